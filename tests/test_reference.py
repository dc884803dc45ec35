"""The oracle, tested: against torch.optim, closed forms, and steps worked out by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from eager import LOUD, Eager
from torch import Tensor

from wdkernels import schedules

METHODS = ["l2", "unmixed", "decoupled", "swd", "spd"]


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def vector(*values: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def run(optimizer: Any, grads: list[dict[Tensor, Tensor]]) -> None:
    """One step per dict, with those gradients and no others."""
    for each in grads:
        for param in optimizer.state:
            param.grad = each.get(param)
        optimizer.step()


def stepped(method: str, w: Tensor, g: Tensor, steps: int = 1, **options: Any) -> Tensor:
    """Where `steps` steps with the same gradient take a parameter that starts at w."""
    param = w.clone()
    run(Eager(method, [param], **options), [{param: g}] * steps)
    return param


# ---- against torch.optim -------------------------------------------------------------------------


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.5)], ids=str)
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("method", ["l2", "decoupled"])
def test_is_torch_optim(
    method: str, amsgrad: bool, maximize: bool, betas: tuple[float, float]
) -> None:
    shapes = [(), (1,), (7,), (3, 5), (0,)]
    mine = [random(*shape, seed=i) for i, shape in enumerate(shapes)]
    theirs = [w.clone() for w in mine]
    options: dict[str, Any] = {"betas": betas, "amsgrad": amsgrad, "maximize": maximize}
    reference = Eager(method, mine, **options)
    for w in theirs:
        w.requires_grad_()
    torch_class = torch.optim.Adam if method == "l2" else torch.optim.AdamW
    loud = {key: LOUD[key] for key in ("lr", "eps", "weight_decay")}
    expected = torch_class(theirs, foreach=False, fused=False, **loud, **options)

    for t in range(20):
        for i, (x, y) in enumerate(zip(mine, theirs, strict=True)):
            # Every third gradient of the third parameter is missing: its own step count lags.
            skip = i == 2 and t % 3 == 1
            # Falling gradients, so that amsgrad's maximum differs from v.
            x.grad = None if skip else random(*x.shape, seed=100 * t + i) * 0.7**t
            y.grad = x.grad
        reference.step()
        expected.step()

    for x, y in zip(mine, theirs, strict=True):
        torch.testing.assert_close(x, y.detach(), rtol=1e-13, atol=1e-14)
        assert set(reference.state[x]) == set(expected.state[y])
        for key, value in expected.state[y].items():
            torch.testing.assert_close(reference.state[x][key], value, rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.5)], ids=str)
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("method", ["l2", "decoupled"])
def test_overflow_inf_and_nan_are_those_of_torch_optim(
    method: str, amsgrad: bool, betas: tuple[float, float]
) -> None:
    # In float32, 1e20 squared overflows unless (1 - b2) comes first; 1e30 squared always does.
    grads = vector(1e20, 1e30, -1e30, math.inf, -math.inf, math.nan, 0, 1, dtype=torch.float32)
    mine = torch.ones(8)
    theirs = torch.ones(8, requires_grad=True)
    options: dict[str, Any] = {"betas": betas, "amsgrad": amsgrad}
    reference = Eager(method, [mine], **options)
    torch_class = torch.optim.Adam if method == "l2" else torch.optim.AdamW
    loud = {key: LOUD[key] for key in ("lr", "eps", "weight_decay")}
    expected = torch_class([theirs], foreach=False, fused=False, **loud, **options)
    for t in range(4):
        mine.grad = theirs.grad = grads if t == 0 else torch.full((8,), 0.5)
        reference.step()
        expected.step()
        torch.testing.assert_close(mine, theirs.detach(), equal_nan=True)
        for key, value in expected.state[theirs].items():
            torch.testing.assert_close(reference.state[mine][key], value, equal_nan=True)
    assert reference.state[mine]["exp_avg_sq"].isinf().any()


# ---- zero gradients: only the decay moves weights, to the closed form ----------------------------

STEPS = 5
SCALES = {"lr": 0.1, "relative_lr": 0.1 / 0.4, "corrected": 0.1**2 / 0.4}
TIMES: dict[str, tuple[dict[str, Any] | None, list[float]]] = {
    "always": (None, [1] * STEPS),
    "early": (schedules.early(3), [1, 1, 0, 0, 0]),
    "late": (schedules.late(3), [0, 0, 1, 1, 1]),
    "window": (schedules.window(2, 4), [0, 1, 1, 0, 0]),
    "linear": (schedules.linear(2.0, 0.0, steps=4), [2.0, 1.5, 1.0, 0.5, 0.0]),
    "cosine": (schedules.cosine(steps=2), [1.0, 0.5, 0.0, 0.0, 0.0]),
    "product": (schedules.product(schedules.late(2), schedules.warmup(4)), [0, 0.25, 0.5, 0.75, 1]),
}
times = pytest.mark.parametrize(("schedule", "factors"), TIMES.values(), ids=TIMES.keys())
anchors = pytest.mark.parametrize("anchored", [False, True], ids=["zero", "anchor"])


def start(anchored: bool) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Weights, their offset from the anchor, and the option that sets the anchor."""
    w = vector(1.0, -2.0, 0.5)
    if not anchored:
        return w, w.clone(), {}
    a = vector(0.25, 1.0, 0.5)
    return w, w - a, {"anchor": [a]}


