"""Lists of tensors for Triton's launches: tensors of one kind, in tables on their device.

Nothing here waits for the device.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wdkernels.coefficients import (
    Coefficients,
    bias_correction1,
    bias_correction2,
    coefficients,
    random_key,
)
from wdkernels.options import GroupOptions
from wdkernels.plan import Parameter
from wdkernels.triton_tables import OPTIONS, STREAMS, TensorWords, Unrounded, option_words

REALS = {
    **{x: x for x in (torch.float32, torch.float64, torch.bfloat16, torch.float16)},
    torch.complex64: torch.float32,
    torch.complex128: torch.float64,
}
_COUNTERS = {torch.float32: ctypes.c_float, torch.float64: ctypes.c_double}  # a step, in place

# IEEE arithmetic without contraction: the bits of the native backend.
LAUNCH = {"num_warps": 4, "enable_fp_fusion": False}


@cache
def kernels(module: str = "triton_kernels") -> ModuleType:
    """The kernels, imported with Triton when they are first needed."""
    return importlib.import_module(f"wdkernels.{module}")


class Kind(NamedTuple):
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


def kind_of(p: Parameter, weight: Tensor, options: GroupOptions) -> Kind:
    return Kind(
        device=weight.device,
        counted=options.device_numbers is not None,
        method=options.method,
        weights=REALS[weight.dtype],
        moments=REALS[p.streams["exp_avg"].dtype],
        # One without an anchor goes with those whose anchors are the likeliest.
        anchors=REALS[p.streams.get("anchor", weight).dtype],
        storage=p.storage,
    )


class TensorList:
    """Tensors of one kind, in tables: what a launch works through.

    `active` says where they stand among all tensors with a gradient, and so do their rows of the
    sums and of the telemetry.
    """

    counted = False  # steps, on the device

    def __init__(
        self,
        kind: Kind,
        active: list[int],
        parameters: Sequence[Parameter],
        weights: Sequence[Tensor],
        options: Sequence[GroupOptions],
    ) -> None:
        self.active = active
        self.method = kind.method
        self.device = kind.device
        self._dtype = kind.computed
        self._options = options  # of all groups
        self._groups = [p.group for p in parameters]
        self._sizes = [x.numel() * (2 if x.is_complex() else 1) for x in weights]
        self.total = sum(p.total for p in parameters)
        self._decay = {"swd": "decoupled", "spd": "projection"}.get(kind.method, kind.method)
        self.has_maxima = any("max_exp_avg_sq" in p.streams for p in parameters)
        anchored = any("anchor" in p.streams for p in parameters)
        self._weights = type_of(kind.weights)
        self._moments = type_of(kind.moments)
        self._cautiously = any(options[group].cautious for group in self._groups)
        self._of_weights = {  # constants of a kernel that writes them
            "weights": self._weights,
            "anchors": type_of(kind.anchors) if anchored else None,
            "storage": kind.storage,
            "AVERAGED": any("ema" in p.streams for p in parameters),
            "RUNS": any(p.numbering.run for p in parameters),
        }

        words = [
            TensorWords(
                weight=weight.data_ptr(),
                **{key: _address(p.streams.get(key)) for key in STREAMS},
                numel=size,
                total=p.total,
                cautious=options[p.group].cautious,
                position=p.position,
                active=row,
                **p.numbering._asdict(),
            )
            for p, weight, size, row in zip(parameters, weights, self._sizes, active, strict=True)
        ]
        (self._tensors,) = sent(torch.tensor(words, dtype=torch.int64), device=self.device)
        self._chunks, self._firsts = pieces(self._sizes, kernels().CHUNK.value, self.device)
        self._tables = [self._tensors, self._chunks, self._firsts]  # that outlast a step
        self._spans: Tensor | None = None
        self._set_steps([p.streams["step"] for p in parameters])

    def without_elements(self) -> list[int]:
        return [row for row, size in zip(self.active, self._sizes, strict=True) if size == 0]

    def _set_steps(self, steps: Sequence[Tensor]) -> None:
        # In place: reading and writing a tensor costs microseconds.
        self._steps = [_COUNTERS[x.dtype].from_address(x.data_ptr()) for x in steps]

    # ---- one step ------------------------------------------------------------------------------

    def prepare(self, gradients: Sequence[int]) -> None:
        """Send what changes from one step to the next: addresses and numbers."""
        keys = [*zip(self._groups, [step.value + 1 for step in self._steps], strict=True)]
        rows = {key: row for row, key in enumerate(dict.fromkeys(keys))}
        numbers = [coefficients(self._options[group], t) for group, t in rows]
        unrounded = [
            Unrounded(
                decay=c.decay,
                one_minus_beta2=c.one_minus_beta2,
                bias_correction1=bias_correction1(o, t),
                bias_correction2=bias_correction2(o, t),
                lr=o.lr,
                key=random_key(o, t),
            )
            for c, o, t in (
                (c, self._options[group], t) for c, (group, t) in zip(numbers, rows, strict=True)
            )
        ]
        self._gradients, self._rows, self._unrounded, self._numbers = sent(
            torch.tensor(gradients, dtype=torch.int64),
            torch.tensor([*map(rows.__getitem__, keys)], dtype=torch.int32),
            torch.tensor(unrounded, dtype=torch.float64),
            torch.tensor(numbers, dtype=self._dtype),
            device=self.device,
        )
        self._decision: Tensor | None = None

    def start(self, decision: Tensor | None) -> None:
        """What is decided about all tensors is known, or that nothing is."""
        self._decision = decision
        self._mean_v: Tensor | None = None

    def advance(self) -> None:
        """Count the step, once nothing can fail any more."""
        for step in self._steps:
            step.value += 1

    def reduce(self, maxima: bool) -> Tensor:
        """Each span's part of the sums over the gradients: of their squares, as they are, or of the
        maxima of v, where there are any and they are asked for."""
        k = kernels()
        if self._spans is None:
            self._spans, self._span_firsts = pieces(self._sizes, k.SPAN.value, self.device)
            self._tables += [self._spans, self._span_firsts]
        self._claim()
        self._span_sums: Tensor | None = self._empty(len(self._spans))
        self._launch(
            k.reduce_kernel,
            len(self._spans),
            *(self._tensors, self._gradients, self._rows, self._spans),
            *(self._numbers if maxima else None, self._decision, self._span_sums),
            weights=self._weights,
            moments=self._moments,
            MAXIMA=maxima,
        )
        return self._span_sums

    def fold_reduced(self, sums: Tensor, squares: bool, maxima: bool) -> None:
        """Leave in the table what `reduce` has found."""
        own = self._own(sums)
        self._launch(
            kernels().fold_spans_kernel,
            len(self._tensors),
            *(self._tensors, self._span_firsts, self._span_sums, own),
            SQUARES=squares,
            MAXIMA=maxima,
        )
        self._bring(own, sums)
        self._span_sums = None

    def share_of_v(self, sums: Tensor | None) -> Tensor:
        """SWD: what every tensor adds to V, from `reduce` or from the table."""
        shares = self._empty(len(self._tensors))
        self._launch(
            kernels().share_of_v_kernel,
            len(self._tensors),
            *(self._tensors, self._rows, self._span_firsts if sums is None else None),
            *(self._unrounded, self._decision, self._span_sums if sums is None else None),
            *(None if sums is None else self._own(sums), shares),
        )
        return shares

    def take_mean_v(self, shares: Sequence[Tensor], elements: int) -> None:
        """SWD: V from the shares of all lists, and with it this list's decay."""
        all_shares = joined(shares, self.device)
        self._mean_v = self._empty(1)
        self._launch(
            kernels().mean_v_kernel,
            1,
            *(all_shares, len(all_shares), elements),
            *(self._unrounded, self._numbers, len(self._numbers), self._mean_v),
        )

    def update(self, measured: bool) -> None:
        self._claim()
        k = kernels()
        self._partials: Tensor | None = None
        if self.method == "spd" or measured:
            self._partials = self._empty(k.PARTS.value * len(self._chunks))
        self._launch(
            k.update_kernel,
            len(self._chunks),
            *(self._tensors, self._gradients, self._rows, self._chunks),
            *(self._numbers, self._unrounded, self._decision, self._partials),
            decay=self._decay,
            moments=self._moments,
            AMSGRAD=self.has_maxima,
            CAUTIOUSLY=self._cautiously,
            MEASURE=measured,
            **self._of_weights,
        )

    def fold_updated(self, sums: Tensor, measured: bool) -> None:
        """Leave in the table what `update` has summed."""
        if self._partials is None:
            return
        own = self._own(sums)
        self._launch(
            kernels().fold_kernel,
            len(self._tensors),
            *(self._tensors, self._firsts, self._partials, own),
            MEASURE=measured,
            PROJECT=self.method == "spd",
        )
        self._bring(own, sums)
        self._partials = None

    def project(self, sums: Tensor | None) -> None:
        """SPD: the second touch, of the tensors that it selects or that have an average."""
        k = kernels()
        shrink = self._empty(len(self._tensors), self._dtype)
        self._launch(
            k.select_kernel,
            len(self._tensors),
            *(self._tensors, self._rows, self._firsts, self._unrounded),
            *(self._partials, None if sums is None else self._own(sums), shrink),
        )
        self._launch(
            k.pull_kernel,
            len(self._chunks),
            *(self._tensors, self._gradients, self._rows, self._chunks),
            *(self._numbers, self._unrounded, self._decision, shrink),
            **self._of_weights,
        )

    def tell(self, telemetry: Tensor, sums: Tensor | None) -> None:
        """Write the tensors' rows of the telemetry."""
        own = self._own(telemetry)
        self._launch(
            kernels().tell_kernel,
            len(self._tensors),
            *(self._tensors, self._rows, self._firsts, self._unrounded),
            *(self._decision, self._partials, None if sums is None else self._own(sums)),
            *(self._mean_v, own),
            decay=self._decay,
        )
        self._bring(own, telemetry)

    # ---- what it is made of --------------------------------------------------------------------

    def _own(self, table: Tensor) -> Tensor:
        """A table with a row for each active tensor, on this list's device."""
        return table.to(self.device, non_blocking=True)

    def _bring(self, own: Tensor, table: Tensor) -> None:
        """This list's rows, to where the table is."""
        if own is not table:
            (here,) = sent(torch.tensor(self.active), device=self.device)
            (there,) = sent(torch.tensor(self.active), device=table.device)
            table.index_copy_(0, there, own.index_select(0, here).to(table.device))

    def _claim(self) -> None:
        claim(self.device, [*self._tables, self._gradients])

    def _empty(self, size: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Scratch of this step: its allocator keeps it for the stream that the step runs on."""
        return torch.empty(size, dtype=dtype, device=self.device)

    def _launch(self, kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        launch(self.device, kernel, programs, *arguments, **constants)


class CountingList(TensorList):
    """A list whose steps are counted, and its numbers computed, on the device: in CUDA graphs, and
    where only the device knows which steps are skipped.

    A CUDA graph repeats addresses. What a captured step allocates belongs to the graph, and what it
    finds must stay where it is: nobody says when a graph is replayed for the last time.
    """

    counted = True

    def _set_steps(self, steps: Sequence[Tensor]) -> None:
        counters = [
            [step.data_ptr(), step.dtype == torch.float64, group]
            for step, group in zip(steps, self._groups, strict=True)
        ]
        own_rows = torch.arange(len(counters), dtype=torch.int32)
        self._counters, self._rows = sent(torch.tensor(counters), own_rows, device=self.device)
        self._tables.append(self._counters)
        self._changing: list[Tensor] = []
        self._known: Any = None  # what stands there
        self._spare: Tensor | None = None  # pinned memory for a capture, in which none can be had

    def prepare(self, gradients: Sequence[int]) -> None:
        """Send addresses and options if they changed; the device does the rest."""
        words = [*map(option_words, self._options)]
        changing = torch.tensor(gradients), torch.tensor(words, dtype=torch.float64)
        if capturing():
            # Copied by the graph at each replay: other steps may use other gradients meanwhile.
            staging, self._spare = self._spare, None
            if staging is None:
                raise RuntimeError(
                    "a CUDA graph is being captured, which a step can only join after steps "
                    "outside of it: run one, with the same parameters, before each capture"
                )
            on_device = sent(*changing, device=self.device, staging=staging)
            captured.append([staging, *self._tables])
        else:
            if self._known != (gradients, words):
                self._changing = sent(*changing, device=self.device)
                self._known = gradients, words
            if self._spare is None:
                self._spare = _staging(changing, self.device)
            on_device = self._changing
        self._gradients, self._words = on_device
        self._decision = None
        for row, options in zip(self._words, self._options, strict=True):
            for name, x in (options.device_numbers or {}).items():
                row[OPTIONS.index(name)].copy_(x, non_blocking=True)

    def start(self, decision: Tensor | None) -> None:
        super().start(decision)
        k, count = kernels("triton_numbers"), len(self._tensors)
        numbers = self._empty(count * len(Coefficients._fields), self._dtype)
        self._numbers = numbers.view(count, -1)
        self._unrounded = self._empty(count * len(Unrounded._fields))
        self._launch(
            k.coefficients_kernel,
            -(-count // k.TENSORS.value),
            *(self._counters, self._words, decision, self._numbers, self._unrounded, count),
            decay=self._decay,
        )

    def advance(self) -> None:
        """The device has counted."""


# ---- launches and tables -------------------------------------------------------------------------

captured: list[list[Tensor]] = []  # what graphs read, for as long as the process lives


def capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def claim(device: torch.device, tables: Sequence[Tensor]) -> None:
    """Memory belongs to the stream it was allocated on; another one has to say that it uses it, or
    it might be given out again before that stream is done."""
    if device.type == "cpu" or capturing():
        return
    stream = torch.get_device_module(device).current_stream(device)
    for table in tables:
        table.record_stream(stream)


def launch(
    device: torch.device, kernel: Any, programs: int, *arguments: Any, **constants: Any
) -> None:
    if programs == 0:
        return
    module = torch.get_device_module(device)
    with nullcontext() if device.type == "cpu" else module.device(device):
        kernel[(programs,)](*arguments, **constants, **LAUNCH)


def joined(parts: Sequence[Tensor], device: torch.device) -> Tensor:
    if not parts:
        return torch.empty(0, dtype=torch.float64, device=device)
    moved = [each.to(device, non_blocking=True) for each in parts]
    return moved[0] if len(moved) == 1 else torch.cat(moved)


def type_of(dtype: torch.dtype) -> Any:
    """Triton's name of it."""
    return getattr(kernels().tl, str(dtype).removeprefix("torch."))


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def pieces(sizes: Sequence[int], size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Every piece's tensor and number in it, int32 [pieces, 2]; every tensor's first piece and,
    last, the number of pieces, int32 [tensors + 1]."""
    counts = (torch.tensor(sizes, dtype=torch.int64) + size - 1) // size
    firsts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    tensor = torch.repeat_interleave(counts)
    number = torch.arange(len(tensor)) - firsts[tensor]
    table = torch.stack([tensor, number], 1)
    sent_pieces, sent_firsts = sent(table.int(), firsts.int(), device=device)
    return sent_pieces, sent_firsts


def _staging(tables: Sequence[Tensor], device: torch.device) -> Tensor:
    """Room for a copy of the tables, each aligned to 16 bytes."""
    size = sum(_rounded_up(table.nbytes) for table in tables)
    return torch.empty(size, dtype=torch.uint8, pin_memory=device.type != "cpu")


def _rounded_up(size: int) -> int:
    return size + -size % 16


def sent(*tables: Tensor, device: torch.device, staging: Tensor | None = None) -> list[Tensor]:
    """The tables on the device, by one asynchronous copy. It reads memory that is pinned, and not
    given out again before the copy is done."""
    staging = _staging(tables, device) if staging is None else staging
    sizes = [_rounded_up(table.nbytes) for table in tables]
    for part, table in zip(staging.split(sizes), tables, strict=True):
        part[: table.nbytes] = table.contiguous().view(-1).view(torch.uint8)
    return [
        part[: table.nbytes].view(table.dtype).view(table.shape)
        for part, table in zip(
            staging.to(device, non_blocking=True).split(sizes), tables, strict=True
        )
    ]
