"""The compiled loops on the CPU, beyond what every backend does: phases, shards, threads."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from support import (
    NARROW,
    Variant,
    assert_same_bits,
    bits,
    every_variant,
    needs_native,
    random,
    train,
    trained,
)
from support.phases import step_in_phases
from torch import Tensor

import wdkernels as wd
from wdkernels import groups, native, state
from wdkernels.options import from_group
from wdkernels.plan import Numbering, Request

pytestmark = needs_native

# One is larger than a batch of Selective Projection Decay, one has no elements.
SIZES = (40, 300_000, 0, 70_001, 5)


def plan_of(
    w: Tensor, numbering: Numbering, total: int, **options: Any
) -> tuple[native.Plan, tuple[Any, Any]]:
    """A plan of one parameter, and what its calls need to be told of it."""
    optimizer = wd.AdamW([w], lr=0.1, weight_decay=0.2, eps=1e-2, backend="eager", **options)
    (group,) = optimizer.param_groups
    chosen = from_group("decoupled", group)
    state.complete(w, optimizer.state[w], chosen, None)
    (parameter,) = groups.as_parameters(optimizer.param_groups, optimizer.state, [chosen])
    parameter = parameter._replace(total=total, numbering=numbering)
    arguments = optimizer.state, optimizer.param_groups
    return native.Plan([parameter], [chosen], *arguments), arguments


@pytest.mark.parametrize("asked", [False, True], ids=["plain", "asked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_variant
def test_phases_have_the_bits_of_a_step(
    *, variant: Variant, dtype: torch.dtype, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Telemetry and the norm too."""
    more = {"max_grad_norm": 40.0, "skip_nonfinite": True, "telemetry_every": 1}

    def run() -> tuple[dict[str, Tensor], dict[str, Any]]:
        params = [random(n, seed=i, dtype=dtype) for i, n in enumerate(SIZES)]
        optimizer = variant.build(params, "native", **(more if asked else {}))
        found = trained(optimizer, params, 2)
        return found, optimizer.telemetry().to_dict() if asked else {}

    expected, told = run()
    monkeypatch.setattr(native.Plan, "step", step_in_phases)
    actual, of_phases = run()
    assert_same_bits(actual, expected)
    assert str(of_phases) == str(told)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("moments", [None, torch.bfloat16])
@pytest.mark.parametrize("columns", [slice(0, 1), slice(7, 300), slice(300, 701)])
def test_a_shard_has_the_random_bits_of_the_whole(
    columns: slice, moments: torch.dtype | None, dtype: torch.dtype
) -> None:
    """Its rows, which follow each other in its own memory, do not in that of the whole."""
    rows, width = 50, 701
    whole = random(rows, width, seed=1, dtype=dtype)
    shard = whole[:, columns].contiguous().clone()
    numbering = Numbering(columns.start, shard.shape[1], width)
    plans = [
        plan_of(whole, Numbering(), whole.numel(), moment_dtype=moments, seed=3),
        plan_of(shard, numbering, whole.numel(), moment_dtype=moments, seed=3),
    ]
    for t in range(3):
        whole.grad = random(rows, width, seed=10 + t, dtype=dtype)
        shard.grad = whole.grad[:, columns].contiguous()
        for plan, arguments in plans:
            assert plan.step(*arguments, Request())
    assert torch.equal(bits(whole[:, columns].contiguous()), bits(shard))


def test_no_step_begins_before_another_has_ended() -> None:
    w = random(7, seed=1)
    w.grad = random(7, seed=2)
    plan, arguments = plan_of(w, Numbering(), w.numel())
    phases = plan.begin(*arguments, Request())
    with pytest.raises(RuntimeError, match="at work on a step in another thread"):
        plan.step(*arguments, Request())
    del phases  # as where an exception came between its phases
    assert plan.step(*arguments, Request())


def test_a_step_needs_gradients_of_its_own() -> None:
    w = random(4, 3, seed=1)
    w.grad = random(4, 3, seed=2)
    plan, arguments = plan_of(w, Numbering(), w.numel())
    core, request = plan._core, native._C.Request()
    gathered = core.gather(*arguments)
    core.step(gathered, request, None, 0, False)
    with pytest.raises(RuntimeError, match="gradients of its own"):
        core.step(gathered, request, None, 0, False)
    w.grad = random(3, 4, seed=2).T
    gathered = core.gather(*arguments)
    assert gathered.irregular == [0]
    with pytest.raises(RuntimeError, match="has not been replaced"):
        core.step(gathered, request, None, 0, False)


def test_threads_may_free_each_others_gradients() -> None:
    """Each step reads the gradients that it has found, or is refused."""
    params = [random(2000, seed=i) for i in range(40)]
    optimizer = wd.AdamW(params, backend="native")
    train(optimizer, params, range(1))
    outcomes: list[str] = []

    def run() -> None:
        for t in range(60):
            for p in params:
                p.grad = torch.ones(4000, dtype=p.dtype)[::2] if t % 3 else torch.ones_like(p)
            try:
                optimizer.step()
                outcomes.append("stepped")
            except RuntimeError as error:
                outcomes.append(str(error))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "stepped" in outcomes
    assert all(x == "stepped" or "another thread" in x or "changed" in x for x in outcomes)
    assert all(torch.isfinite(p).all() for p in params)