@anchors
@times
@pytest.mark.parametrize("scale", SCALES)
def test_decoupled_decay_is_geometric(
    scale: str, schedule: Any, factors: list[float], anchored: bool
) -> None:
    w, offset, options = start(anchored)
    options.update(decay_scale=scale, lr_max=0.4, decay_schedule=schedule)
    result = stepped("decoupled", w, torch.zeros_like(w), STEPS, **options)
    kept = math.prod(1 - SCALES[scale] * 0.2 * factor for factor in factors)
    torch.testing.assert_close(result, w - offset + kept * offset, rtol=1e-14, atol=0)


@anchors
@times
def test_unmixed_decay_is_geometric(schedule: Any, factors: list[float], anchored: bool) -> None:
    w, offset, options = start(anchored)
    options.update(eps=0.1, decay_schedule=schedule)
    result = stepped("unmixed", w, torch.zeros_like(w), STEPS, **options)
    kept = math.prod(1 - 0.1 * 0.2 * factor / 0.1 for factor in factors)
    torch.testing.assert_close(result, w - offset + kept * offset, rtol=1e-14, atol=1e-15)


@anchors
@times
def test_l2_decay_is_a_normalised_step(schedule: Any, factors: list[float], anchored: bool) -> None:
    """Without memory, betas (0, 0), the penalty p = lambda (w - a) gives eta p / (|p| + eps)."""
    w, offset, options = start(anchored)
    options.update(betas=(0.0, 0.0), decay_schedule=schedule)
    result = stepped("l2", w, torch.zeros_like(w), STEPS, **options)
    anchor = w - offset
    for factor in factors:
        penalty = 0.2 * factor * offset
        offset = offset - 0.1 * penalty / (penalty.abs() + 1e-2)
    torch.testing.assert_close(result, anchor + offset, rtol=1e-14, atol=1e-15)


@anchors
@times
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("scale", SCALES)
def test_swd_decay_is_geometric(
    scale: str, amsgrad: bool, schedule: Any, factors: list[float], anchored: bool
) -> None:
    """Three weights have no gradient to speak of, nine others the same one g at every step.

    v/(1 - b2^t) is then g^2 for these at any t, so that V = 9 g^2 / 12.
    """
    w, offset, options = start(anchored)
    if anchored:
        options["anchor"].append(torch.zeros(3, 3, dtype=torch.float64))
    options.update(decay_scale=scale, lr_max=0.4, decay_schedule=schedule, amsgrad=amsgrad)
    still, other = w.clone(), random(3, 3, seed=0)
    grads = {still: torch.zeros_like(still), other: torch.full((3, 3), 4.0, dtype=torch.float64)}
    run(Eager("swd", [still, other], **options), [grads] * STEPS)
    root = math.sqrt(9 * 4.0**2 / 12)
    kept = math.prod(1 - SCALES[scale] * 0.2 * factor / root for factor in factors)
    torch.testing.assert_close(still, w - offset + kept * offset, rtol=1e-13, atol=0)


@anchors
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("method", ["swd", "spd"])
def test_swd_and_spd_rest_without_gradients(method: str, amsgrad: bool, anchored: bool) -> None:
    """V = 0 means no decay; c = 0 means no projection."""
    w, _, options = start(anchored)
    assert torch.equal(
        stepped(method, w, torch.zeros_like(w), STEPS, amsgrad=amsgrad, **options), w
    )


