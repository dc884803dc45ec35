"""The optimizers on every backend: against the reference, closed forms, torch and themselves."""

from __future__ import annotations

import itertools
import math
from functools import cache
from typing import Any

import pytest
import torch
from support import (
    METHODS,
    REFERENCE,
    TORCH,
    USUAL,
    VARIANTS,
    WIDE,
    Variant,
    anchors_of,
    assert_same_bits,
    every_backend,
    every_method,
    every_solver,
    every_variant,
    internals,
    needs_native,
    random,
    set_gradients,
    snapshot,
    train,
    trained,
    weights,
)
from torch import Tensor

import wdkernels as wd
from wdkernels import schedules

DTYPES = [torch.float32, torch.float64, torch.complex64, torch.complex128]
STEPS = 6


def assert_accurate(
    actual: dict[str, Tensor],
    plain: dict[str, Tensor],
    exact: dict[str, Tensor],
    dtype: torch.dtype,
) -> None:
    """`actual` errs at most twice as much as the papers' formulas written in the same dtype.

    Both round a like number of times per step, so their largest errors over all elements of a kind
    (weights, a moment) are alike, and a factor of two is left for chance. Where few roundings meet,
    chance is larger: an ulp of the largest number for each step is always allowed. Formulas in
    `exact`'s own dtype show no error; there the 1e-12 of the recorded trajectories counts.
    """
    assert actual.keys() == plain.keys() == exact.keys()
    for kind in {name.split()[0] for name in exact}:
        names = [name for name in exact if name.split()[0] == kind and exact[name].numel() > 0]
        scale = max(exact[name].abs().max().item() for name in names)
        if dtype == WIDE[dtype]:
            tolerance = 1e-12 * scale
        else:
            ulp = torch.finfo(dtype).eps * scale
            tolerance = max(2 * max(error(plain[k], exact[k]) for k in names), STEPS * ulp)
        for name in names:
            off = error(actual[name], exact[name])
            assert off <= tolerance, f"{name} is off by {off}, more than {tolerance}"


def error(x: Tensor, exact: Tensor) -> float:
    return (x.to(exact.dtype) - exact).abs().max().item()


# ---- against the reference -----------------------------------------------------------------------


def run(
    variant: Variant, backend: str, dtype: torch.dtype, computed: torch.dtype | None = None
) -> dict[str, Tensor]:
    """On numbers of `dtype`, which is `computed` in another one."""
    numbers = weights(dtype)
    params, anchors = (
        [x.detach().to(computed or dtype) for x in each] for each in (numbers, anchors_of(numbers))
    )
    return trained(variant.build(params, backend, anchors), params, STEPS, like=numbers)


