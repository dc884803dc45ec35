"""The update rule in Triton: that of csrc/update.h, same names in the same order, on blocks of
elements; what SWD and SPD decide (csrc/decide.h); and how numbers are stored (csrc/dtype.h).

It knows no loops, addresses or tables: those are triton_kernels.py's. All functions give the bits
of their namesakes in C++ if they are compiled with `enable_fp_fusion=False`, so that nothing is
contracted.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# These functions are Triton's language, not Python's.

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

# ---- the rule ------------------------------------------------------------------------------------


class Element(NamedTuple):
    """A block of every stream that the step reads or writes, in the type it is computed in."""

    w: Any
    g: Any
    m: Any
    v: Any
    vmax: Any
    a: Any
    u: Any  # of line 3, with its denominator: by-products, for who measures the step
    denominator: Any


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
def adam(x, d, c, amsgrad, decay: tl.constexpr):
    """Lines 0 to 3: the moments, and Adam's step u; d is the weight's displacement."""
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
    return Element(w=x.w, g=x.g, m=m, v=v, vmax=vmax, a=x.a, u=u, denominator=denominator)


@triton.jit
def move(w, u, d, c, cautious, decay: tl.constexpr):
    """Line 4: the weight after the step u, whoever computed it, with its decay."""
    step = u
    if decay == "decoupled":
        pull = c.decay * d
        step = tl.where(cautious & opposed(u, d), u, pull + u)  # summed first: w is rounded once
    return w - step


@triton.jit
def update(x, c, amsgrad, cautious, decay: tl.constexpr):
    d = x.w - x.a
    y = adam(x, d, c, amsgrad, decay)
    w = move(x.w, y.u, d, c, cautious, decay)
    return Element(w=w, g=x.g, m=y.m, v=y.v, vmax=y.vmax, a=x.a, u=y.u, denominator=y.denominator)


@triton.jit
def average(ema, w, c):
    return lerp(ema, w, c.average)


@triton.jit
def project(w, a, shrink):
    return w - shrink * (w - a)


# ---- what an element adds to the sums over its tensor --------------------------------------------


class MeasuredTerms(NamedTuple):
    """What telemetry sums over a tensor, by the names of wdkernels.sums; float64, because squares
    of float32s may be too large or too small for another float32."""

    gradient2: Any
    weight2: Any
    update2: Any
    decay2: Any
    distance2: Any
    update_weight: Any
    rate: Any


class ProjectionTerms(NamedTuple):
    """What Selective Projection Decay sums over a tensor; also the sums themselves, float64."""

    alignment: Any
    stepped_distance2: Any
    growth2: Any


@triton.jit
def product(x, y):
    return x.to(tl.float64) * y.to(tl.float64)


@triton.jit
def measured_terms(w, x, c, cautious, decay: tl.constexpr):
    """The terms of elements that have been updated; w are the weights before."""
    d = w - x.a
    pull = c.decay * d
    if decay == "unmixed":
        pull = quotient(c.step_size * pull, x.denominator)
    if decay == "decoupled":
        pull = tl.where(cautious & opposed(x.u, d), 0.0, pull)
    if decay == "projection":
        pull = tl.zeros_like(d)  # which is known after the sums
    return MeasuredTerms(
        gradient2=product(x.g, x.g),
        weight2=product(w, w),
        update2=product(x.u, x.u),
        decay2=product(pull, pull),
        distance2=product(d, d),
        update_weight=product(x.u, w),
        rate=quotient(1.0 + tl.zeros_like(d), x.denominator),
    )


@triton.jit
def projection_terms(w, g, a, stepped):
    """w are the weights before, g the gradients after line 0."""
    before = w - a
    after = stepped - a
    return ProjectionTerms(
        alignment=g * before,
        stepped_distance2=after * after,
        growth2=(stepped - w) * (after + before),
    )


# ---- what is decided once the sums are known -----------------------------------------------------


@triton.jit
def kept_sum(kept, elements, gradient2, scale, one_minus_beta2):
    """SWD: sum(v) after a step, from the one before. What has overflowed stays inf, as v. The sum
    over no elements is 0, even if the scale is NaN."""
    squares = tl.where(elements == 0, 0.0, scale * scale * gradient2)
    mean = lerp(kept, squares, one_minus_beta2)
    return tl.where(mean == mean, mean, kept + squares)


@triton.jit
def swd_decay(decay, mean_v):
    """SWD: d / sqrt(V); nothing has been learnt of the gradient's scale while V = 0."""
    return tl.where(mean_v == 0, 0.0, decay / tl.sqrt(mean_v))


@triton.jit
def selected(sums):
    """SPD: whether a tensor is."""
    return sums.alignment > 0  # c < 0


@triton.jit
def projection_ratio(sums):
    """SPD: r, or 0 where the tensor is not selected."""
    after = tl.sqrt(sums.stepped_distance2)
    before2 = sums.stepped_distance2 - sums.growth2
    before = tl.sqrt(tl.where(before2 > 0, before2, 0.0))
    ratio = sums.growth2 / ((after + before) * after)  # (after - before) / after
    r = tl.where(ratio < 0, 0.0, tl.where(ratio > 1, 1.0, ratio))  # NaN stays NaN
    return tl.where(selected(sums) & (sums.stepped_distance2 != 0), r, 0.0)


# ---- random bits ---------------------------------------------------------------------------------


class Noise(NamedTuple):
    """The keys of a tensor's random bits in one step."""

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


# ---- 16 bits -------------------------------------------------------------------------------------


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