def test_schedules_run_on_the_parameters_own_step_count() -> None:
    often, rarely = torch.ones(1), torch.ones(1)
    optimizer = Eager("decoupled", [often, rarely], decay_schedule=schedules.early(2))
    zero = torch.zeros(1)
    run(optimizer, [{often: zero}, {often: zero}, {often: zero, rarely: zero}])
    torch.testing.assert_close(often, torch.full((1,), 1 - 0.1 * 0.2))
    torch.testing.assert_close(rarely, torch.full((1,), 1 - 0.1 * 0.2))


# ---- worked out by hand --------------------------------------------------------------------------
# At the first step m/(1 - b1) = g and v/(1 - b2) = g^2, so that u = eta g / (|g| + eps); with
# eps = 0 it is eta sign(g).


@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_first_step_of_swd(amsgrad: bool, cautious: bool) -> None:
    p, q = vector(2.0), vector(-1.0, 5.0)
    groups = [{"params": [p], "weight_decay": 0.0}, {"params": [q], "lr": 0.2, "lr_max": 0.2}]
    optimizer = Eager("swd", groups, eps=1.0, amsgrad=amsgrad, cautious=cautious)
    run(optimizer, [{p: vector(3.0), q: vector(4.0, 0.0)}])
    # V = (9 + 16 + 0) / 3 over both groups, also the one without decay; d = 0.2 * 0.2 / sqrt(V).
    d = 0.04 * math.sqrt(3) / 5
    torch.testing.assert_close(p, vector(2 - 0.1 * 3 / 4))
    # The first element of q moves away from 0 and its decay opposes that: cautious leaves it out.
    torch.testing.assert_close(q, vector(-1 + (0 if cautious else d) - 0.2 * 4 / 5, 5 - 5 * d))


def test_swd_averages_over_the_parameters_that_have_a_gradient() -> None:
    p, q = vector(1.0), torch.ones(8, dtype=torch.float64)
    optimizer = Eager("swd", [p, q], eps=1.0)
    run(optimizer, [{q: torch.full((8,), 5.0, dtype=torch.float64)}, {p: vector(2.0)}])
    # V = 2^2 at the second step, where only p takes part, at its own t = 1.
    torch.testing.assert_close(p, vector(1 - 0.02 / 2 - 0.1 * 2 / 3))


