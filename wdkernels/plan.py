"""What every backend is given, and what it must be able to do.

A backend is a module with two things: `refuses(tensors)`, why it cannot update these tensors or
None, and `Plan`, below. It sees plain tensors of one process: those of a DTensor are its local
shard, and `Numbering` says which of the whole tensor's elements they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import attrgetter, eq, is_
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from wdkernels import checks, layouts, shards
from wdkernels.layouts import Numbering
from wdkernels.options import GroupOptions


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
    whole: Tensor | None = None  # sums over the tensors of all processes (wdkernels/shards.py)
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
    other shards. Everything that can fail has been done before these are to be had. A plan takes
    one step at a time.
    """

    sums: Tensor
    reductions: int  # how often `reduce` is to be called: 0, 1 or 2

    def reduce(self, round: int) -> None: ...

    def decide(self, round: int) -> bool:
        """After each `reduce`, or once if there is none; False if the host knows that the step is
        skipped, and then nothing is left to call."""

    def update(self) -> None: ...

    def finish(self) -> None: ...


def in_turn(phases: Phases) -> None:
    """A step of this process alone."""
    for each in range(max(1, phases.reductions)):
        if each < phases.reductions:
            phases.reduce(each)
        if not phases.decide(each):
            return
    phases.update()
    phases.finish()


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
            if p.state is None:
                continue
            weight = layouts.local(p.tensor).detach()
            if not layouts.is_dense(weight):
                self._copies[position] = torch.empty_like(weight)

    def __getitem__(self, position: int) -> Tensor:
        copy = self._copies.get(position)
        return layouts.local(self._parameters[position].tensor) if copy is None else copy

    def gradient(self, position: int) -> Tensor:
        """A gradient in the order of its weight; an exception if it cannot be brought into it."""
        p = self._parameters[position]
        checks.check_gradient(p.tensor, p.name)
        return layouts.like(shards.gradient_of(p.tensor, p.name), self[position])

    def load(self) -> None:
        """Copy the parameters that are not dense; `store` brings them back."""
        for weight, copy in self._copied():
            copy.copy_(weight)

    def store(self) -> None:
        for weight, copy in self._copied():
            weight.copy_(copy)

    def _copied(self) -> Iterator[tuple[Tensor, Tensor]]:
        for position, copy in self._copies.items():
            parameter = self._parameters[position].tensor
            if parameter.grad is not None:
                yield layouts.local(parameter).detach(), copy


# ---- whether a plan still holds ------------------------------------------------------------------

_Questions: TypeAlias = "tuple[Callable[[Tensor], Any], ...]"

# What must not change about a tensor that is known. An address alone would not do: allocators hand
# the same one out again.
_IDENTITY: _Questions = (Tensor.data_ptr, Tensor.numel, Tensor.stride, attrgetter("dtype"))
# What a gradient must have in common with its weight for both to be runs of numbers in one order.
_ORDER: _Questions = (Tensor.size, Tensor.stride, attrgetter("dtype"), Tensor.get_device)


