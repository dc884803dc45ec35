"""How Triton's kernels find and read what they work on: tables, pieces of tensors, streams.

Tensors reach a kernel by their addresses, so that one launch takes all of them. Its tables:

    tensors    int64, a row of TensorWords each (triton_tables.py)
    gradients  int64, the addresses of the tensors' gradients
    rows       int32, the tensors' rows in the next two tables
    numbers    a row of Coefficients for each group and step count, in the type that is computed in
    unrounded  float64, a row of Unrounded for each of them
    decision   float64, DECISION: what is decided for all tensors before they are updated; None
               where gradients are taken as they are
    chunks     int32, a pair for each program: a tensor, and which chunk of it (CHUNK elements); or
    spans      the same for spans of chunks (SPAN elements), which sums before the step take

The types of the streams are constants of a launch: `weights` (and gradients), `moments`, `anchors`
(None: there are none). T is what is computed in, float64 for float64 weights and else float32.
`storage` says how weights are stored, by the names of csrc/dtype.h's Storage. Flags in capitals say
what some tensor of the launch has, its words what each has.

A full chunk whose streams are all aligned is read and written 16 bytes at a time, any other one
element by element under a mask. Beside streams of 32 bits those of 16 take 8 bytes: so a thread has
the same elements of all of them, and none is exchanged through shared memory. VECTOR says how many
elements of a stream are taken at a time; 0: one, under a mask.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="assignment, attr-defined"
# These functions are Triton's language, not Python's.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl

from wdkernels.coefficients import Coefficients
from wdkernels.triton_rule import narrow, noise_of, widen
from wdkernels.triton_tables import DECISION, TensorWords, Unrounded


def columns(table: Sequence[str], names: str) -> list[tl.constexpr]:
    """Where these of a table's columns stand."""
    return [tl.constexpr(table.index(name)) for name in names.split()]


WORDS = tl.constexpr(len(TensorWords._fields))
WEIGHT, EXP_AVG, EXP_AVG_SQ, MAX_EXP_AVG_SQ, ANCHOR, COMPANION, EMA, EXP_AVG_SQ_SUM = columns(
    TensorWords._fields,
    "weight exp_avg exp_avg_sq max_exp_avg_sq anchor companion ema exp_avg_sq_sum",
)
NUMEL, TOTAL, CAUTIOUS, POSITION, ACTIVE, FIRST, RUN, PITCH = columns(
    TensorWords._fields, "numel total cautious position active first run pitch"
)
NUMBERS = tl.constexpr(len(Coefficients._fields))
UNROUNDED = tl.constexpr(len(Unrounded._fields))
(KEY,) = columns(Unrounded._fields, "key")
SCALE, UNSCALE, SKIP = columns(DECISION, "scale unscale skip")


# ---- tables --------------------------------------------------------------------------------------


@triton.jit
def load_row(address, COUNT: tl.constexpr):
    row = ()
    for k in tl.static_range(COUNT):
        row = row + (tl.load(address + k),)  # noqa: RUF005 - Triton has no other way
    return row


@triton.jit
def store_row(address, row, here):
    for k in tl.static_range(len(row)):
        tl.store(address + k, row[k], here)


@triton.jit
def proceeds(decision):
    """Whether the step is taken."""
    return tl.load(decision + SKIP) == 0 if decision is not None else tl.full([], 1, tl.int1)


@triton.jit
def scale_of(decision):
    return tl.load(decision + SCALE) if decision is not None else tl.full([], 1.0, tl.float64)


@triton.jit
def coefficients_of(numbers, row, decision):
    c = Coefficients(*load_row(numbers + row * NUMBERS, NUMBERS))
    return Coefficients(
        scale=(c.scale.to(tl.float64) * scale_of(decision)).to(c.scale.dtype),
        one_minus_beta1=c.one_minus_beta1,
        one_minus_beta2=c.one_minus_beta2,
        step_size=c.step_size,
        eps=c.eps,
        decay=c.decay,
        average=c.average,
    )


# ---- what a program works on ---------------------------------------------------------------------


class Numbering(NamedTuple):
    """Which of the whole tensor's elements a shard's are (wdkernels/plan.py)."""

    first: Any
    run: Any
    pitch: Any


class Piece(NamedTuple):
    """What a program works on: the words of its tensor, and which of the elements."""

    w: Any
    g: Any
    m: Any
    v: Any
    vmax: Any
    a: Any
    companion: Any
    ema: Any
    cautious: Any
    position: Any
    numbering: Any
    tensor: Any
    row: Any
    begin: Any
    size: Any  # of the tensor, from `begin` on; 0 in a step that is skipped
    aligned: Any  # every stream to 16 bytes


