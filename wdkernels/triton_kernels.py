"""The Triton kernels of a step: the rule of triton_rule.py over chunks, and the sums around it.

What they are given is described in triton_streams.py; and for sums:

    firsts    int32, each tensor's first chunk (or span) and, last, how many there are of all
    partials  float64, what each chunk adds to the sums over its tensor, in PARTS columns, of which
              the first are SUMS; or what each span does, in a single one
    sums      float64, a row of SUMS for each tensor with a gradient (wdkernels/sums.py)

A kernel that needs a tensor's sums folds the partials, which saves a launch; where fold_kernel has
left them in `sums`, for a step that is taken phase by phase, `partials` is None.

Nothing is tuned at run time: a step cannot be repeated.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="attr-defined, call-arg"
# These functions are Triton's language, not Python's.

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from wdkernels.coefficients import Coefficients
from wdkernels.sums import SUMS
from wdkernels.telemetry import COLUMNS
from wdkernels.triton_rule import (
    Element,
    ProjectionTerms,
    average,
    kept_sum,
    maximum,
    measured_terms,
    noise,
    product,
    project,
    projection_ratio,
    projection_terms,
    second_moment,
    selected,
    swd_decay,
    update,
)
from wdkernels.triton_streams import (
    ACTIVE,
    EXP_AVG_SQ_SUM,
    NUMBERS,
    SCALE,
    SKIP,
    TOTAL,
    UNROUNDED,
    UNSCALE,
    WORDS,
    at_once,
    coefficients_of,
    columns,
    inside,
    noise_in,
    numbers_in_whole,
    only,
    piece_of,
    proceeds,
    read,
    read_weight,
    scale_of,
    store_row,
    write,
    write_weight,
)
from wdkernels.triton_tables import Unrounded

# Elements a program updates: with 4 warps each thread has two 16-byte loads of every stream in
# flight (float32), and even a small model occupies the device.
CHUNK = tl.constexpr(1024)
SPAN = tl.constexpr(16 * 1024)
# Any other chunk is taken in blocks of this size: in one piece it would need as many registers
# again, and leave room for half as many programs.
TAIL = tl.constexpr(256)
LANES = tl.constexpr(1024)  # accumulators that add up partial sums, always in the same order

(NUMBER_OF_DECAY,) = columns(Coefficients._fields, "decay")
DECAY, ONE_MINUS_BETA2, BIAS_CORRECTION1, BIAS_CORRECTION2, LR = columns(
    Unrounded._fields, "decay one_minus_beta2 bias_correction1 bias_correction2 lr"
)
N_SUMS = tl.constexpr(len(SUMS))
PARTS = tl.constexpr(1 << (len(SUMS) - 1).bit_length())  # a block has a power of two
GRADIENT2, MAXIMUM, WEIGHT2, UPDATE2, DECAY2, DISTANCE2, UPDATE_WEIGHT, RATE = columns(
    SUMS, "gradient2 maximum weight2 update2 decay2 distance2 update_weight rate"
)
ALIGNMENT, STEPPED_DISTANCE2, GROWTH2 = columns(SUMS, "alignment stepped_distance2 growth2")
TOLD = tl.constexpr(len(COLUMNS))
TelemetryRow = NamedTuple("TelemetryRow", [(name, Any) for name in COLUMNS])  # type: ignore[misc]


# ---- sums ----------------------------------------------------------------------------------------


@triton.jit
def add(sums, column: tl.constexpr, terms, here):
    """`sums`, with those of the terms added to one of its columns."""
    part = tl.sum(tl.where(here, terms, 0.0).to(tl.float64))
    return sums + tl.where(tl.arange(0, PARTS) == column, part, 0.0)


@triton.jit
def total(partials, begin, end, STRIDE: tl.constexpr):
    sums = tl.zeros([LANES], tl.float64)
    for first in range(begin, end, LANES):
        k = first + tl.arange(0, LANES)
        sums += tl.load(partials + k.to(tl.int64) * STRIDE, k < end, 0.0)
    return tl.sum(sums)


@triton.jit
def row_of_sums(sums, tensors, i):
    """Where those of tensor i begin."""
    return sums + tl.load(tensors + i * WORDS + ACTIVE) * N_SUMS


@triton.jit
def sum_of(column: tl.constexpr, partials, begin, end, row):
    """A tensor's, of its chunks from `begin` to `end`, or as it has been folded into its row."""
    if partials is not None:
        found = total(partials + column, begin, end, PARTS)
    else:
        found = tl.load(row + column)
    return found