@cache
def formulas(index: int, dtype: torch.dtype, computed: torch.dtype) -> dict[str, Tensor]:
    return run(VARIANTS[index], REFERENCE, dtype, computed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index", range(len(VARIANTS)), ids=map(str, VARIANTS))
@every_backend
def test_is_the_reference(index: int, backend: str, dtype: torch.dtype) -> None:
    actual = run(VARIANTS[index], backend, dtype)
    plain, exact = formulas(index, dtype, dtype), formulas(index, dtype, WIDE[dtype])
    assert_accurate(actual, plain, exact, dtype)


# Around the sizes where a loop ends: a lane (16), a tile (1024), a chunk (16384), some chunks.
EDGES = [n + k for n in (16, 1024, 16384) for k in (-1, 0, 1)] + [3 * 16384 + 1024 + 17]


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@every_backend
@pytest.mark.parametrize("options", [{}, {"amsgrad": True}], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_every_size(method: str, options: dict[str, Any], backend: str, dtype: torch.dtype) -> None:
    variant = Variant(method, options, anchored=True)
    sizes = [(n // 2 if dtype.is_complex else n,) for n in EDGES]
    runs = []
    for solver in (REFERENCE, backend):
        params = weights(dtype, sizes)
        runs.append(trained(variant.build(params, solver), params, 3))
    assert_accurate(runs[1], runs[0], runs[0], dtype)


def mixed_groups(params: list[Tensor]) -> list[dict[str, Any]]:
    """Eight groups that differ in everything a group may hold; one parameter each."""
    options: list[dict[str, Any]] = [
        {},
        {"amsgrad": True, "eps": 0.1},
        {"anchor": anchors_of(params)[2:3]},
        {"decay_schedule": schedules.window(2, 4), "lr": 0.05},
        {"maximize": True, "anchor": anchors_of(params)[4:5], "amsgrad": True},
        {"betas": (0.0, 0.9), "weight_decay": 0.4},
        {"weight_decay": 0.0, "lr": 0.3},
        {"decay_schedule": schedules.warmup(4), "betas": (0.5, 0.5)},
    ]
    return [{"params": [p], **each} for p, each in zip(params, options, strict=True)]


@every_backend
@pytest.mark.parametrize("method", METHODS)
def test_groups_mix_options_and_dtypes(method: str, backend: str) -> None:
    """One optimizer of many groups is the reference of the same groups."""
    dtypes = itertools.cycle([torch.float64, torch.complex128])
    runs = []
    for solver in (REFERENCE, backend):
        shapes = [(5,), (3, 7), (), (2, 2), (40,), (1,), (6,), (30,)]
        params = [random(*s, seed=i, dtype=next(dtypes)) for i, s in enumerate(shapes)]
        groups = mixed_groups(params)
        if method in ("decoupled", "swd"):
            groups[0] |= {"cautious": True}
            groups[4] |= {"decay_scale": "relative_lr", "lr_max": 0.4}
            groups[7] |= {"decay_scale": "corrected", "lr_max": 0.2, "cautious": True}
        runs.append(trained(Variant(method).build(groups, solver), params, STEPS))
    assert_accurate(runs[1], runs[0], runs[0], torch.float64)


@every_backend
@pytest.mark.parametrize("method", [method for method in METHODS if method != "swd"])
def test_a_group_does_not_see_the_others(method: str, backend: str) -> None:
    """The bits are those of an optimizer for each group, also of float32 beside float64."""
    dtypes = [torch.float32, torch.float64, torch.complex64, torch.float32] * 2
    runs = []
    for apart in (False, True):
        params = [random(50 + i, seed=i, dtype=dtype) for i, dtype in enumerate(dtypes)]
        groups = [[group] for group in mixed_groups(params)] if apart else [mixed_groups(params)]
        optimizers = [Variant(method).build(each, backend) for each in groups]
        for t in range(STEPS):
            set_gradients(params, t)
            for optimizer in optimizers:
                optimizer.step()
        weights_and_states = [snapshot(optimizer, params) for optimizer in optimizers]
        runs.append({key: x for each in weights_and_states for key, x in each.items()})
    assert_same_bits(*runs)


@every_backend
@every_method
def test_swd_averages_over_dtypes_and_groups(variant: Variant, backend: str) -> None:
    """A float32 beside a float64 parameter: V, and with it the decay, counts the reals of both."""
    runs = []
    for solver in (REFERENCE, backend):
        params = [torch.ones(3), torch.ones(7, dtype=torch.complex128), torch.ones(2).double()]
        train(variant.build(params, solver), params, range(2))
        runs.append(params[1:])
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-7, atol=1e-7)


# ---- zero gradients: only the decay moves weights, to the closed form ----------------------------

SCHEDULES: dict[str, tuple[dict[str, Any] | None, list[float]]] = {
    "always": (None, [1, 1, 1, 1, 1]),
    "early": (schedules.early(3), [1, 1, 0, 0, 0]),
    "late": (schedules.late(3), [0, 0, 1, 1, 1]),
    "window": (schedules.window(2, 4), [0, 1, 1, 0, 0]),
    "linear": (schedules.linear(2.0, 0.0, steps=4), [2.0, 1.5, 1.0, 0.5, 0.0]),
    "cosine": (schedules.cosine(steps=2), [1.0, 0.5, 0.0, 0.0, 0.0]),
    "product": (schedules.product(schedules.late(2), schedules.warmup(4)), [0, 0.25, 0.5, 0.75, 1]),
}
SCALES = {"lr": 0.1, "relative_lr": 0.1 / 0.4, "corrected": 0.1**2 / 0.4}
every_schedule = pytest.mark.parametrize(
    ("schedule", "factors"), SCHEDULES.values(), ids=SCHEDULES.keys()
)
with_and_without_anchor = pytest.mark.parametrize("anchored", [False, True], ids=["zero", "anchor"])


def at_rest(
    method: str, backend: str, anchored: bool, loud: list[Tensor] | None = None, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Five steps without gradient: the weights' offset from the anchor before and after, anchor.

    `loud` parameters have a gradient of 4 all the while.
    """
    w = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    a = torch.tensor([0.25, 1.0, 0.5, -1.0], dtype=torch.float64) * anchored
    params = [w.clone(), *(loud or [])]
    options["anchor"] = [a, *map(torch.zeros_like, loud or [])] if anchored else "zero"
    optimizer = Variant(method).build(params, backend, **options)
    for _ in range(5):
        params[0].grad = torch.zeros_like(w)
        for p in params[1:]:
            p.grad = torch.full_like(p, 4.0)
        optimizer.step()
    return w - a, params[0] - a, a


@every_solver
@with_and_without_anchor
@every_schedule
@pytest.mark.parametrize("scale", SCALES)
def test_decoupled_decay_is_geometric(
    scale: str, schedule: Any, factors: list[float], anchored: bool, backend: str
) -> None:
    options = {"decay_scale": scale, "lr_max": 0.4, "decay_schedule": schedule}
    before, after, _ = at_rest("decoupled", backend, anchored, **options)
    kept = math.prod(1 - SCALES[scale] * 0.2 * factor for factor in factors)
    torch.testing.assert_close(after, kept * before, rtol=1e-14, atol=1e-15)


@every_solver
@with_and_without_anchor
@every_schedule
def test_unmixed_decay_is_geometric(
    schedule: Any, factors: list[float], anchored: bool, backend: str
) -> None:
    options = {"eps": 0.1, "decay_schedule": schedule}
    before, after, _ = at_rest("unmixed", backend, anchored, **options)
    kept = math.prod(1 - 0.1 * 0.2 * factor / 0.1 for factor in factors)
    torch.testing.assert_close(after, kept * before, rtol=1e-14, atol=1e-15)


@every_solver
@with_and_without_anchor
@every_schedule
def test_l2_decay_is_a_normalised_step(
    schedule: Any, factors: list[float], anchored: bool, backend: str
) -> None:
    """Without memory, betas (0, 0), the penalty p = lambda (w - a) gives eta p / (|p| + eps)."""
    options = {"betas": (0.0, 0.0), "decay_schedule": schedule}
    offset, after, _ = at_rest("l2", backend, anchored, **options)
    for factor in factors:
        penalty = 0.2 * factor * offset
        offset = offset - 0.1 * penalty / (penalty.abs() + 1e-2)
    torch.testing.assert_close(after, offset, rtol=1e-14, atol=1e-15)


@every_solver
@with_and_without_anchor
@every_schedule
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("scale", SCALES)
def test_swd_decay_is_geometric(
    scale: str, amsgrad: bool, schedule: Any, factors: list[float], anchored: bool, backend: str
) -> None:
    """Twelve elements of gradient 4 beside the four at rest: V = 12 * 4^2 / 16 at every step."""
    loud = [random(3, 3, seed=0), random(3, seed=1)]
    options = {"decay_schedule": schedule, "amsgrad": amsgrad}
    options |= {"decay_scale": scale, "lr_max": 0.4}
    before, after, _ = at_rest("swd", backend, anchored, loud, **options)
    kept = math.prod(1 - SCALES[scale] * 0.2 * factor / math.sqrt(12) for factor in factors)
    torch.testing.assert_close(after, kept * before, rtol=1e-14, atol=1e-15)


@every_solver
@with_and_without_anchor
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("method", ["swd", "spd"])
def test_swd_and_spd_rest_without_gradients(
    method: str, amsgrad: bool, anchored: bool, backend: str
) -> None:
    """V = 0 means no decay; c = 0 means no projection."""
    before, after, _ = at_rest(method, backend, anchored, amsgrad=amsgrad)
    assert torch.equal(before, after)


# ---- the same bits -------------------------------------------------------------------------------


# The whole step, on weights of several types.
WHOLE: list[dict[str, Any]] = [
    {"max_grad_norm": 0.5, "ema_decay": 0.9, "telemetry_every": 1},
    {"rounding": "kahan", "moment_dtype": torch.bfloat16},
    {"master_weights": True, "ema_decay": 0.9},
    {"amsgrad": True, "moment_dtype": torch.bfloat16, "max_grad_norm": 0.5},
]
variants_and_whole_steps = pytest.mark.parametrize(
    "variant",
    [*VARIANTS, *(Variant(method, each, True) for method in METHODS for each in WHOLE)],
    ids=str,
)


def on_native(variant: Variant, sizes: list[tuple[int, ...]], steps: int) -> dict[str, Tensor]:
    narrow = (torch.float32, torch.bfloat16, torch.float16)
    dtypes = narrow if variant.options in WHOLE else (torch.float32, torch.float64)
    params = [p for dtype in dtypes for p in weights(dtype, sizes)]
    optimizer = variant.build(params, "native")
    train(optimizer, params, range(steps))
    found = snapshot(optimizer, params)
    if optimizer.telemetry_every:
        telemetry = optimizer.telemetry()
        found |= {f"{p} {key}": x for p in telemetry for key, x in telemetry[p].items()}
    return found


@needs_native
@variants_and_whole_steps
@pytest.mark.usefixtures("restored")
def test_same_bits_with_every_instruction_set(variant: Variant) -> None:
    runs = []
    for name in internals.instruction_sets():
        internals.use_instruction_set(name)
        assert internals.instruction_set() == name
        runs.append(on_native(variant, [(3, 5), (1040,), (17,), (), (2100,)], 4))
    for run in runs:
        assert_same_bits(run, runs[0])


@needs_native
@variants_and_whole_steps
@pytest.mark.usefixtures("restored")
def test_same_bits_for_every_number_of_threads_and_every_run(variant: Variant) -> None:
    """Enough elements to wake the threads, in tensors of many chunks and many tensors of one."""
    sizes = [(3 * 16384 + 5,), (16384,), (40,), (2 * 16384,), *[(300,)] * 10]
    runs = []
    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        runs.append(on_native(variant, sizes, 2))
    for run in runs:
        assert_same_bits(run, runs[0])


@needs_native
@pytest.mark.usefixtures("restored")
def test_spd_over_many_batches() -> None:
    """SPD's second touch follows the step batch by batch, also of tensors larger than a batch."""
    sizes = [300_000, 0, 1, 200_000, 100_000, 5, 262_144, 262_145, 70_000]

    def two_steps(backend: str) -> dict[str, Tensor]:
        params = [random(n, seed=n) for n in sizes]
        return trained(Variant("spd", anchored=True).build(params, backend), params, 2)

    expected, runs = two_steps(REFERENCE), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        runs.append(two_steps("native"))
        assert_same_bits(runs[-1], runs[0])
    # Sums of as many terms as a tensor has elements, each rounded; in double, and by either side.
    for name, x in runs[0].items():
        torch.testing.assert_close(x, expected[name], rtol=1e-12, atol=1e-12)


@every_backend
@every_variant
def test_same_bits_for_every_run(variant: Variant, backend: str) -> None:
    assert_same_bits(*(run(variant, backend, torch.float32) for _ in range(2)))


# ---- against torch.optim -------------------------------------------------------------------------


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize(
    ("usual", "room"),
    [
        pytest.param({}, 1.0, id="loud"),
        pytest.param({"betas": (0.5, 0.9)}, 1.0, id="short memory"),
        # Adam's errors are then all but those of rounding w once a step, which nobody can avoid.
        pytest.param({"lr": 1e-3, "weight_decay": 1e-2, "eps": 1e-8}, 1.01, id="usual"),
    ],
)
@pytest.mark.parametrize("method", TORCH)
@needs_native
def test_float32_errs_no_more_than_the_fused_kernel_of_torch(
    method: str, usual: dict[str, Any], room: float, amsgrad: bool
) -> None:
    """Root mean square over 4096 weights after 40 steps, against torch in float64."""
    options = {**USUAL, **usual, "amsgrad": amsgrad}

    def leaves(kind: Any, dtype: torch.dtype, **more: Any) -> list[Tensor]:
        w = random(4096, seed=1, dtype=torch.float32).to(dtype).requires_grad_()
        optimizer = kind([w], **options, **more)
        for t in range(40):
            g = (random(4096, seed=10 + t) + 0.1) * 0.95**t
            w.grad = g.to(torch.float32).to(dtype)
            optimizer.step()
        return [w.detach(), optimizer.state[w]["exp_avg_sq"]]

    exact = leaves(TORCH[method], torch.float64, fused=False, foreach=False)
    fused = leaves(TORCH[method], torch.float32, fused=True)
    mine = leaves({"l2": wd.Adam, "decoupled": wd.AdamW}[method], torch.float32, backend="native")
    for x, y, z in zip(mine, fused, exact, strict=True):
        ours, theirs = ((each.double() - z).square().mean().sqrt() for each in (x, y))
        assert ours <= room * theirs


def of_torch(method: str, params: list[Tensor], **options: Any) -> Any:
    return TORCH[method](params, foreach=False, fused=False, **{**USUAL, **options})


@every_solver
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.5)], ids=str)
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("method", TORCH)
def test_is_torch_optim(
    method: str, amsgrad: bool, maximize: bool, betas: tuple[float, float], backend: str
) -> None:
    variant = Variant(method, {"amsgrad": amsgrad, "maximize": maximize, "betas": betas})
    params, others = weights(), weights()
    actual = trained(variant.build(params, backend), params, 20)
    expected = trained(of_torch(method, others, **variant.options), others, 20)
    assert_accurate(actual, expected, expected, torch.float64)


@every_solver
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.4), (0.0, 0.5)], ids=str)
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("method", TORCH)
def test_overflow_inf_and_nan_are_those_of_torch_optim(
    method: str, amsgrad: bool, betas: tuple[float, float], backend: str
) -> None:
    """The overflow lasts: an infinite second moment stops an element, it does not make it NaN.

    In float32, 1e20 squared overflows unless (1 - b2) comes first; 1e30 squared always does.
    """
    first = torch.tensor([1e30, -1e30, math.inf, -math.inf, math.nan, 0, 1, 1e-30, 3e19, 1e20])
    options = {"amsgrad": amsgrad, "betas": betas}
    params = [torch.ones(10, requires_grad=True) for _ in range(2)]
    optimizers = [
        Variant(method).build(params[:1], backend, **options),
        of_torch(method, params[1:], **options),
    ]
    for t in range(4):
        for p, optimizer in zip(params, optimizers, strict=True):
            p.grad = first.clone() if t == 0 else torch.full((10,), 0.5)
            optimizer.step()
        runs = [snapshot(o, [p]) for o, p in zip(optimizers, params, strict=True)]
        torch.testing.assert_close(*runs, equal_nan=True)
    assert runs[0]["exp_avg_sq 0"][:2].isinf().all()


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bad", [1e30, math.inf, math.nan], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_one_bad_gradient_is_that_of_the_reference(
    method: str, bad: float, dtype: torch.dtype, backend: str
) -> None:
    """One element's overflow, inf or NaN spreads as far as the formula says, and no further."""
    runs = []
    for solver in (REFERENCE, backend):
        params = [torch.ones(20, dtype=dtype), torch.ones(3, dtype=dtype)]
        optimizer = Variant(method).build(params, solver)
        for t in range(4):
            params[0].grad = torch.linspace(-1, 1, 20, dtype=dtype)
            params[1].grad = torch.ones(3, dtype=dtype)
            if t == 0:
                params[0].grad[7] = bad**10 if dtype == torch.float64 else bad
            optimizer.step()
        runs.append(params)
    torch.testing.assert_close(runs[1], runs[0], equal_nan=True)
