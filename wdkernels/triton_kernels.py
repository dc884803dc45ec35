"""The Triton kernels: the rule of csrc/update.h, same names in same order, and the launches.

Tensors reach a kernel by their addresses, so one launch takes all of them:

    tensors   int64, a row of TENSOR words each: W, M, V, VMAX, A, COPY, EMA (addresses; 0 where
              there is no such stream), NUMEL, CAUTIOUS (0 or 1), INDEX (of the parameter, for its
              random bits), PLACE (of its row in the telemetry)
    gradients int64, the addresses of the tensors' gradients
    rows      int32, the tensors' rows in the next two tables
    pieces    int32, a pair for each program: a tensor, and which piece of it. A piece is a chunk
              (CHUNK elements) or, for sums before the step, a span of chunks
    numbers   a row of Coefficients for each group and step count, in the type that is computed in
    exact     float64, a row of EXACT: what is needed unrounded
    whole     float64, SHARED: what all tensors share, decided on the device before the step; None
              where gradients are taken as they are

`numbers` and `exact` come from the host, or, where it does not know the step counts, from
coefficients_kernel.

The types of the streams are constants of a launch: `weights` (and gradients), `moments`, `anchors`
(None: there are none). T is what is computed in, float64 for float64 weights and else float32.
`storage` says how weights of 16 bits are kept: "nearest", "stochastic", "kahan" (COPY is the
compensation) or "master" (COPY is a float32 weight). Rounding is that of csrc/dtype.h, to the bit.

A chunk that is whole and whose streams are all aligned is read and written 16 bytes at a time, any
other one element by element under a mask. Beside streams of 32 bits those of 16 take 8 bytes: so a
thread has the same elements of all of them, and none is exchanged through shared memory. Nothing is
tuned at run time: a step cannot be repeated.

Same bits as on the CPU: launch with `enable_fp_fusion=False`, so that nothing is contracted.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# These functions are Triton's language, not Python's.

from __future__ import annotations

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl

from wdkernels import telemetry
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

TENSOR = tl.constexpr(12)  # words
W, M, V, VMAX, A, COPY, EMA, NUMEL, CAUTIOUS, INDEX, PLACE = map(tl.constexpr, range(11))

NUMBERS = tl.constexpr(len(Coefficients._fields))
DECAY = tl.constexpr(Coefficients._fields.index("decay"))

EXACT = tl.constexpr(6)
LAMBDA, ONE_MINUS_BETA2, BIAS_CORRECTION1, BIAS_CORRECTION2, ETA, KEY = map(tl.constexpr, range(6))

SHARED = tl.constexpr(3)
SCALE, UNSCALE, SKIP = map(tl.constexpr, range(3))  # SCALE of the gradients: UNSCALE and clipping

# A group's hyper-parameters, with DECAY_SCALE 0 (lr), 1 (relative_lr) or 2 (corrected), and a
# product of two schedules for the decay and of two for the average.
LR, LR_MAX, BETA1, BETA2, EPS, WEIGHT_DECAY, SIGN = map(tl.constexpr, range(7))
DECAY_SCALE, SEED, EMA_DECAY, SCHEDULES, EMA_SCHEDULES = map(tl.constexpr, (7, 8, 9, 10, 18))
KIND, START, END, STEPS, SCHEDULE = map(tl.constexpr, range(5))
CONSTANT, WINDOW, LINEAR, COSINE = map(tl.constexpr, range(4))
HYPER = tl.constexpr(26)

# A chunk's part of the sums: those of SPD, and from MEASURED on those of telemetry
SUMS, PROJECTION, MEASURED = map(tl.constexpr, (16, 3, 3))
MEASURES = tl.constexpr(7)
COLUMNS = tl.constexpr(len(telemetry.COLUMNS))
PI = tl.constexpr(math.pi)


# ---- the rule ----------------------------------------------------------------------------------


class Element(NamedTuple):
    """A chunk of every stream the step reads or writes, in the type it is computed in."""

    w: Any
    g: Any
    m: Any
    v: Any
    vmax: Any
    a: Any
    u: Any  # of line 3, with its denominator: by-products, for who measures the step
    denominator: Any


class ProjectionTerms(NamedTuple):
    """What Selective Projection Decay sums over a tensor: the terms of a chunk, or float64 sums."""

    alignment: Any  # g (w - a); its sum is -c
    distance2: Any  # (w~ - a)^2
    growth2: Any  # (w~ - a)^2 - (w - a)^2


class MeasuredTerms(NamedTuple):
    """What telemetry sums over a tensor; w and d = w - a before the step, g before line 0. Float64:
    squares of float32s may be too large or too small for another float32."""

    weight2: Any
    gradient2: Any
    update2: Any
    decay2: Any  # of what the decay adds, where it enters; SPD's is known after its sums
    distance2: Any  # d^2
    update_weight: Any  # u w
    rate: Any  # 1 / (sqrt(v) + eps)


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

    g = c.scale * x.g  # unscaled, clipped, ascent or descent
    if decay == "l2":
        g = g + c.decay * d  # penalty into the gradient

    m = lerp(x.m, g, c.one_minus_beta1)  # first moment
    v = second_moment(x.v, g, c.one_minus_beta2)
    vmax = maximum(x.vmax, v)

    numerator = m
    if decay == "unmixed":
        numerator = numerator + c.decay * d
    denominator = square_root(tl.where(amsgrad, vmax, v)) + c.eps
    u = quotient(c.step_size * numerator, denominator)

    step = u
    if decay == "decoupled":
        pull = c.decay * d
        step = tl.where(cautious & opposed(u, d), u, pull + u)  # summed first: w is rounded once
    return Element(w=x.w - step, g=x.g, m=m, v=v, vmax=vmax, a=x.a, u=u, denominator=denominator)


@triton.jit
def average(ema, w, c):
    return lerp(ema, w, c.average)


@triton.jit
def product(x, y):
    return x.to(tl.float64) * y.to(tl.float64)


@triton.jit
def measured_terms(w, x, c, cautious, decay: tl.constexpr):
    """Of elements that have been updated; w are the weights before."""
    d = w - x.a
    pull = c.decay * d
    if decay == "unmixed":
        pull = quotient(c.step_size * pull, x.denominator)
    if decay == "decoupled":
        pull = tl.where(cautious & opposed(x.u, d), 0.0, pull)
    if decay == "projection":
        pull = tl.zeros_like(d)
    return MeasuredTerms(
        weight2=product(w, w),
        gradient2=product(x.g, x.g),
        update2=product(x.u, x.u),
        decay2=product(pull, pull),
        distance2=product(d, d),
        update_weight=product(x.u, w),
        rate=quotient(1.0 + tl.zeros_like(d), x.denominator),
    )


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
def kept_sum(kept, squares, one_minus_beta2):
    """What has overflowed stays inf, as v."""
    mean = lerp(kept, squares, one_minus_beta2)
    return tl.where(mean == mean, mean, kept + squares)


@triton.jit
def stable_decay(decay, mean_square):
    return tl.where(mean_square == 0, 0.0, decay / tl.sqrt(mean_square))


class Projection(NamedTuple):
    """SPD's decision on a tensor."""

    selected: Any
    ratio: Any  # 0 if it was not


