"""The Triton backend: one launch for all tensors and groups, on any GPU that Triton compiles for.

Without a compiled module and on devices it has no kernels for. Kernels and tables are those of
triton_kernels.py; nothing here waits for the device.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import cache
from operator import attrgetter, eq, is_
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from wdkernels import layouts, schedules, storage
from wdkernels.coefficients import (
    DECAY_SCALES,
    Hyper,
    bias_correction1,
    bias_correction2,
    coefficients,
    factors,
    random_key,
)
from wdkernels.plan import Parameter, Request, Weights

_REALS = {
    **{x: x for x in (torch.float32, torch.float64, *storage.NARROW)},
    torch.complex64: torch.float32,
    torch.complex128: torch.float64,
}
_COUNTERS = {torch.float32: ctypes.c_float, torch.float64: ctypes.c_double}  # a step, in place

# Behind the weight, as M to EMA. At most one of a stream's names is in use.
_STREAMS = (
    *(("exp_avg",), ("exp_avg_sq",), ("max_exp_avg_sq",), ("anchor",)),
    *(("master", "compensation"), ("ema",)),
)

_Questions: TypeAlias = "tuple[Callable[[Tensor], Any], ...]"

# IEEE arithmetic without contraction: the bits of the native backend.
_LAUNCH = {"num_warps": 4, "enable_fp_fusion": False}


def refuses(tensors: Sequence[Tensor]) -> str | None:
    """Why this backend cannot update these tensors; None if it can."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    for x in tensors:
        if not layouts.has_memory(x):
            return f"a {type(x).__name__} has no memory of its own"
        if x.device.type not in (("cpu",) if interpreted else ("cuda", "xpu")):
            where = "in Triton's interpreter " if interpreted else ""
            return f"{where}it has no kernels for {x.device.type} tensors"
        if x.dtype not in _REALS:
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


@cache
def _kernels() -> Any:
    """The kernels, imported with Triton when they are first needed."""
    from wdkernels import triton_kernels

    return triton_kernels


class _Member(NamedTuple):
    """A parameter that can be updated, and what a step of it touches besides the gradient."""

    group: int
    position: int
    weight: Tensor
    streams: dict[str, Tensor]  # entries of its state


class _Kind(NamedTuple):
    """What all tensors of a list have in common: constants of its launches."""

    device: torch.device
    counted: bool  # steps, on the device
    method: str
    weights: torch.dtype
    moments: torch.dtype
    anchors: torch.dtype
    storage: str

    @property
    def computed(self) -> torch.dtype:
        return torch.float64 if self.weights == torch.float64 else torch.float32


