"""What the host hands to the Triton kernels: the columns of each table, by name.

The host fills rows by these names (triton_lists.py), and from them the kernels know where a number
stands (triton_streams.py). So this is where a new stream, number or option gets its column.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from wdkernels.coefficients import ScheduleFactor, average_factors, factors
from wdkernels.options import DECAY_SCALES, GroupOptions


class TensorWords(NamedTuple):
    """A tensor's row, int64. Addresses are 0 where there is no such stream."""

    weight: int
    # By the names of Parameter.streams:
    exp_avg: int
    exp_avg_sq: int
    max_exp_avg_sq: int
    anchor: int
    companion: int
    ema: int
    exp_avg_sq_sum: int
    numel: int  # elements that lie here
    total: int  # elements of the whole tensor
    cautious: int  # 0 or 1
    position: int  # of the parameter over all groups, for its random bits
    active: int  # position among the tensors with a gradient: its row of sums and of telemetry
    # Numbering: the elements' numbers in the whole tensor, for their random bits.
    first: int
    run: int
    pitch: int


STREAMS = TensorWords._fields[1 : TensorWords._fields.index("numel")]


class Unrounded(NamedTuple):
    """What is needed unrounded of a group at a step count, float64. The other numbers are
    `Coefficients`, in the type that is computed in."""

    decay: float  # that of Coefficients, before SWD divides it
    one_minus_beta2: float
    bias_correction1: float
    bias_correction2: float
    lr: float
    key: float  # of the random bits


# What is decided for all tensors before they are updated, float64.
DECISION = ("scale", "unscale", "skip")  # scale of the gradients: unscaled and clipped

# ---- a group's options, for steps that the device counts -----------------------------------------

# A name among the options is sent as its position here, or in DECAY_SCALES.
SCHEDULE_KINDS = ("constant", "window", "linear", "cosine", "inverse")

_PLAIN: dict[str, Callable[[GroupOptions], float]] = {
    "lr": lambda o: o.lr,
    "lr_max": lambda o: o.lr_max,
    "beta1": lambda o: o.beta1,
    "beta2": lambda o: o.beta2,
    "eps": lambda o: o.eps,
    "weight_decay": lambda o: o.weight_decay,
    "decay_scale": lambda o: DECAY_SCALES.index(o.decay_scale),
    "sign": lambda o: -1 if o.maximize else 1,
    "seed": lambda o: o.seed,
    "ema_decay": lambda o: average_factors(o)[0],
}
# Schedules are products of two factors, each a row of ScheduleFactor.
_SCHEDULES: dict[str, Callable[[GroupOptions], tuple[ScheduleFactor, ScheduleFactor]]] = {
    "decay_schedule": lambda o: factors(o.decay_schedule),
    "ema_schedule": lambda o: average_factors(o)[1],
}
OPTIONS = (
    *_PLAIN,
    *(f"{name}[{k}].{x}" for name in _SCHEDULES for k in range(2) for x in ScheduleFactor._fields),
)


def option_words(o: GroupOptions) -> list[float]:
    """A group's row, float64. Numbers that lie on the device stay 0 until they are copied."""
    on_device = o.device_numbers or {}
    plain = [0.0 if name in on_device else float(word(o)) for name, word in _PLAIN.items()]
    scheduled = [
        float(SCHEDULE_KINDS.index(x) if isinstance(x, str) else x)
        for product in _SCHEDULES.values()
        for factor in product(o)
        for x in factor
    ]
    return plain + scheduled
