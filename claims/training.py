"""What the training loops share; each experiment's own loop stands in its file."""

from __future__ import annotations

import math

import torch
from torch import nn

from claims.networks import grouped


def cosine(t: int, steps: int) -> float:
    """What multiplies the learning rate at step t = 0, 1, 2...: half a wave from 1 to 0."""
    return (1 + math.cos(math.pi * t / steps)) / 2


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every param group this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def sgd(model: nn.Module, lr: float, decay: float) -> torch.optim.SGD:
    """torch.optim.SGD with momentum, as the papers use it; it knows L2 decay only."""
    return torch.optim.SGD(grouped(model), lr=lr, momentum=0.9, weight_decay=decay)
