"""The Triton kernels: the rule of csrc/update.h, same names in same order, and the launches.

Tensors reach a kernel by their addresses, so one launch takes all of them:

    tensors   int64, a row of TENSOR words each: W, M, V, VMAX, A (addresses; 0 where there is no
              such stream), NUMEL, CAUTIOUS (0 or 1)
    gradients int64, the addresses of the tensors' gradients
    rows      int32, the tensors' rows in the next two tables
    pieces    int32, a pair for each program: a tensor, and which piece of it. A piece is a chunk
              (CHUNK elements) or, for the sums of SWD, a span of chunks
    numbers   a row of Coefficients for each group and step count, in the type of the elements
    exact     float64, a row of EXACT: what the kernels that finish a sum need unrounded

Both come from the host, or in a CUDA graph, which the host does not see, from coefficients_kernel.

A chunk that is whole and whose streams are all aligned is read and written 16 bytes at a time, any
other one element by element under a mask. Nothing is tuned at run time: a step cannot be repeated.

Same bits as on the CPU: launch with `enable_fp_fusion=False`, so that nothing is contracted.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# These functions are Triton's language, not Python's.

from __future__ import annotations

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl

from wdkernels.coefficients import Coefficients

# Elements a program updates: with 4 warps each thread has two 16-byte loads of every stream in
# flight (float32), and even a small model occupies the device.
CHUNK = tl.constexpr(1024)
SPAN = tl.constexpr(16 * 1024)
# Any other chunk is taken in blocks of this size: in one piece it would need as many registers
# again, and leave room for half as many programs.
TAIL = tl.constexpr(256)
TENSORS = tl.constexpr(128)  # whose numbers a program computes
LANES = tl.constexpr(1024)  # accumulators that add up partial sums, always in the same order

TENSOR = tl.constexpr(8)  # words
W, M, V, VMAX, A, NUMEL, CAUTIOUS = map(tl.constexpr, range(7))

NUMBERS = tl.constexpr(len(Coefficients._fields))
DECAY = tl.constexpr(Coefficients._fields.index("decay"))

EXACT = tl.constexpr(3)
LAMBDA, ONE_MINUS_BETA2, BIAS_CORRECTION2 = map(tl.constexpr, range(3))

# A group's hyper-parameters, with SCALE 0 (lr), 1 (relative_lr) or 2 (corrected), and two schedules
LR, LR_MAX, BETA1, BETA2, EPS, WEIGHT_DECAY, SIGN, SCALE, SCHEDULES = map(tl.constexpr, range(9))
KIND, START, END, STEPS, SCHEDULE = map(tl.constexpr, range(5))
CONSTANT, WINDOW, LINEAR, COSINE = map(tl.constexpr, range(4))
HYPER = tl.constexpr(16)
PI = tl.constexpr(math.pi)


# ---- the rule ----------------------------------------------------------------------------------


class Element(NamedTuple):
    """A chunk of every stream the step reads or writes."""

    w: Any
    g: Any
    m: Any
    v: Any
    vmax: Any
    a: Any


class ProjectionTerms(NamedTuple):
    """What Selective Projection Decay sums over a tensor: the terms of a chunk, or float64 sums."""

    alignment: Any  # g (w - a); its sum is -c
    distance2: Any  # (w~ - a)^2
    growth2: Any  # (w~ - a)^2 - (w - a)^2


@triton.jit
def square_root(x):
    return tl.sqrt_rn(x) if x.dtype == tl.float32 else tl.sqrt(x)


@triton.jit
def quotient(x, y):
    return tl.div_rn(x, y) if x.dtype == tl.float32 else x / y


@triton.jit
def lerp(a, b, weight):
    return tl.where(weight < 0.5, a + weight * (b - a), b - (1.0 - weight) * (b - a))


@triton.jit
def second_moment(v, g, weight):
    mean = lerp(v, g * g, weight)
    return tl.where(mean - mean == 0, mean, (1 - weight) * v + (weight * g) * g)


@triton.jit
def maximum(vmax, v):
    return tl.where(vmax > v, vmax, v)


@triton.jit
def opposed(u, d):
    return ((u > 0) & (d < 0)) | ((u < 0) & (d > 0))


@triton.jit
def update(x, c, amsgrad, cautious, decay: tl.constexpr):
    d = x.w - x.a

    g = c.scale * x.g  # ascent or descent
    if decay == "l2":
        g = g + c.decay * d  # penalty into the gradient

    m = lerp(x.m, g, c.one_minus_beta1)  # first moment
    v = second_moment(x.v, g, c.one_minus_beta2)
    vmax = maximum(x.vmax, v)

    numerator = m
    if decay == "unmixed":
        numerator = numerator + c.decay * d
    u = quotient(c.step_size * numerator, square_root(tl.where(amsgrad, vmax, v)) + c.eps)

    if decay == "decoupled":
        pull = c.decay * d
        u = tl.where(cautious & opposed(u, d), u, pull + u)  # summed first: w is rounded once
    return Element(w=x.w - u, g=x.g, m=m, v=v, vmax=vmax, a=x.a)


@triton.jit
def projection_terms(w, g, a, stepped):
    before = w - a
    after = stepped - a
    return ProjectionTerms(
        alignment=g * before,
        distance2=after * after,
        growth2=(stepped - w) * (after + before),
    )


@triton.jit
def project(w, a, shrink):
    return w - shrink * (w - a)


@triton.jit
def stable_decay(decay, mean_square):
    return tl.where(mean_square == 0, 0.0, decay / tl.sqrt(mean_square))


@triton.jit
def selected_decay(lambda_t, sums):
    after = tl.sqrt(sums.distance2)
    shorter2 = sums.distance2 - sums.growth2
    before = tl.sqrt(tl.where(shorter2 > 0, shorter2, 0.0))
    ratio = sums.growth2 / ((after + before) * after)  # (after - before) / after
    r = tl.where(ratio < 0, 0.0, tl.where(ratio > 1, 1.0, ratio))  # NaN stays NaN
    selected = (sums.alignment > 0) & (sums.distance2 != 0)  # c < 0
    return tl.where(selected, lambda_t * r, 0.0)


# ---- streams -----------------------------------------------------------------------------------


class Piece(NamedTuple):
    """What a program works on: the words of its tensor, and which of the elements."""

    w: Any
    g: Any
    m: Any
    v: Any
    vmax: Any
    a: Any
    cautious: Any
    tensor: Any
    row: Any
    begin: Any
    size: Any  # of the tensor, from `begin` on
    aligned: Any  # every stream to 16 bytes


@triton.jit
def piece_of(tensors, gradients, rows, pieces, SIZE: tl.constexpr):
    place = pieces + 2 * tl.program_id(0).to(tl.int64)
    tensor = tl.load(place).to(tl.int64)
    begin = tl.load(place + 1).to(tl.int64) * SIZE
    words = tensors + tensor * TENSOR
    w = tl.load(words + W)
    m = tl.load(words + M)
    v = tl.load(words + V)
    vmax = tl.load(words + VMAX)
    a = tl.load(words + A)
    g = tl.load(gradients + tensor)
    return Piece(
        w=w,
        g=g,
        m=m,
        v=v,
        vmax=vmax,
        a=a,
        cautious=tl.load(words + CAUTIOUS) != 0,
        tensor=tensor,
        row=tl.load(rows + tensor),
        begin=begin,
        size=tl.load(words + NUMEL) - begin,
        aligned=(w | g | m | v | vmax | a) % 16 == 0,
    )


@triton.jit
def coefficients_of(numbers, row):
    c = numbers + row * NUMBERS
    return Coefficients(
        scale=tl.load(c),
        one_minus_beta1=tl.load(c + 1),
        one_minus_beta2=tl.load(c + 2),
        step_size=tl.load(c + 3),
        eps=tl.load(c + 4),
        decay=tl.load(c + 5),
        average=tl.load(c + 6),
    )


@triton.jit
def stream(address, begin, T: tl.constexpr, SIZE: tl.constexpr, WHOLE: tl.constexpr):
    """Pointers to SIZE elements; to a whole chunk, which is aligned, 16 bytes at a time."""
    first = address.to(tl.pointer_type(T)) + begin
    if WHOLE:
        first = tl.multiple_of(first, 16)
    return first + tl.arange(0, SIZE)


@triton.jit
def inside(size, SIZE: tl.constexpr, WHOLE: tl.constexpr):
    return tl.full([SIZE], 1, tl.int1) if WHOLE else tl.arange(0, SIZE) < size


@triton.jit
def only(here, present):
    """`here`, if there is the stream. Not by `&`, which Triton 3.9's interpreter widens."""
    return tl.where(present, here, False)


