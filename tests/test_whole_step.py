"""What a step does beside its update: scaled, clipped and bad gradients, averages, telemetry."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from eager import LOUD
from torch import Tensor, nn
from variants import (
    METHODS,
    VARIANTS,
    Edge,
    Variant,
    anchors_of,
    assert_as_at,
    assert_same_bits,
    bits,
    every_backend,
    every_edge,
    every_method,
    gradient,
    needs_native,
    random,
    saved,
    snapshot,
    train,
)

import wdkernels as wd
from wdkernels import native, schedules
from wdkernels.plan import Request

every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=str)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SHAPES = [(3, 5), (), (7,), (2, 2, 3), (0, 3), (130,)]
STEPS = 5


def weights(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    tensors = [random(*shape, seed=i, dtype=dtype) for i, shape in enumerate(SHAPES)]
    return [w.requires_grad_() for w in tensors]


def set_gradients(params: list[Tensor], t: int, scale: float = 1.0) -> list[Tensor]:
    """Those that there are."""
    for i, p in enumerate(params):
        g = gradient(p, i, t)
        p.grad = None if g is None else g * scale
    return [p.grad for p in params if p.grad is not None]


def scaled(optimizer: Any, scale: float | None, found_inf: float = 0.0) -> None:
    """What a GradScaler tells the optimizer for the next step."""
    optimizer.grad_scale = None if scale is None else torch.tensor(scale)
    optimizer.found_inf = torch.tensor(found_inf)


def real(x: Tensor) -> Tensor:
    x = x.detach()
    return (torch.view_as_real(x) if x.is_complex() else x).double()


def norm(gradients: list[Tensor]) -> float:
    return math.sqrt(sum((real(g) ** 2).sum().item() for g in gradients))


# ---- GradScaler ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "unscaled"),
    [
        *((dtype, False) for dtype in DTYPES),
        *((dtype, True) for dtype in DTYPES[:3]),  # GradScaler.unscale_ refuses float16
    ],
    ids=str,
)
@every_backend
@every_method
def test_grad_scaler(variant: Variant, backend: str, dtype: torch.dtype, unscaled: bool) -> None:
    """Its scales are powers of two: not a bit differs from a run with gradients that were never
    scaled, in which the steps with inf are left out. The first step is one of them."""
    overflows = (0, 3)
    params, plain = weights(dtype), weights(dtype)
    optimizer = variant.build(params, backend)
    expected = variant.build(plain, backend)
    scaler: Any = torch.amp.GradScaler(
        "cpu", init_scale=64.0, growth_factor=4.0, backoff_factor=0.5, growth_interval=2
    )
    scales = []
    for t in range(6):
        scaler.scale(torch.ones(()))  # makes its tensors at first
        set_gradients(params, t, scaler.get_scale())
        set_gradients(plain, t)
        if t in overflows:
            params[-1].grad[7] = math.inf
        else:
            expected.step()
        if unscaled:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        if t == 0:
            assert all(not state["step"] for state in optimizer.state.values())
    assert scales == [32, 32, 128, 64, 64, 256]
    assert optimizer.skipped_steps == len(overflows)
    assert_same_bits(snapshot(optimizer, params), snapshot(expected, plain))


@every_backend
def test_grad_scaler_as_with_torch(backend: str) -> None:
    """Beside the loop that everybody writes: loss scaled, gradients clipped, the best of both."""
    runs = []
    for kind, own in ((torch.optim.AdamW, {}), (wd.AdamW, {"backend": backend})):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        optimizer: Any = kind(model.parameters(), lr=0.1, eps=1e-2, weight_decay=0.2, **own)
        if own:
            optimizer.max_grad_norm = 0.25
        scaler: Any = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=3)
        for t in range(8):
            optimizer.zero_grad()
            loss = (model(8 * random(6, 4, seed=t, dtype=torch.float32)) ** 2).mean()
            scaler.scale(loss).backward()
            if not own:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.25)
            scaler.step(optimizer)
            scaler.update()
        if own:
            assert optimizer.skipped_steps > 0
        runs.append([*(p.detach() for p in model.parameters()), scaler.get_scale()])
    for x, y in zip(*runs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)  # float32, a few steps


@pytest.mark.parametrize("unscaled", [False, True])
@pytest.mark.parametrize("again", [True, False], ids=["again", "without"])
@every_backend
def test_a_step_that_fails_keeps_nothing_of_a_grad_scaler(
    backend: str, again: bool, unscaled: bool
) -> None:
    """The same step once more is unscaled once, and one without a scaler not at all."""
    runs = []
    for fails in (False, True):
        w = torch.ones(3)
        optimizer = wd.AdamW([w], lr=0.1, eps=1.0, backend=backend)
        scaler: Any = torch.amp.GradScaler("cpu", init_scale=64.0)
        scaler.scale(torch.ones(()))
        w.grad = torch.full((3,), 32.0)
        if unscaled:
            scaler.unscale_(optimizer)
        if fails:
            optimizer.param_groups[0]["lr"] = -1.0
            with pytest.raises(ValueError, match="lr must be"):
                scaler.step(optimizer)
            optimizer.param_groups[0]["lr"] = 0.1
        scaler.step(optimizer) if again else optimizer.step()
        runs.append(snapshot(optimizer, [w]))
        assert not {"grad_scale", "found_inf"} & vars(optimizer).keys()
    assert_same_bits(*runs)


@every_backend
def test_grad_scaler_without_gradients(backend: str) -> None:
    """It says that it found the number 0."""
    w = torch.ones(2)
    optimizer = wd.AdamW([w], backend=backend)
    scaler: Any = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    assert torch.equal(w, torch.ones(2))
    assert optimizer.skipped_steps == 0


# ---- clipping ------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_norm", [0.0, 0.5, 10.0, 1e6, torch.tensor(2.0)], ids=str)
@every_backend
@every_variant
def test_clipping_is_that_of_torch(
    variant: Variant, backend: str, max_norm: float | Tensor
) -> None:
    """Of groups with other numbers, too: the norm is one for all."""
    runs = []
    for own in (True, False):
        params = weights()
        groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.3}]
        if variant.anchored:
            anchors = anchors_of(params)
            groups[0]["anchor"], groups[1]["anchor"] = anchors[:2], anchors[2:]
        optimizer = Variant(variant.method, variant.options).build(
            groups, backend, max_grad_norm=max_norm if own else None
        )
        for t in range(STEPS):
            gradients = set_gradients(params, t)
            before = norm(gradients)
            if not own:
                nn.utils.clip_grad_norm_(params, float(max_norm))
            optimizer.step()
            if own:
                assert optimizer.grad_norm.item() == pytest.approx(before, rel=1e-12)
        runs.append(snapshot(optimizer, params))
    for key, expected in runs[1].items():
        torch.testing.assert_close(runs[0][key], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@every_backend
@every_method
def test_clipping_by_a_norm_that_is_no_number(variant: Variant, backend: str, bad: float) -> None:
    runs = []
    for own in (True, False):
        params = weights()
        optimizer = variant.build(params, backend, max_grad_norm=1.0 if own else None)
        for t in range(3):
            set_gradients(params, t)
            if t == 1:
                params[0].grad[1, 2] = bad
            if not own:
                nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
        runs.append(snapshot(optimizer, params))
    for key, expected in runs[1].items():
        torch.testing.assert_close(
            runs[0][key], expected, rtol=1e-12, atol=1e-12, equal_nan=True, msg=key
        )


@every_dtype
@every_backend
def test_the_norm_is_of_unscaled_gradients_of_all_types(backend: str, dtype: torch.dtype) -> None:
    params = [*weights(dtype), random(4, seed=7, dtype=torch.complex64), torch.ones(3)]
    optimizer = wd.AdamW(params, backend=backend, max_grad_norm=1e-3)
    assert optimizer.grad_norm is None
    for t in range(3):
        gradients = set_gradients(params, t, 16.0)
        scaled(optimizer, 16.0)
        optimizer.step()
        found = optimizer.grad_norm
        assert found is not None
        assert found.dtype == torch.float64
        assert found.shape == ()
        # Summed in float64.
        assert found.item() == pytest.approx(norm(gradients) / 16, rel=1e-12)
    optimizer.max_grad_norm = None
    optimizer.step()
    assert optimizer.grad_norm is None


@pytest.mark.parametrize("before", [None, 1.0, torch.tensor(1.0)], ids=str)
@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (-1.0, "must be finite and >= 0, not -1"),
        (torch.tensor(-1.0), "must be finite and >= 0, not -1"),
        (torch.ones(2), "must be a number, not tensor"),
        (torch.tensor(1.0, device="meta"), "is a tensor on meta, for which .*: pass a number"),
    ],
    ids=str,
)
def test_options_of_the_whole_are_checked_when_they_change(
    before: Any, bad: Any, match: str
) -> None:
    w = torch.ones(2)
    optimizer = wd.AdamW([w], backend="eager", max_grad_norm=before)
    w.grad = torch.ones(2)
    optimizer.max_grad_norm = bad
    with pytest.raises(ValueError, match=f"max_grad_norm {match}"):
        optimizer.step()
    assert torch.equal(w, torch.ones(2))
    assert not optimizer.state[w]


@needs_native
def test_a_bound_that_changes_needs_no_new_plan() -> None:
    w = torch.ones(2)
    optimizer = wd.AdamW([w], backend="native", max_grad_norm=1.0)
    w.grad = torch.ones(2)
    optimizer.step()
    plan = optimizer._plan
    for bound in (0.5, None, torch.tensor(0.25)):
        optimizer.max_grad_norm = bound
        optimizer.step()
        assert optimizer._plan is plan


def test_a_tensor_that_bounds_the_norm_may_change_in_place() -> None:
    w = torch.ones(2)
    limit = torch.tensor(1.0)
    optimizer = wd.AdamW([w], backend="eager", max_grad_norm=limit)
    w.grad = torch.ones(2)
    optimizer.step()
    limit.fill_(-1.0)
    before = w.clone()
    with pytest.raises(ValueError, match="max_grad_norm must be finite and >= 0, not -1"):
        optimizer.step()
    assert torch.equal(w, before)


@needs_native
@pytest.mark.parametrize("key", ["grad_norm", "skipped", "telemetry"])
def test_the_core_writes_only_what_has_room(key: str) -> None:
    """It would write 8 bytes a number, whatever stands there."""
    dtype = torch.float64 if key == "skipped" else torch.float32
    asked = Request(**{key: torch.zeros((), dtype=dtype)})
    with pytest.raises(ValueError, match="not a tensor of the type that a step writes"):
        native._request(asked)


# ---- gradients and bad steps ---------------------------------------------------------------------

EVERYTHING: dict[str, Any] = {
    "max_grad_norm": 0.5,
    "skip_nonfinite": True,
    "telemetry_every": 1,
    "ema_decay": 0.9,
}


@every_dtype
@every_backend
@every_variant
def test_gradients_are_never_written(variant: Variant, backend: str, dtype: torch.dtype) -> None:
    params = weights(dtype)
    optimizer = variant.build(params, backend, **EVERYTHING)
    for t in range(3):
        gradients = set_gradients(params, t, 4.0)
        if t == 2:
            gradients[0].view(-1)[0] = math.nan
        before = [(g.clone(), g._version) for g in gradients]
        scaled(optimizer, 4.0, found_inf=float(t == 1))
        optimizer.step()
        for g, (values, version) in zip(gradients, before, strict=True):
            assert torch.equal(bits(g), bits(values))
            assert g._version == version
    assert optimizer.skipped_steps == 2


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@every_dtype
@every_backend
@every_method
def test_a_step_without_a_finite_norm_is_skipped(
    variant: Variant, backend: str, dtype: torch.dtype, bad: float
) -> None:
    """As if it had not been: step counts, averages and random bits are those of a run without."""
    options = {"ema_decay": 0.5, "skip_nonfinite": True}
    params, plain = weights(dtype), weights(dtype)
    optimizer = variant.build(params, backend, **options)
    expected = variant.build(plain, backend, **options)
    assert optimizer.skipped_steps == 0
    seen = []  # numbers, which do not count on
    for t in range(4):
        set_gradients(params, t)
        if t in (0, 2):
            params[-1].grad[-1] = bad
        else:
            set_gradients(plain, t)
            expected.step()
        optimizer.step()
        seen.append(optimizer.skipped_steps)
        assert math.isfinite(optimizer.grad_norm.item()) == (t not in (0, 2))
    assert_same_bits(snapshot(optimizer, params), snapshot(expected, plain))
    assert expected.skipped_steps == 0
    assert seen == [1, 1, 2, 2]
    assert {(x.dtype, x.shape) for x in seen} == {(torch.int64, ())}


def test_skipped_steps_stand_beside_the_weights_from_the_beginning() -> None:
    skipped = wd.AdamW([torch.ones(2, device="meta")]).skipped_steps
    assert (skipped.device.type, skipped.dtype, skipped.shape) == ("meta", torch.int64, ())


@every_backend
@every_method
def test_without_skip_nonfinite_a_bad_step_counts(variant: Variant, backend: str) -> None:
    params = weights()
    optimizer = variant.build(params, backend)
    set_gradients(params, 1)
    params[-1].grad[-1] = math.nan
    optimizer.step()
    assert params[-1].isnan().any()
    assert optimizer.state[params[-1]]["step"] == 1
    assert optimizer.skipped_steps == 0


# ---- averages ------------------------------------------------------------------------------------

DECAYS: list[Any] = [
    0.0,
    0.3,
    0.999,
    1.0,
    schedules.linear(0.2, 1.0, steps=3),
    schedules.cosine(0.9, 0.1, steps=4),
    schedules.product(schedules.late(2), schedules.linear(0.5, 0.9, steps=2)),
]


@pytest.mark.parametrize("k", DECAYS, ids=str)
@every_dtype
@every_backend
@every_method
def test_average(variant: Variant, backend: str, dtype: torch.dtype, k: Any) -> None:
    """ema <- k ema + (1 - k) w, of the weights that the model sees; k at the parameter's own t."""
    params = weights(dtype)
    optimizer = variant.build(params, backend, ema_decay=k)
    averages = [p.detach().double().clone() for p in params]
    counts = [0] * len(params)
    for t in range(STEPS):
        set_gradients(params, t)
        optimizer.step()
        for i, p in enumerate(params):
            if p.grad is not None:
                counts[i] += 1
                share = schedules.factor(k, counts[i]) if isinstance(k, dict) else k
                averages[i] = share * averages[i] + (1 - share) * p.detach().double()
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    for p, expected in zip(params, averages, strict=True):
        found = optimizer.state[p]["ema"]
        assert found.dtype == computed
        # A step rounds three times, of numbers that are below 4.
        tolerance = STEPS * 3 * 4 * torch.finfo(computed).eps
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)
        if k == 0:
            assert torch.equal(found, p.to(computed))