@triton.jit
def projection_of(sums):
    after = tl.sqrt(sums.distance2)
    shorter2 = sums.distance2 - sums.growth2
    before = tl.sqrt(tl.where(shorter2 > 0, shorter2, 0.0))
    ratio = sums.growth2 / ((after + before) * after)  # (after - before) / after
    r = tl.where(ratio < 0, 0.0, tl.where(ratio > 1, 1.0, ratio))  # NaN stays NaN
    away = sums.alignment > 0  # c < 0
    return Projection(selected=away, ratio=tl.where(away & (sums.distance2 != 0), r, 0.0))


# ---- storage: csrc/dtype.h ---------------------------------------------------------------------


class Noise(NamedTuple):
    """Keys of a tensor's random bits in one step."""

    weight: Any
    pulled: Any  # the weight's, stored once more by a second touch
    moments: Any


@triton.jit
def mix(x):
    """A hash of 32 bits, in which every bit of x decides over every bit."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def step_key(seed, t):
    return mix(mix(seed) + t)


@triton.jit
def noise_of(step_key, index):
    key = mix(step_key ^ (index * 0x9E3779B9))
    return Noise(weight=key, pulled=mix(key + 1), moments=mix(key + 2))


@triton.jit
def noise(key, element):
    return mix(key ^ element)


@triton.jit
def to_bfloat16(x, random):
    """The bits of float32s in 16 of them; to nearest, ties to even, if `random` is None."""
    bits = x.to(tl.uint32, bitcast=True)
    up = 0x7FFF + ((bits >> 16) & 1) if random is None else random & 0xFFFF
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, (bits + up) >> 16).to(tl.uint16)


@triton.jit
def to_float16(x, random):
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    exponent = magnitude >> 23
    one = tl.full([1], 1, tl.uint32)
    own = tl.where(exponent > 1, exponent, one)  # a subnormal's exponent is that of 1
    kept = tl.where(own > 113, own, 113 * one)  # below are float16's subnormals
    distance = 13 + (kept - own)
    dropped = tl.where(distance < 31, distance, 31 * one)  # bits
    beyond = tl.where(distance - dropped < 31, distance - dropped, 31 * one)
    mantissa = ((magnitude & 0x7FFFFF) | (tl.where(exponent > 0, one, 0 * one) << 23)) >> beyond
    half = one << (dropped - 1)
    tie = half - 1 + ((mantissa >> dropped) & 1)
    up = tie if random is None else random & ((half << 1) - 1)
    found = ((mantissa + up) >> dropped) + ((kept - 113) << 10)
    found = tl.where(found > 0x7C00, 0x7C00 * one, found)  # overflows to inf
    found = found | ((bits >> 16) & 0x8000)
    return tl.where(magnitude > 0x7F800000, 0x7E00 * one, found).to(tl.uint16)  # NaN


@triton.jit
def narrow(x, random, dtype: tl.constexpr):
    """x as it is stored: bits, where dtype has 16."""
    if dtype == tl.bfloat16:
        stored = to_bfloat16(x, random)
    elif dtype == tl.float16:
        stored = to_float16(x, random)
    else:
        stored = x
    return stored


@triton.jit
def widen(stored, dtype: tl.constexpr):
    """What has been stored; exact, and subnormals are kept."""
    if dtype == tl.bfloat16:
        x = (stored.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif dtype == tl.float16:
        x = stored.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        x = stored
    return x


# ---- streams -----------------------------------------------------------------------------------


class Piece(NamedTuple):
    """What a program works on: the words of its tensor, and which of the elements."""

    w: Any
    g: Any
    m: Any
    v: Any
    vmax: Any
    a: Any
    copy: Any
    ema: Any
    cautious: Any
    index: Any
    tensor: Any
    row: Any
    begin: Any
    size: Any  # of the tensor, from `begin` on; 0 in a step that is skipped
    aligned: Any  # every stream to 16 bytes


@triton.jit
def proceeds(whole):
    """Whether the step is taken."""
    return tl.load(whole + SKIP) == 0 if whole is not None else tl.full([], 1, tl.int1)


@triton.jit
def scale_of(whole):
    return tl.load(whole + SCALE) if whole is not None else tl.full([], 1.0, tl.float64)


@triton.jit
def piece_of(tensors, gradients, rows, pieces, whole, SIZE: tl.constexpr):
    place = pieces + 2 * tl.program_id(0).to(tl.int64)
    tensor = tl.load(place).to(tl.int64)
    begin = tl.load(place + 1).to(tl.int64) * SIZE
    words = tensors + tensor * TENSOR
    w = tl.load(words + W)
    m = tl.load(words + M)
    v = tl.load(words + V)
    vmax = tl.load(words + VMAX)
    a = tl.load(words + A)
    copy = tl.load(words + COPY)
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
        copy=copy,
        ema=ema,
        cautious=tl.load(words + CAUTIOUS) != 0,
        index=tl.load(words + INDEX),
        tensor=tensor,
        row=tl.load(rows + tensor),
        begin=begin,
        size=tl.where(proceeds(whole), size, 0),
        aligned=(w | g | m | v | vmax | a | copy | ema) % 16 == 0,
    )


@triton.jit
def coefficients_of(numbers, row, whole):
    c = numbers + row * NUMBERS
    sign = tl.load(c)
    return Coefficients(
        scale=(sign.to(tl.float64) * scale_of(whole)).to(sign.dtype),
        one_minus_beta1=tl.load(c + 1),
        one_minus_beta2=tl.load(c + 2),
        step_size=tl.load(c + 3),
        eps=tl.load(c + 4),
        decay=tl.load(c + 5),
        average=tl.load(c + 6),
    )


@triton.jit
def noise_in(p, exact):
    """The tensor's in this step."""
    key = tl.load(exact + p.row * EXACT + KEY).to(tl.int64).to(tl.uint32)
    return noise_of(key, p.index.to(tl.uint32))