class Plan:
    """All tensors of an optimizer, in tables on their devices; valid until `step` says no."""

    def __init__(
        self,
        parameters: Sequence[Parameter],
        hypers: Sequence[Hyper],
        state: dict[Tensor, Any],
        param_groups: list[dict[str, Any]],
    ) -> None:
        self._all = [p.tensor for p in parameters]
        self._hypers = list(hypers)
        self._weights = Weights(parameters)
        self._states = list(state.values())  # held, so that no other dict can take an id
        self._objects = _objects(state, param_groups)
        self._members: dict[int, _Member] = {}
        self._places: tuple[list[dict[str, Any]], list[str]] = [], []
        self._streams: list[Tensor] = []
        for position, p in enumerate(parameters):
            member = _member(p, self._weights[position], self._hypers[p.group])
            if member is not None and p.state is not None:
                self._members[position] = member
                self._places[0].extend([p.state] * len(member.streams))
                self._places[1].extend(member.streams)
                self._streams += member.streams.values()
        self._tensors = [self._all[i] for i in self._members] + self._streams
        self._identities = [*_answers(_IDENTITY, self._tensors)]

        # Of the parameters that have a gradient: by position, and in tables.
        self._active: list[int] = []
        self._lists: list[_TensorList] = []
        self._limit: tuple[float, Tensor] | None = None  # of the gradients' norm, and on the device
        self._orders: list[tuple[Any, ...]] = []
        self._maybe_lazy: list[int] = []

    def set_hyper(self, group: int, hyper: Hyper) -> None:
        """Numbers may change; what decides over the streams that are read may not."""
        if hyper.cautious != self._hypers[group].cautious:
            self._active = []  # the tables say who is
        self._hypers[group] = hyper

    def step(
        self, state: dict[Tensor, Any], param_groups: list[dict[str, Any]], request: Request
    ) -> bool:
        """One optimizer step; False, with nothing done, if the plan is out of date."""
        if not self._unchanged(state, param_groups):
            return False
        found = [tensor.grad for tensor in self._all]
        active = [i for i, gradient in enumerate(found) if gradient is not None]
        # Steps may be counted on the device without: a graph would repeat the host's lr and decay.
        if _capturing() and not (
            active == self._active and all(group["capturable"] for group in param_groups)
        ):
            raise RuntimeError(
                "a CUDA graph is being captured, which a step can only join with capturable=True, "
                "and after steps outside of it with the same parameters"
            )
        if active != self._active:
            if not self._members.keys() >= set(active):
                return False
            self._build(active)
        gradients = self._in_order([gradient for gradient in found if gradient is not None])

        self._weights.load()
        addresses = [*map(Tensor.data_ptr, gradients)]
        for each in self._lists:
            each.prepare([addresses[k] for k in each.places])
        whole = self._decided(request)
        if not self._known_to_be_skipped(request, whole):
            _phases(self._lists, whole, request)
            for each in self._lists:
                each.advance()
        # Autograd must know, as of any in-place operation, that saved weights are out of date.
        torch.autograd.graph.increment_version([self._all[i] for i in active])
        self._weights.store()
        return True

    def _decided(self, request: Request) -> Tensor | None:
        """What norm and GradScaler mean for all tensors, `whole` of triton_kernels.py; None if
        nobody asks for the one or has the other."""
        normed = (
            request.grad_norm is not None
            or request.skip_nonfinite
            or request.max_grad_norm != math.inf
        )
        if not normed and request.grad_scale is None and request.found_inf is None:
            return None
        k, device = _kernels(), self._all[0].device
        limit, partials = None, None
        if normed:
            if self._limit is None or self._limit[0] != request.max_grad_norm:
                (limit,) = _sent(
                    torch.tensor(request.max_grad_norm, dtype=torch.float64), device=device
                )
                self._limit = request.max_grad_norm, limit
            limit = self._limit[1]
            _claim(device, [limit])
            if _capturing():
                _captured.append([limit])
            parts = [each.squares() for each in self._lists]
            partials = _joined(parts, device)
        whole = torch.empty(k.SHARED.value, dtype=torch.float64, device=device)
        _launch(
            device,
            k.decide_kernel,
            1,
            *(partials, 0 if partials is None else len(partials), limit),
            *(request.grad_scale, request.found_inf, whole, request.grad_norm, request.skipped),
            SKIP_NONFINITE=request.skip_nonfinite,
        )
        return whole

    def _known_to_be_skipped(self, request: Request, whole: Tensor | None) -> bool:
        """Where the host counts the steps it must know of those that are skipped. In the
        interpreter it waits for nobody; on a GPU the device counts them (optim.py)."""
        if whole is None or (request.found_inf is None and not request.skip_nonfinite):
            return False
        if all(each.counted for each in self._lists):
            return False
        return bool(whole[_kernels().SKIP.value].item() != 0)

    def _unchanged(self, state: dict[Tensor, Any], param_groups: list[dict[str, Any]]) -> bool:
        return (
            _objects(state, param_groups) == self._objects
            and all(map(is_, map(dict.get, *self._places), self._streams))
            and all(map(eq, _answers(_IDENTITY, self._tensors), self._identities))
        )

    def _build(self, active: list[int]) -> None:
        """Tables for another set of parameters that have a gradient."""
        members = [self._members[i] for i in active]
        kinds: dict[_Kind, list[int]] = {}
        for k, member in enumerate(members):
            kinds.setdefault(_kind(member, self._hypers[member.group]), []).append(k)
        self._lists = [
            (_CountingList if kind.counted else _TensorList)(
                places, [members[k] for k in places], self._hypers, kind
            )
            for kind, places in kinds.items()
        ]
        weights = [member.weight for member in members]
        self._orders = [*_answers(_ORDER, weights)]
        self._maybe_lazy = [k for k, x in enumerate(weights) if x.is_complex() or x.numel() == 1]
        self._active = active

    def _in_order(self, gradients: list[Tensor]) -> list[Tensor]:
        """Every gradient, in the order of its weight: itself, or a copy of one that is not."""
        regular = (
            {torch.strided} >= {*map(attrgetter("layout"), gradients)}
            and all(map(eq, _answers(_ORDER, gradients), self._orders))
            and all(map(Tensor.data_ptr, gradients))  # 0: there is no memory, or are no elements
            # Only a view of a complex tensor, or of one element of it, can be lazy and yet dense.
            and not any(gradients[k].is_conj() or gradients[k].is_neg() for k in self._maybe_lazy)
        )
        return gradients if regular else [*map(self._weights.gradient, self._active)]