@every_backend
def test_average_is_that_of_foreach_lerp(backend: str) -> None:
    """As torch.optim.swa_utils.get_ema_multi_avg_fn has it."""
    params = weights(torch.float32)
    optimizer = wd.AdamW(params, lr=0.1, backend=backend, ema_decay=0.9)
    averages = [p.detach().clone() for p in params]
    for t in range(2, 2 + STEPS):
        for i, p in enumerate(params):
            p.grad = random(*p.shape, seed=100 * t + i, dtype=torch.float32)
        optimizer.step()
        torch._foreach_lerp_(averages, [p.detach() for p in params], 1 - 0.9)
    for p, expected in zip(params, averages, strict=True):
        torch.testing.assert_close(optimizer.state[p]["ema"], expected, rtol=1e-6, atol=1e-7)


MODES: list[tuple[torch.dtype, dict[str, Any]]] = [
    (torch.float32, {}),
    (torch.complex64, {}),
    (torch.bfloat16, {}),
    (torch.float16, {"rounding": "kahan"}),
    (torch.bfloat16, {"master_weights": True}),
]
every_mode = pytest.mark.parametrize(("dtype", "mode"), MODES, ids=str)


@every_mode
@every_backend
def test_averages_in_and_out(backend: str, dtype: torch.dtype, mode: dict[str, Any]) -> None:
    params = weights(dtype)
    optimizer = wd.AdamW(params, lr=0.1, backend=backend, ema_decay=0.5, **mode)
    train(optimizer, params, range(2))  # one of them has not been updated yet
    runs = copy.deepcopy((optimizer, params))
    before = snapshot(optimizer, params)
    for _ in range(2):
        with optimizer.ema_weights():
            for i, p in enumerate(params):
                average = before[f"ema {i}"] if f"ema {i}" in before else before[f"weight {i}"]
                assert torch.equal(p, average.to(dtype))
                assert p.requires_grad
        assert_same_bits(snapshot(optimizer, params), before)
    assert "ema 3" not in before

    train(optimizer, params, range(2, 4))
    train(*runs, range(2, 4))
    assert_same_bits(snapshot(optimizer, params), snapshot(*runs))