@triton.jit
def elements(begin, SIZE: tl.constexpr):
    """Numbers of SIZE elements, the low 32 bits of them."""
    return begin.to(tl.uint32) + tl.arange(0, SIZE).to(tl.uint32)


@triton.constexpr_function
def at_once(*dtypes):
    """Elements that a whole chunk's accesses take: 16 bytes of the widest stream."""
    return 128 // max(dtype.primitive_bitwidth for dtype in dtypes if dtype is not None)


@triton.jit
def stream(address, begin, dtype: tl.constexpr, SIZE: tl.constexpr, WHOLE: tl.constexpr):
    """Pointers to SIZE elements; to a whole chunk, which is aligned, WHOLE elements at a time."""
    STORED: tl.constexpr = tl.uint16 if dtype == tl.bfloat16 or dtype == tl.float16 else dtype
    first = address.to(tl.pointer_type(STORED)) + begin
    if WHOLE:
        BYTES: tl.constexpr = WHOLE * dtype.primitive_bitwidth // 8
        first = tl.multiple_of(first, BYTES)
    return first + tl.arange(0, SIZE)


@triton.jit
def inside(size, SIZE: tl.constexpr, WHOLE: tl.constexpr):
    return tl.full([SIZE], 1, tl.int1) if WHOLE else tl.arange(0, SIZE) < size


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
    WHOLE: tl.constexpr,
):
    """SIZE elements of a stream of dtype, as T."""
    return widen(tl.load(stream(address, begin, dtype, SIZE, WHOLE), here, 0), dtype).to(T)


