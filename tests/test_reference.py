"""Steps worked out by hand, and what holds for every method: of the formulas and every backend."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from support import METHODS, REFERENCE, Eager, Variant, every_solver, random
from torch import Tensor

from wdkernels import schedules


def vector(*values: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def run(optimizer: Any, grads: list[dict[Tensor, Tensor]]) -> None:
    """One step per dict, with those gradients and no others."""
    params = {param for each in grads for param in each}
    for each in grads:
        for param in params:
            param.grad = each.get(param)
        optimizer.step()


def stepped(
    method: str, backend: str, w: Tensor, g: Tensor, steps: int = 1, **options: Any
) -> Tensor:
    """Where `steps` steps with the same gradient take a parameter that starts at w."""
    param = w.clone()
    run(Variant(method).build([param], backend, **options), [{param: g}] * steps)
    return param


# ---- worked out by hand --------------------------------------------------------------------------
# At the first step m/(1 - b1) = g and v/(1 - b2) = g^2, so that u = eta g / (|g| + eps); with
# eps = 0 it is eta sign(g).


@every_solver
@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_first_step_of_swd(amsgrad: bool, cautious: bool, backend: str) -> None:
    p, q = vector(2.0), vector(-1.0, 5.0)
    groups = [{"params": [p], "weight_decay": 0.0}, {"params": [q], "lr": 0.2, "lr_max": 0.2}]
    optimizer = Variant("swd").build(groups, backend, eps=1.0, amsgrad=amsgrad, cautious=cautious)
    run(optimizer, [{p: vector(3.0), q: vector(4.0, 0.0)}])
    # V = (9 + 16 + 0) / 3 over both groups, also the one without decay; d = 0.2 * 0.2 / sqrt(V).
    d = 0.04 * math.sqrt(3) / 5
    torch.testing.assert_close(p, vector(2 - 0.1 * 3 / 4))
    # The first element of q moves away from 0 and its decay opposes that: cautious leaves it out.
    torch.testing.assert_close(q, vector(-1 + (0 if cautious else d) - 0.2 * 4 / 5, 5 - 5 * d))


@every_solver
def test_swd_averages_over_the_parameters_that_have_a_gradient(backend: str) -> None:
    p, q = vector(1.0), torch.ones(8, dtype=torch.float64)
    optimizer = Variant("swd").build([p, q], backend, eps=1.0)
    run(optimizer, [{q: torch.full((8,), 5.0, dtype=torch.float64)}, {p: vector(2.0)}])
    # V = 2^2 at the second step, where only p takes part, at its own t = 1.
    torch.testing.assert_close(p, vector(1 - 0.02 / 2 - 0.1 * 2 / 3))


@every_solver
def test_swd_with_amsgrad_averages_the_maximum(backend: str) -> None:
    p = vector(1.0)
    optimizer = Variant("swd").build([p], backend, betas=(0.0, 0.5), eps=1.0, amsgrad=True)
    run(optimizer, [{p: vector(4.0)}, {p: vector(0.0)}])
    # v = 8, then 4, vmax = 8; at t = 2 the correction is 1 - 0.25, and m = 0 moves nothing.
    first = 1 - 0.02 / 4 - 0.1 * 4 / 5
    torch.testing.assert_close(p, vector(first * (1 - 0.02 / math.sqrt(8 / 0.75))))


@every_solver
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_swd_keeps_the_sum_of_v(dtype: torch.dtype, backend: str) -> None:
    params = [random(4, 5, seed=1).to(dtype), random(seed=2).to(dtype), torch.ones(0, dtype=dtype)]
    optimizer = Variant("swd").build(params, backend)
    run(optimizer, [{p: random(*p.shape, seed=t).to(dtype) for p in params} for t in range(3)])
    for p in params:
        v = optimizer.state[p]["exp_avg_sq"]
        total = optimizer.state[p]["exp_avg_sq_sum"]
        assert total.dtype == torch.float64
        assert total.shape == ()
        expected = (torch.view_as_real(v) if v.is_complex() else v).double().sum()
        # The kernels' own recurrence takes squares that were never rounded to v's type.
        rounded = backend == "native" and dtype != torch.float64
        torch.testing.assert_close(total, expected, rtol=1e-6 if rounded else 1e-15, atol=0)


@every_solver
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
    backend: str,
) -> None:
    a = vector(10.0, -20.0) if anchored else vector(0.0, 0.0)
    options: dict[str, Any] = {"anchor": [a]} if anchored else {}
    grad = -vector(*g) if maximize else vector(*g)
    options.update(lr=eta, eps=0.0, weight_decay=0.5, maximize=maximize)
    result = stepped("spd", backend, a + vector(*offset), grad, **options)
    torch.testing.assert_close(result, a + vector(*expected), rtol=1e-14, atol=1e-14)


@every_solver
def test_spd_has_no_learning_rate_before_lambda_and_follows_the_schedule(backend: str) -> None:
    options: dict[str, Any] = {"lr": 3.0, "eps": 0.0, "weight_decay": 1.0}
    half = schedules.linear(0.5, 0.5, steps=1)
    result = stepped("spd", backend, vector(3, 4), vector(2, -1), decay_schedule=half, **options)
    torch.testing.assert_close(result, vector(0, 6), rtol=1e-14, atol=1e-14)


@every_solver
def test_spd_decides_per_tensor(backend: str) -> None:
    p, q = vector(3, 4), vector(3, 4)
    optimizer = Variant("spd").build([p, q], backend, lr=3.0, eps=0.0, weight_decay=0.5)
    run(optimizer, [{p: vector(2, -1), q: vector(1, -1)}])
    torch.testing.assert_close(torch.stack([p, q]), torch.tensor([[0.0, 6], [0, 7]]).double())


@every_solver
def test_spd_keeps_the_digits_of_a_small_growth(backend: str) -> None:
    """In float32 the two norms agree to 7 digits; their difference must still have its own."""
    offset, g, eta = (3000.0, 4000.0), (2.0, -1.0), 2**-9
    options: dict[str, Any] = {"lr": eta, "eps": 0.0, "weight_decay": 1000.0}
    single = stepped(
        "spd", backend, vector(*offset, dtype=torch.float32), torch.tensor(g), **options
    )
    w = vector(*offset)
    after = w - eta * vector(1.0, -1.0)
    r = (after.norm() - w.norm()) / after.norm()
    torch.testing.assert_close(single.double(), after - 1000 * r * after, rtol=2.0**-23, atol=0)


@every_solver
def test_spd_survives_norms_that_underflow(backend: str) -> None:
    """c < 0 while both norms are 0: the quotient of their difference is 0/0 and means r = 0."""
    w = vector(3e-200, 4e-200)
    result = stepped("spd", backend, w, vector(2, -1), lr=3e-200, eps=0.0)
    torch.testing.assert_close(result / 1e-200, vector(0, 7), rtol=1e-14, atol=1e-14)


@every_solver
def test_cautious_decay_spares_what_moves_away_from_the_anchor(backend: str) -> None:
    w, g = vector(1, 1, -1, -1, 1, 0), vector(1, -1, 1, -1, 0, 1)
    # u (w - a) is > 0, < 0, < 0, > 0, = 0, = 0.
    decayed = vector(1, 0, 0, 1, 1, 1)
    result = stepped("decoupled", backend, w, g, eps=0.0, cautious=True)
    # eps = 0: the element without gradient takes the step 0/0.
    assert result[4].isnan()
    expected = w * (1 - 0.02 * decayed) - 0.1 * g
    torch.testing.assert_close(result[[0, 1, 2, 3, 5]], expected[[0, 1, 2, 3, 5]])
    result = stepped("decoupled", backend, w, g, eps=1.0, cautious=True)
    torch.testing.assert_close(result, w * (1 - 0.02 * decayed) - 0.05 * g)


@every_solver
def test_cautious_decay_looks_from_the_anchor(backend: str) -> None:
    w, a, g = vector(1, 1), vector(2, 0.5), vector(1, 1)
    result = stepped("decoupled", backend, w, g, eps=1.0, cautious=True, anchor=[a])
    torch.testing.assert_close(result, vector(1 - 0.05, 1 - 0.02 * 0.5 - 0.05))


@every_solver
def test_cautious_decay_goes_by_signs_not_by_a_product_that_underflows(backend: str) -> None:
    tiny = 1e-200
    options: dict[str, Any] = {"lr": tiny, "lr_max": tiny, "decay_scale": "relative_lr"}
    options.update(eps=0.0, cautious=True)
    result = stepped("decoupled", backend, vector(-tiny, tiny), vector(1, 1), **options)
    torch.testing.assert_close(result / tiny, vector(-2, 1 - 0.2 - 1), rtol=1e-14, atol=1e-15)


@every_solver
def test_unmixed_decay_meets_the_bias_corrected_moment(backend: str) -> None:
    w, a, g = vector(2.0), vector(1.5), vector(3.0)
    result = stepped("unmixed", backend, w, g, eps=1.0, anchor=[a], weight_decay=0.4)
    torch.testing.assert_close(result, vector(2 - 0.1 * (3 + 0.4 * 0.5) / (3 + 1)))


@every_solver
def test_unmixed_decay_leaves_the_moments_alone(backend: str) -> None:
    states = []
    for method in ("unmixed", "decoupled"):
        param = vector(2.0)
        optimizer = Variant(method).build([param], backend)
        run(optimizer, [{param: vector(3.0)}] * 3)
        states.append([optimizer.state[param][key] for key in ("exp_avg", "exp_avg_sq")])
    assert states[0] == states[1]


@every_solver
def test_decay_comes_first_and_acts_on_the_old_weights(backend: str) -> None:
    result = stepped("decoupled", backend, vector(2.0), vector(3.0), eps=1.0)
    torch.testing.assert_close(result, vector(2 - 0.02 * 2 - 0.1 * 3 / 4))


@every_solver
def test_schedules_run_on_the_parameters_own_step_count(backend: str) -> None:
    often, rarely = torch.ones(1), torch.ones(1)
    optimizer = Variant("decoupled").build(
        [often, rarely], backend, decay_schedule=schedules.early(2)
    )
    zero = torch.zeros(1)
    run(optimizer, [{often: zero}, {often: zero}, {often: zero, rarely: zero}])
    torch.testing.assert_close(often, torch.full((1,), 1 - 0.1 * 0.2))
    torch.testing.assert_close(rarely, torch.full((1,), 1 - 0.1 * 0.2))


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


def weights(seed: int = 1) -> list[Tensor]:
    return [random(*shape, seed=seed) for shape in [(2, 3, 4), (), (3, 4), (0, 3)]]


def trajectory(
    method: str, backend: str, params: list[Tensor], sign: float = 1.0, **options: Any
) -> list[Tensor]:
    """Five steps with gradients that depend on shape, index and step only."""
    optimizer = Variant(method).build(params, backend, **options)
    for t in range(5):
        for i, p in enumerate(params):
            shape = (*p.shape, 2) if p.is_complex() else p.shape
            g = random(*shape, seed=10 * t + i) + 0.3
            p.grad = sign * (torch.view_as_complex(g) if p.is_complex() else g)
        optimizer.step()
    return params


@every_solver
@every_method
def test_weight_decay_is_heard(method: str, options: dict[str, Any], backend: str) -> None:
    decayed = trajectory(method, backend, weights(), **options)
    plain = trajectory(method, backend, weights(), **options, weight_decay=0.0)
    assert (decayed[2] - plain[2]).abs().max() > 1e-3


@every_solver
@pytest.mark.parametrize("method", METHODS)
def test_without_weight_decay_all_methods_are_adam(method: str, backend: str) -> None:
    result = trajectory(method, backend, weights(), weight_decay=0.0)
    expected = trajectory("decoupled", backend, weights(), weight_decay=0.0)
    assert all(map(torch.equal, result, expected))


@every_solver
@every_method
def test_anchor_moves_the_origin(method: str, options: dict[str, Any], backend: str) -> None:
    anchor = weights(seed=5)
    moved = [w + a for w, a in zip(weights(), anchor, strict=True)]
    result = trajectory(method, backend, moved, anchor=anchor, **options)
    expected = trajectory(method, backend, weights(), **options)
    for x, a, y in zip(result, anchor, expected, strict=True):
        torch.testing.assert_close(x - a, y, rtol=1e-13, atol=1e-13)


@every_solver
@every_method
def test_maximize_is_descent_on_the_negated_gradient(
    method: str, options: dict[str, Any], backend: str
) -> None:
    options = {**options, "maximize": True}
    result = trajectory(method, backend, weights(), **options)
    options["maximize"] = False
    expected = trajectory(method, backend, weights(), -1.0, **options)
    assert all(map(torch.equal, result, expected))


@every_solver
@every_method
def test_complex_is_pairs_of_reals(method: str, options: dict[str, Any], backend: str) -> None:
    pairs = random(3, 4, 2, seed=1)
    z = torch.view_as_complex(pairs.clone())
    trajectory(method, backend, [z], **options)
    trajectory(method, backend, [pairs], **options)
    assert torch.equal(torch.view_as_real(z), pairs)


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
    expected = stepped(method, REFERENCE, single, g.float(), **options)
    assert torch.equal(half, expected.to(dtype))


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