# ---- the step ----------------------------------------------------------------------------------


@triton.jit
def update_block(
    p,
    offset,
    c,
    decay: tl.constexpr,
    ANCHORED: tl.constexpr,
    AMSGRAD: tl.constexpr,
    CAUTIOUSLY: tl.constexpr,
    SIZE: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """The step of SIZE elements, `offset` past the chunk's first; their part of the sums."""
    T: tl.constexpr = c.scale.dtype
    here = inside(p.size - offset, SIZE, WHOLE)
    amsgrad = p.vmax != 0 if AMSGRAD else False
    cautious = p.cautious if CAUTIOUSLY else False
    zero = tl.zeros([SIZE], T)

    begin = p.begin + offset
    w = stream(p.w, begin, T, SIZE, WHOLE)
    g = stream(p.g, begin, T, SIZE, WHOLE)
    m = stream(p.m, begin, T, SIZE, WHOLE)
    v = stream(p.v, begin, T, SIZE, WHOLE)
    vmax = stream(p.vmax, begin, T, SIZE, WHOLE)
    a = stream(p.a, begin, T, SIZE, WHOLE)
    x = Element(
        w=tl.load(w, here, 0.0),
        g=tl.load(g, here, 0.0),
        m=tl.load(m, here, 0.0),
        v=tl.load(v, here, 0.0),
        vmax=tl.load(vmax, only(here, amsgrad), 0.0) if AMSGRAD else zero,
        a=tl.load(a, only(here, p.a != 0), 0.0) if ANCHORED else zero,
    )
    y = update(x, c, amsgrad, cautious, decay)
    tl.store(w, y.w, here)
    tl.store(m, y.m, here)
    tl.store(v, y.v, here)
    if AMSGRAD:
        tl.store(vmax, y.vmax, only(here, amsgrad))

    if decay == "projection":
        terms = projection_terms(x.w, c.scale * x.g, x.a, y.w)
        sums = ProjectionTerms(
            alignment=tl.sum(tl.where(here, terms.alignment, 0.0).to(tl.float64)),
            distance2=tl.sum(tl.where(here, terms.distance2, 0.0).to(tl.float64)),
            growth2=tl.sum(tl.where(here, terms.growth2, 0.0).to(tl.float64)),
        )
    else:
        sums = ProjectionTerms(alignment=0.0, distance2=0.0, growth2=0.0)
    return sums


@triton.jit
def update_kernel(
    tensors,
    gradients,
    rows,
    chunks,
    numbers,
    partials,
    decay: tl.constexpr,
    ANCHORED: tl.constexpr,
    AMSGRAD: tl.constexpr,
    CAUTIOUSLY: tl.constexpr,
):
    """The step of a chunk; for `projection` also its part of the sums (partials, [chunks, 3]).

    The constants in capitals say what some tensor of the launch has, its words what each has.
    """
    p = piece_of(tensors, gradients, rows, chunks, CHUNK)
    c = coefficients_of(numbers, p.row)
    alignment = tl.zeros([1], tl.float64)
    distance2 = tl.zeros([1], tl.float64)
    growth2 = tl.zeros([1], tl.float64)
    if (p.size >= CHUNK) & p.aligned:
        sums = update_block(p, 0, c, decay, ANCHORED, AMSGRAD, CAUTIOUSLY, CHUNK, True)
        alignment += sums.alignment
        distance2 += sums.distance2
        growth2 += sums.growth2
    else:
        for k in range(0, tl.minimum(p.size, CHUNK).to(tl.int32), TAIL):
            part = update_block(p, k, c, decay, ANCHORED, AMSGRAD, CAUTIOUSLY, TAIL, False)
            alignment += part.alignment
            distance2 += part.distance2
            growth2 += part.growth2
    if decay == "projection":
        chunk = partials + 3 * tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
        tl.store(chunk, alignment)
        tl.store(chunk + 1, distance2)
        tl.store(chunk + 2, growth2)


# ---- SWD: V before the step --------------------------------------------------------------------


@triton.jit
def square_terms(
    p, offset, one_minus_beta2, T: tl.constexpr, AMSGRAD: tl.constexpr, WHOLE: tl.constexpr
):
    """g^2, or with amsgrad the vmax this step will have: the maximum has no recurrence, so it is
    computed here and once more in the step."""
    here = inside(p.size - offset, CHUNK, WHOLE)
    begin = p.begin + offset
    g = tl.load(stream(p.g, begin, T, CHUNK, WHOLE), here, 0.0)
    terms = g.to(tl.float64) * g.to(tl.float64)
    if AMSGRAD:
        amsgrad = p.vmax != 0
        v = tl.load(stream(p.v, begin, T, CHUNK, WHOLE), only(here, amsgrad), 0.0)
        vmax = tl.load(stream(p.vmax, begin, T, CHUNK, WHOLE), only(here, amsgrad), 0.0)
        vmax = maximum(vmax, second_moment(v, g, one_minus_beta2))
        terms = tl.where(amsgrad, tl.where(here, vmax.to(tl.float64), 0.0), terms)
    return terms


@triton.jit
def reduce_kernel(tensors, gradients, rows, spans, numbers, partials, AMSGRAD: tl.constexpr):
    """A span's part of the sums (partials, [spans])."""
    T: tl.constexpr = numbers.dtype.element_ty
    p = piece_of(tensors, gradients, rows, spans, SPAN)
    one_minus_beta2 = coefficients_of(numbers, p.row).one_minus_beta2
    sums = tl.zeros([CHUNK], tl.float64)
    if (p.size >= SPAN) & p.aligned:
        for offset in range(0, SPAN, CHUNK):
            sums += square_terms(p, offset, one_minus_beta2, T, AMSGRAD, True)
    else:
        for offset in range(0, tl.minimum(p.size, SPAN).to(tl.int32), CHUNK):
            sums += square_terms(p, offset, one_minus_beta2, T, AMSGRAD, False)
    tl.store(partials + tl.program_id(0).to(tl.int64), tl.sum(sums))


@triton.jit
def total(partials, begin, end, STRIDE: tl.constexpr):
    sums = tl.zeros([LANES], tl.float64)
    for first in range(begin, end, LANES):
        k = first + tl.arange(0, LANES)
        sums += tl.load(partials + k.to(tl.int64) * STRIDE, k < end, 0.0)
    return tl.sum(sums)


@triton.jit
def fold_kernel(rows, kept, firsts, exact, partials, means):
    """A tensor's part of V. sum(v) obeys the recurrence of v itself, so it is kept (addresses of
    its place in `kept`) and a sum over the gradient replaces one over v."""
    i = tl.program_id(0).to(tl.int64)
    row = exact + tl.load(rows + i) * EXACT
    sums = total(partials, tl.load(firsts + i), tl.load(firsts + i + 1), 1)
    address = tl.load(kept + i)
    if address != 0:
        place = address.to(tl.pointer_type(tl.float64))
        sums = lerp(tl.load(place), sums, tl.load(row + ONE_MINUS_BETA2))
        tl.store(place, sums)
    tl.store(means + i, sums / tl.load(row + BIAS_CORRECTION2))


@triton.jit(do_not_specialize=["count", "elements", "length"])
def stabilise_kernel(means, count, elements, exact, numbers, length):
    """V = sum(means) / elements, and with it the decay in each of `length` rows of numbers."""
    mean_square = total(means, 0, count, 1) / elements.to(tl.float64)
    for first in range(0, length, LANES):
        row = first + tl.arange(0, LANES)
        decay = tl.load(exact + row * EXACT + LAMBDA, row < length, 0.0)
        tl.store(numbers + row * NUMBERS + DECAY, stable_decay(decay, mean_square), row < length)


# ---- SPD: the second touch ---------------------------------------------------------------------


@triton.jit
def select_kernel(rows, firsts, exact, partials, shrink):
    """A tensor's lambda r."""
    i = tl.program_id(0).to(tl.int64)
    begin = tl.load(firsts + i)
    end = tl.load(firsts + i + 1)
    sums = ProjectionTerms(
        alignment=total(partials, begin, end, 3),
        distance2=total(partials + 1, begin, end, 3),
        growth2=total(partials + 2, begin, end, 3),
    )
    lambda_t = tl.load(exact + tl.load(rows + i) * EXACT + LAMBDA)
    tl.store(shrink + i, selected_decay(lambda_t, sums))


@triton.jit
def pull_chunk(p, shrink, ANCHORED: tl.constexpr, WHOLE: tl.constexpr):
    T: tl.constexpr = shrink.dtype
    here = inside(p.size, CHUNK, WHOLE)
    pointers = stream(p.w, p.begin, T, CHUNK, WHOLE)
    w = tl.load(pointers, here, 0.0)
    if ANCHORED:
        a = tl.load(stream(p.a, p.begin, T, CHUNK, WHOLE), only(here, p.a != 0), 0.0)
    else:
        a = tl.zeros([CHUNK], T)
    tl.store(pointers, project(w, a, shrink), here)


@triton.jit
def pull_kernel(tensors, gradients, rows, chunks, shrink, ANCHORED: tl.constexpr):
    """The projection of a chunk, if its tensor was selected."""
    p = piece_of(tensors, gradients, rows, chunks, CHUNK)
    tensor_shrink = tl.load(shrink + p.tensor)
    if tensor_shrink != 0:
        if (p.size >= CHUNK) & p.aligned:
            pull_chunk(p, tensor_shrink, ANCHORED, True)
        else:
            pull_chunk(p, tensor_shrink, ANCHORED, False)


# ---- numbers on the device ---------------------------------------------------------------------


@triton.jit
def factor(schedule, t, here):
    """A schedule of csrc/coefficients.h: SCHEDULE numbers from `schedule` on."""
    kind = tl.load(schedule + KIND, here, 0.0)
    start = tl.load(schedule + START, here, 0.0)
    end = tl.load(schedule + END, here, 0.0)
    progress = (t - 1) / tl.load(schedule + STEPS, here, 1.0)
    progress = tl.where(progress < 1, progress, 1.0)
    wave = (1 + tl.cos(progress * PI)) / 2
    share = tl.where(kind == COSINE, wave, 1 - progress)  # of the start value
    ramp = start * share + end * (1 - share)
    window = tl.where((start <= t) & (t < end), 1.0, 0.0)
    return tl.where(kind == CONSTANT, 1.0, tl.where(kind == WINDOW, window, ramp))


@triton.jit(do_not_specialize=["count"])
def coefficients_kernel(counters, hypers, numbers, exact, count, decay: tl.constexpr):
    """Counts the steps of `count` tensors, and computes the row of numbers of each.

    counters: int64 [count, 3], the address of a step count, 1 if it is a double, and the group;
    hypers: float64 [groups, HYPER]. The formulas are those of csrc/coefficients.h.
    """
    i = tl.program_id(0) * TENSORS + tl.arange(0, TENSORS)
    here = i < count
    address = tl.load(counters + 3 * i, here, 0)
    double = tl.load(counters + 3 * i + 1, here, 0) != 0
    single_step = address.to(tl.pointer_type(tl.float32))
    double_step = address.to(tl.pointer_type(tl.float64))
    t = tl.load(single_step, here & ~double, 0.0).to(tl.float64)
    t = tl.where(double, tl.load(double_step, here & double, 0.0), t) + 1
    tl.store(single_step, t, here & ~double)
    tl.store(double_step, t, here & double)

    h = hypers + tl.load(counters + 3 * i + 2, here, 0) * HYPER
    lr = tl.load(h + LR, here, 0.0)
    beta1 = tl.load(h + BETA1, here, 0.0)
    beta2 = tl.load(h + BETA2, here, 0.0)
    bias_correction1 = 1 - tl.exp(t * tl.log(beta1))
    bias_correction2 = 1 - tl.exp(t * tl.log(beta2))
    root = tl.sqrt(bias_correction2)
    lambda_t = tl.load(h + WEIGHT_DECAY, here, 0.0)
    lambda_t = lambda_t * factor(h + SCHEDULES, t, here)
    lambda_t = lambda_t * factor(h + SCHEDULES + SCHEDULE, t, here)
    if decay == "unmixed":
        lambda_t = lambda_t * bias_correction1
    if decay == "decoupled":
        scale = tl.load(h + SCALE, here, 0.0)
        relative = tl.where(scale == 0, lr, lr / tl.load(h + LR_MAX, here, 1.0))
        lambda_t = lambda_t * tl.where(scale == 2, lr * relative, relative)

    row = numbers + i * NUMBERS
    tl.store(row, tl.load(h + SIGN, here, 0.0), here)
    tl.store(row + 1, 1 - beta1, here)
    tl.store(row + 2, 1 - beta2, here)
    tl.store(row + 3, lr * root / bias_correction1, here)
    tl.store(row + 4, tl.load(h + EPS, here, 0.0) * root, here)
    tl.store(row + 5, lambda_t, here)
    tl.store(row + 6, 0.0, here)
    tl.store(exact + i * EXACT + LAMBDA, lambda_t, here)
    tl.store(exact + i * EXACT + ONE_MINUS_BETA2, 1 - beta2, here)
    tl.store(exact + i * EXACT + BIAS_CORRECTION2, bias_correction2, here)