@triton.jit
def write(
    address, begin, x, random, here, dtype: tl.constexpr, SIZE: tl.constexpr, WHOLE: tl.constexpr
):
    tl.store(stream(address, begin, dtype, SIZE, WHOLE), narrow(x, random, dtype), here)


@triton.jit
def read_weight(
    p,
    begin,
    here,
    weights: tl.constexpr,
    T: tl.constexpr,
    storage: tl.constexpr,
    SIZE: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """The weight as it is computed with."""
    if storage == "master":
        w = read(p.copy, begin, here, T, T, SIZE, WHOLE)
    else:
        w = read(p.w, begin, here, weights, T, SIZE, WHOLE)
        if storage == "kahan":
            w = w + read(p.copy, begin, here, weights, T, SIZE, WHOLE)
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
    WHOLE: tl.constexpr,
):
    """Returns the weight as the model sees it."""
    stored = narrow(w, random if storage == "stochastic" else None, weights)
    tl.store(stream(p.w, begin, weights, SIZE, WHOLE), stored, here)
    seen = widen(stored, weights)
    if storage == "master":
        tl.store(stream(p.copy, begin, T, SIZE, WHOLE), w, here)
    if storage == "kahan":
        write(p.copy, begin, w - seen, None, here, weights, SIZE, WHOLE)
    return seen


# ---- the step ----------------------------------------------------------------------------------


