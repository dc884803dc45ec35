"""Weight decay over time, as plain data.

A schedule is a small dict that a param group holds under ``decay_schedule``; it multiplies
``weight_decay``. It holds no state: the optimizer reads the factor at each parameter's own step
count, so nothing has to be called in the training loop and a resumed run continues exactly.
Being made of str, int, float and None only, it survives JSON and
``torch.load(weights_only=True)``::

    wd.AdamW(params, weight_decay=0.1, decay_schedule=wd.schedules.early(stop=2000))
    wd.AdamW(params, weight_decay=0.1, decay_schedule=wd.schedules.cosine(steps=10_000))

Sources: early, late and windowed decay are the interventions of Golatkar et al. 2019
(arXiv 1905.13277) and Bjorck et al. 2021 (arXiv 2012.13841); linear and cosine ramps are the
``start_weight_decay`` to ``end_weight_decay`` of Megatron-LM.
"""

from __future__ import annotations

import math
import sys
from typing import Any

Schedule = dict[str, Any]

_KEYS = {
    "constant": (),
    "window": ("start", "stop"),
    "linear": ("start", "end", "steps"),
    "cosine": ("start", "end", "steps"),
    "inverse": ("offset",),
    "product": ("factors",),
}


def constant() -> Schedule:
    """Factor 1 at every step; the same as no schedule."""
    return _checked({"kind": "constant"})


def early(stop: int) -> Schedule:
    """Decay early, then never: factor 1 while t < `stop`, then 0. `stop` is a step count >= 1."""
    return window(0, stop)


def late(start: int) -> Schedule:
    """Decay from step `start` (>= 0) on: factor 0 while t < `start`, then 1."""
    return window(start, None)


def window(start: int, stop: int | None) -> Schedule:
    """Decay in a window: factor 1 while `start` <= t < `stop`, else 0.

    Both are step counts, 0 <= `start` < `stop`; `stop` None means that the window stays open.
    """
    return _checked({"kind": "window", "start": start, "stop": stop})


def linear(start: float = 1.0, end: float = 0.0, *, steps: int) -> Schedule:
    """Straight ramp: start + (end - start) p, with p = min((t - 1) / steps, 1).

    The first step has exactly the factor `start`, each one after the `steps`-th exactly `end`.
    Both are finite and >= 0 (and may exceed 1); `steps` is a step count >= 1.
    """
    return _checked({"kind": "linear", "start": start, "end": end, "steps": steps})


def cosine(start: float = 1.0, end: float = 0.0, *, steps: int) -> Schedule:
    """Half a cosine wave: end + (start - end)(1 + cos(pi p)) / 2; otherwise as `linear`."""
    return _checked({"kind": "cosine", "start": start, "end": end, "steps": steps})


def inverse(offset: int = 2) -> Schedule:
    """Factor 1 / (t - 1 + offset), `offset` a step count >= 1.

    With anchor="initial" and decay_scale="independent" it is SODA (arXiv 2605.11172).
    """
    return _checked({"kind": "inverse", "offset": offset})


def warmup(steps: int) -> Schedule:
    """From no decay to full decay in a straight line over `steps` steps: `linear(0, 1)`."""
    return linear(0.0, 1.0, steps=steps)


def product(a: Schedule, b: Schedule) -> Schedule:
    """The product of two schedules, neither of them a product itself."""
    return _checked({"kind": "product", "factors": [a, b]})


def factor(schedule: Schedule | None, t: int) -> float:
    """What multiplies the weight decay at a parameter's own step t = 1, 2, 3...

    The schedule must be valid (`validate`); None is constant.
    """
    if schedule is None or schedule["kind"] == "constant":
        return 1.0
    if schedule["kind"] == "product":
        return math.prod(factor(each, t) for each in schedule["factors"])
    if schedule["kind"] == "window":
        stop = math.inf if schedule["stop"] is None else schedule["stop"]
        return 1.0 if schedule["start"] <= t < stop else 0.0
    if schedule["kind"] == "inverse":
        return float(1.0 / (t - 1 + schedule["offset"]))
    p = min((t - 1) / schedule["steps"], 1.0)
    # The share of the start value, not of the difference: both ends then come out exactly.
    share = 1.0 - p if schedule["kind"] == "linear" else (1.0 + math.cos(math.pi * p)) / 2.0
    return float(schedule["start"] * share + schedule["end"] * (1.0 - share))


