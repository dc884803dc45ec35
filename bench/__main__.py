"""`python -m bench`: measure, print a table, and write bench/results/."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from bench import report, runner
from bench.conftest import OPTIONS

HERE = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser("python -m bench", description=__doc__)
    for name, settings in OPTIONS.items():
        parser.add_argument(name, **settings)
    parser.add_argument(
        "--output",
        type=Path,
        help="folder for JSON, Markdown and chart (default: bench/results for a full run, none for "
        "a part of it)",
    )
    parser.add_argument("--commit", help="what was measured, where git cannot say it")
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: torch finds no GPU on this machine")

    device = torch.device(options.device)
    workloads = runner.workloads_of(device, options.quick, options.workload)
    results = runner.run(workloads, device, Console(stderr=True))
    if options.commit:
        results = replace(results, commit=options.commit)
    console = Console()
    console.width = max(console.width, 110)  # where there is no terminal, it is 80
    report.print_table(results, console)
    part = options.quick or options.workload
    if output := options.output or (None if part else HERE / "results"):
        console.print(f"Written: {report.write(results, output)}.json, .md and .png")
    return int(any(each.reason != runner.OUT_OF_MEMORY for each in results.absent))


if __name__ == "__main__":
    sys.exit(main())