@triton.jit
def add(sums, column: tl.constexpr, terms, here):
    """`sums`, with those of the terms added to one of its columns."""
    part = tl.sum(tl.where(here, terms, 0.0).to(tl.float64))
    return sums + tl.where(tl.arange(0, SUMS) == column, part, 0.0)


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
    MEASURE: tl.constexpr,
    SIZE: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """The step of SIZE elements, `offset` past the chunk's first; the sums with their part."""
    T: tl.constexpr = c.scale.dtype
    here = inside(p.size - offset, SIZE, WHOLE)
    amsgrad = p.vmax != 0 if AMSGRAD else False
    cautious = p.cautious if CAUTIOUSLY else False
    zero = tl.zeros([SIZE], T)

    begin = p.begin + offset
    x = Element(
        w=read_weight(p, begin, here, weights, T, storage, SIZE, WHOLE),
        g=read(p.g, begin, here, weights, T, SIZE, WHOLE),
        m=read(p.m, begin, here, moments, T, SIZE, WHOLE),
        v=read(p.v, begin, here, moments, T, SIZE, WHOLE),
        vmax=read(p.vmax, begin, only(here, amsgrad), moments, T, SIZE, WHOLE) if AMSGRAD else zero,
        a=read(p.a, begin, only(here, p.a != 0), anchors, T, SIZE, WHOLE)
        if anchors is not None
        else zero,
        u=zero,
        denominator=zero,
    )
    y = update(x, c, amsgrad, cautious, decay)

    element = elements(begin, SIZE)
    bits = noise(random.moments, element)
    write(p.m, begin, y.m, bits, here, moments, SIZE, WHOLE)
    write(p.v, begin, y.v, bits >> 16, here, moments, SIZE, WHOLE)
    if AMSGRAD:
        write(p.vmax, begin, y.vmax, bits >> 16, only(here, amsgrad), moments, SIZE, WHOLE)
    bits = noise(random.weight, element)
    seen = write_weight(p, begin, y.w, bits, here, weights, T, storage, SIZE, WHOLE)
    if AVERAGED and decay != "projection":  # whose weights are not final yet
        averaged = only(here, p.ema != 0)
        ema = average(read(p.ema, begin, averaged, T, T, SIZE, WHOLE), seen, c)
        write(p.ema, begin, ema, None, averaged, T, SIZE, WHOLE)

    if decay == "projection":
        terms = projection_terms(x.w, c.scale * x.g, x.a, y.w)
        sums = add(sums, 0, terms.alignment, here)
        sums = add(sums, 1, terms.distance2, here)
        sums = add(sums, 2, terms.growth2, here)
    if MEASURE:
        measured = measured_terms(x.w, y, c, cautious, decay)
        sums = add(sums, MEASURED, measured.weight2, here)
        sums = add(sums, MEASURED + 1, measured.gradient2, here)
        sums = add(sums, MEASURED + 2, measured.update2, here)
        sums = add(sums, MEASURED + 3, measured.decay2, here)
        sums = add(sums, MEASURED + 4, measured.distance2, here)
        sums = add(sums, MEASURED + 5, measured.update_weight, here)
        sums = add(sums, MEASURED + 6, measured.rate, here)
    return sums


@triton.jit
def update_kernel(
    tensors,
    gradients,
    rows,
    chunks,
    numbers,
    exact,
    whole,
    partials,
    decay: tl.constexpr,
    weights: tl.constexpr,
    moments: tl.constexpr,
    anchors: tl.constexpr,
    storage: tl.constexpr,
    AMSGRAD: tl.constexpr,
    CAUTIOUSLY: tl.constexpr,
    AVERAGED: tl.constexpr,
    MEASURE: tl.constexpr,
):
    """The step of a chunk; for `projection` and telemetry its part of the sums (partials, [chunks,
    SUMS]), of which there are none otherwise.

    AMSGRAD, CAUTIOUSLY and AVERAGED say what some tensor of the launch has, its words what each
    has.
    """
    T: tl.constexpr = numbers.dtype.element_ty
    copies: tl.constexpr = T if storage == "master" or AVERAGED else None
    AT_ONCE: tl.constexpr = at_once(weights, moments, anchors, copies)
    p = piece_of(tensors, gradients, rows, chunks, whole, CHUNK)
    c = coefficients_of(numbers, p.row, whole)
    random = noise_in(p, exact)
    sums = tl.zeros([SUMS], tl.float64)
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
                MEASURE,
                TAIL,
                0,
            )
    if decay == "projection" or MEASURE:
        column = tl.arange(0, SUMS)
        USED: tl.constexpr = MEASURED + MEASURES if MEASURE else PROJECTION
        chunk = partials + SUMS * tl.program_id(0).to(tl.int64)
        tl.store(chunk + column, sums, column < USED)


# ---- before the step: the gradients' norm, SWD's V ---------------------------------------------


