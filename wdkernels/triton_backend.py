"""The Triton backend: one launch for all tensors and groups, on any GPU that Triton compiles for.

It works without a compiled module, and on devices for which that has no kernels. A step queues its
kernels and never waits for the device.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from wdkernels import layouts, shards
from wdkernels.options import GroupOptions
from wdkernels.plan import Parameter, Request, Watch, in_turn
from wdkernels.sums import SUMS
from wdkernels.triton_lists import (
    REALS,
    CountingList,
    Kind,
    TensorList,
    captured,
    capturing,
    claim,
    joined,
    kernels,
    kind_of,
    launch,
    sent,
)
from wdkernels.triton_tables import DECISION

_NO_SUMS = torch.empty(0, len(SUMS), dtype=torch.float64, device="cpu")


def refuses(tensors: Sequence[Tensor]) -> str | None:
    """Why this backend cannot update these tensors; None if it can."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    for x in tensors:
        if not layouts.has_memory(x):
            return f"a {type(x).__name__} has no memory of its own"
        if x.device.type not in (("cpu",) if interpreted else ("cuda", "xpu")):
            where = "in Triton's interpreter " if interpreted else ""
            return f"{where}it has no kernels for {x.device.type} tensors"
        if x.dtype not in REALS:
            return f"it has no kernels for {x.dtype}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    return None if interpreted else _no_driver()


@cache
def _no_driver() -> str | None:
    """Why Triton cannot launch kernels here; it compiles its launcher when it is asked."""
    import triton

    try:
        target = triton.runtime.driver.active.get_current_target()
    except Exception as error:
        return f"Triton finds no device, or no C compiler to drive it ({error})"
    if target.backend == "cuda" and target.arch < 70:
        return f"Triton has no code for GPUs of compute capability {target.arch / 10}"
    return None


class Plan:
    """All tensors of an optimizer, in tables on their devices; valid until `step` says no."""

    def __init__(
        self,
        parameters: Sequence[Parameter],
        options: Sequence[GroupOptions],
        state: dict[Tensor, Any],
        param_groups: list[dict[str, Any]],
    ) -> None:
        self._parameters = parameters
        self._options = list(options)
        self.watch = Watch(parameters, state, param_groups)
        self.device = parameters[0].tensor.device if parameters else torch.device("cpu")
        # These are about the parameters that have a gradient.
        self.active: list[int] | None = None
        self.lists: list[TensorList] = []
        self._order: Tensor | None = None  # in which a norm adds up their rows
        self._limit: tuple[float, Tensor] | None = None  # of the gradients' norm, and on the device

    def set_options(self, group: int, options: GroupOptions) -> None:
        """Numbers may change; what decides over the streams that are read may not."""
        if options.cautious != self._options[group].cautious:
            self.active = None  # the tables say who is
        self._options[group] = options

    def set_number(self, group: int, name: str, value: float) -> None:
        """One of lr, beta1, beta2, eps and weight_decay has changed, and nothing else."""
        setattr(self._options[group], name, value)

    def step(
        self, state: dict[Tensor, Any], param_groups: list[dict[str, Any]], request: Request
    ) -> bool:
        """One optimizer step; False, with nothing done, if the plan is out of date."""
        step = self._begin(state, param_groups, request, in_phases=False)
        if step is None:
            return False
        in_turn(step)
        return True

    def begin(
        self, state: dict[Tensor, Any], param_groups: list[dict[str, Any]], request: Request
    ) -> Step | None:
        """The same step, to be taken phase by phase; None if the plan is out of date."""
        return self._begin(state, param_groups, request, in_phases=True)

    def _begin(
        self,
        state: dict[Tensor, Any],
        param_groups: list[dict[str, Any]],
        request: Request,
        in_phases: bool,
    ) -> Step | None:
        active = self.watch.active(state, param_groups)
        if active is None:
            return None
        # Steps may be counted on the device without: a graph would repeat the host's lr and decay.
        if capturing() and not (
            active == self.active and all(group["capturable"] for group in param_groups)
        ):
            raise RuntimeError(
                "a CUDA graph is being captured, which a step can only join with capturable=True, "
                "and after steps outside of it with the same parameters"
            )
        if active != self.active:
            self._build(active)
        gradients = self.watch.gradients()
        self.watch.weights.load()
        addresses = [*map(Tensor.data_ptr, gradients)]
        for each in self.lists:
            each.prepare([addresses[k] for k in each.active])
        return Step(self, request, gradients, in_phases)

    def _build(self, active: list[int]) -> None:
        """Tables for another set of parameters that have a gradient."""
        parameters = [self._parameters[i] for i in active]
        weights = [self.watch.weights[i] for i in active]
        kinds: dict[Kind, list[int]] = {}
        for k, (p, weight) in enumerate(zip(parameters, weights, strict=True)):
            kinds.setdefault(kind_of(p, weight, self._options[p.group]), []).append(k)
        self.lists = [
            (CountingList if kind.counted else TensorList)(
                kind, own, [parameters[k] for k in own], [weights[k] for k in own], self._options
            )
            for kind, own in kinds.items()
        ]
        self._order = None
        self.active = active

    def updated(self) -> list[Tensor]:
        return [self._parameters[i].tensor for i in self.active or ()]

    def limit(self, value: float) -> Tensor:
        """The bound of the norm, on the device."""
        if self._limit is None or self._limit[0] != value:
            (sent_value,) = sent(torch.tensor(value, dtype=torch.float64), device=self.device)
            self._limit = value, sent_value
        return _used(self._limit[1])

    def order(self) -> Tensor:
        """The rows of the sums in the order in which a norm adds them up: that of the lists, and of
        their parts, which tensors without elements do not have."""
        if self._order is None:
            rows = [k for each in self.lists for k in each.active]
            empty = {k for each in self.lists for k in each.without_elements()}
            rows = [k for k in rows if k not in empty] + sorted(empty)
            (self._order,) = sent(torch.tensor(rows, dtype=torch.int64), device=self.device)
        return _used(self._order)


