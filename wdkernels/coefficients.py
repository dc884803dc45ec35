"""Hyper-parameters: what a param group may hold, checked and made plain."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from wdkernels import schedules

DECAY_SCALES = ("lr", "relative_lr", "corrected")
ROUNDINGS = ("stochastic", "kahan", "nearest")
MOMENT_DTYPES = (None, torch.float32, torch.bfloat16)
_LIVE = ("lr", "weight_decay")  # may be tensors that a GPU reads in every step
ANCHORS = ("zero", "initial", "given")  # of a group in use: given tensors are in the state


# Options that have no meaning for a method, and why.
_IN_THE_STEP = "with L2 the decay is a part of the step, which lr multiplies as a whole"
_NO_LR = "SPD's pull has no learning rate in front of it"
SENSELESS: dict[tuple[str, str], str] = {
    ("l2", "cautious"): "with L2 the decay is a part of the step it would be compared with",
    ("l2", "decay_scale"): _IN_THE_STEP,
    ("l2", "lr_max"): _IN_THE_STEP,
    ("spd", "cautious"): "SPD selects whole tensors by a condition of its own",
    ("spd", "decay_scale"): _NO_LR,
    ("spd", "lr_max"): _NO_LR,
    **{
        (method, "unmixed"): "it is a variant of L2, which Adam has; this decay is never in m or v"
        for method in ("decoupled", "swd", "spd")
    },
}


class Schedule(NamedTuple):
    """A schedule that is no product, in the form of csrc/coefficients.h."""

    kind: str
    start: float  # window: first decayed step;        linear, cosine: value at t = 1
    end: float  # window: first step past the decay;   linear, cosine: value after `steps` steps
    steps: float


@dataclass(frozen=True)
class Hyper:
    """One param group's numbers, valid by construction (`from_group`); fields as in the group."""

    method: str  # "l2", "unmixed", "decoupled", "swd" or "spd"
    lr: float
    lr_max: float  # eta_max of the decay scales
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decay_schedule: schedules.Schedule | None
    decay_scale: str
    amsgrad: bool
    maximize: bool
    cautious: bool
    anchored: bool
    # Steps are counted on the device (for CUDA graphs, and where only the device knows whether a
    # step is skipped); lr and weight_decay that are tensors of it stand here and are read there at
    # every step. None: the host does all that.
    live: Mapping[str, torch.Tensor] | None = None
    rounding: str = "stochastic"
    master_weights: bool = False
    moment_dtype: torch.dtype | None = None
    seed: int = 0
    ema_decay: float | schedules.Schedule | None = None

    @property
    def streams(self) -> tuple[object, ...]:
        """What decides over the tensors that a step reads and writes; all else is numbers."""
        return (
            *(self.method, self.amsgrad, self.anchored, self.live is not None),
            *(self.rounding, self.master_weights, self.moment_dtype, self.ema_decay is not None),
        )

    def read(self) -> Hyper:
        """With the numbers that live on a device, for which the host waits."""
        read: dict[str, Any] = {name: x.item() for name, x in (self.live or {}).items()}
        return replace(self, **read)


def factors(schedule: schedules.Schedule | None) -> tuple[Schedule, Schedule]:
    """A schedule as a product of two."""
    constant = schedules.constant()
    schedule = schedule or constant
    product = schedule["factors"] if schedule["kind"] == "product" else [schedule, constant]
    first, second = map(_plain, product)
    return first, second


def _plain(schedule: schedules.Schedule) -> Schedule:
    end = schedule.get("stop", schedule.get("end", 1.0))
    return Schedule(
        kind=schedule["kind"],
        start=schedule.get("start", 1.0),
        end=math.inf if end is None else end,
        steps=schedule.get("steps", 1),
    )


