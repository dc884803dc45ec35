"""Agreement with trajectories recorded from the papers' own code."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from golden import Case, Runner, names, replay
from support import Eager, needs_native
from torch import Tensor

import wdkernels as wd

OPTIMIZERS = {"spd": wd.AdamSPD, "swd": wd.AdamSWD}


def on(backend: str) -> Runner:
    return lambda case, params: OPTIMIZERS[case.kind](case.param_groups(params), backend=backend)


RUNNERS: list[Any] = [
    pytest.param(lambda case, params: Eager(case.kind, case.param_groups(params)), id="reference"),
    pytest.param(on("eager"), id="eager"),
    pytest.param(on("native"), id="native", marks=needs_native),
]
runners = pytest.mark.parametrize("runner", RUNNERS)


@runners
@pytest.mark.parametrize("name", names(dtype="64"))
def test_float64_is_the_papers_code_to_12_digits(runner: Runner, name: str) -> None:
    case = Case(name)
    for t, params, optimizer in replay(case, runner):
        if t in case.recorded:
            _assert_close(params, case.read(f"param/{t}"), _relative(1e-12))
        if t == case.steps - 1:
            for moment in ("exp_avg", "exp_avg_sq"):
                values = [optimizer.state[param][moment] for param in params]
                _assert_close(values, case.read(moment), _relative(1e-12))


@runners
@pytest.mark.parametrize("name", names(dtype="32"))
def test_float32_is_the_papers_code_to_its_rounding(runner: Runner, name: str) -> None:
    """Both runs are float32, so they may differ by what rounding adds up to in each of them.

    A step rounds a weight four times (the update, the decay, their two subtractions), each time by
    at most half an ulp of the largest number about: 2^-24 of max |w|. The moments are rounded
    three times a step. What a step adds, the later ones carry on, never amplified.
    """
    case = Case(name)

    def rounding(steps: int, roundings: int) -> Callable[[Tensor], float]:
        return lambda expected: 2 * steps * roundings * 2.0**-24 * expected.abs().max().item()

    for t, params, optimizer in replay(case, runner):
        if t in case.recorded:
            _assert_close(params, case.read(f"param/{t}"), rounding(t + 1, 4))
        if t == case.steps - 1:
            for moment in ("exp_avg", "exp_avg_sq"):
                values = [optimizer.state[param][moment] for param in params]
                _assert_close(values, case.read(moment), rounding(case.steps, 3))


@runners
@pytest.mark.parametrize("name", names("spd", "64"))
def test_spd_fires_where_the_papers_code_did(runner: Runner, name: str) -> None:
    case = Case(name)
    anchors = case.anchors or [torch.zeros(()) for _ in range(case.count)]
    before = case.read("param0")
    moved = 0
    for t, params, optimizer in replay(case, runner):
        for i, (grad, anchor) in enumerate(zip(case.grads(t), anchors, strict=True)):
            assert grad is not None
            c = -(grad * (before[i] - anchor)).sum()
            assert bool(c < 0) == bool(case.fired[t, i])
            # What was taken off beyond Adam's own step: nothing, or a pull towards the anchor.
            stepped = before[i] - _adam_step(case, optimizer.state[params[i]], t + 1)
            pulled = (params[i] - stepped).norm() > 1e-9 * stepped.norm()
            assert not pulled or case.fired[t, i]
            moved += int(pulled)
        before = [param.detach().clone() for param in params]
    assert moved > case.steps, "too few projections to have tested anything"


@runners
def test_skipped_gradients_leave_a_parameter_alone(runner: Runner) -> None:
    case = Case("swd_64")
    case.meta["skip_grad"] = {"1": [3]}
    trajectory = [[p.detach().clone() for p in params] for _, params, _ in replay(case, runner)]
    assert torch.equal(trajectory[1][3], trajectory[0][3])
    assert not torch.equal(trajectory[1][2], trajectory[0][2])
    assert not torch.equal(trajectory[2][3], trajectory[1][3])


def _relative(tolerance: float) -> Callable[[Tensor], float]:
    return lambda expected: tolerance * expected.abs().max().item()


def _assert_close(
    actual: list[Tensor], expected: list[Tensor], tolerance: Callable[[Tensor], float]
) -> None:
    for i, (x, y) in enumerate(zip(actual, expected, strict=True)):
        off = (x.detach() - y).abs()
        assert (off <= tolerance(y)).all(), f"parameter {i} is off by {off.max()}"


def _adam_step(case: Case, state: dict[str, Tensor], t: int) -> Tensor:
    beta1, beta2 = case.meta["betas"]
    v = state["max_exp_avg_sq" if case.meta["amsgrad"] else "exp_avg_sq"]
    m_hat = state["exp_avg"] / (1 - beta1**t)
    step: Tensor = case.meta["lr"] * m_hat / (v.sqrt() / math.sqrt(1 - beta2**t) + case.meta["eps"])
    return step
