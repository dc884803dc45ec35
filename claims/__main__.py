"""`python -m claims`: run what has not run, write docs/claims/; `--verdicts` only recomputes."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

from rich.console import Console

from claims import harness, page

NAMES = (
    "early_decay",
    "decoupling",
    "selective_projection",
    "over_training",
    "under_training",
    "divergence",
    "scheduled_decay",
    "averaging_time",
    "bfloat16",
)


def experiments() -> list[harness.Experiment]:
    """All of them, in the order of the page."""
    return [import_module(f"claims.{name}").EXPERIMENT for name in NAMES]


def main() -> int:
    parser = argparse.ArgumentParser("python -m claims", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"which ones, of {', '.join(NAMES)}; default: all")
    parser.add_argument("--anew", action="store_true", help="forget what has run, and run it again")
    parser.add_argument(
        "--verdicts", action="store_true", help="recompute every verdict from docs/claims/*.json"
    )
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in NAMES]:
        parser.error(f"no experiment {', '.join(unknown)}; there are {', '.join(NAMES)}")
    console = Console(width=None if sys.stdout.isatty() else 110)
    everything = experiments()
    chosen = [e for e in everything if not options.names or e.name in options.names]
    if options.verdicts:
        page.print_verdicts(chosen, console)
        return 0
    for experiment in harness.run_all(chosen, options.anew, console):
        page.draw(experiment)
        page.print_verdicts([experiment], console)
        page.write(everything)
    page.write(everything)
    console.print(f"Written: {page.PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