def from_group(method: str, group: Mapping[str, Any], counted: bool = False) -> Hyper:
    """The hyper-parameters of a group; ValueError names the one that is wrong.

    `counted`: on the device, whether `capturable` or not.
    """
    for option in group:
        if reason := SENSELESS.get((method, option)):
            raise ValueError(f"{option} makes no sense here: {reason}")
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas must be a pair of numbers in [0, 1), not {betas!r}")
    decay_scale = group.get("decay_scale", "lr")
    if decay_scale not in DECAY_SCALES:
        known = ", ".join(map(repr, DECAY_SCALES))
        raise ValueError(f"unknown decay_scale {decay_scale!r}; there are {known}")
    schedules.validate(group["decay_schedule"])
    if _flag(group, "unmixed"):
        method = "unmixed"

    if not isinstance(group["anchor"], str) or group["anchor"] not in ANCHORS:
        raise ValueError(
            "anchor tensors are taken at construction and in add_param_group; in a group it must "
            f"be one of {', '.join(map(repr, ANCHORS))}, not {group['anchor']!r}"
        )

    # Of a device: read there, and never waited for.
    live = {name: x for name in _LIVE if isinstance(x := group[name], torch.Tensor) and x.is_cuda}
    capturable = _flag(group, "capturable")
    if live and not capturable:
        name, x = next(iter(live.items()))
        raise ValueError(
            f"{name} is a tensor on {x.device}, for which the host would have to wait in every "
            "step: pass a number, or capturable=True, and the device reads it"
        )
    rounding = group["rounding"]
    if rounding not in ROUNDINGS:
        known = ", ".join(map(repr, ROUNDINGS))
        raise ValueError(f"unknown rounding {rounding!r}; there are {known}")
    master_weights = _flag(group, "master_weights")
    if master_weights and rounding == "kahan":
        raise ValueError(
            "master_weights=True and rounding='kahan' each keep what 16-bit weights lose: take one"
        )
    moment_dtype = group["moment_dtype"]
    if moment_dtype not in MOMENT_DTYPES:
        known = ", ".join(map(str, MOMENT_DTYPES))
        raise ValueError(f"moment_dtype must be one of {known}, not {moment_dtype!r}")
    seed = group["seed"]
    if type(seed) is not int or not 0 <= seed < 2**32:
        raise ValueError(f"seed must be an int in [0, 2**32), not {seed!r}")

    lr = 0.0 if "lr" in live else _number(group["lr"], "lr")
    given = group.get("lr_max", lr)
    if given is None:  # only in a group that is being made: so this waits for a device once
        given = live["lr"].item() if "lr" in live else lr
    lr_max = _number(given, "lr_max")
    if decay_scale != "lr" and lr_max == 0:
        raise ValueError(
            f"decay_scale {decay_scale!r} divides by lr_max, the largest learning rate of the "
            "group's schedule, which is 0: pass lr_max, or a positive lr at construction"
        )
    return Hyper(
        method=method,
        lr=lr,
        lr_max=lr_max,
        beta1=_number(betas[0], "betas[0]", below=1.0),
        beta2=_number(betas[1], "betas[1]", below=1.0),
        eps=_number(group["eps"], "eps"),
        weight_decay=0.0
        if "weight_decay" in live
        else _number(group["weight_decay"], "weight_decay"),
        decay_schedule=group["decay_schedule"],
        decay_scale=decay_scale,
        amsgrad=_flag(group, "amsgrad"),
        maximize=_flag(group, "maximize"),
        cautious=_flag(group, "cautious"),
        anchored=group["anchor"] != "zero",
        live=live if capturable or counted else None,
        rounding=rounding,
        master_weights=master_weights,
        moment_dtype=moment_dtype,
        seed=seed,
        ema_decay=_ema_decay(group["ema_decay"]),
    )


def max_norm(value: Any) -> float:
    """A bound of the gradients' norm; none is infinite. ValueError if it is no bound."""
    if isinstance(value, float) and value == math.inf:
        return value
    return math.inf if value is None else _number(value, "max_grad_norm")