def test_swd_with_amsgrad_averages_the_maximum() -> None:
    p = vector(1.0)
    optimizer = Eager("swd", [p], betas=(0.0, 0.5), eps=1.0, amsgrad=True)
    run(optimizer, [{p: vector(4.0)}, {p: vector(0.0)}])
    # v = 8, then 4, vmax = 8; at t = 2 the correction is 1 - 0.25, and m = 0 moves nothing.
    first = 1 - 0.02 / 4 - 0.1 * 4 / 5
    torch.testing.assert_close(p, vector(first * (1 - 0.02 / math.sqrt(8 / 0.75))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_swd_keeps_the_sum_of_v(dtype: torch.dtype) -> None:
    params = [random(4, 5, seed=1).to(dtype), random(seed=2).to(dtype), torch.ones(0, dtype=dtype)]
    optimizer = Eager("swd", params)
    run(optimizer, [{p: random(*p.shape, seed=t).to(dtype) for p in params} for t in range(3)])
    for p in params:
        v = optimizer.state[p]["exp_avg_sq"]
        total = optimizer.state[p]["exp_avg_sq_sum"]
        assert total.dtype == torch.float64
        assert total.shape == ()
        expected = (torch.view_as_real(v) if v.is_complex() else v).double().sum()
        torch.testing.assert_close(total, expected, rtol=1e-15, atol=0)


@pytest.mark.parametrize("anchored", [False, True], ids=["zero", "anchor"])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(
    ("offset", "g", "eta", "expected"),
    [
        # c = -(2*3 - 1*4) = -2 < 0 and the distance grows from 5 to 7: r = 2/7, 7 (1 - r/2) = 6.
        pytest.param((3, 4), (2, -1), 3.0, (0, 6), id="fires"),
        # c = -(1*3 - 1*4) = 1: w~ stays.
        pytest.param((3, 4), (1, -1), 3.0, (0, 7), id="does not fire"),
        # c = -(4*3 - 3*4) = 0: w~ stays.
        pytest.param((3, 4), (4, -3), 3.0, (0, 7), id="c = 0"),
        # c = -7 < 0, but the distance falls: r is clipped at 0.
        pytest.param((3, 4), (1, 1), 1.0, (2, 3), id="r clipped at 0"),
        # w~ = a: norm(w~ - a) = 0 means r = 0.
        pytest.param((1, 1), (1, 1), 1.0, (0, 0), id="w~ = a"),
        # w = a: c = 0.
        pytest.param((0, 0), (1, 1), 1.0, (-1, -1), id="w = a"),
    ],
)
def test_first_step_of_spd(
    offset: tuple[int, int],
    g: tuple[int, int],
    eta: float,
    expected: tuple[int, int],
    maximize: bool,
    anchored: bool,
) -> None:
    a = vector(10.0, -20.0) if anchored else vector(0.0, 0.0)
    options: dict[str, Any] = {"anchor": [a]} if anchored else {}
    grad = -vector(*g) if maximize else vector(*g)
    options.update(lr=eta, eps=0.0, weight_decay=0.5, maximize=maximize)
    result = stepped("spd", a + vector(*offset), grad, **options)
    torch.testing.assert_close(result, a + vector(*expected), rtol=1e-14, atol=1e-14)


def test_spd_has_no_learning_rate_before_lambda_and_follows_the_schedule() -> None:
    options: dict[str, Any] = {"lr": 3.0, "eps": 0.0, "weight_decay": 1.0}
    half = schedules.linear(0.5, 0.5, steps=1)
    result = stepped("spd", vector(3, 4), vector(2, -1), decay_schedule=half, **options)
    torch.testing.assert_close(result, vector(0, 6), rtol=1e-14, atol=1e-14)


def test_spd_decides_per_tensor() -> None:
    p, q = vector(3, 4), vector(3, 4)
    optimizer = Eager("spd", [p, q], lr=3.0, eps=0.0, weight_decay=0.5)
    run(optimizer, [{p: vector(2, -1), q: vector(1, -1)}])
    torch.testing.assert_close(torch.stack([p, q]), torch.tensor([[0.0, 6], [0, 7]]).double())


def test_spd_keeps_the_digits_of_a_small_growth() -> None:
    """In float32 the two norms agree to 7 digits; their difference must still have its own."""
    offset, g, eta = (3000.0, 4000.0), (2.0, -1.0), 2**-9
    options: dict[str, Any] = {"lr": eta, "eps": 0.0, "weight_decay": 1000.0}
    single = stepped("spd", vector(*offset, dtype=torch.float32), torch.tensor(g), **options)
    w = vector(*offset)
    after = w - eta * vector(1.0, -1.0)
    r = (after.norm() - w.norm()) / after.norm()
    torch.testing.assert_close(single.double(), after - 1000 * r * after, rtol=2.0**-23, atol=0)


def test_spd_survives_norms_that_underflow() -> None:
    """c < 0 while both norms are 0: the quotient of their difference is 0/0 and means r = 0."""
    w = vector(3e-200, 4e-200)
    result = stepped("spd", w, vector(2, -1), lr=3e-200, eps=0.0)
    torch.testing.assert_close(result / 1e-200, vector(0, 7), rtol=1e-14, atol=1e-14)


def test_cautious_decay_spares_what_moves_away_from_the_anchor() -> None:
    w, g = vector(1, 1, -1, -1, 1, 0), vector(1, -1, 1, -1, 0, 1)
    # u (w - a) is > 0, < 0, < 0, > 0, = 0, = 0.
    decayed = vector(1, 0, 0, 1, 1, 1)
    result = stepped("decoupled", w, g, eps=0.0, cautious=True)
    # eps = 0: the element without gradient takes the step 0/0.
    assert result[4].isnan()
    expected = w * (1 - 0.02 * decayed) - 0.1 * g
    torch.testing.assert_close(result[[0, 1, 2, 3, 5]], expected[[0, 1, 2, 3, 5]])
    result = stepped("decoupled", w, g, eps=1.0, cautious=True)
    torch.testing.assert_close(result, w * (1 - 0.02 * decayed) - 0.05 * g)


def test_cautious_decay_looks_from_the_anchor() -> None:
    w, a, g = vector(1, 1), vector(2, 0.5), vector(1, 1)
    result = stepped("decoupled", w, g, eps=1.0, cautious=True, anchor=[a])
    torch.testing.assert_close(result, vector(1 - 0.05, 1 - 0.02 * 0.5 - 0.05))


def test_cautious_decay_goes_by_signs_not_by_a_product_that_underflows() -> None:
    tiny = 1e-200
    options: dict[str, Any] = {"lr": tiny, "lr_max": tiny, "decay_scale": "relative_lr"}
    options.update(eps=0.0, cautious=True)
    result = stepped("decoupled", vector(-tiny, tiny), vector(1, 1), **options)
    torch.testing.assert_close(result / tiny, vector(-2, 1 - 0.2 - 1), rtol=1e-14, atol=1e-15)


def test_unmixed_decay_meets_the_bias_corrected_moment() -> None:
    w, a, g = vector(2.0), vector(1.5), vector(3.0)
    result = stepped("unmixed", w, g, eps=1.0, anchor=[a], weight_decay=0.4)
    torch.testing.assert_close(result, vector(2 - 0.1 * (3 + 0.4 * 0.5) / (3 + 1)))


def test_unmixed_decay_leaves_the_moments_alone() -> None:
    states = []
    for method in ("unmixed", "decoupled"):
        param = vector(2.0)
        optimizer = Eager(method, [param])
        run(optimizer, [{param: vector(3.0)}] * 3)
        states.append([optimizer.state[param][key] for key in ("exp_avg", "exp_avg_sq")])
    assert states[0] == states[1]


def test_decay_comes_first_and_acts_on_the_old_weights() -> None:
    result = stepped("decoupled", vector(2.0), vector(3.0), eps=1.0)
    torch.testing.assert_close(result, vector(2 - 0.02 * 2 - 0.1 * 3 / 4))


# ---- what holds for every method -----------------------------------------------------------------

OPTIONS: list[dict[str, Any]] = [
    {},
    {"amsgrad": True},
    {"maximize": True},
    {"decay_schedule": schedules.window(2, 4)},
    {"amsgrad": True, "maximize": True, "betas": (0.0, 0.5)},
]
CAUTIOUS: list[dict[str, Any]] = [
    {"cautious": True},
    {"cautious": True, "decay_scale": "corrected", "lr_max": 0.4, "amsgrad": True},
    {"decay_scale": "relative_lr", "lr_max": 0.4, "maximize": True},
]
ALL = [*itertools.product(METHODS, OPTIONS), *itertools.product(["decoupled", "swd"], CAUTIOUS)]
every_method = pytest.mark.parametrize(("method", "options"), ALL, ids=str)


def weights(seed: int = 1, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [random(*shape, seed=seed).to(dtype) for shape in [(2, 3, 4), (), (3, 4), (0, 3)]]


def trajectory(
    method: str,
    params: list[Tensor],
    layout: Callable[[Tensor], Tensor] = lambda g: g,
    **options: Any,
) -> list[Tensor]:
    """Five steps with gradients that depend on shape, index and step only, in any layout."""
    optimizer = Eager(method, params, **options)
    for t in range(5):
        for i, p in enumerate(params):
            shape = (*p.shape, 2) if p.is_complex() else p.shape
            g = random(*shape, seed=10 * t + i) + 0.3
            p.grad = layout((torch.view_as_complex(g) if p.is_complex() else g).to(p.dtype))
        optimizer.step()
    return params


@every_method
def test_weight_decay_is_heard(method: str, options: dict[str, Any]) -> None:
    decayed = trajectory(method, weights(), **options)
    plain = trajectory(method, weights(), **options, weight_decay=0.0)
    assert (decayed[2] - plain[2]).abs().max() > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_without_weight_decay_all_methods_are_adam(method: str) -> None:
    result = trajectory(method, weights(), weight_decay=0.0)
    expected = trajectory("decoupled", weights(), weight_decay=0.0)
    assert all(map(torch.equal, result, expected))


@every_method
def test_anchor_moves_the_origin(method: str, options: dict[str, Any]) -> None:
    anchor = weights(seed=5)
    moved = [w + a for w, a in zip(weights(), anchor, strict=True)]
    result = trajectory(method, moved, anchor=anchor, **options)
    expected = trajectory(method, weights(), **options)
    for x, a, y in zip(result, anchor, expected, strict=True):
        torch.testing.assert_close(x - a, y, rtol=1e-13, atol=1e-13)


@every_method
def test_maximize_is_descent_on_the_negated_gradient(method: str, options: dict[str, Any]) -> None:
    options = {**options, "maximize": True}
    result = trajectory(method, weights(), **options)
    options["maximize"] = False
    expected = trajectory(method, weights(), torch.neg, **options)
    assert all(map(torch.equal, result, expected))


def other_strides(x: Tensor) -> Tensor:
    """The same values with the last two dimensions swapped in memory."""
    return x.mT.contiguous().mT if x.dim() > 1 else x.clone()


def sliced(x: Tensor) -> Tensor:
    """The same values with holes between them."""
    return torch.full((*x.shape, 2), 7, dtype=x.dtype)[..., 0].copy_(x)


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
def test_layouts_change_no_bit_but_that_of_sums(
    dtype: torch.dtype, method: str, options: dict[str, Any]
) -> None:
    anchor = weights(seed=5, dtype=dtype)
    expected = trajectory(method, weights(dtype=dtype), anchor=anchor, **options)
    # SWD and SPD sum over elements in the order of memory; what they sum is then rounded once.
    tolerance = 0.0
    if method in ("swd", "spd"):
        tolerance = 1e-13 if dtype == torch.float64 else 1e-5
    for of_param, of_grad in itertools.product([other_strides, sliced], repeat=2):
        params = [of_param(w) for w in weights(dtype=dtype)]
        strides = [w.stride() for w in params]
        others = [of_grad(a) for a in anchor]
        result = trajectory(method, params, of_grad, anchor=others, **options)
        assert [w.stride() for w in result] == strides
        for x, y in zip(result, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=tolerance)


@pytest.mark.parametrize("method", METHODS)
def test_a_slice_writes_only_to_itself(method: str) -> None:
    whole = random(4, 6, seed=1)
    inside = whole[1:3, ::2]
    before, expected = whole.clone(), inside.clone()
    trajectory(method, [inside])
    trajectory(method, [expected])
    torch.testing.assert_close(inside, expected, rtol=1e-14, atol=0)
    before[1:3, ::2] = inside
    assert torch.equal(whole, before)


@pytest.mark.parametrize("method", METHODS)
def test_expanded_gradient(method: str) -> None:
    g = torch.tensor(0.7, dtype=torch.float64).expand(3, 4)
    w = random(3, 4, seed=1)
    assert torch.equal(stepped(method, w, g, 3), stepped(method, w, g.contiguous(), 3))


@every_method
def test_complex_is_pairs_of_reals(method: str, options: dict[str, Any]) -> None:
    pairs = random(3, 4, 2, seed=1)
    z = torch.view_as_complex(pairs.clone())
    trajectory(method, [z], **options)
    trajectory(method, [pairs], **options)
    assert torch.equal(torch.view_as_real(z), pairs)


def test_lazily_conjugated_gradient() -> None:
    z, g = torch.complex(vector(1, 2), vector(3, 4)), torch.complex(vector(5, 6), vector(7, 8))
    assert g.conj().is_conj()
    result = stepped("decoupled", z, g.conj())
    assert torch.equal(result, stepped("decoupled", z, g.conj().resolve_conj()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_method
def test_half_precision_is_rounded_only_on_store(
    method: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    half, single = random(3, 4, seed=1).to(dtype), random(3, 4, seed=1).to(dtype).float()
    optimizer = Eager(method, [half], rounding="nearest", **options)
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        if key in optimizer.state[half]:
            optimizer.state[half][key] = optimizer.state[half][key].float()
    g = random(3, 4, seed=2).to(dtype)
    run(optimizer, [{half: g}])
    expected = stepped(method, single, g.float(), **options)
    assert torch.equal(half, expected.to(dtype))


@pytest.mark.parametrize("method", METHODS)
def test_zero_size_only(method: str) -> None:
    empty = torch.ones(0, 3)
    assert stepped(method, empty, empty, 2).shape == (0, 3)


@pytest.mark.parametrize("method", METHODS)
def test_no_gradient_at_all(method: str) -> None:
    w = vector(1.0)
    optimizer = Eager(method, [w])
    optimizer.step()
    assert w == 1
    assert optimizer.state[w]["step"] == 0


@every_method
def test_reads_no_number_from_the_device(method: str, options: dict[str, Any]) -> None:
    """On the meta device reading one raises: there are none. Steps are counted on the CPU."""
    w = [torch.ones(3, 4, device="meta"), torch.ones((), device="meta")]
    optimizer = Eager(method, w, anchor=[x.clone() for x in w], **options)
    run(optimizer, [{x: x.clone() for x in w}] * 2)
    assert optimizer.state[w[0]]["step"] == 2
