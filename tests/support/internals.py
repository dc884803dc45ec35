"""Whatever of wdkernels the tests look at from within; all else goes by its front door."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from support.numbers import LOUD
from wdkernels import native, reference, rounding
from wdkernels import state as entries
from wdkernels.coefficients import mix, random_key
from wdkernels.layouts import _runs as runs_of_memory
from wdkernels.layouts import overlapping
from wdkernels.options import GROUP_OPTIONS, GroupOptions, from_group
from wdkernels.plan import Numbering, Request

__all__ = ["mix", "overlapping", "runs_of_memory"]

# ---- the compiled module -------------------------------------------------------------------------

native_missing: str = native._missing  # why it cannot be had; empty if it can


def instruction_sets() -> list[str]:
    found: list[str] = native._C.instruction_sets()
    return found


def instruction_set() -> str:
    return str(native._C.instruction_set())


def use_instruction_set(name: str) -> None:
    native._C.use_instruction_set(name)


def ask_the_core(**what: Any) -> None:
    """Hand it what a step is asked for."""
    native._request(Request(**what))


def plan_of(optimizer: Any) -> Any:
    return optimizer._run.plan


def options_unknown_to(method: str) -> set[str]:
    """Options of groups that an optimizer of this method refuses."""
    method = "l2" if method == "unmixed" else method
    return {name for name, row in GROUP_OPTIONS.items() if method in row.senseless}


# ---- checks --------------------------------------------------------------------------------------


def check_state(p: Tensor, state: dict[str, Any], group: dict[str, Any], name: str) -> None:
    """What a step checks of a state; the group is one of AdamW."""
    options = from_group("decoupled", group)
    entries.check_in_use(p, state, options, name, active=True, given=False)


# ---- random bits ---------------------------------------------------------------------------------

narrow = rounding.narrow


def noise(key: int, x: Tensor) -> Tensor:
    """The random bits of a whole tensor's elements."""
    return rounding.noise(key, x, Numbering())


def step_key(seed: int, t: int) -> int:
    """What all random bits of a step are made from."""
    return random_key(_options("decoupled", {"seed": seed}), t)


def words(seed: int, t: int, position: int, x: Tensor) -> Tensor:
    """The random bits with which parameter `position` is stored at step t."""
    return noise(rounding.key(step_key(seed, t), position), x)


# ---- the reference -------------------------------------------------------------------------------


class Eager:
    """`reference.step` behind the face of an optimizer, so that tests drive both alike.

    Takes parameters or param groups, as torch.optim does; `anchor` is "zero" or tensors.
    """

    def __init__(self, method: str, params: Iterable[Any], **options: Any) -> None:
        groups = list(params)
        if not groups or isinstance(groups[0], Tensor):
            groups = [{"params": groups}]
        self.state: dict[Tensor, dict[str, Any]] = {}
        self._groups: list[tuple[GroupOptions, list[Tensor]]] = []
        for given in groups:
            group = {**options, **given}
            members: list[Tensor] = list(group.pop("params"))
            chosen, anchor = _options(method, group), group.get("anchor", "zero")
            self._groups.append((chosen, members))
            for i, param in enumerate(members):
                own = None if isinstance(anchor, str) else anchor[i]
                self.state[param] = _initial_state(chosen, param, own)

    @torch.no_grad()
    def step(self) -> None:
        groups = []
        first = 0
        for chosen, params in self._groups:
            active = [param for param in params if param.grad is not None]
            grads = [param.grad for param in active if param.grad is not None]
            states = [self.state[param] for param in active]
            indices = [first + i for i, param in enumerate(params) if param.grad is not None]
            totals = [param.numel() * (2 if param.is_complex() else 1) for param in active]
            whole = [Numbering()] * len(active)
            groups.append(reference.Group(chosen, active, grads, states, indices, totals, whole))
            first += len(params)
        reference.step(groups, Request())

    def adopt(self, other: Eager) -> None:
        """Take the groups of another one in addition."""
        self.state.update(other.state)
        self._groups += other._groups


def _options(method: str, group: dict[str, Any]) -> GroupOptions:
    """Written out here, so that a mistake in how an optimizer reads its groups is seen."""
    given = {**LOUD, **group}
    if not isinstance(given["anchor"], str):
        given["anchor"] = "given"
    defaults = {name: row.default for name, row in GROUP_OPTIONS.items()}
    return GroupOptions(method=method, device_numbers=None, **{**defaults, **given})


def _initial_state(options: GroupOptions, param: Tensor, anchor: Tensor | None) -> dict[str, Any]:
    moments = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if options.amsgrad else [])]
    state: dict[str, Any] = {name: torch.zeros_like(param.detach()) for name in moments}
    state["step"] = torch.tensor(0.0)
    if options.method == "swd" and not options.amsgrad:
        state["exp_avg_sq_sum"] = torch.zeros((), dtype=torch.float64, device=param.device)
    if anchor is not None:
        state["anchor"] = anchor
    if options.ema_decay is not None:
        state["ema"] = param.detach().clone()
    return state