@triton.jit
def square_terms(
    p,
    offset,
    c,
    weights: tl.constexpr,
    moments: tl.constexpr,
    T: tl.constexpr,
    AMSGRAD: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """g^2, or with amsgrad the vmax this step will have: the maximum has no recurrence, so it is
    computed here and once more in the step."""
    here = inside(p.size - offset, CHUNK, WHOLE)
    begin = p.begin + offset
    g = read(p.g, begin, here, weights, T, CHUNK, WHOLE)
    terms = g.to(tl.float64) * g.to(tl.float64)
    if AMSGRAD:
        amsgrad = p.vmax != 0
        v = read(p.v, begin, only(here, amsgrad), moments, T, CHUNK, WHOLE)
        vmax = read(p.vmax, begin, only(here, amsgrad), moments, T, CHUNK, WHOLE)
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
    whole,
    partials,
    weights: tl.constexpr,
    moments: tl.constexpr,
    AMSGRAD: tl.constexpr,
):
    """A span's part of the sums (partials, [spans]); only AMSGRAD asks for the numbers."""
    T: tl.constexpr = tl.float64 if weights == tl.float64 else tl.float32
    AT_ONCE: tl.constexpr = at_once(weights, moments if AMSGRAD else None)
    p = piece_of(tensors, gradients, rows, spans, whole, SPAN)
    c = coefficients_of(numbers, p.row, whole) if AMSGRAD else None
    sums = tl.zeros([CHUNK], tl.float64)
    if (p.size >= SPAN) & p.aligned:
        for offset in range(0, SPAN, CHUNK):
            sums += square_terms(p, offset, c, weights, moments, T, AMSGRAD, AT_ONCE)
    else:
        for offset in range(0, tl.minimum(p.size, SPAN).to(tl.int32), CHUNK):
            sums += square_terms(p, offset, c, weights, moments, T, AMSGRAD, 0)
    tl.store(partials + tl.program_id(0).to(tl.int64), tl.sum(sums))


@triton.jit
def total(partials, begin, end, STRIDE: tl.constexpr):
    sums = tl.zeros([LANES], tl.float64)
    for first in range(begin, end, LANES):
        k = first + tl.arange(0, LANES)
        sums += tl.load(partials + k.to(tl.int64) * STRIDE, k < end, 0.0)
    return tl.sum(sums)


@triton.jit(do_not_specialize=["count"])
def decide_kernel(
    partials,
    count,
    limit,
    grad_scale,
    found_inf,
    whole,
    grad_norm,
    skipped,
    SKIP_NONFINITE: tl.constexpr,
):
    """What `count` parts of the gradients' squared norm, a GradScaler's tensors and the `limit` of
    the norm mean for all tensors; None are those that nobody gave or asks for."""
    place = tl.arange(0, 1)
    one = tl.full([1], 1.0, tl.float64)
    unscale = one
    if grad_scale is not None:
        unscale = one / tl.load(grad_scale + place).to(tl.float64)
    skip = one < 0
    if found_inf is not None:
        skip = tl.load(found_inf + place) != 0
    clip = one
    if partials is not None:
        norm = unscale * tl.sqrt(total(partials, 0, count, 1))
        bound = tl.load(limit + place)
        ratio = bound / (norm + 1e-6)
        clip = tl.where((ratio > 1) | (bound == float("inf")), one, ratio)  # NaN stays NaN
        if SKIP_NONFINITE:
            skip = skip | (norm - norm != 0)
        if grad_norm is not None:
            tl.store(grad_norm + place, norm)
    tl.store(whole + SCALE + place, unscale * clip)
    tl.store(whole + UNSCALE + place, unscale)
    tl.store(whole + SKIP + place, tl.where(skip, one, 0.0))
    if skipped is not None:
        tl.store(skipped + place, tl.load(skipped + place) + tl.where(skip, 1, 0))


@triton.jit
def fold_kernel(rows, kept, firsts, exact, whole, partials, means):
    """A tensor's part of V. sum(v) obeys the recurrence of v itself, so it is kept (addresses of
    its place in `kept`) and a sum over the gradient replaces one over v."""
    i = tl.program_id(0).to(tl.int64)
    row = exact + tl.load(rows + i) * EXACT
    begin = tl.load(firsts + i)
    end = tl.load(firsts + i + 1)
    sums = total(partials, begin, end, 1)
    address = tl.load(kept + i)
    if address != 0:
        place = address.to(tl.pointer_type(tl.float64))
        scale = scale_of(whole)
        squares = tl.where(begin == end, 0.0, scale * scale * sums)  # were the scale NaN
        sums = kept_sum(tl.load(place), squares, tl.load(row + ONE_MINUS_BETA2))
        tl.store(place, sums, proceeds(whole))
    tl.store(means + i, sums / tl.load(row + BIAS_CORRECTION2))