@every_mode
@every_backend
def test_weights_come_back_that_no_step_has_stored(
    backend: str, dtype: torch.dtype, mode: dict[str, Any]
) -> None:
    """Loaded into the model since, say: a master copy or a compensation does not know of them."""
    params = weights(dtype)
    optimizer = wd.AdamW(params, lr=0.1, backend=backend, ema_decay=0.5, **mode)
    train(optimizer, params, range(2))
    for i, p in enumerate(params):
        p.data.copy_(random(*p.shape, seed=90 + i, dtype=dtype))
    before = snapshot(optimizer, params)
    with optimizer.ema_weights():
        assert not torch.equal(params[0], before["weight 0"])
    assert_same_bits(snapshot(optimizer, params), before)


@pytest.mark.parametrize("known", [True, False])
@every_backend
def test_averages_of_a_state_dict_without_them(backend: str, known: bool) -> None:
    """Its options count: saved without averages they end, and may begin again. A group that was
    saved before there was the option says nothing of it."""
    params = weights()
    plain = wd.AdamW(params, lr=0.1, backend=backend)
    train(plain, params, range(2, 3))
    checkpoint = saved(plain.state_dict())
    if not known:
        del checkpoint["param_groups"][0]["method"]
    optimizer = wd.AdamW(params, lr=0.1, backend=backend, ema_decay=0.5)
    train(optimizer, params, range(3, 4))
    optimizer.load_state_dict(checkpoint)
    (group,) = optimizer.param_groups
    assert group["ema_decay"] == (None if known else 0.5)
    if known:
        assert "ema" not in optimizer.state[params[0]]
        train(optimizer, params, range(4, 5))
        assert "ema" not in optimizer.state[params[0]]
        group["ema_decay"] = 0.5
    before = params[0].detach().clone()
    train(optimizer, params, range(5, 6))
    expected = torch.lerp(before, params[0].detach(), 0.5)
    assert torch.equal(optimizer.state[params[0]]["ema"], expected)


