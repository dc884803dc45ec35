"""Schedules: the factors they give, the mistakes they name, and that they are plain data."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wdkernels import schedules

factors = st.floats(0, 1e300)
counts = st.integers(1, 10**9)
windows = st.tuples(st.integers(0, 10**9), st.none() | counts).map(
    lambda bounds: schedules.window(bounds[0], bounds[1] and bounds[0] + bounds[1])
)
ramps = st.builds(schedules.linear, factors, factors, steps=counts) | st.builds(
    schedules.cosine, factors, factors, steps=counts
)
simple = st.just(schedules.constant()) | windows | ramps
every = simple | st.builds(schedules.product, simple, simple)


def values(schedule: dict[str, Any] | None, last: int) -> list[float]:
    return [schedules.factor(schedule, t) for t in range(1, last + 1)]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (None, [1, 1, 1]),
        (schedules.constant(), [1, 1, 1]),
        (schedules.early(3), [1, 1, 0, 0]),
        (schedules.early(1), [0, 0]),
        (schedules.late(3), [0, 0, 1, 1]),
        (schedules.late(0), [1, 1]),
        (schedules.window(2, 4), [0, 1, 1, 0, 0]),
        (schedules.window(2, None), [0, 1, 1, 1]),
        (schedules.linear(steps=4), [1, 0.75, 0.5, 0.25, 0, 0]),
        (schedules.linear(0.5, 2.5, steps=2), [0.5, 1.5, 2.5, 2.5]),
        (schedules.linear(steps=1), [1, 0, 0]),
        (schedules.warmup(4), [0, 0.25, 0.5, 0.75, 1, 1]),
        (schedules.cosine(steps=2), [1, 0.5, 0, 0]),
        (schedules.cosine(0, 4, steps=4), [0, 2 - math.sqrt(2), 2, 2 + math.sqrt(2), 4, 4]),
        (schedules.product(schedules.warmup(2), schedules.early(4)), [0, 0.5, 1, 0, 0]),
        (schedules.product(schedules.late(2), schedules.late(3)), [0, 0, 1]),
    ],
    ids=str,
)
def test_factor(schedule: dict[str, Any] | None, expected: list[float]) -> None:
    assert values(schedule, len(expected)) == pytest.approx(expected, rel=1e-15, abs=1e-15)


@given(st.sampled_from([schedules.linear, schedules.cosine]), factors, factors, counts, counts)
def test_ramps_have_exact_ends_and_stay_between_them(
    ramp: Any, start: float, end: float, steps: int, t: int
) -> None:
    schedule = ramp(start, end, steps=steps)
    assert schedules.factor(schedule, 1) == start
    assert schedules.factor(schedule, steps + 1) == end
    assert schedules.factor(schedule, steps + 1 + t) == end
    low, high = sorted([start, end])
    assert low * (1 - 1e-15) <= schedules.factor(schedule, t) <= high * (1 + 1e-15)


@given(simple, simple, counts)
def test_product_multiplies(a: dict[str, Any], b: dict[str, Any], t: int) -> None:
    expected = schedules.factor(a, t) * schedules.factor(b, t)
    assert schedules.factor(schedules.product(a, b), t) == expected


@given(every)
def test_is_plain_data(schedule: dict[str, Any]) -> None:
    assert json.loads(json.dumps(schedule)) == schedule
    file = io.BytesIO()
    torch.save({"decay_schedule": schedule}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["decay_schedule"]
    assert loaded == schedule
    schedules.validate(loaded)


JUNK = [-1, -0.5, math.nan, math.inf, True, "5", None, [1], torch.tensor(1)]


@pytest.mark.parametrize("value", JUNK, ids=repr)
@pytest.mark.parametrize("key", ["start", "end"])
@pytest.mark.parametrize("ramp", [schedules.linear, schedules.cosine])
def test_ramp_names_a_bad_value(ramp: Any, key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"'{key}' of .*'{ramp.__name__}' .* finite float >= 0"):
        ramp(**{key: value, "steps": 5})


@pytest.mark.parametrize("value", [*JUNK, 0, 2.0], ids=repr)
@pytest.mark.parametrize("ramp", [schedules.linear, schedules.cosine])
def test_ramp_names_bad_steps(ramp: Any, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"'steps' of .*'{ramp.__name__}' must be an int >= 1"):
        ramp(steps=value)


@pytest.mark.parametrize("value", [*JUNK, 2.0], ids=repr)
def test_window_names_a_bad_bound(value: Any) -> None:
    with pytest.raises(ValueError, match=r"'start' of .*'window' must be an int >= 0"):
        schedules.window(value, 10)
    if value is not None:
        with pytest.raises(ValueError, match=r"'stop' of .*'window' must be an int >= 0"):
            schedules.window(0, value)


@pytest.mark.parametrize(("start", "stop"), [(3, 3), (3, 2), (0, 0)])
def test_window_must_not_be_empty(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match=f"start < stop, not start={start} and stop={stop}"):
        schedules.window(start, stop)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("cosine", "None or a dict .* not 'cosine' of type str"),
        ([], "None or a dict"),
        (1.0, "None or a dict"),
        ({}, "unknown kind of decay schedule None"),
        ({"kind": "exponential"}, "unknown kind of decay schedule 'exponential'; there are const"),
        ({"kind": ["linear"]}, "unknown kind"),
        ({"kind": "linear", "start": 1.0}, "'linear' lacks 'end', 'steps'"),
        ({"kind": "window", "start": 1}, "'window' lacks 'stop'"),
        ({"kind": "product"}, "'product' lacks 'factors'"),
        ({"kind": "constant", "steps": 5, 7: 8}, "'constant' has no 'steps', 7"),
        ({"kind": "linear", "start": 10**400, "end": 0, "steps": 1}, "'start' .* finite float"),
        ({"kind": "product", "factors": None}, "must be a list of two, not None"),
        ({"kind": "product", "factors": [schedules.constant()]}, "must be a list of two"),
        ({"kind": "product", "factors": [None, schedules.constant()]}, "must be a dict, not None"),
        (
            {"kind": "product", "factors": [schedules.constant(), {"kind": "linear"}]},
            "'linear' lacks 'start', 'end', 'steps'",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_validate_names_what_is_wrong(schedule: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedules.validate(schedule)


def test_product_of_products_is_an_error() -> None:
    square = schedules.product(schedules.warmup(5), schedules.early(9))
    with pytest.raises(ValueError, match="cannot be a product itself"):
        schedules.product(square, schedules.constant())


def test_numpy_scalars_are_refused() -> None:
    """They would break torch.load(weights_only=True), when it is too late."""
    with pytest.raises(ValueError, match=r"'steps' .* of type int64"):
        schedules.linear(steps=np.int64(5))
    with pytest.raises(ValueError, match=r"'end' .* of type float64"):
        schedules.linear(end=np.float64(0.5), steps=5)


def test_none_is_valid() -> None:
    schedules.validate(None)


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
kinds = st.sampled_from(["constant", "window", "linear", "cosine", "product"])
keys = st.sampled_from(["start", "stop", "end", "steps", "factors"])
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.builds(
            lambda kind, rest: {"kind": kind, **rest},
            kinds | inner,
            st.dictionaries(keys, inner, max_size=3),
        )
    ),
    max_leaves=8,
)


@given(trees, counts)
def test_whatever_passes_validation_has_a_factor(tree: Any, t: int) -> None:
    try:
        schedules.validate(tree)
    except ValueError:
        return
    factor = schedules.factor(tree, t)
    assert type(factor) is float
    assert factor >= 0
