"""A step's numbers, where the device counts the steps: csrc/coefficients.h in Triton."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# These functions are Triton's language, not Python's.

from __future__ import annotations

import math

import triton
import triton.language as tl

from wdkernels.coefficients import Coefficients, ScheduleFactor
from wdkernels.options import DECAY_SCALES
from wdkernels.triton_rule import step_key
from wdkernels.triton_streams import NUMBERS, UNROUNDED, columns, only, proceeds, store_row
from wdkernels.triton_tables import OPTIONS, SCHEDULE_KINDS, Unrounded

TENSORS = tl.constexpr(128)  # whose numbers a program computes
PI = tl.constexpr(math.pi)

ROW = tl.constexpr(len(OPTIONS))
LR, LR_MAX, BETA1, BETA2, EPS, WEIGHT_DECAY, DECAY_SCALE, SIGN, SEED, EMA_DECAY = columns(
    OPTIONS, "lr lr_max beta1 beta2 eps weight_decay decay_scale sign seed ema_decay"
)
DECAY_SCHEDULE, EMA_SCHEDULE = columns(OPTIONS, "decay_schedule[0].kind ema_schedule[0].kind")
BY_LR, CORRECTED, INDEPENDENT = columns(DECAY_SCALES, "lr corrected independent")
FACTOR = tl.constexpr(len(ScheduleFactor._fields))
KIND, START, END, STEPS = columns(ScheduleFactor._fields, "kind start end steps")
CONSTANT, WINDOW, COSINE, INVERSE = columns(SCHEDULE_KINDS, "constant window cosine inverse")


@triton.jit
def factor(schedule, t, here):
    """A factor of a schedule, whose row begins at `schedule`."""
    kind = tl.load(schedule + KIND, here, 0.0)
    start = tl.load(schedule + START, here, 0.0)
    end = tl.load(schedule + END, here, 0.0)
    progress = (t - 1) / tl.load(schedule + STEPS, here, 1.0)
    progress = tl.where(progress < 1, progress, 1.0)
    wave = (1 + tl.cos(progress * PI)) / 2
    share = tl.where(kind == COSINE, wave, 1 - progress)  # of the start value
    ramp = start * share + end * (1 - share)
    window = tl.where((start <= t) & (t < end), 1.0, 0.0)
    found = tl.where(kind == WINDOW, window, ramp)
    found = tl.where(kind == INVERSE, 1 / (t - 1 + start), found)
    return tl.where(kind == CONSTANT, 1.0, found)


@triton.jit
def decay_scale(o, here):
    """What multiplies lambda in a decoupled decay; nothing moves where lr is 0."""
    lr = tl.load(o + LR, here, 0.0)
    kind = tl.load(o + DECAY_SCALE, here, 0.0)
    relative = tl.where(kind == BY_LR, lr, lr / tl.load(o + LR_MAX, here, 1.0))
    scale = tl.where(kind == CORRECTED, lr * relative, relative)
    return tl.where(kind == INDEPENDENT, tl.where(lr > 0, 1.0, 0.0), scale)


@triton.jit(do_not_specialize=["count"])
def coefficients_kernel(
    counters, options, decision, numbers, unrounded, count, decay: tl.constexpr
):
    """Counts the steps of `count` tensors, unless they are skipped, and computes the row of numbers
    of each.

    counters: int64 [count, 3], the address of a step count, 1 if it is a double, and the group;
    options: float64, a row of OPTIONS (triton_tables.py) for each group.
    """
    i = tl.program_id(0) * TENSORS + tl.arange(0, TENSORS)
    here = i < count
    address = tl.load(counters + 3 * i, here, 0)
    double = tl.load(counters + 3 * i + 1, here, 0) != 0
    single_step = address.to(tl.pointer_type(tl.float32))
    double_step = address.to(tl.pointer_type(tl.float64))
    t = tl.load(single_step, here & ~double, 0.0).to(tl.float64)
    t = tl.where(double, tl.load(double_step, here & double, 0.0), t) + 1
    counted = only(here, proceeds(decision))
    tl.store(single_step, t, counted & ~double)
    tl.store(double_step, t, counted & double)

    o = options + tl.load(counters + 3 * i + 2, here, 0) * ROW
    lr = tl.load(o + LR, here, 0.0)
    beta1 = tl.load(o + BETA1, here, 0.0)
    beta2 = tl.load(o + BETA2, here, 0.0)
    bias_correction1 = 1 - tl.exp(t * tl.log(beta1))
    bias_correction2 = 1 - tl.exp(t * tl.log(beta2))
    root = tl.sqrt(bias_correction2)
    lambda_t = tl.load(o + WEIGHT_DECAY, here, 0.0)
    lambda_t = lambda_t * factor(o + DECAY_SCHEDULE, t, here)
    lambda_t = lambda_t * factor(o + DECAY_SCHEDULE + FACTOR, t, here)
    if decay == "unmixed":
        lambda_t = lambda_t * bias_correction1
    if decay == "decoupled":
        lambda_t = lambda_t * decay_scale(o, here)

    ema_decay = tl.load(o + EMA_DECAY, here, 0.0)
    ema_decay = ema_decay * factor(o + EMA_SCHEDULE, t, here)
    ema_decay = ema_decay * factor(o + EMA_SCHEDULE + FACTOR, t, here)
    seed = tl.load(o + SEED, here, 0.0).to(tl.int64).to(tl.uint32)
    key = step_key(seed, t.to(tl.int64).to(tl.uint32))

    c = Coefficients(
        scale=tl.load(o + SIGN, here, 0.0),
        one_minus_beta1=1 - beta1,
        one_minus_beta2=1 - beta2,
        step_size=lr * root / bias_correction1,
        eps=tl.load(o + EPS, here, 0.0) * root,
        decay=lambda_t,
        average=1 - ema_decay,
    )
    store_row(numbers + i * NUMBERS, c, here)
    exact = Unrounded(
        decay=lambda_t,
        one_minus_beta2=1 - beta2,
        bias_correction1=bias_correction1,
        bias_correction2=bias_correction2,
        lr=lr,
        key=key.to(tl.int64).to(tl.float64),
    )
    store_row(unrounded + i * UNROUNDED, exact, here)