INSIDE: dict[str, Callable[[Any], Any]] = {
    "step": lambda optimizer: optimizer.step(),
    "state_dict": lambda optimizer: optimizer.state_dict(),
    "load_state_dict": lambda optimizer: optimizer.load_state_dict({}),
    "ema_weights": lambda optimizer: optimizer.ema_weights().__enter__(),
    "copying": copy.deepcopy,
    "copying ": pickle.dumps,
}


@pytest.mark.parametrize("what", INSIDE)
@every_mode
@every_backend
def test_exchanged_weights_are_left_alone(
    backend: str, dtype: torch.dtype, mode: dict[str, Any], what: str
) -> None:
    params = weights(dtype)
    optimizer = wd.AdamW(params, backend=backend, ema_decay=0.5, **mode)
    train(optimizer, params, range(2))
    before = snapshot(optimizer, params)
    with (
        pytest.raises(RuntimeError, match=rf"{what.strip()}.* in ema_weights\(\), where weights"),
        optimizer.ema_weights(),
    ):
        INSIDE[what](optimizer)
    assert_same_bits(snapshot(optimizer, params), before)
    train(optimizer, params, range(2, 3))


@every_mode
@every_backend
def test_weights_come_back_after_an_exception(
    backend: str, dtype: torch.dtype, mode: dict[str, Any]
) -> None:
    """One of the caller's, and one in the middle of the exchange."""
    params = weights(dtype)
    optimizer = wd.AdamW(params, backend=backend, ema_decay=0.5, **mode)
    train(optimizer, params, range(2))
    before = snapshot(optimizer, params)
    with pytest.raises(KeyError), optimizer.ema_weights():
        raise KeyError
    assert_same_bits(snapshot(optimizer, params), before)

    good = optimizer.state[params[2]]["ema"]
    optimizer.state[params[2]]["ema"] = torch.ones(5, dtype=good.dtype)
    with pytest.raises(RuntimeError), optimizer.ema_weights():
        pass
    optimizer.state[params[2]]["ema"] = good
    assert_same_bits(snapshot(optimizer, params), before)
    train(optimizer, params, range(2, 3))


