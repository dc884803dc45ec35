"""`reference.step` behind the face of an optimizer, so that tests drive both alike."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from wdkernels import reference
from wdkernels.coefficients import Hyper
from wdkernels.plan import Request

# Loud: at lr 1e-3, weight decay 1e-2, eps 1e-8 a decay or an eps in the wrong place passes unseen.
LOUD: dict[str, Any] = {
    "lr": 0.1,
    "betas": (0.9, 0.999),
    "eps": 1e-2,
    "weight_decay": 0.2,
    "decay_schedule": None,
    "decay_scale": "lr",
    "lr_max": 0.1,
    "amsgrad": False,
    "maximize": False,
    "cautious": False,
    "anchor": "zero",
}


class Eager:
    """Takes parameters or param groups, as torch.optim does; `anchor` is "zero" or tensors."""

    def __init__(self, method: str, params: Iterable[Any], **options: Any) -> None:
        groups = list(params)
        if not groups or isinstance(groups[0], Tensor):
            groups = [{"params": groups}]
        self.state: dict[Tensor, dict[str, Any]] = {}
        self._groups: list[tuple[Hyper, list[Tensor]]] = []
        for group in groups:
            group = {**LOUD, **options, **group}
            members: list[Tensor] = list(group.pop("params"))
            anchor = group.pop("anchor")
            beta1, beta2 = group.pop("betas")
            anchored = not isinstance(anchor, str)
            hyper = Hyper(method=method, beta1=beta1, beta2=beta2, anchored=anchored, **group)
            self._groups.append((hyper, members))
            for i, param in enumerate(members):
                self.state[param] = _initial_state(hyper, param, anchor[i] if anchored else None)

    @torch.no_grad()
    def step(self) -> None:
        groups = []
        first = 0
        for hyper, params in self._groups:
            active = [param for param in params if param.grad is not None]
            grads = [param.grad for param in active if param.grad is not None]
            states = [self.state[param] for param in active]
            indices = [first + i for i, param in enumerate(params) if param.grad is not None]
            groups.append(reference.Group(hyper, active, grads, states, indices))
            first += len(params)
        reference.step(groups, Request())


def _initial_state(hyper: Hyper, param: Tensor, anchor: Tensor | None) -> dict[str, Any]:
    moments = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if hyper.amsgrad else [])]
    state: dict[str, Any] = {name: torch.zeros_like(param.detach()) for name in moments}
    state["step"] = torch.tensor(0.0)
    if hyper.method == "swd" and not hyper.amsgrad:
        state["exp_avg_sq_sum"] = torch.zeros((), dtype=torch.float64, device=param.device)
    if anchor is not None:
        state["anchor"] = anchor
    return state
