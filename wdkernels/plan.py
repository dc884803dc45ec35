"""What the plan of every backend starts from: the parameters, as dense weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from wdkernels import checks, layouts, storage
from wdkernels.coefficients import Hyper


class Parameter(NamedTuple):
    """A parameter's place: its group and name, and its state if it has been initialised."""

    tensor: Tensor
    state: dict[str, Any] | None
    group: int
    name: str
    position: int  # over all groups


class Request(NamedTuple):
    """What a step is asked for, beside its tensors. Its own are on the first parameter's device."""

    grad_scale: Tensor | None = None  # of a GradScaler: the gradients are so many times too large
    found_inf: Tensor | None = None  # of a GradScaler: skip this step if it is not 0
    max_grad_norm: float = math.inf
    skip_nonfinite: bool = False
    grad_norm: Tensor | None = None  # 0-d float64, to be written; None if nobody asks
    skipped: Tensor | None = None  # 0-d int64, counts skipped steps; None where none can be
    telemetry: Tensor | None = None  # to be written: float64 [parameters with a gradient, COLUMNS]


class Plan(Protocol):
    """All tensors of an optimizer, as a backend sees them; valid until `step` says no."""

    def set_hyper(self, group: int, hyper: Hyper) -> None:
        """Numbers may change; what decides over the streams that are read may not."""

    def step(
        self, state: dict[Tensor, Any], param_groups: list[dict[str, Any]], request: Request
    ) -> bool:
        """One optimizer step; False, with nothing done, if the plan is out of date."""


class Weights:
    """The dense tensors that the loops write, by position: a parameter itself, or a copy of it."""

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        """Brings the parameters' states into the order of the weights."""
        self._parameters = parameters
        self._copies: dict[int, Tensor] = {}
        for position, p in enumerate(parameters):
            weight = p.tensor.detach()
            if not layouts.is_dense(weight):
                weight = self._copies[position] = torch.empty_like(weight)
            for key in storage.ALIKE:
                if p.state is not None and key in p.state:
                    p.state[key] = layouts.like(p.state[key], weight)

    def __getitem__(self, position: int) -> Tensor:
        return self._copies.get(position, self._parameters[position].tensor)

    def gradient(self, position: int) -> Tensor:
        """A gradient in the order of its weight; an exception if it cannot be brought into it."""
        p = self._parameters[position]
        checks.check_gradient(p.tensor, p.name)
        gradient = p.tensor.grad
        assert gradient is not None
        return layouts.like(gradient, self[position])

    def load(self) -> None:
        """Copy the parameters that are not dense; `store` brings them back."""
        for parameter, copy in self._copied():
            copy.copy_(parameter)

    def store(self) -> None:
        for parameter, copy in self._copied():
            parameter.copy_(copy)

    def _copied(self) -> Iterator[tuple[Tensor, Tensor]]:
        for position, copy in self._copies.items():
            parameter = self._parameters[position].tensor
            if parameter.grad is not None:
                yield parameter, copy
