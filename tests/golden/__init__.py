"""Trajectories recorded from the papers' own code, and the loop that replays them.

One archive per case and precision (`_64`, `_32`), read with `np.load`:

    meta                          JSON: kind ("swd", "spd"), steps, shapes, the hyper-parameters,
                                  anchor ("init", "shifted", null = zero), two_groups (the first
                                  three parameters then have weight decay 0), and skip_grad (step
                                  -> parameters that have no gradient at it)
    param0/i, anchor/i            where parameter i starts, and its anchor
    grad/t/i                      its gradient at every step t = 0, 1, 2...
    param/t/i                     its value after step t, for some t
    exp_avg/i, exp_avg_sq/i       its moments at the end
    fired[t, i]                   spd only: whether the condition c < 0 held
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor


class Optimizer(Protocol):
    """What a replay needs of an optimizer; it reads `.grad` as those of torch.optim do."""

    @property
    def state(self) -> Any: ...

    def step(self) -> Any: ...


class Case:
    """One archive, as tensors."""

    def __init__(self, name: str, dtype: torch.dtype | None = None) -> None:
        """`dtype` converts everything; without it the archive keeps its own precision."""
        with np.load(Path(__file__).with_name(f"{name}.npz")) as archive:
            self._arrays = {key: archive[key] for key in archive.files}
        self.name = name
        self.meta: dict[str, Any] = json.loads(str(self._arrays.pop("meta")))
        self.dtype: torch.dtype = dtype or getattr(torch, self.meta["dtype"])
        self.kind: str = self.meta["kind"]
        self.steps: int = self.meta["steps"]
        self.count = len(self.meta["shapes"])
        self.recorded = [t for t in range(self.steps) if f"param/{t}/0" in self._arrays]

    def read(self, key: str) -> list[Tensor]:
        """The tensors of all parameters under `key`, such as "param0" or "param/19"."""
        return [self._tensor(f"{key}/{i}") for i in range(self.count)]

    def grads(self, t: int) -> list[Tensor | None]:
        skipped = self.meta["skip_grad"].get(str(t), [])
        return [None if i in skipped else self._tensor(f"grad/{t}/{i}") for i in range(self.count)]

    @property
    def anchors(self) -> list[Tensor] | None:
        return self.read("anchor") if self.meta.get("anchor") else None

    @property
    def fired(self) -> Tensor:
        return torch.from_numpy(self._arrays["fired"]).bool()

    def param_groups(self, params: list[Tensor]) -> list[dict[str, Any]]:
        """torch-style param groups with the case's hyper-parameters and anchors."""
        keys = ("lr", "betas", "eps", "weight_decay", "amsgrad")
        group = {"params": params, **{key: self.meta[key] for key in keys}}
        if self.kind == "spd":
            group["anchor"] = self.anchors or "zero"
        if not self.meta.get("two_groups"):
            return [group]
        return [group | {"params": params[:3], "weight_decay": 0.0}, group | {"params": params[3:]}]

    def _tensor(self, key: str) -> Tensor:
        return torch.tensor(self._arrays[key], dtype=self.dtype)


Runner = Callable[[Case, list[Tensor]], Optimizer]


def names(kind: str = "", dtype: str = "") -> list[str]:
    """The archives of a kind ("swd", "spd") and precision ("64", "32")."""
    return sorted(path.stem for path in Path(__file__).parent.glob(f"{kind}*{dtype}.npz"))


def replay(case: Case, runner: Runner) -> Iterator[tuple[int, list[Tensor], Optimizer]]:
    """Feed the recorded gradients to `runner(case, params)`; yields (t, params, it) per step."""
    params: list[Tensor] = [torch.nn.Parameter(param) for param in case.read("param0")]
    optimizer = runner(case, params)
    for t in range(case.steps):
        for param, grad in zip(params, case.grads(t), strict=True):
            param.grad = grad
        optimizer.step()
        yield t, params, optimizer