def _objects(state: dict[Tensor, Any], param_groups: list[dict[str, Any]]) -> list[list[int]]:
    """Which parameters stand where, and their states."""
    return [[*map(id, group["params"])] for group in param_groups] + [[*map(id, state.values())]]


# What must not change about a tensor that is known. An address alone would not do: allocators hand
# the same one out again.
_IDENTITY: _Questions = (Tensor.data_ptr, Tensor.numel, Tensor.stride, attrgetter("dtype"))
# What a gradient must have in common with its weight for both to be runs of numbers in one order.
_ORDER: _Questions = (Tensor.size, Tensor.stride, attrgetter("dtype"), Tensor.get_device)


def _answers(questions: _Questions, tensors: Sequence[Tensor]) -> Iterator[tuple[Any, ...]]:
    """Each tensor's, in a fraction of the time of a loop in Python."""
    return zip(*(map(question, tensors) for question in questions), strict=True)


def _member(p: Parameter, weight: Tensor, hyper: Hyper) -> _Member | None:
    """None if the state is not (or not yet) one that the kernels could use."""
    keys = ["step", *storage.entries(weight, hyper)]
    if hyper.method == "swd" and not hyper.amsgrad:
        keys.append("exp_avg_sq_sum")
    if hyper.anchored:
        keys.append("anchor")
    if p.state is None or not p.state.keys() >= set(keys):
        return None
    if weight.numel() > 0 and weight.data_ptr() == 0:
        return None

    streams = {key: p.state[key] for key in keys}
    for key, x in streams.items():
        if key == "step":
            device = torch.device("cpu") if hyper.live is None else weight.device
            fits = x.device == device and x.dtype in _COUNTERS and x.numel() == 1
        elif key == "exp_avg_sq_sum":
            fits = x.device == weight.device and x.dtype == torch.float64 and x.numel() == 1
        else:
            fits = x.device == weight.device and x.dtype in storage.dtypes_of(key, weight, hyper)
            fits = fits and layouts.same_order(x, weight)
        if not fits:
            return None
    return _Member(p.group, p.position, weight, streams)


def _kind(member: _Member, hyper: Hyper) -> _Kind:
    weight = member.weight
    if weight.dtype not in storage.NARROW:
        kept = "nearest"
    else:
        kept = "master" if hyper.master_weights else hyper.rounding
    return _Kind(
        device=weight.device,
        counted=hyper.live is not None,
        method=hyper.method,
        weights=_REALS[weight.dtype],
        moments=_REALS[member.streams["exp_avg"].dtype],
        # One without an anchor goes with those whose anchors are the likeliest.
        anchors=_REALS[member.streams.get("anchor", weight).dtype],
        storage=kept,
    )


