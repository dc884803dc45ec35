"""The measure of the others: the loop without a tool."""

from __future__ import annotations

import pytest
import torch
from loops import OPTIONS, TOLERANCE, Net, assert_as_torch, plain

import wdkernels as wd


def losses(cls: type[torch.optim.Optimizer], **more: float) -> list[float]:
    net = Net()
    return plain(net, cls(net.parameters(), **{**OPTIONS, **more}))


def test_the_same_losses() -> None:
    assert_as_torch(losses(wd.AdamW), losses(torch.optim.AdamW))


def test_a_decay_left_out_would_be_seen() -> None:
    ours, torchs = losses(wd.AdamW, weight_decay=0.0), losses(torch.optim.AdamW)
    assert max(abs(a / b - 1) for a, b in zip(ours, torchs, strict=True)) > 10 * TOLERANCE
    with pytest.raises(AssertionError):
        assert_as_torch(ours, torchs)