@triton.jit(do_not_specialize=["count", "elements", "length"])
def stabilise_kernel(means, count, elements, exact, numbers, length, mean_square):
    """V = sum(means) / elements, and with it the decay in each of `length` rows of numbers."""
    v = total(means, 0, count, 1) / elements.to(tl.float64)
    for first in range(0, length, LANES):
        row = first + tl.arange(0, LANES)
        decay = tl.load(exact + row * EXACT + LAMBDA, row < length, 0.0)
        tl.store(numbers + row * NUMBERS + DECAY, stable_decay(decay, v), row < length)
    tl.store(mean_square, v)


# ---- SPD: the second touch ---------------------------------------------------------------------


@triton.jit
def projection_sums(partials, begin, end):
    return ProjectionTerms(
        alignment=total(partials, begin, end, SUMS),
        distance2=total(partials + 1, begin, end, SUMS),
        growth2=total(partials + 2, begin, end, SUMS),
    )


@triton.jit
def select_kernel(rows, firsts, exact, partials, shrink):
    """A tensor's lambda r."""
    i = tl.program_id(0).to(tl.int64)
    sums = projection_sums(partials, tl.load(firsts + i), tl.load(firsts + i + 1))
    lambda_t = tl.load(exact + tl.load(rows + i) * EXACT + LAMBDA)
    tl.store(shrink + i, lambda_t * projection_of(sums).ratio)


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
    WHOLE: tl.constexpr,
):
    T: tl.constexpr = shrink.dtype
    here = inside(p.size, CHUNK, WHOLE)
    selected = only(here, shrink != 0) if AVERAGED else here
    w = read_weight(p, p.begin, selected, weights, T, storage, CHUNK, WHOLE)
    if anchors is not None:
        a = read(p.a, p.begin, only(selected, p.a != 0), anchors, T, CHUNK, WHOLE)
    else:
        a = tl.zeros([CHUNK], T)
    bits = noise(random.pulled, elements(p.begin, CHUNK))
    w = project(w, a, shrink)
    seen = write_weight(p, p.begin, w, bits, selected, weights, T, storage, CHUNK, WHOLE)
    if AVERAGED:
        averaged = only(here, p.ema != 0)
        stepped = read(p.w, p.begin, only(averaged, shrink == 0), weights, T, CHUNK, WHOLE)
        seen = tl.where(shrink != 0, seen, stepped)
        ema = average(read(p.ema, p.begin, averaged, T, T, CHUNK, WHOLE), seen, c)
        write(p.ema, p.begin, ema, None, averaged, T, CHUNK, WHOLE)


@triton.jit
def pull_kernel(
    tensors,
    gradients,
    rows,
    chunks,
    numbers,
    exact,
    whole,
    shrink,
    weights: tl.constexpr,
    anchors: tl.constexpr,
    storage: tl.constexpr,
    AVERAGED: tl.constexpr,
):
    """The projection of a chunk, if its tensor was selected, and its average, if there is one."""
    p = piece_of(tensors, gradients, rows, chunks, whole, CHUNK)
    c = coefficients_of(numbers, p.row, whole)
    random = noise_in(p, exact)
    tensor_shrink = tl.load(shrink + p.tensor)
    copies: tl.constexpr = shrink.dtype.element_ty if storage == "master" or AVERAGED else None
    AT_ONCE: tl.constexpr = at_once(weights, anchors, copies)
    touched = tensor_shrink != 0
    if AVERAGED:
        touched = touched | (p.ema != 0)
    if touched:
        if (p.size >= CHUNK) & p.aligned:
            pull_chunk(p, c, random, tensor_shrink, weights, anchors, storage, AVERAGED, AT_ONCE)
        else:
            pull_chunk(p, c, random, tensor_shrink, weights, anchors, storage, AVERAGED, 0)


# ---- telemetry ---------------------------------------------------------------------------------