@every_mode
@every_backend
def test_whatever_comes_of_one_weight_the_others_come_back(
    backend: str, dtype: torch.dtype, mode: dict[str, Any]
) -> None:
    params = weights(dtype)
    optimizer = wd.AdamW(params, backend=backend, ema_decay=0.5, **mode)
    train(optimizer, params, range(2))
    before = [p.clone() for p in params]
    averages = {p: optimizer.state[p]["ema"] for p in params[1:] if optimizer.state[p]}
    values = [x.clone() for x in averages.values()]

    def spoil() -> None:
        with optimizer.ema_weights():
            params[0].data = torch.ones(3, 5, 7, dtype=dtype)
            optimizer.state.clear()

    with pytest.raises(RuntimeError, match="size"):
        spoil()
    assert all(map(torch.equal, params[1:], before[1:]))
    assert all(map(torch.equal, averages.values(), values))
    optimizer.state_dict()  # nothing is exchanged any more


def test_no_averages() -> None:
    optimizer = wd.AdamW([torch.ones(2)])
    with pytest.raises(RuntimeError, match="construct the optimizer with ema_decay"):
        optimizer.ema_weights().__enter__()


# ---- telemetry -----------------------------------------------------------------------------------


def as_computed(p: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    if "master" in state:
        return state["master"].double()
    if "compensation" in state:
        return p.detach().double() + state["compensation"].double()
    return real(p)


def recount(
    optimizer: Any, method: str, before: list[Tensor], params: list[Tensor], unscale: float
) -> dict[str, dict[str, float]]:
    """A measured step's quantities, from the weights before it and the moments after it."""
    (group,) = optimizer.param_groups
    beta1, beta2 = group["betas"]
    lr, lr_max = group["lr"], group.get("lr_max", 1.0)
    norm2 = sum((real(p.grad) ** 2).sum() for p in params if p.grad is not None) * unscale**2
    limit = optimizer.max_grad_norm
    clip = 1.0 if limit is None else min(1.0, limit / (math.sqrt(norm2) + 1e-6))
    active = [i for i, p in enumerate(params) if p.grad is not None]

    def seen(i: int) -> Tensor:
        state = optimizer.state[params[i]]
        corrected = 1 - beta2 ** state["step"].item()
        return real(state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]) / corrected

    mean_v = torch.cat([seen(i).flatten() for i in active]).mean().item()
    sums: dict[str, list[float]] = {}
    found: dict[str, dict[str, float]] = {}

    def tell(name: str, x: dict[str, float], own: dict[str, float]) -> None:
        weight, grad, update = (x[key] ** 0.5 for key in ("w", "g", "u"))
        nan = math.nan
        found[name] = {
            "weight_norm": weight,
            "grad_norm": grad,
            "update_norm": update,
            "decay_norm": x["decay"] ** 0.5,
            "anchor_distance": x["d"] ** 0.5,
            "update_weight_cosine": x["uw"] / (update * weight) if update * weight else nan,
            "relative_update": update / weight if weight else nan,
            "effective_lr": x["rate"] / x["n"] if x["n"] else nan,
            "lr_over_weight_norm2": lr / x["w"] if x["w"] else math.inf,
            "weight_grad_product": weight * grad,
            **own,
        }

    selected = 0
    for i in active:
        p, w = params[i], before[i]
        state = optimizer.state[p]
        t = int(state["step"].item())
        a = real(state["anchor"]) if "anchor" in state else torch.zeros(())
        d = w - a
        g = real(p.grad) * (-unscale if group["maximize"] else unscale)
        lambda_t = group["weight_decay"] * schedules.factor(group["decay_schedule"], t)
        root = seen(i).sqrt() + group["eps"]
        m_hat = real(state["exp_avg"]) / (1 - beta1**t)
        u = lr * (m_hat + (lambda_t * d if method == "unmixed" else 0)) / root
        rate, own = lambda_t, {}
        if method == "l2":
            decay = lambda_t * d
        elif method == "unmixed":
            decay = lr * lambda_t * d / root
        elif method == "spd":
            near, far = d.norm().item(), (d - u).norm().item()
            fires = (g * d).sum().item() > 0
            r = min(1.0, max(0.0, (far - near) / far)) if fires and far else 0.0
            decay = lambda_t * r * (d - u)
            own = {"selected": float(fires), "ratio": r}
            selected += fires
        else:
            relative = {
                "lr": lr,
                "relative_lr": lr / (lr_max or lr),
                "corrected": lr**2 / (lr_max or lr),
            }
            rate *= relative[group["decay_scale"]]
            if method == "swd":
                rate = rate / math.sqrt(mean_v)
                own = {"sqrt_mean_v": math.sqrt(mean_v)}
            decay = rate * d * (~(u * d < 0) if group["cautious"] else 1)
        terms = {"w": w**2, "g": g**2, "u": u**2, "decay": decay**2, "d": d**2, "uw": u * w}
        terms.update(rate=lr / root, n=torch.ones_like(w))
        x = {key: value.sum().item() for key, value in terms.items()}
        for key, value in x.items():
            sums.setdefault(key, []).append(value)
        tell(f"0.{i}", x, {"lr": lr, "decay": rate, **own})
    assert (clip == 1) == (limit is None)
    own = {"selected": float(selected)} if method == "spd" else {}
    own = {"sqrt_mean_v": math.sqrt(mean_v)} if method == "swd" else own
    tell("total", {key: sum(values) for key, values in sums.items()}, own)
    return found