@triton.jit
def projection_sums(partials, begin, end, row):
    return ProjectionTerms(
        alignment=sum_of(ALIGNMENT, partials, begin, end, row),
        stepped_distance2=sum_of(STEPPED_DISTANCE2, partials, begin, end, row),
        growth2=sum_of(GROWTH2, partials, begin, end, row),
    )


@triton.jit
def fold_kernel(tensors, firsts, partials, sums, MEASURE: tl.constexpr, PROJECT: tl.constexpr):
    """What an update has summed over a tensor, into its row; but for the gradient's squares, which
    a reduction has left there."""
    i = tl.program_id(0).to(tl.int64)
    begin = tl.load(firsts + i)
    end = tl.load(firsts + i + 1)
    row = row_of_sums(sums, tensors, i)
    for column in tl.static_range(
        WEIGHT2 if MEASURE else ALIGNMENT, N_SUMS if PROJECT else ALIGNMENT
    ):
        tl.store(row + column, total(partials + column, begin, end, PARTS))


@triton.jit
def fold_spans_kernel(tensors, firsts, partials, sums, SQUARES: tl.constexpr, MAXIMA: tl.constexpr):
    """What reduce_kernel has summed over a tensor, into its row: maxima, where it has them and they
    are asked for, or squares, unless they are known already."""
    i = tl.program_id(0).to(tl.int64)
    row = row_of_sums(sums, tensors, i)
    found = total(partials, tl.load(firsts + i), tl.load(firsts + i + 1), 1)
    maxima = tl.load(tensors + i * WORDS + EXP_AVG_SQ_SUM) == 0 if MAXIMA else False
    if MAXIMA:
        tl.store(row + MAXIMUM, found, maxima)
    if SQUARES:
        tl.store(row + GRADIENT2, found, ~maxima if MAXIMA else None)


# ---- the step ------------------------------------------------------------------------------------


