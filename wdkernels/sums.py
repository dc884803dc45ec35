"""The table of sums that the phases of a step hand on, float64: a row for each tensor that has a
gradient, a column for each of `SUMS`, in memory that torch owns.

    reduce   leaves what is summed over the gradients (before the update)
    decide   reads it: the norm, whether the step is skipped, SWD's V
    update   leaves the sums of Selective Projection Decay and of telemetry
    finish   reads them: which tensors are pulled, what telemetry tells

The first round of `reduce` leaves "gradient2", the last "maximum"; `update` leaves the columns
behind these, and touches neither. A column that nobody asks for may hold any number.

Where tensors are shards, `torch.distributed` adds up rows between `reduce` and `decide`, and
between `update` and `finish`. w are the weights before the step, d = w - a, u is Adam's step,
w~ = w - u.
"""

from __future__ import annotations

# In the order of csrc/sums.h.
SUMS = (
    "gradient2",  # g^2, as the gradients are: neither scaled nor clipped
    "maximum",  # max(v) as it will be after the step: SWD with amsgrad
    # of telemetry
    "weight2",  # w^2
    "update2",  # u^2
    "decay2",  # squares of what the decay adds, where it enters
    "distance2",  # d^2
    "update_weight",  # u w
    "rate",  # 1 / (sqrt(v) + eps), the bias corrections left out
    # of Selective Projection Decay
    "alignment",  # g d, g scaled; it is -c
    "stepped_distance2",  # (w~ - a)^2
    "growth2",  # (w~ - a)^2 - d^2
)