@triton.jit
def measure_kernel(
    tensors, rows, firsts, exact, whole, partials, mean_square, table, decay: tl.constexpr
):
    """A tensor's row of the table (wdkernels/telemetry.py); mean_square, V, only of SWD."""
    i = tl.program_id(0).to(tl.int64)
    row = exact + tl.load(rows + i) * EXACT
    begin = tl.load(firsts + i)
    end = tl.load(firsts + i + 1)
    here = proceeds(whole)
    measured = table + tl.load(tensors + i * TENSOR + PLACE) * COLUMNS
    sums = partials + MEASURED
    unscale = tl.load(whole + UNSCALE) if whole is not None else 1.0
    eta = tl.load(row + ETA)
    in_force = tl.load(row + LAMBDA)
    if decay == "unmixed":
        in_force = in_force / tl.load(row + BIAS_CORRECTION1)

    decay2 = total(sums + 3, begin, end, SUMS)
    selected = 0.0
    ratio = 0.0
    v = 0.0
    if decay == "projection":
        projected = projection_sums(partials, begin, end)
        projection = projection_of(projected)
        selected = tl.where(projection.selected, 1.0, 0.0)
        ratio = projection.ratio
        shrink = in_force * ratio
        decay2 = tl.where(ratio == 0, decay2, shrink * shrink * projected.distance2)
    if mean_square is not None:
        v = tl.load(mean_square)
        in_force = stable_decay(in_force, v)

    rate = eta * tl.sqrt(tl.load(row + BIAS_CORRECTION2)) * total(sums + 6, begin, end, SUMS)
    tl.store(measured, total(sums, begin, end, SUMS), here)
    tl.store(measured + 1, unscale * unscale * total(sums + 1, begin, end, SUMS), here)
    tl.store(measured + 2, total(sums + 2, begin, end, SUMS), here)
    tl.store(measured + 3, decay2, here)
    tl.store(measured + 4, total(sums + 4, begin, end, SUMS), here)
    tl.store(measured + 5, total(sums + 5, begin, end, SUMS), here)
    tl.store(measured + 6, rate, here)
    tl.store(measured + 7, eta, here)
    tl.store(measured + 8, in_force, here)
    tl.store(measured + 9, selected, here)
    tl.store(measured + 10, ratio, here)
    tl.store(measured + 11, v, here)


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
def coefficients_kernel(counters, hypers, whole, numbers, exact, count, decay: tl.constexpr):
    """Counts the steps of `count` tensors, unless they are skipped, and computes the row of numbers
    of each.

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
    counted = only(here, proceeds(whole))
    tl.store(single_step, t, counted & ~double)
    tl.store(double_step, t, counted & double)

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
        scale = tl.load(h + DECAY_SCALE, here, 0.0)
        relative = tl.where(scale == 0, lr, lr / tl.load(h + LR_MAX, here, 1.0))
        lambda_t = lambda_t * tl.where(scale == 2, lr * relative, relative)

    ema_decay = tl.load(h + EMA_DECAY, here, 0.0)
    ema_decay = ema_decay * factor(h + EMA_SCHEDULES, t, here)
    ema_decay = ema_decay * factor(h + EMA_SCHEDULES + SCHEDULE, t, here)
    seed = tl.load(h + SEED, here, 0.0).to(tl.int64).to(tl.uint32)
    key = step_key(seed, t.to(tl.int64).to(tl.uint32))

    row = numbers + i * NUMBERS
    tl.store(row, tl.load(h + SIGN, here, 0.0), here)
    tl.store(row + 1, 1 - beta1, here)
    tl.store(row + 2, 1 - beta2, here)
    tl.store(row + 3, lr * root / bias_correction1, here)
    tl.store(row + 4, tl.load(h + EPS, here, 0.0) * root, here)
    tl.store(row + 5, lambda_t, here)
    tl.store(row + 6, 1 - ema_decay, here)
    tl.store(exact + i * EXACT + LAMBDA, lambda_t, here)
    tl.store(exact + i * EXACT + ONE_MINUS_BETA2, 1 - beta2, here)
    tl.store(exact + i * EXACT + BIAS_CORRECTION1, bias_correction1, here)
    tl.store(exact + i * EXACT + BIAS_CORRECTION2, bias_correction2, here)
    tl.store(exact + i * EXACT + ETA, lr, here)
    tl.store(exact + i * EXACT + KEY, key.to(tl.int64).to(tl.float64), here)