def outvote(optimizer: Any, params: list[Tensor], scale: float) -> None:
    """Gradients that point at the anchor as a whole, by one element of them, and away from it in
    all others: Adam's step, which is as long for each, goes away, and SPD pulls back."""
    for p in params:
        if p.grad is not None and p.numel() > 0:
            anchor = optimizer.state.get(p, {}).get("anchor", torch.zeros(()))
            d = torch.view_as_real(p - anchor) if p.is_complex() else p - anchor
            sign = -1 if optimizer.param_groups[0]["maximize"] else 1
            g = -sign * 4 * scale * d.detach().sign()
            g.view(-1)[d.abs().argmax()] *= -99
            p.grad = (torch.view_as_complex(g) if p.is_complex() else g).to(p.dtype)


MEASURED: list[tuple[torch.dtype, dict[str, Any]]] = [
    (torch.float64, {}),
    (torch.complex128, {}),
    (torch.float32, {}),
    (torch.float16, {"rounding": "kahan"}),
    (torch.bfloat16, {"master_weights": True}),
    (torch.bfloat16, {}),
]


@pytest.mark.parametrize("scale", [None, 8.0], ids=["", "scaled"])
@pytest.mark.parametrize(("dtype", "mode"), MEASURED, ids=str)
@every_backend
@every_variant
def test_telemetry(
    variant: Variant, backend: str, dtype: torch.dtype, mode: dict[str, Any], scale: float | None
) -> None:
    """In float32 a number carries about ten roundings, and SPD's growth of a norm by a twentieth
    of it twenty times as much."""
    params = weights(dtype)
    options = dict(mode) if scale is None else {"max_grad_norm": 2.0, **mode}
    optimizer = variant.build(params, backend, telemetry_every=1, **options)
    wide = dtype in (torch.float64, torch.complex128)
    tolerance = 1e-11 if wide else 200 * torch.finfo(torch.float32).eps
    heard = set()
    for t in range(STEPS):
        set_gradients(params, t, scale or 1.0)
        if t < 2:
            outvote(optimizer, params, scale or 1.0)
        if scale is not None:
            scaled(optimizer, scale)
        before = [as_computed(p, optimizer.state.get(p, {})).clone() for p in params]
        optimizer.step()
        unscale = 1.0 if scale is None else 1 / scale
        expected = recount(optimizer, variant.method, before, params, unscale)
        found = optimizer.telemetry().to_dict()
        assert found.keys() == expected.keys()
        for name, row in expected.items():
            assert found[name].keys() == row.keys()
            for key, value in row.items():
                close = pytest.approx(value, rel=tolerance, abs=tolerance / 10, nan_ok=True)
                assert found[name][key] == close, (t, name, key)
                if value > 0:
                    heard.add(key)
    assert {"decay_norm", "decay", "anchor_distance", "update_norm"} <= heard


