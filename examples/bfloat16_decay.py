"""How much of a weight decay is left in 16 bits: 1500 steps at lr 1e-4 and decay 0.1.

The gradients are zero, so that nothing but the decay moves the weights; each step should take 1e-5
of them. Runs on the CPU in seconds.

    python examples/bfloat16_decay.py
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import wdkernels as wd

STEPS, WEIGHTS = 1500, 2**16
OPTIONS: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.1}
EXACT = 1 - (1 - OPTIONS["lr"] * OPTIONS["weight_decay"]) ** STEPS  # of a weight: what it loses

WAYS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    'wdkernels, rounding="stochastic"': wd.AdamW,
    'wdkernels, rounding="kahan"': partial(wd.AdamW, rounding="kahan"),
    "wdkernels, master_weights=True": partial(wd.AdamW, master_weights=True),
    'wdkernels, rounding="nearest"': partial(wd.AdamW, rounding="nearest"),
    "torch.optim.AdamW(fused=True)": partial(torch.optim.AdamW, fused=True),
}


def share_kept(way: Callable[..., torch.optim.Optimizer], dtype: torch.dtype) -> float:
    """The decay there was, over the exact one."""
    weights = 1 + torch.rand(WEIGHTS, generator=torch.Generator().manual_seed(0))
    w = weights.to(dtype)
    before = w.double().sum()
    optimizer = way([w], **OPTIONS)
    w.grad = torch.zeros_like(w)
    for _ in range(STEPS):
        optimizer.step()
    return float((before - w.double().sum()) / (before * EXACT))


def main() -> None:
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    table = Table("", *(str(dtype).removeprefix("torch.") for dtype in dtypes))
    for name, way in WAYS.items():
        cells = []
        for dtype in dtypes:
            master = "master" in name and dtype == torch.float32  # there is nothing to keep
            cells.append("" if master else f"{share_kept(way, dtype):.1%}")
        table.add_row(name, *cells)
    console = Console()
    console.print(f"Share of the exact decay after {STEPS} steps, {OPTIONS}", table)
    console.print(f"torch {torch.__version__} on {platform.machine()}")


if __name__ == "__main__":
    main()