def _phases(lists: Sequence[_TensorList], whole: Tensor | None, request: Request) -> None:
    """A step on the devices, of lists that are prepared: at most three phases.

    What tensors share stands between them. Lists are apart by device and type, V is not.
    """
    copies: dict[torch.device, Tensor] = {}
    for each in lists:
        if whole is not None and each.device not in copies:
            copies[each.device] = whole.to(each.device, non_blocking=True)
        each.start(copies.get(each.device), request.telemetry is not None)

    stable = [each for each in lists if each.method == "swd"]
    for each in stable:
        each.reduce()
    elements = sum(each.elements for each in stable)
    for each in stable:
        each.stabilise([other.means for other in stable], elements)

    for each in lists:
        each.update()

    for each in lists:
        if each.method == "spd":
            each.project()
        if request.telemetry is not None:
            each.measure(request.telemetry)


class _TensorList:
    """Tensors of one kind, in tables: what a launch works through.

    `places` says where its members stand in the list of all gradients.
    """

    counted = False  # steps, on the device

    def __init__(
        self,
        places: list[int],
        members: Sequence[_Member],
        hypers: Sequence[Hyper],
        kind: _Kind,
    ) -> None:
        kernels = _kernels()
        self.places = places
        self.method = kind.method
        self.device = kind.device
        self._members = members
        self._hypers = hypers
        self._dtype = kind.computed
        self._groups = [member.group for member in members]
        steps = [member.streams["step"] for member in members]
        # In place: reading and writing a tensor costs microseconds.
        self._steps = [_COUNTERS[x.dtype].from_address(x.data_ptr()) for x in steps]
        self._squares: Tensor | None = None
        self._sizes = [
            x.numel() * (2 if x.is_complex() else 1) for x in (m.weight for m in members)
        ]
        self.elements = sum(self._sizes)
        own = [hypers[member.group] for member in members]
        self._decay = {"swd": "decoupled", "spd": "projection"}.get(kind.method, kind.method)
        self._amsgrad = any(h.amsgrad for h in own)
        self._cautiously = any(h.cautious for h in own)
        self._averaged = any(h.ema_decay is not None for h in own)
        self._weights = _type(kind.weights)
        self._moments = _type(kind.moments)
        self._anchors = _type(kind.anchors) if any(h.anchored for h in own) else None
        self._storage = kind.storage
        words = [
            [
                member.weight.data_ptr(),
                *(_address(member, *keys) for keys in _STREAMS),
                *(size, hyper.cautious, member.position, place, 0),
            ]
            for member, size, hyper, place in zip(members, self._sizes, own, places, strict=True)
        ]
        (self._tensors,) = _sent(torch.tensor(words, dtype=torch.int64), device=self.device)
        self._chunks, self._firsts = _pieces(self._sizes, kernels.CHUNK.value, self.device)
        self._tables = [self._tensors, self._chunks, self._firsts]  # that outlast a step
        self._spans: Tensor | None = None
        if self.method == "swd":
            kept = [_address(member, "exp_avg_sq_sum") for member in members]
            (self._kept,) = _sent(torch.tensor(kept, dtype=torch.int64), device=self.device)
            self._tables.append(self._kept)

    def prepare(self, gradients: Sequence[int]) -> None:
        """Send what changes from one step to the next: addresses and numbers."""
        keys = [*zip(self._groups, [step.value + 1 for step in self._steps], strict=True)]
        rows = {key: row for row, key in enumerate(dict.fromkeys(keys))}
        numbers = [coefficients(self._hypers[group], t) for group, t in rows]
        exact = [
            (
                *(c.decay, c.one_minus_beta2),
                *(bias_correction1(h, t), bias_correction2(h, t), h.lr, random_key(h, t)),
            )
            for c, h, t in (
                (c, self._hypers[g], t) for c, (g, t) in zip(numbers, rows, strict=True)
            )
        ]
        self._gradients, self._rows, self._exact, self._numbers = _sent(
            torch.tensor(gradients, dtype=torch.int64),
            torch.tensor([*map(rows.__getitem__, keys)], dtype=torch.int32),
            torch.tensor(exact, dtype=torch.float64),
            torch.tensor(numbers, dtype=self._dtype),
            device=self.device,
        )

    def start(self, whole: Tensor | None, measured: bool) -> None:
        """What is decided about all tensors, before any list's step."""
        self._whole = whole
        self._measured = measured
        self._partials: Tensor | None = None
        self._mean_square: Tensor | None = None

    def advance(self) -> None:
        """Count the step, once nothing can fail any more."""
        for step in self._steps:
            step.value += 1

    def squares(self) -> Tensor:
        """Of the gradients as they are: each span's part of their sum."""
        self._squares = self._sums(None, amsgrad=False)
        return self._squares

    def reduce(self) -> None:
        """SWD: every tensor's part of V."""
        partials = self._squares
        if partials is None or self._amsgrad:  # the maxima need to know the gradients' scale
            partials = self._sums(self._whole, self._amsgrad)
        self.means = self._empty(len(self._tensors))
        self._launch(
            _kernels().fold_kernel,
            len(self._tensors),
            *(self._rows, self._kept, self._span_firsts, self._exact),
            *(self._whole, partials, self.means),
        )

    def _sums(self, whole: Tensor | None, amsgrad: bool) -> Tensor:
        if self._spans is None:
            span = _kernels().SPAN.value
            self._spans, self._span_firsts = _pieces(self._sizes, span, self.device)
            self._tables += [self._spans, self._span_firsts]
        self._claim()
        partials = self._empty(len(self._spans))
        self._launch(
            _kernels().reduce_kernel,
            len(self._spans),
            *(self._tensors, self._gradients, self._rows, self._spans),
            *(self._numbers if amsgrad else None, whole, partials),
            weights=self._weights,
            moments=self._moments,
            AMSGRAD=amsgrad,
        )
        return partials

    def stabilise(self, means: Sequence[Tensor], elements: int) -> None:
        """SWD: V from the parts of all lists, and with it this list's decay."""
        joined = _joined(means, self.device)
        self._mean_square = self._empty(1)
        self._launch(
            _kernels().stabilise_kernel,
            1,
            *(joined, len(joined), elements),
            *(self._exact, self._numbers, len(self._numbers), self._mean_square),
        )

    def update(self) -> None:
        self._claim()
        k = _kernels()
        if self.method == "spd" or self._measured:
            self._partials = self._empty(k.SUMS.value * len(self._chunks))
        self._launch(
            k.update_kernel,
            len(self._chunks),
            *(self._tensors, self._gradients, self._rows, self._chunks),
            *(self._numbers, self._exact, self._whole, self._partials),
            decay=self._decay,
            weights=self._weights,
            moments=self._moments,
            anchors=self._anchors,
            storage=self._storage,
            AMSGRAD=self._amsgrad,
            CAUTIOUSLY=self._cautiously,
            AVERAGED=self._averaged,
            MEASURE=self._measured,
        )

    def project(self) -> None:
        """SPD: the second touch, of the tensors that it selects or that have an average."""
        k = _kernels()
        shrink = self._empty(len(self._tensors), self._dtype)
        self._launch(
            k.select_kernel,
            len(self._tensors),
            *(self._rows, self._firsts, self._exact, self._partials, shrink),
        )
        self._launch(
            k.pull_kernel,
            len(self._chunks),
            *(self._tensors, self._gradients, self._rows, self._chunks),
            *(self._numbers, self._exact, self._whole, shrink),
            weights=self._weights,
            anchors=self._anchors,
            storage=self._storage,
            AVERAGED=self._averaged,
        )

    def measure(self, table: Tensor) -> None:
        """The tensors' rows of the telemetry."""
        here = table.device == self.device
        own = table if here else torch.full_like(table, math.nan, device=self.device)
        self._launch(
            _kernels().measure_kernel,
            len(self._tensors),
            *(self._tensors, self._rows, self._firsts, self._exact),
            *(self._whole, self._partials, self._mean_square, own),
            decay=self._decay,
        )
        if not here:  # other devices' lists have other rows, which are NaN in this one's
            there = own.to(table.device, non_blocking=True)
            table.copy_(torch.where(there.isnan(), table, there))

    def _claim(self) -> None:
        _claim(self.device, [*self._tables, self._gradients])

    def _empty(self, size: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Scratch of this step: its allocator keeps it for the stream that the step runs on."""
        return torch.empty(size, dtype=dtype, device=self.device)

    def _launch(self, kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        _launch(self.device, kernel, programs, *arguments, **constants)


class _CountingList(_TensorList):
    """A list whose steps are counted, and its numbers computed, on the device: in CUDA graphs, and
    where only the device knows which steps are skipped.

    A CUDA graph repeats addresses. What a captured step allocates belongs to the graph, and what it
    finds must stay where it is: nobody says when a graph is replayed for the last time.
    """

    counted = True

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        steps = [member.streams["step"] for member in self._members]
        counters = [
            [step.data_ptr(), step.dtype == torch.float64, group]
            for step, group in zip(steps, self._groups, strict=True)
        ]
        own_rows = torch.arange(len(counters), dtype=torch.int32)
        self._counters, self._rows = _sent(torch.tensor(counters), own_rows, device=self.device)
        self._tables.append(self._counters)
        self._changing: list[Tensor] = []
        self._known: Any = None  # what stands there
        self._spare: Tensor | None = None  # pinned memory for a capture, in which none can be had

    def prepare(self, gradients: Sequence[int]) -> None:
        """Send addresses and hyper-parameters if they changed; the device does the rest."""
        hypers = [*map(_hyper_words, self._hypers)]
        changing = torch.tensor(gradients), torch.tensor(hypers, dtype=torch.float64)
        if _capturing():
            # Copied by the graph at each replay: other steps may use other gradients meanwhile.
            staging, self._spare = self._spare, None
            if staging is None:
                raise RuntimeError(
                    "a CUDA graph is being captured, which a step can only join after steps "
                    "outside of it: run one, with the same parameters, before each capture"
                )
            sent = _sent(*changing, device=self.device, staging=staging)
            _captured.append([staging, *self._tables])
        else:
            if self._known != (gradients, hypers):
                self._changing = _sent(*changing, device=self.device)
                self._known = gradients, hypers
            if self._spare is None:
                self._spare = _staging(changing, self.device)
            sent = self._changing
        self._gradients, numbers = sent
        for words, hyper in zip(numbers, self._hypers, strict=True):
            for key, x in (hyper.live or {}).items():
                words[_LIVE[key]].copy_(x, non_blocking=True)

        self._words = numbers

    def start(self, whole: Tensor | None, measured: bool) -> None:
        super().start(whole, measured)
        k, count = _kernels(), len(self._tensors)
        self._numbers = self._empty(count * k.NUMBERS.value, self._dtype).view(count, -1)
        self._exact = self._empty(count * k.EXACT.value)
        self._launch(
            k.coefficients_kernel,
            -(-count // k.TENSORS.value),
            *(self._counters, self._words, whole, self._numbers, self._exact, count),
            decay=self._decay,
        )

    def advance(self) -> None:
        """The device has counted."""


_captured: list[list[Tensor]] = []  # what graphs read, for as long as the process lives
_LIVE = {"lr": 0, "weight_decay": 5}  # their places among the words


def _claim(device: torch.device, tables: Sequence[Tensor]) -> None:
    """Memory belongs to the stream it was allocated on; another one has to say that it uses it, or
    it might be given out again before that stream is done."""
    if device.type == "cpu" or _capturing():
        return
    stream = torch.get_device_module(device).current_stream(device)
    for table in tables:
        table.record_stream(stream)


def _launch(
    device: torch.device, kernel: Any, programs: int, *arguments: Any, **constants: Any
) -> None:
    if programs == 0:
        return
    module = torch.get_device_module(device)
    with nullcontext() if device.type == "cpu" else module.device(device):
        kernel[(programs,)](*arguments, **constants, **_LAUNCH)


def _joined(parts: Sequence[Tensor], device: torch.device) -> Tensor:
    if not parts:
        return torch.empty(0, dtype=torch.float64, device=device)
    moved = [each.to(device, non_blocking=True) for each in parts]
    return moved[0] if len(moved) == 1 else torch.cat(moved)


def _capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _hyper_words(h: Hyper) -> list[float]:
    """A row of the coefficients kernel's hyper-parameters; live ones are 0 until they are read."""
    live = h.live or {}
    average = h.ema_decay if isinstance(h.ema_decay, dict) else None
    return [
        0.0 if "lr" in live else h.lr,
        h.lr_max,
        h.beta1,
        h.beta2,
        h.eps,
        0.0 if "weight_decay" in live else h.weight_decay,
        -1.0 if h.maximize else 1.0,
        float(DECAY_SCALES.index(h.decay_scale)),
        float(h.seed),
        h.ema_decay if isinstance(h.ema_decay, float) else 1.0,
        *_schedule_words(h.decay_schedule),
        *_schedule_words(average),
    ]


def _schedule_words(schedule: schedules.Schedule | None) -> list[float]:
    kinds = ("constant", "window", "linear", "cosine")
    parts = factors(schedule)
    return [x for s in parts for x in (float(kinds.index(s.kind)), s.start, s.end, s.steps)]


def _type(dtype: torch.dtype) -> Any:
    """Triton's name of it."""
    return getattr(_kernels().tl, str(dtype).removeprefix("torch."))


def _address(member: _Member, *keys: str) -> int:
    return next((member.streams[key].data_ptr() for key in keys if key in member.streams), 0)


def _pieces(sizes: Sequence[int], size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Every piece's tensor and number in it, int32 [pieces, 2]; every tensor's first piece and,
    last, the number of pieces, int32 [tensors + 1]."""
    counts = (torch.tensor(sizes, dtype=torch.int64) + size - 1) // size
    firsts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    tensor = torch.repeat_interleave(counts)
    number = torch.arange(len(tensor)) - firsts[tensor]
    pieces = torch.stack([tensor, number], 1)
    sent_pieces, sent_firsts = _sent(pieces.int(), firsts.int(), device=device)
    return sent_pieces, sent_firsts


def _staging(tables: Sequence[Tensor], device: torch.device) -> Tensor:
    """Room for a copy of the tables, each aligned to 16 bytes."""
    size = sum(_rounded_up(table.nbytes) for table in tables)
    return torch.empty(size, dtype=torch.uint8, pin_memory=device.type != "cpu")


def _rounded_up(size: int) -> int:
    return size + -size % 16


def _sent(*tables: Tensor, device: torch.device, staging: Tensor | None = None) -> list[Tensor]:
    """The tables on the device, by one asynchronous copy. It reads memory that is pinned, and not
    given out again before the copy is done."""
    staging = _staging(tables, device) if staging is None else staging
    sizes = [_rounded_up(table.nbytes) for table in tables]
    for place, table in zip(staging.split(sizes), tables, strict=True):
        place[: table.nbytes] = table.contiguous().view(-1).view(torch.uint8)
    return [
        place[: table.nbytes].view(table.dtype).view(table.shape)
        for place, table in zip(
            staging.to(device, non_blocking=True).split(sizes), tables, strict=True
        )
    ]