@triton.jit
def update_block(
    p,
    offset,
    c,
    random,
    sums,
    decay: tl.constexpr,
    weights: tl.constexpr,
    moments: tl.constexpr,
    anchors: tl.constexpr,
    storage: tl.constexpr,
    AMSGRAD: tl.constexpr,
    CAUTIOUSLY: tl.constexpr,
    AVERAGED: tl.constexpr,
    RUNS: tl.constexpr,
    MEASURE: tl.constexpr,
    SIZE: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """The step of SIZE elements, `offset` past the chunk's first; the sums with their part."""
    T: tl.constexpr = c.scale.dtype
    here = inside(p.size - offset, SIZE, VECTOR)
    amsgrad = p.vmax != 0 if AMSGRAD else False
    cautious = p.cautious if CAUTIOUSLY else False
    zero = tl.zeros([SIZE], T)

    begin = p.begin + offset
    x = Element(
        w=read_weight(p, begin, here, weights, T, storage, SIZE, VECTOR),
        g=read(p.g, begin, here, weights, T, SIZE, VECTOR),
        m=read(p.m, begin, here, moments, T, SIZE, VECTOR),
        v=read(p.v, begin, here, moments, T, SIZE, VECTOR),
        vmax=read(p.vmax, begin, only(here, amsgrad), moments, T, SIZE, VECTOR)
        if AMSGRAD
        else zero,
        a=read(p.a, begin, only(here, p.a != 0), anchors, T, SIZE, VECTOR)
        if anchors is not None
        else zero,
        u=zero,
        denominator=zero,
    )
    y = update(x, c, amsgrad, cautious, decay)

    element = numbers_in_whole(p.numbering, begin, SIZE, RUNS)
    bits = noise(random.moments, element)
    write(p.m, begin, y.m, bits, here, moments, SIZE, VECTOR)
    write(p.v, begin, y.v, bits >> 16, here, moments, SIZE, VECTOR)
    if AMSGRAD:
        write(p.vmax, begin, y.vmax, bits >> 16, only(here, amsgrad), moments, SIZE, VECTOR)
    bits = noise(random.weight, element)
    seen = write_weight(p, begin, y.w, bits, here, weights, T, storage, SIZE, VECTOR)
    if AVERAGED and decay != "projection":  # whose weights are not final yet
        # The anchor, which may be the average, has been read.
        averaged = only(here, p.ema != 0)
        ema = average(read(p.ema, begin, averaged, T, T, SIZE, VECTOR), seen, c)
        write(p.ema, begin, ema, None, averaged, T, SIZE, VECTOR)

    if decay == "projection":
        terms = projection_terms(x.w, c.scale * x.g, x.a, y.w)
        sums = add(sums, ALIGNMENT, terms.alignment, here)
        sums = add(sums, STEPPED_DISTANCE2, terms.stepped_distance2, here)
        sums = add(sums, GROWTH2, terms.growth2, here)
    if MEASURE:
        measured = measured_terms(x.w, y, c, cautious, decay)
        sums = add(sums, GRADIENT2, measured.gradient2, here)
        sums = add(sums, WEIGHT2, measured.weight2, here)
        sums = add(sums, UPDATE2, measured.update2, here)
        sums = add(sums, DECAY2, measured.decay2, here)
        sums = add(sums, DISTANCE2, measured.distance2, here)
        sums = add(sums, UPDATE_WEIGHT, measured.update_weight, here)
        sums = add(sums, RATE, measured.rate, here)
    return sums


@triton.jit
def update_kernel(
    tensors,
    gradients,
    rows,
    chunks,
    numbers,
    unrounded,
    decision,
    partials,
    decay: tl.constexpr,
    weights: tl.constexpr,
    moments: tl.constexpr,
    anchors: tl.constexpr,
    storage: tl.constexpr,
    AMSGRAD: tl.constexpr,
    CAUTIOUSLY: tl.constexpr,
    AVERAGED: tl.constexpr,
    RUNS: tl.constexpr,
    MEASURE: tl.constexpr,
):
    """The step of a chunk; for `projection` and telemetry its part of the sums, too."""
    T: tl.constexpr = numbers.dtype.element_ty
    copies: tl.constexpr = T if storage == "master" or AVERAGED else None
    AT_ONCE: tl.constexpr = at_once(weights, moments, anchors, copies)
    PROJECT: tl.constexpr = decay == "projection"
    p = piece_of(tensors, gradients, rows, chunks, decision, CHUNK)
    c = coefficients_of(numbers, p.row, decision)
    random = noise_in(p, unrounded)
    sums = tl.zeros([PARTS], tl.float64)
    if (p.size >= CHUNK) & p.aligned:
        sums = update_block(
            p,
            0,
            c,
            random,
            sums,
            decay,
            weights,
            moments,
            anchors,
            storage,
            AMSGRAD,
            CAUTIOUSLY,
            AVERAGED,
            RUNS,
            MEASURE,
            CHUNK,
            AT_ONCE,
        )
    else:
        for k in range(0, tl.minimum(p.size, CHUNK).to(tl.int32), TAIL):
            sums = update_block(
                p,
                k,
                c,
                random,
                sums,
                decay,
                weights,
                moments,
                anchors,
                storage,
                AMSGRAD,
                CAUTIOUSLY,
                AVERAGED,
                RUNS,
                MEASURE,
                TAIL,
                0,
            )
    if PROJECT or MEASURE:
        FIRST: tl.constexpr = GRADIENT2 if MEASURE else ALIGNMENT
        LAST: tl.constexpr = N_SUMS if PROJECT else ALIGNMENT
        column = tl.arange(0, PARTS)
        chunk = partials + PARTS * tl.program_id(0).to(tl.int64)
        tl.store(chunk + column, sums, (column >= FIRST) & (column < LAST))


# ---- before the step: the gradients' norm, SWD's V -----------------------------------------------


@triton.jit
def reduced_terms(
    p,
    offset,
    c,
    weights: tl.constexpr,
    moments: tl.constexpr,
    T: tl.constexpr,
    MAXIMA: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """g^2; or of a tensor with maxima, if they are asked for, the vmax that this step will have: it
    has no recurrence, so it is computed here and once more in the step."""
    here = inside(p.size - offset, CHUNK, VECTOR)
    begin = p.begin + offset
    g = read(p.g, begin, here, weights, T, CHUNK, VECTOR)
    terms = product(g, g)
    if MAXIMA:
        amsgrad = p.vmax != 0
        v = read(p.v, begin, only(here, amsgrad), moments, T, CHUNK, VECTOR)
        vmax = read(p.vmax, begin, only(here, amsgrad), moments, T, CHUNK, VECTOR)
        vmax = maximum(vmax, second_moment(v, c.scale * g, c.one_minus_beta2))
        terms = tl.where(amsgrad, tl.where(here, vmax.to(tl.float64), 0.0), terms)
    return terms


@triton.jit
def reduce_kernel(
    tensors,
    gradients,
    rows,
    spans,
    numbers,
    decision,
    partials,
    weights: tl.constexpr,
    moments: tl.constexpr,
    MAXIMA: tl.constexpr,
):
    """A span's part of the sums (partials, [spans]); only MAXIMA asks for the numbers."""
    T: tl.constexpr = tl.float64 if weights == tl.float64 else tl.float32
    AT_ONCE: tl.constexpr = at_once(weights, moments if MAXIMA else None)
    p = piece_of(tensors, gradients, rows, spans, decision, SPAN)
    c = coefficients_of(numbers, p.row, decision) if MAXIMA else None
    sums = tl.zeros([CHUNK], tl.float64)
    if (p.size >= SPAN) & p.aligned:
        for offset in range(0, SPAN, CHUNK):
            sums += reduced_terms(p, offset, c, weights, moments, T, MAXIMA, AT_ONCE)
    else:
        for offset in range(0, tl.minimum(p.size, SPAN).to(tl.int32), CHUNK):
            sums += reduced_terms(p, offset, c, weights, moments, T, MAXIMA, 0)
    tl.store(partials + tl.program_id(0).to(tl.int64), tl.sum(sums))


@triton.jit(do_not_specialize=["count"])
def decide_kernel(
    squares,
    count,
    limit,
    grad_scale,
    found_inf,
    decision,
    grad_norm,
    skipped,
    SKIP_NONFINITE: tl.constexpr,
):
    """What `count` parts of the gradients' squared norm, a GradScaler's tensors and the `limit` of
    the norm mean for all tensors; None are those that nobody gave or asks for."""
    at = tl.arange(0, 1)
    one = tl.full([1], 1.0, tl.float64)
    unscale = one
    if grad_scale is not None:
        unscale = one / tl.load(grad_scale + at).to(tl.float64)
    skip = one < 0
    if found_inf is not None:
        skip = tl.load(found_inf + at) != 0
    clip = one
    if squares is not None:
        norm = unscale * tl.sqrt(total(squares, 0, count, 1))
        bound = tl.load(limit + at)
        ratio = bound / (norm + 1e-6)
        clip = tl.where((ratio > 1) | (bound == float("inf")), one, ratio)  # NaN stays NaN
        if SKIP_NONFINITE:
            skip = skip | (norm - norm != 0)
        if grad_norm is not None:
            tl.store(grad_norm + at, norm)
    tl.store(decision + SCALE + at, unscale * clip)
    tl.store(decision + UNSCALE + at, unscale)
    tl.store(decision + SKIP + at, tl.where(skip, one, 0.0))
    if skipped is not None:
        tl.store(skipped + at, tl.load(skipped + at) + tl.where(skip, 1, 0))


@triton.jit
def share_of_v_kernel(tensors, rows, firsts, unrounded, decision, partials, sums, shares):
    """What a tensor adds to V. sum(v) obeys the recurrence of v itself, so it is kept, and a sum
    over the gradient replaces one over v."""
    i = tl.program_id(0).to(tl.int64)
    words = tensors + i * WORDS
    numbers = unrounded + tl.load(rows + i) * UNROUNDED
    kept = tl.load(words + EXP_AVG_SQ_SUM)  # 0: there are maxima, where v has any elements
    if partials is not None:
        found = total(partials, tl.load(firsts + i), tl.load(firsts + i + 1), 1)
    else:
        column = tl.where(kept != 0, GRADIENT2, MAXIMUM)
        found = tl.load(row_of_sums(sums, tensors, i) + column)
    if kept != 0:
        kept_at = kept.to(tl.pointer_type(tl.float64))
        size = tl.load(words + TOTAL)
        one_minus_beta2 = tl.load(numbers + ONE_MINUS_BETA2)
        found = kept_sum(tl.load(kept_at), size, found, scale_of(decision), one_minus_beta2)
        tl.store(kept_at, found, proceeds(decision))
    tl.store(shares + i, found / tl.load(numbers + BIAS_CORRECTION2))


@triton.jit(do_not_specialize=["count", "elements", "length"])
def mean_v_kernel(shares, count, elements, unrounded, numbers, length, mean_v):
    """V = sum(shares) / elements, and with it the decay in each of `length` rows of numbers."""
    v = total(shares, 0, count, 1) / elements.to(tl.float64)
    for first in range(0, length, LANES):
        row = first + tl.arange(0, LANES)
        decay = tl.load(unrounded + row * UNROUNDED + DECAY, row < length, 0.0)
        tl.store(numbers + row * NUMBERS + NUMBER_OF_DECAY, swd_decay(decay, v), row < length)
    tl.store(mean_v, v)


# ---- SPD: the second touch -----------------------------------------------------------------------


@triton.jit
def select_kernel(tensors, rows, firsts, unrounded, partials, sums, shrink):
    """A tensor's lambda r."""
    i = tl.program_id(0).to(tl.int64)
    row = row_of_sums(sums, tensors, i) if partials is None else None
    found = projection_sums(partials, tl.load(firsts + i), tl.load(firsts + i + 1), row)
    lambda_t = tl.load(unrounded + tl.load(rows + i) * UNROUNDED + DECAY)
    tl.store(shrink + i, lambda_t * projection_ratio(found))


@triton.jit
def pull_chunk(
    p,
    c,
    random,
    shrink,
    weights: tl.constexpr,
    anchors: tl.constexpr,
    storage: tl.constexpr,
    AVERAGED: tl.constexpr,
    RUNS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    T: tl.constexpr = shrink.dtype
    here = inside(p.size, CHUNK, VECTOR)
    pulled = only(here, shrink != 0) if AVERAGED else here
    w = read_weight(p, p.begin, pulled, weights, T, storage, CHUNK, VECTOR)
    if anchors is not None:
        a = read(p.a, p.begin, only(pulled, p.a != 0), anchors, T, CHUNK, VECTOR)
    else:
        a = tl.zeros([CHUNK], T)
    bits = noise(random.pulled, numbers_in_whole(p.numbering, p.begin, CHUNK, RUNS))
    w = project(w, a, shrink)
    seen = write_weight(p, p.begin, w, bits, pulled, weights, T, storage, CHUNK, VECTOR)
    if AVERAGED:
        averaged = only(here, p.ema != 0)
        stepped = read(p.w, p.begin, only(averaged, shrink == 0), weights, T, CHUNK, VECTOR)
        seen = tl.where(shrink != 0, seen, stepped)
        ema = average(read(p.ema, p.begin, averaged, T, T, CHUNK, VECTOR), seen, c)
        write(p.ema, p.begin, ema, None, averaged, T, CHUNK, VECTOR)


@triton.jit
def pull_kernel(
    tensors,
    gradients,
    rows,
    chunks,
    numbers,
    unrounded,
    decision,
    shrink,
    weights: tl.constexpr,
    anchors: tl.constexpr,
    storage: tl.constexpr,
    AVERAGED: tl.constexpr,
    RUNS: tl.constexpr,
):
    """The projection of a chunk, if its tensor was selected, and its average, if there is one."""
    p = piece_of(tensors, gradients, rows, chunks, decision, CHUNK)
    c = coefficients_of(numbers, p.row, decision)
    random = noise_in(p, unrounded)
    pull = tl.load(shrink + p.tensor)
    copies: tl.constexpr = shrink.dtype.element_ty if storage == "master" or AVERAGED else None
    AT_ONCE: tl.constexpr = at_once(weights, anchors, copies)
    touched = pull != 0
    if AVERAGED:
        touched = touched | (p.ema != 0)
    if touched:
        if (p.size >= CHUNK) & p.aligned:
            pull_chunk(p, c, random, pull, weights, anchors, storage, AVERAGED, RUNS, AT_ONCE)
        else:
            pull_chunk(p, c, random, pull, weights, anchors, storage, AVERAGED, RUNS, 0)


# ---- telemetry -----------------------------------------------------------------------------------


@triton.jit
def tell_kernel(
    tensors,
    rows,
    firsts,
    unrounded,
    decision,
    partials,
    sums,
    mean_v,
    telemetry,
    decay: tl.constexpr,
):
    """A tensor's row of the telemetry (wdkernels/telemetry.py); mean_v, V, only of SWD."""
    i = tl.program_id(0).to(tl.int64)
    numbers = unrounded + tl.load(rows + i) * UNROUNDED
    begin = tl.load(firsts + i)
    end = tl.load(firsts + i + 1)
    row = row_of_sums(sums, tensors, i) if partials is None else None
    unscale = tl.load(decision + UNSCALE) if decision is not None else 1.0
    lr = tl.load(numbers + LR)
    in_force = tl.load(numbers + DECAY)
    if decay == "unmixed":
        in_force = in_force / tl.load(numbers + BIAS_CORRECTION1)

    decay2 = sum_of(DECAY2, partials, begin, end, row)
    is_selected = 0.0
    ratio = 0.0
    v = 0.0
    if decay == "projection":
        projected = projection_sums(partials, begin, end, row)
        is_selected = tl.where(selected(projected), 1.0, 0.0)
        ratio = projection_ratio(projected)
        shrink = in_force * ratio
        decay2 = tl.where(ratio == 0, decay2, shrink * shrink * projected.stepped_distance2)
    if mean_v is not None:
        v = tl.load(mean_v)
        in_force = swd_decay(in_force, v)

    rate_scale = lr * tl.sqrt(tl.load(numbers + BIAS_CORRECTION2))
    told = TelemetryRow(
        weight2=sum_of(WEIGHT2, partials, begin, end, row),
        gradient2=unscale * unscale * sum_of(GRADIENT2, partials, begin, end, row),
        update2=sum_of(UPDATE2, partials, begin, end, row),
        decay2=decay2,
        distance2=sum_of(DISTANCE2, partials, begin, end, row),
        update_weight=sum_of(UPDATE_WEIGHT, partials, begin, end, row),
        rate=rate_scale * sum_of(RATE, partials, begin, end, row),
        lr=lr,
        decay=in_force,
        selected=is_selected,
        ratio=ratio,
        mean_v=v,
    )
    active = tl.load(tensors + i * WORDS + ACTIVE)
    store_row(telemetry + active * TOLD, told, proceeds(decision))
