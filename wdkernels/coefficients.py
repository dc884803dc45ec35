"""A group's options at a step count -> the few numbers an element needs: csrc/coefficients.h."""

from __future__ import annotations

import math
from typing import NamedTuple

from wdkernels import schedules
from wdkernels.options import GroupOptions


class ScheduleFactor(NamedTuple):
    """A schedule that is no product, in the form of csrc/options.h."""

    kind: str
    start: float  # window: first decayed step; linear, cosine: value at t = 1; inverse: offset
    end: float  # window: first step past the decay; linear, cosine: value after `steps` steps
    steps: float


def factors(schedule: schedules.Schedule | None) -> tuple[ScheduleFactor, ScheduleFactor]:
    """A schedule as a product of two."""
    constant = schedules.constant()
    schedule = schedule or constant
    product = schedule["factors"] if schedule["kind"] == "product" else [schedule, constant]
    first, second = map(_plain, product)
    return first, second


def _plain(schedule: schedules.Schedule) -> ScheduleFactor:
    start: float = schedule["offset"] if "offset" in schedule else schedule.get("start", 1.0)
    end = schedule.get("stop", schedule.get("end", 1.0))
    return ScheduleFactor(
        kind=schedule["kind"],
        start=start,
        end=math.inf if end is None else end,
        steps=schedule.get("steps", 1),
    )


def average_factors(o: GroupOptions) -> tuple[float, tuple[ScheduleFactor, ScheduleFactor]]:
    """The share of the average that stays, as a number and a product of two schedules."""
    if isinstance(o.ema_decay, dict):
        return 1.0, factors(o.ema_decay)
    return 1.0 if o.ema_decay is None else o.ema_decay, factors(None)


class Coefficients(NamedTuple):
    """The numbers of one parameter's step, as in csrc/update.h: rounded once, by who uses them."""

    scale: float
    one_minus_beta1: float
    one_minus_beta2: float
    step_size: float
    eps: float
    decay: float
    average: float


def bias_correction1(o: GroupOptions, t: float) -> float:
    return 1 - math.pow(o.beta1, t)


def bias_correction2(o: GroupOptions, t: float) -> float:
    return 1 - math.pow(o.beta2, t)


def ema_decay(o: GroupOptions, t: float) -> float:
    """k_t, the share of the average that stays; 1 without one."""
    if isinstance(o.ema_decay, dict):
        return schedules.factor(o.ema_decay, int(t))
    return 1.0 if o.ema_decay is None else o.ema_decay


def mix(x: int) -> int:
    """A hash of 32 bits, csrc/dtype.h's: every bit of x decides over every bit of it."""
    x ^= x >> 16
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x ^= x >> 15
    x = x * 0x846CA68B & 0xFFFFFFFF
    return x ^ x >> 16


def random_key(o: GroupOptions, t: float) -> int:
    """What the random bits of stochastic rounding at step t are made from, 32 bits."""
    return mix((mix(o.seed) + int(t)) & 0xFFFFFFFF)


def decay_scale(o: GroupOptions) -> float:
    """What multiplies lambda_t in a decoupled decay."""
    if o.decay_scale == "independent":
        return 1.0
    relative: float = o.lr if o.decay_scale == "lr" else o.lr / o.lr_max
    return float(o.lr) * relative if o.decay_scale == "corrected" else relative


def coefficients(o: GroupOptions, t: float) -> Coefficients:
    """A group's numbers at step t = 1, 2, 3...: operation for operation csrc/coefficients.h."""
    correction1 = bias_correction1(o, t)
    root = math.sqrt(bias_correction2(o, t))
    decay = o.weight_decay
    schedule = o.decay_schedule or {"kind": "constant"}
    for each in schedule["factors"] if schedule["kind"] == "product" else [schedule]:
        decay *= schedules.factor(each, int(t))

    if o.method == "unmixed":
        decay *= correction1
    elif o.method in ("decoupled", "swd"):
        decay *= decay_scale(o)
    return Coefficients(
        scale=-1.0 if o.maximize else 1.0,
        one_minus_beta1=1 - o.beta1,
        one_minus_beta2=1 - o.beta2,
        step_size=o.lr * root / correction1,
        eps=o.eps * root,
        decay=decay,
        average=1 - ema_decay(o, t),
    )