def largest(schedule: Schedule) -> float:
    """The largest factor that a valid schedule, which is no product, ever has."""
    if schedule["kind"] in ("linear", "cosine"):
        return float(max(schedule["start"], schedule["end"]))
    return 1.0


def validate(schedule: object) -> None:
    """Raise a ValueError that names what is wrong unless `schedule` is None or a valid schedule."""
    if schedule is None:
        return
    if not isinstance(schedule, dict):
        raise ValueError(
            "a decay schedule is None or a dict made by wdkernels.schedules, "
            f"not {schedule!r} of type {_name(schedule)}"
        )
    kind = schedule.get("kind")
    if not isinstance(kind, str) or kind not in _KEYS:
        raise ValueError(f"unknown kind of decay schedule {kind!r}; there are {', '.join(_KEYS)}")
    expected = {"kind", *_KEYS[kind]}
    if missing := [key for key in _KEYS[kind] if key not in schedule]:
        raise ValueError(f"decay schedule {kind!r} lacks {_listed(missing)}")
    if extra := [key for key in schedule if key not in expected]:
        raise ValueError(f"decay schedule {kind!r} has no {_listed(extra)}")

    if kind == "window":
        _check_count(schedule, "start", at_least=0)
        if schedule["stop"] is not None:
            _check_count(schedule, "stop", at_least=0)
            if schedule["stop"] <= schedule["start"]:
                raise ValueError(
                    "decay schedule 'window' needs start < stop, "
                    f"not start={schedule['start']} and stop={schedule['stop']}"
                )
    elif kind in ("linear", "cosine"):
        _check_factor(schedule, "start")
        _check_factor(schedule, "end")
        _check_count(schedule, "steps", at_least=1)
    elif kind == "inverse":
        _check_count(schedule, "offset", at_least=1)
    elif kind == "product":
        _check_factors(schedule["factors"])


# Types are compared exactly: True is no step count, and a numpy scalar, though it may be a float,
# does not survive torch.load(weights_only=True).


def _check_count(schedule: Schedule, key: str, at_least: int) -> None:
    value = schedule[key]
    if type(value) is not int or not at_least <= value <= 2**53:  # exact as a float
        raise ValueError(
            f"{key!r} of decay schedule {schedule['kind']!r} must be an int >= {at_least}, "
            f"not {value!r} of type {_name(value)}"
        )


def _check_factor(schedule: Schedule, key: str) -> None:
    value = schedule[key]
    if type(value) not in (int, float) or not 0 <= value <= sys.float_info.max:
        raise ValueError(
            f"{key!r} of decay schedule {schedule['kind']!r} must be a finite float >= 0, "
            f"not {value!r} of type {_name(value)}"
        )


def _check_factors(factors: object) -> None:
    if not isinstance(factors, list) or len(factors) != 2:
        raise ValueError(
            f"'factors' of decay schedule 'product' must be a list of two, not {factors!r}"
        )
    for each in factors:
        if not isinstance(each, dict):
            raise ValueError(f"a factor of decay schedule 'product' must be a dict, not {each!r}")
        if each.get("kind") == "product":
            raise ValueError("a factor of decay schedule 'product' cannot be a product itself")
        validate(each)


def _checked(schedule: Schedule) -> Schedule:
    validate(schedule)
    return schedule


def _listed(keys: list[Any]) -> str:
    return ", ".join(repr(key) for key in keys)


def _name(value: object) -> str:
    return type(value).__name__
