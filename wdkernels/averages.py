"""Averages in the place of weights, for `ema_weights`."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor


def swap_in(p: Tensor, ema: Tensor, undo: ExitStack) -> None:
    """In place, and back again by `undo`."""
    if p.dtype == ema.dtype:
        _exchange(p, ema)
        undo.callback(_exchange, p, ema)
    else:
        undo.callback(_write, p, p.detach().clone())
        _write(p, ema)


@torch.no_grad()
def _write(to: Tensor, values: Tensor) -> None:
    to.copy_(values)


@torch.no_grad()
def _exchange(p: Tensor, ema: Tensor) -> None:
    before = p.clone()
    p.copy_(ema)
    ema.copy_(before)
