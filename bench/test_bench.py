"""What pytest-benchmark says of every step, and a check that contenders are comparable."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import pytest
import torch

from bench import separate
from bench.clock import clock_of
from bench.contenders import Contender, contenders
from bench.runner import OUT_OF_MEMORY, Arena, Case
from bench.workloads import Workload

pytestmark = pytest.mark.filterwarnings("default")  # the contenders' own are not ours to fix


@pytest.fixture(scope="session")
def arena_of(device: torch.device) -> Callable[[Workload], Arena]:
    return lru_cache(maxsize=1)(lambda workload: Arena(workload, device, clock_of(device)))


def test_step(case: Case, arena_of: Callable[[Workload], Arena], benchmark: Any) -> None:
    """One contender after the other, with all of pytest-benchmark's options: to follow one of them.
    Where two are compared, `python -m bench` lets them take turns."""
    arena = arena_of(case.workload)
    try:
        entrant = arena.warm_up(case)
    except torch.OutOfMemoryError:
        pytest.skip(OUT_OF_MEMORY)

    def prepare() -> None:
        arena.set_out()
        arena.prepare(case, entrant, case.workload.untimed)
        arena.clock.wait()

    def step() -> None:
        entrant.optimizer.step()
        arena.clock.wait()

    benchmark.group = case.workload.title
    benchmark.extra_info["bytes"] = case.bytes
    benchmark.pedantic(step, setup=prepare, rounds=case.workload.rounds)
    arena.check()


def test_contenders_of_a_method_compute_the_same(
    contender: Contender, device: torch.device
) -> None:
    if contender.dtype == torch.bfloat16:
        _check_bf16(contender, device)
        return
    original = next(c for c in contenders(device) if c.method == contender.method)
    results = [_results(*_train(each, device, steps=20)) for each in (contender, original)]
    torch.testing.assert_close(*results)


def _check_bf16(contender: Contender, device: torch.device) -> None:
    """Each bfloat16 contender against AdamW in float32, on numbers that both types hold.

    A number x is stored with an error below 2^-7 |x|, or 2^-8 |x| if it is rounded to the nearest.
    The norms of all errors add up at most:

    - The weights' own roundings: 2^-7 |w| in each of T steps; or 2^-8 |w| once, in the last of
      them, where the rest of the weight is kept in the state. With a decay of 1, w goes a part of
      the way to the step's direction, whose elements are 1 at most (within 2%, for so few steps):
      |w| is below the larger of its first norm and sqrt(n).
    - Where moments are stored in bfloat16, after t steps they have taken t roundings, which fade as
      the moments themselves do. m is wrong by t 2^-7 of its size at most (that which it has with
      |g| for g), and sqrt(v) by half of that. So the steps, of lr at most, add
      lr 1.5 2^-7 (1 + ... + T) to each of n elements.
    """
    steps, lr = 5, 0.1
    original = next(c for c in contenders(device) if c.method == "AdamW")
    train = partial(_train, device=device, numbers=torch.bfloat16, lr=lr, weight_decay=1.0)
    starts, _ = train(original, steps=0)
    exact, _ = train(original, steps=steps)
    params, optimizer = train(contender, steps=steps)
    for p, start, true in zip(params, starts, exact, strict=True):
        state = optimizer.state[p]
        assert p.dtype == torch.bfloat16
        root = math.sqrt(p.numel())
        weights = 2**-8 if {"master", "compensation"} & set(state) else 2**-7 * steps
        moments = 1.5 * 2**-7 * steps * (steps + 1) / 2
        moments *= state["exp_avg"].dtype == torch.bfloat16
        bound = weights * max(float(start.detach().norm()), root) + moments * lr * root
        assert (p.float() - true).detach().norm() <= 1.02 * bound


def _train(
    contender: Contender,
    device: torch.device,
    steps: int,
    numbers: torch.dtype = torch.float32,  # weights and gradients are rounded to it
    **options: Any,
) -> tuple[list[torch.Tensor], Any]:
    generator = torch.Generator().manual_seed(0)

    def randn(shape: tuple[int, ...]) -> torch.Tensor:
        drawn = torch.randn(shape, generator=generator).to(numbers)
        return drawn.to(device, contender.dtype)

    params = [randn(shape).requires_grad_() for shape in ((40, 30), (7,))]
    optimizer = contender.build([{"params": [p]} for p in params])
    for group in optimizer.param_groups:
        group.update(options)
    for step in range(steps):
        for p in params:  # smaller and smaller: Adam does not see whether all of them were clipped
            p.grad = randn(tuple(p.shape)) * 2.0 ** -(step % 10)
        contender.prepare(optimizer)
        optimizer.step()
    return params, optimizer


def _results(params: list[torch.Tensor], optimizer: Any) -> list[torch.Tensor]:
    """Weights, averages of them, and the norms that were measured."""
    averages = [optimizer.state[p]["ema"] for p in params if "ema" in optimizer.state[p]]
    return [*(p.detach() for p in params), *averages, *_norms(optimizer)]


def _norms(optimizer: Any) -> list[torch.Tensor]:
    """The weights and the gradients before the last measured step."""
    if isinstance(optimizer, separate.AdamW):
        return list(optimizer.norms)
    if getattr(optimizer, "telemetry_every", None) is None:
        return []
    rows = optimizer.telemetry().values()
    norms = [row[norm] for norm in ("weight_norm", "grad_norm") for row in rows]
    return [norm.float() for norm in norms]