def _used(table: Tensor) -> Tensor:
    """A table that outlasts a step."""
    claim(table.device, [table])
    if capturing():
        captured.append([table])
    return table


class Step:
    """One step of all lists, which are prepared, in the phases of plan.Phases.

    In phases the sums over a tensor are folded into `sums`, where the next phase finds them. A step
    that is taken at once saves that: the kernels which need them fold them.
    """

    def __init__(
        self, plan: Plan, request: Request, gradients: list[Tensor], in_phases: bool
    ) -> None:
        self._plan, self._lists, self._request = plan, plan.lists, request
        self._gradients = gradients  # held, for some may be copies
        self._swd = [each for each in self._lists if each.method == "swd"]
        self._measured = request.telemetry is not None
        self._in_phases = in_phases
        self.sums = _NO_SUMS
        if in_phases:
            rows = len(gradients), len(SUMS)
            self.sums = torch.zeros(rows, dtype=torch.float64, device=plan.device)
        # The maxima of amsgrad are those of the scaled gradients: where a norm decides over the
        # scale, they come second. Telemetry's squares are the update's, unless the sums are handed
        # on, where all squares are of one sum.
        self._squares_first = request.needs_norm or (in_phases and self._measured)
        maxima = any(each.has_maxima for each in self._swd)
        self.reductions = 2 if maxima and request.needs_norm else 1
        if not (self._squares_first or self._swd):
            self.reductions = 0
        self._decision: Tensor | None = None

    def reduce(self, round: int) -> None:
        if round == 0 and self._squares_first:
            self._squares = [each.reduce(maxima=False) for each in self._lists]
            if self._in_phases:
                for each in self._lists:
                    each.fold_reduced(self.sums, squares=True, maxima=False)
        if round == 0 and not self._request.needs_norm:
            self._decide_scale(None)
        if round < self.reductions - 1:
            return
        for each in self._swd:
            if each.has_maxima or not self._squares_first:
                each.reduce(each.has_maxima)
                if self._in_phases:
                    each.fold_reduced(self.sums, not self._squares_first, each.has_maxima)

    def decide(self, round: int) -> bool:
        if round == 0 and self._request.needs_norm:
            self._decide_scale(self._squares_of_norm())
        elif self.reductions == 0:
            self._decide_scale(None)
        if self._is_known_to_be_skipped():
            return False
        if round >= self.reductions - 1 and self._swd:
            shares = [each.share_of_v(self._folded()) for each in self._swd]
            elements = sum(each.total for each in self._swd)
            if (whole := self._request.whole) is not None:
                scale = 1.0 if self._decision is None else self._decision[DECISION.index("scale")]
                shares, elements = [shards.mean_v(whole, scale).reshape(1)], 1
            for each in self._swd:
                each.take_mean_v(shares, elements)
        return True

    def update(self) -> None:
        for each in self._lists:
            each.update(self._measured)
        if self._in_phases:
            for each in self._lists:
                each.fold_updated(self.sums, self._measured)

    def finish(self) -> None:
        for each in self._lists:
            if each.method == "spd":
                each.project(self._folded())
            if self._request.telemetry is not None:
                each.tell(self._request.telemetry, self._folded())
        for each in self._lists:
            each.advance()
        # Autograd must know, as of any in-place operation, that saved weights are out of date.
        torch.autograd.graph.increment_version(self._plan.updated())
        self._plan.watch.weights.store()

    def _folded(self) -> Tensor | None:
        return self.sums if self._in_phases else None

    def _squares_of_norm(self) -> Tensor:
        if self._request.whole is not None:
            return self._request.whole[:1]
        if not self._in_phases:
            return joined(self._squares, self._plan.device)
        return self.sums[:, SUMS.index("gradient2")].index_select(0, self._plan.order())

    def _decide_scale(self, squares: Tensor | None) -> None:
        """What norm and GradScaler mean for all tensors; nothing if nobody asks for the one or has
        the other."""
        request, device = self._request, self._plan.device
        given = (request.grad_scale, request.found_inf)
        if any(x is not None for x in (squares, *given)):
            self._decision = torch.empty(len(DECISION), dtype=torch.float64, device=device)
            launch(
                device,
                kernels().decide_kernel,
                1,
                *(squares, 0 if squares is None else len(squares)),
                None if squares is None else self._plan.limit(request.max_grad_norm),
                *(*given, self._decision, request.grad_norm, request.skipped),
                SKIP_NONFINITE=request.skip_nonfinite,
            )
        copies: dict[torch.device, Tensor] = {}
        for each in self._lists:
            if self._decision is not None and each.device not in copies:
                copies[each.device] = self._decision.to(each.device, non_blocking=True)
            each.start(copies.get(each.device))

    def _is_known_to_be_skipped(self) -> bool:
        """Where the host counts the steps it must know of those that are skipped. In the
        interpreter it waits for nobody; on a GPU the device counts them (wdkernels/groups.py)."""
        request = self._request
        if self._decision is None or (request.found_inf is None and not request.skip_nonfinite):
            return False
        if all(each.counted for each in self._lists):
            return False
        return bool(self._decision[DECISION.index("skip")].item() != 0)
