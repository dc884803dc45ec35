"""What every backend is given, and what it must be able to do.

A backend is a module with two things: `refuses(tensors)`, why it cannot update these tensors or None,
and `Plan`, below. It sees plain tensors of one process: those of a DTensor are its local shard, and
`Numbering` says which of the whole tensor's elements they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from wdkernels import checks, layouts
from wdkernels.options import GroupOptions


class Numbering(NamedTuple):
    """Which elements of the whole tensor those of a shard are, in the order of memory:

        number(i) = first + i                               if run is 0
                    first + i // run * pitch + i % run      else

    Random bits depend on an element's number, so that they do not depend on the sharding.
    """

    first: int = 0
    run: int = 0
    pitch: int = 0


class Parameter(NamedTuple):
    """A parameter as a backend sees it."""

    tensor: Tensor  # what holds the gradient; its `state` entry is looked up by it
    state: dict[str, Any] | None  # None: it has not been initialised
    streams: Mapping[str, Tensor]  # what a step reads and writes of the state, by wdkernels.state
    storage: str  # how the weight is stored: a name of csrc/dtype.h's Storage
    group: int
    name: str
    position: int  # over all groups
    total: int  # elements (reals) of the whole tensor, of which this may be a shard
    numbering: Numbering = Numbering()


class Request(NamedTuple):
    """What a step is asked for, beside its tensors. Its own are on the first parameter's device."""

    grad_scale: Tensor | None = None  # of a GradScaler: the gradients are so many times too large
    found_inf: Tensor | None = None  # of a GradScaler: skip this step if it is not 0
    max_grad_norm: float = math.inf
    skip_nonfinite: bool = False
    grad_norm: Tensor | None = None  # 0-d float64, to be written; None if nobody asks
    skipped: Tensor | None = None  # 0-d int64, counts skipped steps; None where none can be
    telemetry: Tensor | None = None  # to be written: float64 [parameters with a gradient, COLUMNS]

    @property
    def needs_norm(self) -> bool:
        """Whether the norm of all gradients is asked for, or decides over the step."""
        return self.grad_norm is not None or self.skip_nonfinite or self.max_grad_norm != math.inf


class Phases(Protocol):
    """One step, in phases that are to be called in this order (docs/design.md).

    Each works on the rows of `sums` (wdkernels/sums.py), between which a caller may add up those of
    other shards. Everything that can fail has been done before these are to be had.
    """

    sums: Tensor
    reductions: int  # how often `reduce` is to be called: 0, 1 or 2

    def reduce(self, round: int) -> None: ...

    def decide(self, round: int) -> bool:
        """After each `reduce`, or once if there is none; False if the host knows that the step is
        skipped, and then nothing is left to call."""

    def update(self) -> None: ...

    def finish(self) -> None: ...


class Plan(Protocol):
    """All tensors of an optimizer, as a backend sees them; valid until a step says no."""

    def __init__(
        self,
        parameters: Sequence[Parameter],
        options: Sequence[GroupOptions],
        state: dict[Tensor, Any],
        param_groups: list[dict[str, Any]],
    ) -> None: ...

    def set_options(self, group: int, options: GroupOptions) -> None:
        """Numbers may change; what decides over the streams that are read may not."""

    def set_number(self, group: int, name: str, value: float) -> None:
        """One of lr, beta1, beta2, eps and weight_decay has changed, and nothing else."""

    def step(
        self, state: dict[Tensor, Any], param_groups: list[dict[str, Any]], request: Request
    ) -> bool:
        """One optimizer step; False, with nothing done, if the plan is out of date."""

    def begin(
        self, state: dict[Tensor, Any], param_groups: list[dict[str, Any]], request: Request
    ) -> Phases | None:
        """The same step, to be taken phase by phase; None if the plan is out of date."""


class Weights:
    """The dense tensors that the loops write, by position: a parameter itself, or a copy of it."""

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        self._parameters = parameters
        self._copies: dict[int, Tensor] = {}
        for position, p in enumerate(parameters):
            weight = p.tensor.detach()
            if not layouts.is_dense(weight):
                self._copies[position] = torch.empty_like(weight)

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