@triton.jit
def piece_of(tensors, gradients, rows, pieces, decision, SIZE: tl.constexpr):
    piece = pieces + 2 * tl.program_id(0).to(tl.int64)
    tensor = tl.load(piece).to(tl.int64)
    begin = tl.load(piece + 1).to(tl.int64) * SIZE
    words = tensors + tensor * WORDS
    w = tl.load(words + WEIGHT)
    m = tl.load(words + EXP_AVG)
    v = tl.load(words + EXP_AVG_SQ)
    vmax = tl.load(words + MAX_EXP_AVG_SQ)
    a = tl.load(words + ANCHOR)
    companion = tl.load(words + COMPANION)
    ema = tl.load(words + EMA)
    g = tl.load(gradients + tensor)
    size = tl.load(words + NUMEL) - begin
    return Piece(
        w=w,
        g=g,
        m=m,
        v=v,
        vmax=vmax,
        a=a,
        companion=companion,
        ema=ema,
        cautious=tl.load(words + CAUTIOUS) != 0,
        position=tl.load(words + POSITION),
        numbering=Numbering(
            first=tl.load(words + FIRST),
            run=tl.load(words + RUN),
            pitch=tl.load(words + PITCH),
        ),
        tensor=tensor,
        row=tl.load(rows + tensor),
        begin=begin,
        size=tl.where(proceeds(decision), size, 0),
        aligned=(w | g | m | v | vmax | a | companion | ema) % 16 == 0,
    )


@triton.jit
def noise_in(p, unrounded):
    """The keys of the tensor's random bits in this step."""
    key = tl.load(unrounded + p.row * UNROUNDED + KEY).to(tl.int64).to(tl.uint32)
    return noise_of(key, p.position.to(tl.uint32))


@triton.jit
def numbers_in_whole(numbering, begin, SIZE: tl.constexpr, RUNS: tl.constexpr):
    """The numbers, low 32 bits, that SIZE elements from `begin` on have in the whole tensor."""
    if RUNS:
        i = begin + tl.arange(0, SIZE)
        if numbering.run != 0:
            i = i // numbering.run * numbering.pitch + i % numbering.run
        number = (numbering.first + i).to(tl.uint32)
    else:
        number = (numbering.first + begin).to(tl.uint32) + tl.arange(0, SIZE).to(tl.uint32)
    return number


# ---- streams -------------------------------------------------------------------------------------


@triton.constexpr_function
def at_once(*dtypes):
    """Elements that the accesses of a VECTOR take: 16 bytes of the widest stream."""
    return 128 // max(dtype.primitive_bitwidth for dtype in dtypes if dtype is not None)


@triton.jit
def stream(address, begin, dtype: tl.constexpr, SIZE: tl.constexpr, VECTOR: tl.constexpr):
    """Pointers to SIZE elements."""
    STORED: tl.constexpr = tl.uint16 if dtype == tl.bfloat16 or dtype == tl.float16 else dtype
    first = address.to(tl.pointer_type(STORED)) + begin
    if VECTOR:
        BYTES: tl.constexpr = VECTOR * dtype.primitive_bitwidth // 8
        first = tl.multiple_of(first, BYTES)
    return first + tl.arange(0, SIZE)


@triton.jit
def inside(size, SIZE: tl.constexpr, VECTOR: tl.constexpr):
    return tl.full([SIZE], 1, tl.int1) if VECTOR else tl.arange(0, SIZE) < size


@triton.jit
def only(here, present):
    """`here`, if there is the stream. Not by `&`, which Triton 3.9's interpreter widens."""
    return tl.where(present, here, False)


@triton.jit
def read(
    address,
    begin,
    here,
    dtype: tl.constexpr,
    T: tl.constexpr,
    SIZE: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """SIZE elements of a stream of dtype, as T."""
    return widen(tl.load(stream(address, begin, dtype, SIZE, VECTOR), here, 0), dtype).to(T)


@triton.jit
def write(
    address, begin, x, random, here, dtype: tl.constexpr, SIZE: tl.constexpr, VECTOR: tl.constexpr
):
    tl.store(stream(address, begin, dtype, SIZE, VECTOR), narrow(x, random, dtype), here)


@triton.jit
def read_weight(
    p,
    begin,
    here,
    weights: tl.constexpr,
    T: tl.constexpr,
    storage: tl.constexpr,
    SIZE: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """The weight as it is computed with."""
    if storage == "master":
        w = read(p.companion, begin, here, T, T, SIZE, VECTOR)
    else:
        w = read(p.w, begin, here, weights, T, SIZE, VECTOR)
        if storage == "kahan":
            w = w + read(p.companion, begin, here, weights, T, SIZE, VECTOR)
    return w


@triton.jit
def write_weight(
    p,
    begin,
    w,
    random,
    here,
    weights: tl.constexpr,
    T: tl.constexpr,
    storage: tl.constexpr,
    SIZE: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Returns the weight as the model sees it."""
    stored = narrow(w, random if storage == "stochastic" else None, weights)
    tl.store(stream(p.w, begin, weights, SIZE, VECTOR), stored, here)
    seen = widen(stored, weights)
    if storage == "master":
        tl.store(stream(p.companion, begin, T, SIZE, VECTOR), w, here)
    if storage == "kahan":
        write(p.companion, begin, w - seen, None, here, weights, SIZE, VECTOR)
    return seen
