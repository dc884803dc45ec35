"""Runs that are saved and go on: a small net, and every kind of state that there is to save."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import wdkernels as wd
from support.numbers import random
from wdkernels import schedules


class Net(nn.Module):
    """Three groups' worth of weights; an odd number of rows, which no two processes share evenly.

    `forward` is there for FSDP2; where nothing is sharded, gradients are set by hand.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 4), nn.Linear(4, 3)
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(random(*p.shape, seed=100 * seed + i))
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).tanh()).tanh())


class Run(NamedTuple):
    kind: str
    options: dict[str, Any] = {}  # noqa: RUF012 - a NamedTuple's default, never written
    second: dict[str, Any] | None = None  # of the second group; None: there is only one
    dtype: torch.dtype = torch.float32
    sums: bool = False  # whether numbers of whole tensors decide, which processes add up

    def build(self, net: nn.Module, **more: Any) -> Any:
        layers = [list(layer.parameters()) for layer in net.children()]
        options = {"lr": 0.1, "weight_decay": 0.2, "eps": 1e-2, **self.options, **more}
        groups: list[dict[str, Any]] = [{"params": [p for layer in layers for p in layer]}]
        if self.second is not None:
            groups = [{"params": layers[0] + layers[2]}, {"params": layers[1], **self.second}]
        for group in groups:
            if (group.get("anchor") or options.get("anchor")) == "given":
                group["anchor"] = [random(*p.shape, seed=50).to(p.dtype) for p in group["params"]]
        if options.get("anchor") == "given":
            del options["anchor"]
        return getattr(wd, self.kind)(groups, **options)


_SCHEDULE = schedules.product(schedules.early(9), schedules.linear(steps=7))
_BF16 = torch.bfloat16
RUNS = {
    "Adam": Run("Adam"),
    "AdamW": Run("AdamW"),
    "AdamSWD": Run("AdamSWD", sums=True),
    "AdamSPD": Run("AdamSPD", sums=True),
    "unmixed": Run("Adam", {"unmixed": True, "amsgrad": True}),
    "scheduled": Run("AdamW", {"decay_schedule": _SCHEDULE, "decay_scale": "relative_lr"}),
    "AdamSWD, amsgrad": Run("AdamSWD", {"amsgrad": True, "anchor": "initial"}, sums=True),
    "AdamSWD, averaged": Run("AdamSWD", {"ema_decay": 0.75}, {"maximize": True}, sums=True),
    "one group is anchored": Run("AdamW", {}, {"anchor": "given"}),
    "one group to its beginning": Run("AdamW", {"cautious": True}, {"anchor": "initial"}),
    "one group is averaged": Run("AdamW", {}, {"ema_decay": 0.5, "lr": 0.05}),
    "one group to its average": Run("AdamW", {}, {"ema_decay": 0.5, "anchor": "ema"}),
    "AdamSPD, given and none": Run("AdamSPD", {"anchor": "given"}, {"anchor": "zero"}, sums=True),
    "clipped": Run("AdamW", {"max_grad_norm": 0.5, "skip_nonfinite": True}, sums=True),
    "narrow moments": Run("AdamW", {"moment_dtype": _BF16, "seed": 5}, {"amsgrad": True}),
    "stochastic": Run("AdamW", {"seed": 3, "ema_decay": 0.75}, {"seed": 4}, _BF16),
    "kahan": Run("AdamSWD", {"rounding": "kahan"}, None, _BF16, sums=True),
    "master": Run("AdamW", {"master_weights": True, "moment_dtype": _BF16}, None, _BF16),
    "master of one group": Run("AdamSPD", {}, {"master_weights": True}, _BF16, sums=True),
}


def set_gradients(net: nn.Module, t: int, shard: Any = None) -> None:
    """The same for every run; `shard` brings one into the placements of its parameter."""
    for i, p in enumerate(net.parameters()):
        g = random(*p.shape, seed=1000 + 50 * t + i).to(p.dtype)
        p.grad = g if shard is None else shard(p, g)


def train(net: nn.Module, optimizer: Any, steps: range, shard: Any = None) -> None:
    for t in steps:
        set_gradients(net, t, shard)
        optimizer.step()


def whole(x: Any) -> Any:
    """A DTensor's numbers, from all processes."""
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).detach().clone()