@every_dtype
@every_backend
@every_variant
def test_a_measured_step_has_the_bits_of_any_other(
    variant: Variant, backend: str, dtype: torch.dtype
) -> None:
    runs = []
    for every in (None, 1, 2):
        params = weights(dtype)
        optimizer = variant.build(params, backend, telemetry_every=every, ema_decay=0.5)
        train(optimizer, params, range(STEPS))
        runs.append(snapshot(optimizer, params))
    for run in runs[1:]:
        assert_same_bits(run, runs[0])


class Writer:
    """As tensorboard's SummaryWriter."""

    def __init__(self) -> None:
        self.written: dict[tuple[str, int], float] = {}

    def add_scalar(self, tag: str, value: float, global_step: int) -> None:
        assert type(value) is float
        self.written[tag, global_step] = value


@every_backend
def test_names_rows_and_writers(backend: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = wd.AdamSWD(model.named_parameters(), backend=backend, telemetry_every=2)
    with pytest.raises(RuntimeError, match=r"no step has been measured yet: .* telemetry_every=n"):
        optimizer.telemetry()
    for t in range(1, 6):
        optimizer.zero_grad()
        model(random(5, 3, seed=t, dtype=torch.float32)).square().mean().backward()
        if t == 4:
            model[1].bias.grad = None
        optimizer.step()
        if t in (1, 5):
            continue
        told = optimizer.telemetry()
        assert told.step == t // 2 * 2
    names = ["0.weight", "0.bias", "1.weight"]  # the fourth had no gradient
    assert list(told) == names
    assert len(told) == 3
    assert isinstance(told, Mapping)
    with pytest.raises(KeyError):
        told["1.bias"]
    quantity = told["0.weight"]["update_norm"]
    assert quantity.dtype == torch.float64
    assert quantity.shape == ()

    numbers = told.to_dict()
    assert list(numbers) == [*names, "total"]
    assert numbers["0.weight"]["update_norm"] == quantity.item()
    assert numbers["total"]["sqrt_mean_v"] == told.total["sqrt_mean_v"].item()
    assert numbers["0.weight"]["sqrt_mean_v"] == numbers["total"]["sqrt_mean_v"]
    assert told.rows() == [{"parameter": name, **row} for name, row in numbers.items()]
    for step in (None, 77):
        writer = Writer()
        told.write(writer, *(() if step is None else (step,)))
        assert writer.written == {
            (f"{key}/{name}", step or 4): value
            for name, row in numbers.items()
            for key, value in row.items()
        }


@every_backend
def test_groups_of_a_measured_step(backend: str) -> None:
    """Each has its own numbers; eta of the total is the mean over the elements."""
    p, q = torch.ones(2), torch.full((6,), 2.0)
    groups = [{"params": [p]}, {"params": [q], "lr": 0.5, "weight_decay": 0.0}]
    optimizer = wd.AdamSPD(groups, lr=0.1, backend=backend, telemetry_every=1, anchor="zero")
    p.grad, q.grad = torch.ones(2), -torch.ones(6)
    optimizer.step()
    found = optimizer.telemetry().to_dict()
    assert list(found) == ["0.0", "1.0", "total"]
    assert [found[name]["lr"] for name in ("0.0", "1.0")] == [0.1, 0.5]
    assert [found[name]["decay"] for name in ("0.0", "1.0")] == [1.0, 0.0]
    assert [found[name]["selected"] for name in found] == [1.0, 0.0, 1.0]
    assert "lr" not in found["total"]
    assert "decay" not in found["total"]
    total = 2 * 1.0 + 6 * 4.0
    mean_lr = (2 * 0.1 + 6 * 0.5) / 8
    assert found["total"]["lr_over_weight_norm2"] == pytest.approx(mean_lr / total, rel=1e-6)
    assert found["total"]["weight_norm"] == pytest.approx(math.sqrt(total), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_edge
@every_backend
@every_method
def test_edges(variant: Variant, backend: str, edge: Edge, dtype: torch.dtype) -> None:
    assert_as_at(edge, variant.method, backend, dtype)


@pytest.mark.parametrize("cause", ["found_inf", "skip_nonfinite", "both"])
@every_backend
@every_method
def test_a_skipped_step_has_nothing_to_tell(variant: Variant, backend: str, cause: str) -> None:
    w = torch.ones(2)
    optimizer = variant.build([w], backend, telemetry_every=1, skip_nonfinite=cause != "found_inf")
    w.grad = torch.tensor([1.0, math.nan])
    scaled(optimizer, 2.0, float(cause != "skip_nonfinite"))
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert torch.equal(w, torch.ones(2))
    told = optimizer.telemetry().to_dict()
    assert list(told) == ["0.0", "total"]
    assert all(math.isnan(value) for row in told.values() for value in row.values())

    w.grad = torch.ones(2)
    scaled(optimizer, 2.0)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert optimizer.telemetry().total["weight_norm"] == pytest.approx(math.sqrt(2))


@every_backend
def test_telemetry_without_any_gradient(backend: str) -> None:
    optimizer = wd.AdamSWD([torch.ones(2)], backend=backend, telemetry_every=1)
    optimizer.step()
    assert list(optimizer.telemetry()) == []
    assert optimizer.telemetry().total["grad_norm"] == 0
    assert optimizer.telemetry().total["effective_lr"].isnan()


# ---- all of it together --------------------------------------------------------------------------


@every_backend
@every_variant
def test_all_together_is_what_each_does_alone(variant: Variant, backend: str) -> None:
    """Unscaled, clipped, skipped and averaged by hand, in float64."""
    params, plain = weights(), weights()
    optimizer = variant.build(params, backend, **EVERYTHING)
    expected = variant.build(plain, backend)
    averages = [p.detach().clone() for p in plain]
    for t in range(6):
        found_inf, scale = float(t == 1), 3.0 if t % 2 else None
        set_gradients(params, t, scale or 1.0)
        if t == 2:
            params[0].grad[0, 0] = math.nan
        scaled(optimizer, scale, found_inf)
        assert optimizer.step(lambda: 5.0) == 5.0
        if t in (1, 2):
            continue
        set_gradients(plain, t)
        nn.utils.clip_grad_norm_(plain, 0.5)
        expected.step()
        for average, p in zip(averages, plain, strict=True):
            if p.grad is not None:
                average.lerp_(p.detach(), 1 - 0.9)
    assert optimizer.skipped_steps == 2
    found = snapshot(optimizer, params)
    for i, average in enumerate(averages):
        torch.testing.assert_close(found.pop(f"ema {i}"), average, rtol=1e-12, atol=1e-12)
    others = snapshot(expected, plain)
    assert found.keys() == others.keys()
    for key, value in found.items():
        # The scale 3 and its inverse round once.
        torch.testing.assert_close(value, others[key], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_backend
@every_variant
def test_all_together_in_16_bits(variant: Variant, backend: str, dtype: torch.dtype) -> None:
    """With master weights, and resumed: the bits of float32 with the same gradients."""
    narrow = weights(dtype)
    wide = [p.detach().float() for p in narrow]
    anchors = anchors_of(narrow) if variant.anchored else None
    first = variant.build(narrow, backend, anchors, master_weights=True, **EVERYTHING)
    second = variant.build(wide, backend, anchors, **EVERYTHING)
    for t in range(6):
        set_gradients(narrow, t, 4.0)
        if t == 3:
            narrow[0].grad[0, 0] = math.inf
            first.load_state_dict(saved(first.state_dict()))
        for p, q in zip(narrow, wide, strict=True):
            q.grad = None if p.grad is None else p.grad.float()
        for optimizer in (first, second):
            scaled(optimizer, 4.0)
            optimizer.step()
        assert first.grad_norm == second.grad_norm
    assert second.skipped_steps == first.skipped_steps == 1
    for p, q in zip(narrow, wide, strict=True):
        assert torch.equal(first.state[p]["master"], q)
        assert torch.equal(p, q.to(dtype))


@every_backend
@pytest.mark.parametrize("method", METHODS)
def test_everything_may_be_switched_on_in_a_run(method: str, backend: str) -> None:
    """And where it asks for nothing it changes nothing."""
    params, plain = weights(), weights()
    options = {key: LOUD[key] for key in ("lr", "eps", "weight_decay")}
    optimizer, expected = (Variant(method).build(each, backend) for each in (params, plain))
    assert all(optimizer.param_groups[0][key] == value for key, value in options.items())
    switches = itertools.cycle([1e9, None])
    for t in range(6):
        optimizer.max_grad_norm = next(switches)
        optimizer.skip_nonfinite = t in (2, 3)
        optimizer.telemetry_every = 1 if t in (1, 2) else None
        train(optimizer, params, range(t, t + 1))
        train(expected, plain, range(t, t + 1))
    assert_same_bits(snapshot(optimizer, params), snapshot(expected, plain))


def test_parameters_of_the_same_name_are_told_apart() -> None:
    models = [nn.Linear(2, 3), nn.Linear(2, 3, bias=False)]
    groups = [{"params": model.named_parameters()} for model in models]
    optimizer = wd.AdamW(groups, telemetry_every=1)
    for i, model in enumerate(models):
        model(torch.full((2,), i + 1.0)).sum().backward()
    optimizer.step()
    told = optimizer.telemetry()
    assert list(told) == ["0.weight", "bias", "1.weight"]
    for i in range(2):
        assert told[f"{i}.weight"]["grad_norm"].item() == pytest.approx((i + 1) * math.sqrt(6))


def test_a_parameter_may_be_named_total() -> None:
    w = torch.ones(3)
    w.grad = torch.ones_like(w)
    optimizer = wd.AdamW([("total", w)], telemetry_every=1)
    optimizer.step()
    assert [row["parameter"] for row in optimizer.telemetry().rows()] == ["total", "total of all"]
