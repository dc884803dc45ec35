"""What a step does beside its update: scaled, clipped and bad gradients, averages, telemetry."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from support import (
    METHODS,
    USUAL,
    WIDE,
    Edge,
    Variant,
    anchors_of,
    assert_as_at,
    assert_close,
    assert_same_bits,
    bits,
    copies,
    every_backend,
    every_edge,
    every_method,
    every_variant,
    every_variant_without_average,
    internals,
    needs_native,
    random,
    saved,
    scaled,
    set_gradients,
    snapshot,
    train,
    trained,
    weights,
)
from torch import Tensor, nn

import wdkernels as wd
from wdkernels import schedules

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
STEPS = 5


def norm(gradients: list[Tensor]) -> float:
    wide = (g.to(WIDE.get(g.dtype, torch.float64)).abs() for g in gradients)
    return math.sqrt(sum((x**2).sum().item() for x in wide))


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
    """So it is for groups with other numbers: the norm is one for all."""
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
    assert_close(*runs)


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
    assert_close(*runs, equal_nan=True)


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
    plan = internals.plan_of(optimizer)
    for bound in (0.5, None, torch.tensor(0.25)):
        optimizer.max_grad_norm = bound
        optimizer.step()
        assert internals.plan_of(optimizer) is plan


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
    with pytest.raises(ValueError, match="not a tensor of the type that a step writes"):
        internals.ask_the_core(**{key: torch.zeros((), dtype=dtype)})


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


def averaged(backend: str, dtype: torch.dtype, mode: dict[str, Any]) -> tuple[Any, list[Tensor]]:
    """An optimizer and its parameters after two steps, of which one had no gradient yet."""
    params = weights(dtype)
    optimizer = wd.AdamW(params, lr=0.1, backend=backend, ema_decay=0.5, **mode)
    train(optimizer, params, range(2))
    return optimizer, params


@every_mode
@every_backend
def test_averages_in_and_out(backend: str, dtype: torch.dtype, mode: dict[str, Any]) -> None:
    optimizer, params = averaged(backend, dtype, mode)
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
    optimizer, params = averaged(backend, dtype, mode)
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
        del checkpoint["param_groups"][0]["decoupled_weight_decay"]
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
    optimizer, params = averaged(backend, dtype, mode)
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
    optimizer, params = averaged(backend, dtype, mode)
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
    optimizer, params = averaged(backend, dtype, mode)
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
every_measured = pytest.mark.parametrize(("dtype", "mode"), MEASURED, ids=str)
with_and_without_scaler = pytest.mark.parametrize("scale", [None, 8.0], ids=["", "scaled"])


class FirstStep(NamedTuple):
    """From w = (3, 4), with eps 0: u is lr (1, -1) where the gradient alone is in the step."""

    optimizer: Any
    options: dict[str, Any]
    decay: float
    decay_norm: float
    own: dict[str, float] = {}  # noqa: RUF012 - what only this method tells
    g: tuple[float, float] = (2.0, -1.0)
    u: tuple[float, float] | None = None
    root: tuple[float, float] | None = None  # sqrt(v); None: |g|


_HALF = schedules.linear(0.5, 0.5, steps=1)
_SPD = {"lr": 3.0, "weight_decay": 0.5, "anchor": "zero"}  # w~ = (0, 7)
_OFF = {**_SPD, "anchor": (3.0, 0.0)}
FIRST_STEPS = {
    "decoupled": FirstStep(wd.AdamW, {}, 0.05, 0.05 * 5),
    "no decay": FirstStep(wd.AdamW, {"weight_decay": 0.0}, 0.0, 0.0),
    "scheduled": FirstStep(wd.AdamW, {"decay_schedule": _HALF}, 0.025, 0.025 * 5),
    "relative_lr": FirstStep(
        wd.AdamW, {"decay_scale": "relative_lr", "lr_max": 2.0}, 0.025, 0.025 * 5
    ),
    "corrected": FirstStep(
        wd.AdamW, {"decay_scale": "corrected", "lr_max": 2.0}, 0.0125, 0.0125 * 5
    ),
    # u w is positive in the first element alone.
    "cautious": FirstStep(wd.AdamW, {"cautious": True}, 0.05, 0.05 * 3),
    "anchor": FirstStep(wd.AdamW, {"anchor": (3.0, 0.0)}, 0.05, 0.05 * 4),
    "maximize": FirstStep(
        wd.AdamW, {"maximize": True}, 0.05, 0.05 * 5, g=(-2.0, 1.0), u=(0.5, -0.5)
    ),
    # The penalty is in v, and not in the gradient's norm.
    "L2": FirstStep(wd.Adam, {}, 0.1, 0.1 * 5, root=(2.3, 0.6)),
    "L2, anchor": FirstStep(wd.Adam, {"anchor": (3.0, 0.0)}, 0.1, 0.1 * 4, root=(2.0, 0.6)),
    # u = lr ((2 + 0.3) / 2, (-1 + 0.4) / 1), of which the decay is lr (0.3 / 2, 0.4 / 1).
    "unmixed": FirstStep(wd.Adam, {"unmixed": True}, 0.1, math.hypot(0.075, 0.2), u=(0.575, -0.3)),
    "unmixed, anchor": FirstStep(
        wd.Adam, {"unmixed": True, "anchor": (3.0, 0.0)}, 0.1, 0.2, u=(0.5, -0.3)
    ),
    "SWD": FirstStep(
        *(wd.AdamSWD, {}, 0.05 / 2.5**0.5, 0.05 / 2.5**0.5 * 5, {"sqrt_mean_v": 2.5**0.5})
    ),
    # c = -(2 3 - 1 4) < 0, and r = (7 - 5) / 7; then c > 0; then, off (3, 0), c = -(-1 4) > 0.
    "SPD selects": FirstStep(wd.AdamSPD, _SPD, 0.5, 0.5 * 2, {"selected": 1.0, "ratio": 2 / 7}),
    "SPD does not": FirstStep(
        *(wd.AdamSPD, _SPD, 0.5, 0.0, {"selected": 0.0, "ratio": 0.0}), g=(1.0, -1.0)
    ),
    "SPD, anchor": FirstStep(wd.AdamSPD, _OFF, 0.5, 0.0, {"selected": 0.0, "ratio": 0.0}),
}


@with_and_without_scaler
@every_measured
@every_backend
@pytest.mark.parametrize("first", FIRST_STEPS.values(), ids=list(FIRST_STEPS))
def test_telemetry_of_a_first_step(
    first: FirstStep, backend: str, dtype: torch.dtype, mode: dict[str, Any], scale: float | None
) -> None:
    """Worked out by hand, of one parameter: what the total tells is the same."""

    def tensor(x: tuple[float, float]) -> Tensor:
        pair = torch.tensor(x, dtype=torch.float64)
        return (torch.view_as_complex(pair) if dtype.is_complex else pair).to(dtype)

    options = {"lr": 0.5, "weight_decay": 0.1, "eps": 0.0, **first.options, **mode}
    lr, anchor = options["lr"], (0.0, 0.0)
    if isinstance(options.get("anchor"), tuple):
        anchor, options["anchor"] = options["anchor"], [tensor(options["anchor"])]
    w = tensor((3.0, 4.0))
    optimizer = first.optimizer([w], backend=backend, telemetry_every=1, **options)
    w.grad = tensor(first.g) * (scale or 1.0)
    scaled(optimizer, scale)
    optimizer.step()
    u, root = first.u or (lr, -lr), first.root or tuple(map(abs, first.g))
    total = {
        "weight_norm": 5.0,
        "grad_norm": math.hypot(*first.g),
        "update_norm": math.hypot(*u),
        "decay_norm": first.decay_norm,
        "anchor_distance": math.dist((3.0, 4.0), anchor),
        "update_weight_cosine": (3 * u[0] + 4 * u[1]) / (5 * math.hypot(*u)),
        "relative_update": math.hypot(*u) / 5,
        "effective_lr": (lr / root[0] + lr / root[1]) / 2,
        "lr_over_weight_norm2": lr / 25,
        "weight_grad_product": 5 * math.hypot(*first.g),
        **{key: value for key, value in first.own.items() if key != "ratio"},
    }
    tolerance = 1e-13 if dtype == WIDE.get(dtype) else 3e-6
    found = optimizer.telemetry().to_dict()
    assert found["total"] == pytest.approx(total, rel=tolerance, abs=0)
    total |= {"lr": lr, "decay": first.decay, **first.own}
    assert found["0.0"] == pytest.approx(total, rel=tolerance, abs=0)


@with_and_without_scaler
@pytest.mark.parametrize(
    ("backend", "dtype", "mode"),
    [
        *(pytest.param("native", *each, marks=needs_native) for each in MEASURED),
        *(("eager", *each) for each in MEASURED[2:]),  # in float64 it would be its own twin
    ],
    ids=str,
)
@every_variant
def test_telemetry_is_that_of_the_formulas_in_float64(
    variant: Variant, backend: str, dtype: torch.dtype, mode: dict[str, Any], scale: float | None
) -> None:
    """Which take each step from the same weights and states. In float32 a number carries about ten
    roundings, and SPD's growth of a norm by a twentieth of it twenty times as much."""
    params = weights(dtype)
    whole: dict[str, Any] = {"telemetry_every": 1}
    whole |= {} if scale is None else {"max_grad_norm": 2.0}
    optimizer = variant.build(params, backend, **whole, **mode)
    tolerance = 1e-11 if dtype == WIDE.get(dtype) else 200 * torch.finfo(torch.float32).eps
    heard = set()
    for t in range(STEPS):
        set_gradients(params, t, scale or 1.0)
        if t < 2:
            outvote(optimizer, params, scale or 1.0)
        twin = in_float64(variant, optimizer, params, **whole)
        for each in (optimizer, twin):
            scaled(each, scale)
            each.step()
        found, expected = (each.telemetry().to_dict() for each in (optimizer, twin))
        assert found.keys() == expected.keys()
        for name, row in expected.items():
            close = pytest.approx(row, rel=tolerance, abs=tolerance / 10, nan_ok=True)
            assert found[name] == close, (t, name)
            heard |= {key for key, value in row.items() if value > 0}
    assert {"decay_norm", "decay", "anchor_distance", "update_norm"} <= heard