def _ema_decay(value: Any) -> float | schedules.Schedule | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        decay = _number(value, "ema_decay")
        if decay > 1:
            raise ValueError(f"ema_decay must be in [0, 1], not {value!r}")
        return decay
    schedules.validate(value)
    factors = value["factors"] if value["kind"] == "product" else [value]
    for each in factors:
        if max(each.get("start", 0), each.get("end", 0)) > 1 and each["kind"] != "window":
            raise ValueError(f"ema_decay must stay in [0, 1], which the schedule {each!r} does not")
    return value


def _number(value: Any, name: str, below: float = math.inf) -> float:
    """A finite number >= 0 and < `below`; a tensor of one element counts as one, on the CPU."""
    if isinstance(value, torch.Tensor):
        if not value.is_cpu:
            raise ValueError(
                f"{name} is a tensor on {value.device}, for which the host would have to wait in "
                "every step: pass a number"
            )
        value = value.item() if value.numel() == 1 else value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):  # numpy's are among them
        raise ValueError(f"{name} must be a number, not {value!r}")
    try:
        number = float(value)
    except OverflowError:  # an int of hundreds of digits
        number = math.inf
    if not 0.0 <= number < below:  # also refuses NaN
        limit = "finite and >= 0" if below == math.inf else f"in [0, {below:g})"
        raise ValueError(f"{name} must be {limit}, not {value!r}")
    return number


def _flag(group: Mapping[str, Any], name: str) -> bool:
    value = group.get(name, False)
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, not {value!r}")
    return value


class Coefficients(NamedTuple):
    """The numbers of one parameter's step, as in csrc/update.h: rounded once, by who uses them."""

    scale: float
    one_minus_beta1: float
    one_minus_beta2: float
    step_size: float
    eps: float
    decay: float
    average: float


def bias_correction1(h: Hyper, t: float) -> float:
    return 1 - math.pow(h.beta1, t)


def bias_correction2(h: Hyper, t: float) -> float:
    return 1 - math.pow(h.beta2, t)


def ema_decay(h: Hyper, t: float) -> float:
    """k_t, the share of the average that stays; 1 without one."""
    if isinstance(h.ema_decay, dict):
        return schedules.factor(h.ema_decay, int(t))
    return 1.0 if h.ema_decay is None else h.ema_decay


def mix(x: int) -> int:
    """A hash of 32 bits, csrc/dtype.h's: every bit of x decides over every bit of it."""
    x ^= x >> 16
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x ^= x >> 15
    x = x * 0x846CA68B & 0xFFFFFFFF
    return x ^ x >> 16


def random_key(h: Hyper, t: float) -> int:
    """What the random bits of stochastic rounding at step t are made from, 32 bits."""
    return mix((mix(h.seed) + int(t)) & 0xFFFFFFFF)


def coefficients(h: Hyper, t: float) -> Coefficients:
    """A group's numbers at step t = 1, 2, 3...: operation for operation csrc/coefficients.h."""
    correction1 = bias_correction1(h, t)
    root = math.sqrt(bias_correction2(h, t))
    decay = h.weight_decay
    schedule = h.decay_schedule or {"kind": "constant"}
    for each in schedule["factors"] if schedule["kind"] == "product" else [schedule]:
        decay *= schedules.factor(each, int(t))

    if h.method == "unmixed":
        decay *= correction1
    elif h.method in ("decoupled", "swd"):
        relative = h.lr if h.decay_scale == "lr" else h.lr / h.lr_max
        decay *= h.lr * relative if h.decay_scale == "corrected" else relative
    return Coefficients(
        scale=-1.0 if h.maximize else 1.0,
        one_minus_beta1=1 - h.beta1,
        one_minus_beta2=1 - h.beta2,
        step_size=h.lr * root / correction1,
        eps=h.eps * root,
        decay=decay,
        average=1 - ema_decay(h, t),
    )
