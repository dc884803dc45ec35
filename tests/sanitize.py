"""The GPU kernels under compute-sanitizer.

    python tests/sanitize.py                    every tool, at the same time
    python tests/sanitize.py racecheck          this one
    python tests/sanitize.py --steps            what they watch: every variant, a few steps
    python tests/sanitize.py --steps --device cpu

The exit status is 1 if a tool found something. A tool that is not there, or cannot watch this
device, is told apart from one that has found nothing.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from support import METHODS, STORAGE, VARIANTS, Variant, gradient, random
from torch import Tensor

TOOLS = ("memcheck", "racecheck", "initcheck")
FOUND = 86  # the exit status that stands for findings
WATCHED, DONE = "the device answers", "all steps are done"
LONGEST = 135  # seconds for a tool; `make gpu` gives all of them 150
LINES = 60  # of a report: the first findings, for the others repeat them

# Many elements, so that several blocks meet; ends that fill no vector; views at odd addresses.
SIZES = (40_000, 3001, 7, 1, 0)
STEPS = 3
WATCHED_STEPS = [
    *((variant, [torch.float32, torch.float64], {}) for variant in VARIANTS),
    # Storage, and all that a step as a whole may be asked for: every second one is skipped.
    *(
        (
            Variant(METHODS[(k + shift) % len(METHODS)], options, anchored=bool(shift)),
            dtypes,
            {"max_grad_norm": 1.0, "skip_nonfinite": True, "telemetry_every": 1, "ema_decay": 0.5},
        )
        for k, (dtypes, options) in enumerate(STORAGE)
        for shift in (0, 3)
    ),
]


# ---- what is watched -----------------------------------------------------------------------------


def train(device: str) -> None:
    # On a GPU the first kernel is torch's: what fails here is not ours.
    assert torch.ones(3).to(device).add(1).sum().item() == 6
    print(WATCHED, flush=True)
    for variant, dtypes, whole in WATCHED_STEPS:
        params = [
            odd(random(n, seed=i, dtype=dtype).to(device), i)
            for dtype in dtypes
            for i, n in enumerate(SIZES)
        ]
        params.append(random(30, 21, seed=9, dtype=torch.float32).to(device)[:, 3:])
        optimizer = variant.build(params, "native", **{**whole, **variant.options})
        for t in range(STEPS):
            for i, p in enumerate(params):
                g = gradient(p, i, t)
                p.grad = None if g is None else g.to(device)
            if whole:
                optimizer.grad_scale = torch.tensor(2.0).to(device)
                optimizer.found_inf = torch.tensor(float(t % 2)).to(device)
            optimizer.step()
        assert all(p.isfinite().all() for p in params), variant
    print(DONE, flush=True)


def odd(x: Tensor, index: int) -> Tensor:
    """The same numbers; of every second tensor an element further on."""
    return torch.cat([x[:1], x])[1:] if index % 2 else x


# ---- who watches ---------------------------------------------------------------------------------


def check(tool: str) -> bool:
    """Print a verdict with the report that it rests on; false if something was found."""
    verdict, clean = judged(tool)
    print(verdict, flush=True)
    return clean


def judged(tool: str) -> tuple[str, bool]:
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    sanitizer = shutil.which("compute-sanitizer", path=path)
    if sanitizer is None:
        return f"{tool}: absent (compute-sanitizer was not found)", True
    command = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND)]
    # What CUDA's own functions return is torch's affair; ours throws what it does not expect.
    command += ["--report-api-errors", "no"] if tool == "memcheck" else []
    command += [sys.executable, __file__, "--steps", "--device", "cuda"]
    # Without torch's cache each tensor ends where its memory ends.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    start = time.monotonic()
    try:
        run = subprocess.run(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LONGEST,
        )
    except subprocess.TimeoutExpired:
        return f"{tool}: found nothing in {LONGEST} s, and was not done", True
    seconds, said = f"{time.monotonic() - start:.0f} s", excerpt(run.stdout)
    if WATCHED not in run.stdout:
        return f"{tool}: does not work here ({seconds})\n{said}", True
    if run.returncode == 0 and DONE in run.stdout:
        summary = " ".join(re.findall(r"\w+ SUMMARY: .*", run.stdout))
        return f"{tool}: passed in {seconds} ({summary or 'it does not say more'})", True
    return f"{tool}: FAILED with status {run.returncode} after {seconds}\n{said}", False


def excerpt(report: str) -> str:
    lines = report.splitlines()
    left_out = [f"... {len(lines) - LINES} lines ..."] if len(lines) > 2 * LINES else []
    return "\n".join([*lines[:LINES], *left_out, *lines[max(LINES, len(lines) - LINES) :]])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tools", nargs="*", metavar="tool", help=f"of {', '.join(TOOLS)}")
    parser.add_argument("--steps", action="store_true", help="only take the steps")
    parser.add_argument("--device", default="cuda", help="where (default: cuda)")
    options = parser.parse_args()
    if options.steps:
        train(options.device)
        return 0
    with ThreadPoolExecutor() as pool:
        return int(not all([*pool.map(check, options.tools or TOOLS)]))


if __name__ == "__main__":
    sys.exit(main())