def in_float64(variant: Variant, optimizer: Any, params: list[Tensor], **options: Any) -> Any:
    """The eager formulas, from copies of an optimizer's weights, gradients and states."""
    wide = []
    for p in params:
        state = optimizer.state.get(p, {})
        w = state.get("master", p).detach().to(WIDE.get(p.dtype, torch.float64), copy=True)
        wide.append(w + state["compensation"] if "compensation" in state else w)
        wide[-1].grad = None if p.grad is None else p.grad.to(w.dtype)
    twin = variant.build(wide, "eager", **options)
    twin.load_state_dict(optimizer.state_dict())
    return twin


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
        runs.append(trained(optimizer, params, STEPS))
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
    head, *lines = (line.split() for line in str(told).splitlines())
    assert head == ["step", "4", *dict.fromkeys(key for row in numbers.values() for key in row)]
    printed = {name: [f"{x:.4g}" for x in row.values()] for name, row in numbers.items()}
    assert {name: cells for name, *cells in lines} == printed
    assert len({len(line) for line in str(told).splitlines()[:-1]}) == 1  # columns are aligned
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
@every_variant_without_average
def test_all_together_is_what_each_does_alone(variant: Variant, backend: str) -> None:
    """Unscaled, clipped, skipped and averaged by hand, in float64."""
    params, plain = weights(), weights()
    optimizer = variant.build(params, backend, **EVERYTHING)
    expected = variant.build(plain, backend)
    averages = [p.detach() for p in copies(plain)]
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
    others = snapshot(expected, plain)
    others |= {f"ema {i}": average for i, average in enumerate(averages)}
    assert_close(found, others)  # the scale 3 and its inverse round once


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_backend
@every_variant_without_average
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
    optimizer, expected = (Variant(method).build(each, backend) for each in (params, plain))
    assert all(optimizer.param_groups[0][key] == value for key, value in USUAL.items())
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