class Watch:
    """Finds at each step whether a plan's tensors are what and where they were, which parameters
    have a gradient, and these gradients, in the order of the weights.

    It is for a backend whose plan is kept in Python; the compiled module looks for itself.
    """

    def __init__(
        self,
        parameters: Sequence[Parameter],
        state: dict[Tensor, Any],
        param_groups: list[dict[str, Any]],
    ) -> None:
        self.weights = Weights(parameters)
        self._parameters = [p.tensor for p in parameters]
        self._objects = _objects(state, param_groups)
        self._states = list(state.values())  # held, so that no other dict can take an id
        self._ready: set[int] = set()  # positions of parameters that can be updated
        self._entries: tuple[list[dict[str, Any]], list[str]] = [], []
        values: list[Tensor] = []
        for position, p in enumerate(parameters):
            weight = self.weights[position]
            if p.state is None or (weight.numel() > 0 and weight.data_ptr() == 0):
                continue
            self._ready.add(position)
            streams = {id(x) for x in p.streams.values()}
            for key, x in p.state.items():
                if isinstance(x, Tensor) and id(layouts.local(x)) in streams:
                    self._entries[0].append(p.state)
                    self._entries[1].append(key)
                    values.append(x)
        self._values = values
        self._tensors = _Shards([self._parameters[i] for i in sorted(self._ready)] + values)
        self._identities = [*_answers(_IDENTITY, self._tensors.local())]

        # What is known of the gradients, in the order of `active`.
        self._active: list[int] = []
        self._orders: list[tuple[Any, ...]] = []
        self._maybe_lazy: list[int] = []
        self._sharded: list[int] = []
        self._gradients: list[Tensor] = []

    def active(
        self, state: dict[Tensor, Any], param_groups: list[dict[str, Any]]
    ) -> list[int] | None:
        """The positions of the parameters that have a gradient; None if the plan is out of date."""
        if not (
            _objects(state, param_groups) == self._objects
            and all(map(is_, map(dict.get, *self._entries), self._values))
            and all(map(eq, _answers(_IDENTITY, self._tensors.local()), self._identities))
        ):
            return None
        found = [tensor.grad for tensor in self._parameters]
        active = [i for i, gradient in enumerate(found) if gradient is not None]
        if active != self._active:
            if not self._ready.issuperset(active):
                return None
            self._expect(active)
        self._gradients = [gradient for gradient in found if gradient is not None]
        return active

    def gradients(self) -> list[Tensor]:
        """Those of the active parameters, in the order of the weights: the gradients themselves, or
        copies of all that are not. To be called once after `active`, which has found them."""
        gradients, self._gradients = self._gradients, []
        for k in self._sharded:
            if not shards.alike(gradients[k], self._parameters[self._active[k]]):
                return [*map(self.weights.gradient, self._active)]
            gradients[k] = layouts.local(gradients[k])
        regular = (
            {torch.strided}.issuperset(map(attrgetter("layout"), gradients))
            and all(map(eq, _answers(_ORDER, gradients), self._orders))
            and all(map(Tensor.data_ptr, gradients))  # 0: there is no memory, or are no elements
            # Only a view of a complex tensor, or of one element of it, can be lazy and yet dense.
            and not any(gradients[k].is_conj() or gradients[k].is_neg() for k in self._maybe_lazy)
        )
        return gradients if regular else [*map(self.weights.gradient, self._active)]

    def _expect(self, active: list[int]) -> None:
        """Gradients of another set of parameters."""
        weights = [self.weights[i] for i in active]
        self._orders = [*_answers(_ORDER, weights)]
        self._maybe_lazy = [k for k, x in enumerate(weights) if x.is_complex() or x.numel() == 1]
        self._sharded = _Shards([self._parameters[i] for i in active]).sharded
        self._active = active


class _Shards:
    """Tensors, and what of them lies in this process: a DTensor's shard, which may be another one
    in each step."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.sharded = [i for i, x in enumerate(tensors) if layouts.local(x) is not x]
        self._tensors = tensors

    def local(self) -> list[Tensor]:
        if not self.sharded:
            return self._tensors
        tensors = list(self._tensors)
        for i in self.sharded:
            tensors[i] = layouts.local(tensors[i])
        return tensors


def _objects(state: dict[Tensor, Any], param_groups: list[dict[str, Any]]) -> list[list[int]]:
    """Which parameters stand where, and their states."""
    return [[*map(id, group["params"])] for group in param_groups] + [[*map(id, state.values())]]


def _answers(questions: _Questions, tensors: Sequence[Tensor]) -> Iterator[tuple[Any, ...]]:
    """Each tensor's, in a fraction of the time of a loop in Python."""
    return zip(*(map(question, tensors) for question in questions), strict=True)
