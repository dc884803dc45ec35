"""Weights and moments of 16 bits: rounded bit by bit, over many steps, and in checkpoints."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support import (
    METHODS,
    NARROW,
    SHAPES,
    TORCH,
    USUAL,
    VARIANTS,
    Variant,
    anchors_of,
    assert_same_bits,
    bits,
    copies,
    every_backend,
    every_method,
    every_variant,
    every_variant_without_average,
    gradient,
    internals,
    needs_native,
    random,
    saved,
    snapshot,
    train,
    trained,
    weights,
)
from support.internals import mix, narrow, noise, step_key, words
from torch import Tensor

import wdkernels as wd
from wdkernels import schedules

# Bits of the mantissa: a number is at most half of 2^-BITS of itself away from the nearest one.
BITS = {torch.bfloat16: 7, torch.float16: 10}
MODES: dict[str, dict[str, Any]] = {
    "stochastic": {},
    "kahan": {"rounding": "kahan"},
    "nearest": {"rounding": "nearest"},
    "master": {"master_weights": True},
    "stochastic moments": {"moment_dtype": torch.bfloat16},
    "kahan moments": {"rounding": "kahan", "moment_dtype": torch.bfloat16},
    "master moments": {"master_weights": True, "moment_dtype": torch.bfloat16},
}
every_narrow = pytest.mark.parametrize("dtype", NARROW, ids=str)
every_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
STEPS = 5


def wider(tensors: list[Tensor]) -> list[Tensor]:
    return [x.detach().float() for x in tensors]


# ---- rounding ------------------------------------------------------------------------------------


def every_number(dtype: torch.dtype) -> Tensor:
    """All that there is in 16 bits, as float32; inf and NaN among them."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).float()


def floats(pattern: Tensor) -> Tensor:
    return pattern.to(torch.int32).view(torch.float32)


def delicate(dtype: torch.dtype) -> Tensor:
    """float32 around all numbers of 16 bits and all middles between them, and any others."""
    numbers = every_number(dtype)
    ends = torch.cat([numbers, floats(torch.tensor([0x477FF000, 0x7F7F8000, 0x7F7FFFFF]))])
    ends = ends[ends.isfinite()].double().unique()
    middles = ((ends[1:] + ends[:-1]) / 2).float()
    around = torch.cat([ends.float(), middles])
    near = [floats(around.view(torch.int32).long() + step) for step in (-1, 0, 1)]
    generator = torch.Generator().manual_seed(1)
    other = torch.randint(-(2**31), 2**31, (10**6,), generator=generator)  # subnormals, inf, NaN
    inf = torch.tensor([torch.inf, -torch.inf, torch.nan])
    return torch.cat([*near, floats(other), floats(torch.arange(-1000, 1000)), inf])


@every_narrow
def test_nearest_is_that_of_torch(dtype: torch.dtype) -> None:
    x = delicate(dtype)
    found, expected = narrow(x, dtype), x.to(dtype)
    nan = expected.isnan()
    assert nan.any()
    assert torch.equal(bits(found)[~nan], bits(expected)[~nan])
    # Processors do not agree on which NaN; here it is always the same one.
    kinds = bits(found)[nan].unique().tolist()
    assert kinds == [0x7FC0 if dtype == torch.bfloat16 else 0x7E00]


@every_narrow
def test_numbers_of_16_bits_are_rounded_to_themselves(dtype: torch.dtype) -> None:
    x = every_number(dtype)
    for word in (0, 1, 0x8000, 0xFFFF, 0xFFFFFFFF):
        found = narrow(x, dtype, torch.full(x.shape, word))
        assert torch.equal(found.isnan(), x.isnan())
        assert torch.equal(bits(found)[~x.isnan()], bits(x.to(dtype))[~x.isnan()])


@pytest.mark.parametrize(
    ("dtype", "x", "dropped"),
    [
        (torch.bfloat16, 1.2345678, 16),
        (torch.bfloat16, -3.3e38, 16),
        (torch.bfloat16, 1.1e-39, 16),  # subnormal
        (torch.float16, 1.2345678, 13),
        (torch.float16, -65510.0, 13),  # inf is the neighbour
        (torch.float16, 6.2e-5, 13),
        (torch.float16, 6.0e-5, 14),  # subnormal
        (torch.float16, -7.77e-7, 20),
        (torch.float16, 1e-8, 26),  # less than half of the smallest
    ],
    ids=str,
)
def test_all_random_words_together_lose_nothing(dtype: torch.dtype, x: float, dropped: int) -> None:
    """x is rounded up by as many of the 2^dropped words as it has of the way up: exactly.

    Where there are too many words, equally many of each group of 2^(dropped - 16) agree.
    """
    wide = torch.tensor(x)
    step = 2 ** max(0, dropped - 16)
    words = torch.arange(0, 2**dropped, step)
    found = narrow(wide.expand(len(words)), dtype, words).float()
    lower, upper = found.abs().min().double().item(), found.abs().max().double().item()
    if upper == torch.inf:
        upper = 65536.0
    share = (abs(wide.double().item()) - lower) / (upper - lower)
    ups = (found.abs() > lower).sum().item()
    assert lower < abs(x) < upper
    assert abs(ups - share * len(words)) < 1
    if step == 1:
        assert ups == share * len(words)


def test_what_is_next_to_nothing_is_not_rounded_up() -> None:
    """Less than 2^-18 of float16's smallest number: in 2^20 words there is no such chance."""
    words = torch.randint(0, 2**32, (2**20,), generator=torch.Generator().manual_seed(1))
    tiny = torch.full(words.shape, 2.0**-24 * 2.0**-40)
    assert (narrow(tiny, torch.float16, words) == 0).all()


def lowbias32(x: np.ndarray[Any, np.dtype[np.uint32]]) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """Chris Wellons, public domain; in C's own arithmetic."""
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x7FEB352D)
    x = x ^ (x >> np.uint32(15))
    x = x * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def test_noise_is_the_hash_of_the_element() -> None:
    key = 0x9ABCDEF0
    elements = np.arange(10**5, dtype=np.uint32)
    expected = lowbias32(elements ^ np.uint32(key)).astype(np.int64)
    assert noise(key, torch.empty(10**5)).tolist() == expected.tolist()
    assert [mix(int(x)) for x in elements[:100]] == lowbias32(elements[:100]).tolist()
    assert step_key(2**32 - 1, 1) == mix((mix(2**32 - 1) + 1) % 2**32)


def test_noise_goes_by_the_place_in_memory() -> None:
    flat = noise(5, torch.empty(24))
    assert torch.equal(noise(5, torch.empty(2, 3, 4)).flatten(), flat)
    assert torch.equal(noise(5, torch.empty(4, 6).mT).mT.flatten(), flat)
    last = torch.empty(2, 3, 2, 2).to(memory_format=torch.channels_last)
    assert torch.equal(noise(5, last).permute(0, 2, 3, 1).flatten(), flat)
    assert torch.equal(noise(5, torch.empty(4, 6, 2)[..., 0]).flatten(), flat)
    assert noise(5, torch.empty(())).item() == flat[0]
    assert noise(5, torch.empty(0, 3)).shape == (0, 3)


def test_noise_looks_random() -> None:
    """In N words, each bit is set in half of them, and agrees in half of them with the same bit
    of the next element, step, parameter and seed, and with the bit below: to 5 sigma, sqrt(N)/2."""
    count = 2**14
    base = torch.empty(count)

    found = words(0, 1, 0, base)
    others = {
        "element": found.roll(1),
        "step": words(0, 2, 0, base),
        "parameter": words(0, 1, 1, base),
        "seed": words(1, 1, 0, base),
        "bit": found >> 1,
        "itself": torch.zeros_like(found),
    }
    for what, other in others.items():
        ones = torch.stack([((found ^ other) >> bit & 1).sum() for bit in range(31)])
        assert ((ones - count / 2).abs() < 5 * count**0.5 / 2).all(), what


# ---- what random bits depend on ------------------------------------------------------------------


RANDOM: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "bfloat16": (torch.bfloat16, {}),
    "float16": (torch.float16, {}),
    "moments": (torch.float32, {"moment_dtype": torch.bfloat16}),
}
every_random = pytest.mark.parametrize(("dtype", "options"), RANDOM.values(), ids=RANDOM.keys())


@every_random
@every_backend
@every_method
def test_a_seed_repeats_a_run_and_another_does_not(
    variant: Variant, backend: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    runs = []
    for seed in (7, 7, 8, 0):
        params = weights(dtype)
        runs.append(trained(variant.build(params, backend, seed=seed, **options), params, STEPS))
    assert_same_bits(runs[0], runs[1])
    for other in runs[2:]:
        assert not torch.equal(other["weight 6"], runs[0]["weight 6"])
        # And yet they go the same way: a last bit for each step and for what it does to the next.
        tolerance = 4 * STEPS * 2.0 ** -BITS.get(dtype, 7)
        torch.testing.assert_close(other["weight 6"], runs[0]["weight 6"], rtol=0, atol=tolerance)


@every_random
@every_backend
def test_random_bits_know_neither_groups_nor_layouts_nor_neighbours(
    backend: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    def run(group: Callable[[list[Tensor]], list[Any]], active: int | None = None) -> list[Tensor]:
        params = weights(dtype)
        # At least two dimensions, in memory the other way round.
        params[0] = torch.empty(8, 3, dtype=dtype).mT[:, :5].copy_(params[0].detach())
        optimizer = wd.AdamW(group(params), lr=0.1, backend=backend, **options)
        for t in range(STEPS):
            for i, p in enumerate(params):
                p.grad = gradient(p, i, t) if active in (None, i) else None
            optimizer.step()
        return params

    expected = run(lambda params: params)
    halves = run(lambda params: [{"params": params[:2]}, {"params": params[2:]}])
    assert all(map(torch.equal, halves, expected))
    for i in range(len(SHAPES)):
        assert torch.equal(run(lambda params: params, active=i)[i], expected[i])

    dense = weights(dtype)
    dense[0] = torch.empty(5, 3, dtype=dtype).mT.copy_(dense[0].detach())
    optimizer = wd.AdamW(dense, lr=0.1, backend=backend, **options)
    train(optimizer, dense, range(STEPS))
    assert all(map(torch.equal, dense, expected))


@every_random
@every_backend
def test_equal_parameters_are_rounded_apart(
    backend: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    twins = [random(50, seed=1, dtype=dtype) for _ in range(2)]
    optimizer = wd.AdamW(twins, lr=0.1, backend=backend, **options)
    for t in range(STEPS):
        for p in twins:
            p.grad = gradient(p, 0, t)
        optimizer.step()
    assert not torch.equal(*twins)


# ---- one step, and many --------------------------------------------------------------------------


def between(x: Tensor, dtype: torch.dtype) -> Tensor:
    """How far from x its farther neighbour of 16 bits is, at most: a last bit."""
    _, exponent = torch.frexp(x)  # |x| in [0.5, 1) * 2^exponent
    smallest = torch.finfo(dtype).smallest_normal * 2.0 ** -BITS[dtype]
    return torch.ldexp(torch.ones_like(x), exponent - 1 - BITS[dtype]).clamp(min=smallest)


@every_mode
@every_narrow
@every_backend
@every_variant
def test_a_step_is_that_of_float32_rounded_once(
    variant: Variant, backend: str, dtype: torch.dtype, mode: dict[str, Any]
) -> None:
    """To one of the two neighbours, or to the nearer one, up to what float32 itself rounds.

    SPD may store what it selects twice, and round it each time: first w~, from which it then goes
    at most a fifth of the way to the anchor, so a quarter of what is left of it.
    """
    small = weights(dtype)
    wide, anchors = wider(small), anchors_of(small)
    train(variant.build(small, backend, anchors, **mode), small, range(2, 3))
    train(variant.build(wide, backend, anchors), wide, range(2, 3), like=small)
    by_chance = "master_weights" not in mode and "rounding" not in mode
    lasts = 1.0 if by_chance else 0.5
    twice = variant.method == "spd" and (by_chance or mode.get("rounding") == "nearest")
    for p, q, a in zip(small, wide, anchors, strict=True):
        assert p.dtype == dtype
        room = between(q, dtype)
        if twice:
            distance = (q - a.float() * variant.anchored).abs()
            room = room + between(q.abs() + distance / 4, dtype)
        slack = 8 * torch.finfo(torch.float32).eps * (q.abs() + 0.1)
        assert ((p.float() - q).abs() <= lasts * room + slack).all()


@needs_native
@every_mode
@every_narrow
@pytest.mark.usefixtures("restored")
def test_compiled_loops_round_bit_by_bit(dtype: torch.dtype, mode: dict[str, Any]) -> None:
    """Weights of 0 take the values of their anchors, where decay pulls them all the way there."""
    values = delicate(dtype)
    stepped = 0 - ((0 - values) + 0)  # what is to be stored: -0 becomes 0
    for name in internals.instruction_sets():
        internals.use_instruction_set(name)
        p = torch.zeros_like(values, dtype=dtype)
        p.grad = torch.zeros_like(p)
        optimizer = wd.AdamW(
            [p], lr=1.0, weight_decay=1.0, anchor=[values], backend="native", **mode
        )
        optimizer.step()
        by_chance = "rounding" not in mode and "master_weights" not in mode
        expected = narrow(stepped, dtype, words(0, 1, 0, values) if by_chance else None)
        assert torch.equal(bits(p), bits(expected)), name
        if mode.get("rounding") == "kahan":
            lost = narrow(stepped - expected.float(), dtype)
            assert torch.equal(bits(optimizer.state[p]["compensation"]), bits(lost)), name


@every_narrow
@every_variant
def test_the_reference_rounds_by_its_own_noise(variant: Variant, dtype: torch.dtype) -> None:
    """What every other backend is compared with, bit by bit: its keys, its words, its halves."""
    small = weights(dtype)
    wide, anchors = wider(small), anchors_of(small)
    options: dict[str, Any] = {"seed": 12345}
    if variant.method == "spd":
        options["weight_decay"] = 0.0  # else it stores twice
    first = variant.build(small, "eager", anchors, moment_dtype=torch.bfloat16, **options)
    second = variant.build(wide, "eager", anchors, **options)
    train(first, small, range(2, 3))
    train(second, wide, range(2, 3), like=small)
    for i, (p, q) in enumerate(zip(small, wide, strict=True)):
        key = mix(mix(mix(12345) + 1) ^ (i * 0x9E3779B9 & 0xFFFFFFFF))
        assert torch.equal(p, narrow(q, dtype, noise(key, q)))
        of_moments = noise(mix(key + 2), q)
        for name, shift in (("exp_avg", 0), ("exp_avg_sq", 16), ("max_exp_avg_sq", 16)):
            if name in second.state[q]:
                exact = second.state[q][name]
                expected = narrow(exact, torch.bfloat16, of_moments >> shift & 0xFFFF)
                assert torch.equal(first.state[p][name], expected), name


@pytest.mark.parametrize("mode", ["stochastic", "nearest", "kahan"])
@every_backend
def test_what_spd_selects_is_stored_twice(backend: str, mode: str) -> None:
    """As the eager formulas do, with the same random bits, but for an element in 500.

    About 30 roundings of float32 on the way, each of 2^-16 of bfloat16's: so many of a million are
    rounded to the other neighbour. Stored once, 37,000 are, or to nearest 10,000.
    """
    runs = []
    for name in (backend, "eager"):
        w, anchor = (random(4096, seed=seed, dtype=torch.bfloat16) for seed in (1, 2))
        options = {**MODES[mode], "lr": 0.1, "weight_decay": 0.7, "eps": 1e-2}
        optimizer = wd.AdamSPD([w], anchor=[anchor], backend=name, telemetry_every=1, **options)
        for pull in (-3, 0.1):  # away from the anchor, and on by momentum
            w.grad = pull * (w - anchor)
            optimizer.step()
        runs.append((w, optimizer.telemetry()["0.0"]["ratio"].item()))
    assert runs[0][1] > 0
    assert (runs[0][0] != runs[1][0]).sum() < 4096 / 500


@every_narrow
@every_backend
@every_variant_without_average
def test_master_weights_are_a_run_in_float32(
    variant: Variant, backend: str, dtype: torch.dtype
) -> None:
    small = weights(dtype)
    wide = wider(small)
    anchors = anchors_of(wide)  # in float32, though the weights are of 16 bits
    first = variant.build(small, backend, anchors, master_weights=True)
    second = variant.build(wide, backend, anchors)
    train(first, small, range(STEPS))
    train(second, wide, range(STEPS), like=small)
    for p, q in zip(small, wide, strict=True):
        state = dict(first.state[p])
        if not state:
            continue
        assert torch.equal(bits(state.pop("master")), bits(q))
        assert torch.equal(bits(p), bits(q.to(dtype)))
        assert_same_bits(state, second.state[q])


@every_narrow
@every_backend
@every_method
def test_compensation_keeps_what_weights_lose(
    variant: Variant, backend: str, dtype: torch.dtype
) -> None:
    """w + compensation has twice the digits of w. It is rounded once a step: by half a last bit of
    the compensation, which is at most half a last bit of w. Float32 has some more of its own."""
    small = weights(dtype)
    wide = wider(small)
    first = variant.build(small, backend, rounding="kahan")
    train(first, small, range(20))
    train(variant.build(wide, backend), wide, range(20), like=small)
    for p, q in zip(small, wide, strict=True):
        compensation = first.state[p]["compensation"]
        assert compensation.dtype == dtype
        whole = p.double() + compensation.double()
        half = 2.0 ** -(BITS[dtype] + 1)
        smallest = torch.finfo(dtype).smallest_normal * half
        once = half * half * 4 + smallest + torch.finfo(torch.float32).eps * 4  # |w| < 4
        torch.testing.assert_close(whole, q.double(), rtol=0, atol=20 * once)
        assert (compensation.abs() <= between(p.float(), dtype) / 2).all()


@pytest.mark.parametrize(
    ("mode", "kept"),
    [("stochastic", True), ("kahan", True), ("master", True), ("nearest", False)],
)
@every_narrow
@every_backend
def test_small_decay_is_not_lost(backend: str, dtype: torch.dtype, mode: str, kept: bool) -> None:
    """1500 steps that each take 1e-5 of the weights, of which bfloat16 sees 4e-3 at most.

    In all 1.5% of them: stochastic rounding of 2^16 numbers errs by 0.3% of that (one sigma, in
    bfloat16), rounding at the end by less.
    """
    generator = torch.Generator().manual_seed(1)
    w = (torch.rand(2**16 if dtype == torch.bfloat16 else 2**12, generator=generator) + 1).to(dtype)
    before = w.double()
    optimizer = wd.AdamW([w], lr=1e-4, weight_decay=0.1, backend=backend, **MODES[mode])
    w.grad = torch.zeros_like(w)
    for _ in range(1500):
        optimizer.step()
    exact = before.sum() * (1 - (1 - 1e-5) ** 1500)
    share = (before - w.double()).sum() / exact
    if kept:
        assert 0.99 < share < 1.01
    else:
        assert share < 0.01


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, *NARROW], ids=str)
def test_second_moments_in_bfloat16_arrive_where_they_belong(
    backend: str, dtype: torch.dtype
) -> None:
    """v of equal gradients is g^2 (1 - b2^t). To nearest it would stop where a step adds less than
    half of its last bit: at a third of g^2. By chance v errs by up to 10 last bits, 4%, and the
    mean of 2^12 of them by less than 0.1%."""
    w = torch.ones(2**12, dtype=dtype)
    optimizer = wd.AdamW([w], lr=0.0, backend=backend, moment_dtype=torch.bfloat16)
    w.grad = torch.full_like(w, 0.75)
    for _ in range(1000):
        optimizer.step()
    state = optimizer.state[w]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16
    exact = 0.75**2 * (1 - 0.999**1000)
    assert abs(state["exp_avg_sq"].double().mean().item() / exact - 1) < 5e-3
    assert abs(state["exp_avg"].double().mean().item() / 0.75 - 1) < 5e-3


@every_backend
@every_variant
def test_moments_in_bfloat16_stay_near_those_in_float32(variant: Variant, backend: str) -> None:
    """A step in which a moment errs by a last bit, 2^-7, errs by as much of itself, at most lr."""
    runs = []
    for dtype in (None, torch.bfloat16):
        params = weights(torch.float32)
        runs.append(trained(variant.build(params, backend, moment_dtype=dtype), params, STEPS))
    assert runs[1]["exp_avg 0"].dtype == torch.bfloat16
    for i in range(len(SHAPES)):
        x, y = (run[f"weight {i}"] for run in runs)
        torch.testing.assert_close(x, y, rtol=0, atol=STEPS * 0.1 * 4 * 2**-7)
        if x.numel() > 1:
            assert not torch.equal(x, y)


@every_backend
@pytest.mark.parametrize("amsgrad", [False, True])
def test_swd_takes_the_mean_of_v_before_it_is_rounded(backend: str, amsgrad: bool) -> None:
    """lr 0: only V is looked at, through the state or a measured step."""
    options = {"lr": 0.0, "amsgrad": amsgrad, "moment_dtype": torch.bfloat16}
    w = random(3, seed=1, dtype=torch.float32)
    optimizer = wd.AdamSWD([w], backend=backend, telemetry_every=1, **options)
    g = random(3, seed=2, dtype=torch.float32)
    v = torch.zeros(3, dtype=torch.float64)
    for t in range(1, 4):
        w.grad = g * t
        optimizer.step()
        v = 0.999 * v + 0.001 * (g.double() * t) ** 2
        if t == 1 or not amsgrad:  # the maximum is that of a rounded v later
            found = optimizer.telemetry()["0.0"]["sqrt_mean_v"] ** 2
            exact = v.mean() / (1 - 0.999**t)
            torch.testing.assert_close(found, exact, rtol=4 * 2**-23, atol=0)


# ---- several types together ----------------------------------------------------------------------

MIXED = [torch.bfloat16, torch.float32, torch.float16, torch.float64, torch.complex64]


@every_backend
@pytest.mark.parametrize("rounding", ["stochastic", "kahan", "nearest"])
@pytest.mark.parametrize("method", [each for each in METHODS if each != "swd"])
def test_types_of_one_group_do_not_see_each_other(method: str, rounding: str, backend: str) -> None:
    """Each has the bits of a run in which only it has gradients. (SWD's V is one for all.)"""

    def run(active: int | None = None) -> dict[str, Tensor]:
        params = [random(3, 5, seed=i, dtype=dtype) for i, dtype in enumerate(MIXED)]
        optimizer = Variant(method).build(params, backend, rounding=rounding, ema_decay=0.5)
        for t in range(STEPS):
            for i, p in enumerate(params):
                p.grad = gradient(p, 0, t) if active in (None, i) else None
            optimizer.step()
        return snapshot(optimizer, params)

    together = run()
    for i, dtype in enumerate(MIXED):
        alone = {key: x for key, x in run(i).items() if key.endswith(f" {i}")}
        assert_same_bits({key: together[key] for key in alone}, alone)
        assert ("compensation" in [key.split()[0] for key in alone]) == (
            rounding == "kahan" and dtype in NARROW
        )


@every_backend
def test_swd_averages_over_all_types(backend: str) -> None:
    params = [torch.ones(2, dtype=dtype) for dtype in MIXED]
    optimizer = wd.AdamSWD(params, lr=0.1, backend=backend, telemetry_every=1)
    for i, p in enumerate(params):
        p.grad = torch.full_like(p, i + 1)
    optimizer.step()
    # 2 elements of each real type, and of the complex one 2 of 5^2 and 2 of 0^2.
    exact = (2 * (1 + 4 + 9 + 16) + 2 * 25) / (4 * 2 + 2 * 2)
    found = optimizer.telemetry().total["sqrt_mean_v"].item() ** 2
    assert found == pytest.approx(exact, rel=1e-6)


@every_narrow
@every_backend
@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.anchored], ids=str)
def test_anchors_of_16_bits(variant: Variant, backend: str, dtype: torch.dtype) -> None:
    """A float32 weight decays to them as to the same numbers in float32."""
    runs = []
    for widen in (False, True):
        params = weights(torch.float32)
        anchors = [a.to(dtype) for a in anchors_of(params)]
        optimizer = variant.build(params, backend, wider(anchors) if widen else anchors)
        train(optimizer, params, range(STEPS))
        kept = {optimizer.state[p].pop("anchor").dtype for p in params}
        assert kept == {torch.float32 if widen else dtype}
        runs.append(snapshot(optimizer, params))
    assert_same_bits(*runs)


# ---- states and checkpoints ----------------------------------------------------------------------

WIDE_MOMENTS = {torch.float64: torch.float64, torch.complex64: torch.complex64}


@every_mode
@every_backend
@every_method
def test_types_of_states(variant: Variant, backend: str, mode: dict[str, Any]) -> None:
    dtypes = [*NARROW, torch.float32]
    if "moment_dtype" not in mode:
        dtypes += [torch.float64, torch.complex64]
    for dtype in dtypes:
        if mode.get("master_weights") and dtype not in NARROW:
            continue
        params = [random(3, 4, seed=1, dtype=dtype)]
        optimizer = variant.build(params, backend, amsgrad=True, ema_decay=0.9, **mode)
        run = trained(optimizer, params, 2)
        computed = WIDE_MOMENTS.get(dtype, torch.float32)
        expected = {
            "weight": dtype,
            "step": torch.float32,
            **dict.fromkeys(
                ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), mode.get("moment_dtype", computed)
            ),
            "ema": computed,
        }
        if mode.get("rounding") == "kahan" and dtype in NARROW:
            expected["compensation"] = dtype
        if mode.get("master_weights"):
            expected["master"] = torch.float32
        assert {key.split()[0]: x.dtype for key, x in run.items()} == expected


@every_narrow
@every_mode
@every_backend
@every_method
def test_resume_is_exact_in_every_mode(
    variant: Variant, backend: str, mode: dict[str, Any], dtype: torch.dtype
) -> None:
    params = weights(dtype)
    anchors = anchors_of(wider(params))
    build = Variant(variant.method, anchored=True).build
    options = {"ema_decay": 0.7, "seed": 3, **mode}
    optimizer = build(params, backend, anchors, **options)
    train(optimizer, params, range(3))
    resumed = copies(params)
    # The seed and the decay of the average are in the checkpoint.
    other = build(resumed, backend, **{**options, "seed": 0, "ema_decay": 0.1})
    other.load_state_dict(saved(optimizer.state_dict()))
    assert_same_bits(snapshot(other, resumed), snapshot(optimizer, params))
    train(optimizer, params, range(3, 6))
    train(other, resumed, range(3, 6))
    assert_same_bits(snapshot(other, resumed), snapshot(optimizer, params))
    clone, theirs = copy.deepcopy((other, resumed))
    train(clone, theirs, range(6, 8))
    train(other, resumed, range(6, 8))
    assert_same_bits(snapshot(other, resumed), snapshot(clone, theirs))


@every_narrow
@every_mode
@every_backend
@pytest.mark.parametrize("method", TORCH)
def test_a_run_of_torch_goes_on(
    method: str, backend: str, mode: dict[str, Any], dtype: torch.dtype
) -> None:
    """There moments have the weights' type."""
    params = weights(dtype)
    theirs = TORCH[method](params, **USUAL, amsgrad=True)
    train(theirs, params, range(3))
    mine = Variant(method).build(params, backend, ema_decay=0.9, **mode)
    mine.load_state_dict(saved(theirs.state_dict()))
    moment = mode.get("moment_dtype", torch.float32)
    for p in params:
        state = mine.state[p]
        for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            assert state[key].dtype == moment
            assert torch.equal(state[key], theirs.state[p][key].to(moment))
        assert state["step"] == theirs.state[p]["step"]
        if "master_weights" in mode:
            assert torch.equal(state["master"], p.float())
        if mode.get("rounding") == "kahan":
            assert not state["compensation"].any()
    before = copies(params)
    train(mine, params, range(3, 5))
    assert all(not torch.equal(x, p) for x, p in zip(before, params, strict=True) if p.numel() > 0)


@every_mode
@every_backend
def test_what_torch_did_not_keep_up_is_made_anew(backend: str, mode: dict[str, Any]) -> None:
    """It carries master weights, compensation and averages along, but steps the weights alone."""
    params = weights(torch.bfloat16)
    options = {"ema_decay": 0.9, **mode}
    mine = Variant("decoupled").build(params, backend, **options)
    train(mine, params, range(3))
    theirs = torch.optim.AdamW(params)
    theirs.load_state_dict(saved(mine.state_dict()))
    train(theirs, params, range(3, 5))
    again = Variant("decoupled").build(params, backend, **options)
    again.load_state_dict(saved(theirs.state_dict()))
    for p in params:
        state = again.state[p]
        fresh = {"master": p.float(), "compensation": torch.zeros_like(p), "ema": p.float()}
        assert torch.equal(state["ema"], p.float())
        for key in fresh.keys() & state.keys():
            assert torch.equal(state[key], fresh[key]), key
            assert state[key].dtype == fresh[key].dtype, key
        assert state["step"] == theirs.state[p]["step"]
    train(again, params, range(5, 7))


@every_backend
def test_a_checkpoint_without_storage_options_is_taken_by_16_bits(backend: str) -> None:
    """It is of an earlier version: moments in the weights' type, and nothing about rounding."""
    params = weights(torch.bfloat16)
    mine = Variant("decoupled").build(params, backend)
    train(mine, params, range(3))
    checkpoint = saved(mine.state_dict())
    for group in checkpoint["param_groups"]:
        del group["decoupled_weight_decay"]  # which earlier releases did not write
    for state in checkpoint["state"].values():
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = state[key].bfloat16()
    other = Variant("decoupled").build(params, backend, rounding="kahan", seed=5)
    other.load_state_dict(checkpoint)
    assert other.param_groups[0]["rounding"] == "kahan"
    assert other.param_groups[0]["seed"] == 5
    for p in params:
        assert other.state[p]["exp_avg"].dtype == torch.float32
        assert not other.state[p]["compensation"].any()


# ---- what is refused -----------------------------------------------------------------------------

half, single, double = (
    torch.ones(2, dtype=dtype) for dtype in (torch.bfloat16, torch.float32, torch.float64)
)
BUILDS: list[tuple[dict[str, Any], Tensor, type[Exception], str]] = [
    ({}, torch.ones(2, dtype=torch.int64), TypeError, "only floating and complex"),
    (
        {"rounding": "up"},
        half,
        ValueError,
        "group 0: unknown rounding 'up'; there are 'stochastic'",
    ),
    ({"rounding": None}, half, ValueError, "unknown rounding None"),
    ({"master_weights": 1}, half, ValueError, "master_weights must be True or False, not 1"),
    ({"master_weights": True}, single, ValueError, "none of these is one .torch.float32.: leave"),
    ({"master_weights": True, "rounding": "kahan"}, half, ValueError, "each keep .* take one"),
    ({"moment_dtype": torch.float16}, half, ValueError, "moment_dtype must be one of None, torch"),
    ({"moment_dtype": "half"}, half, ValueError, "not 'half'"),
    ({"moment_dtype": torch.bfloat16}, double, ValueError, "not for parameter 0 of group 0, which"),
    ({"moment_dtype": torch.float32}, double, ValueError, "is torch.float64: put it into a group"),
    ({"moment_dtype": torch.bfloat16}, single + 0j, ValueError, "which is torch.complex64"),
    *(
        ({"seed": seed}, half, ValueError, r"seed must be an int in \[0, 2\*\*32\), not")
        for seed in (-1, 2**32, 1.0, True, None)
    ),
    ({"ema_decay": 1.5}, single, ValueError, r"ema_decay must be in \[0, 1\], not 1.5"),
    ({"ema_decay": -0.1}, single, ValueError, "ema_decay must be .* not -0.1"),
    ({"ema_decay": "0.9"}, single, ValueError, "ema_decay must be a number, not '0.9'"),
    ({"ema_decay": schedules.linear(0.5, 1.1, steps=3)}, single, ValueError, "must stay in .0, 1."),
    ({"ema_decay": {"kind": "step"}}, single, ValueError, "unknown kind"),
    ({"max_grad_norm": -1.0}, single, ValueError, "max_grad_norm must be finite and >= 0, not -1"),
    ({"max_grad_norm": float("nan")}, single, ValueError, "max_grad_norm must be .* not nan"),
    ({"max_grad_norm": "1"}, single, ValueError, "max_grad_norm must be a number"),
    ({"skip_nonfinite": None}, single, ValueError, "skip_nonfinite must be True or False"),
    ({"telemetry_every": 0}, single, ValueError, "telemetry_every must be None or an int >= 1"),
    ({"telemetry_every": 1.0}, single, ValueError, "telemetry_every must be .* not 1.0"),
]


@pytest.mark.parametrize(("options", "w", "error", "match"), BUILDS)
def test_senseless_storage_is_refused_at_construction(
    options: dict[str, Any], w: Tensor, error: type[Exception], match: str
) -> None:
    for kind in (wd.Adam, wd.AdamW, wd.AdamSWD, wd.AdamSPD):
        with pytest.raises(error, match=match):
            kind([w], **options)


ANCHORS: list[tuple[Tensor, torch.dtype]] = [
    (half, torch.float64),
    (single, torch.float64),
    (single, torch.float8_e5m2),
    (single, torch.int32),
    (single, torch.complex64),
    (single + 0j, torch.float32),
]


@pytest.mark.parametrize(("w", "dtype"), ANCHORS, ids=str)
def test_anchors_wider_than_the_arithmetic_are_refused(w: Tensor, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"anchor of parameter 0 .* dtype {dtype} but"):
        wd.AdamW([w], anchor=[torch.ones(2).to(dtype)])


SWITCHES: list[tuple[str, dict[str, Any], str]] = [
    ("stochastic", {"rounding": "kahan"}, "has no compensation, which rounding='kahan' needs"),
    ("stochastic", {"master_weights": True}, "has no master, which master_weights=True needs"),
    ("kahan", {"rounding": "nearest"}, "has compensation, without which the weight is not whole"),
    ("master", {"master_weights": False}, "has master, without which the weight is not whole"),
    ("stochastic", {"moment_dtype": torch.bfloat16}, "exp_avg of .* dtype torch.float32 but"),
    ("stochastic moments", {"moment_dtype": None}, "exp_avg of .* dtype torch.bfloat16 but"),
    ("stochastic", {"rounding": "up"}, "unknown rounding 'up'"),
    ("stochastic", {"seed": -1}, "seed must be"),
    ("stochastic", {"ema_decay": 2.0}, "ema_decay must be"),
]


@every_backend
@pytest.mark.parametrize(("mode", "change", "match"), SWITCHES)
def test_storage_cannot_be_switched_in_a_run(
    mode: str, change: dict[str, Any], match: str, backend: str
) -> None:
    params = weights(torch.bfloat16)
    optimizer = wd.AdamW(params, backend=backend, **MODES[mode])
    train(optimizer, params, range(2))
    before = snapshot(optimizer, params)
    group = optimizer.param_groups[0]
    old = {key: group[key] for key in change}
    group.update(change)
    with pytest.raises((ValueError, RuntimeError), match=match):
        train(optimizer, params, range(2, 3))
    assert_same_bits(snapshot(optimizer, params), before)
    group.update(old)
    train(optimizer, params, range(2, 3))


@every_backend
def test_stochastic_and_nearest_may_be_switched(backend: str) -> None:
    """Neither keeps anything; and averages may begin and end."""
    params = weights(torch.bfloat16)
    optimizer = wd.AdamW(params, backend=backend)
    train(optimizer, params, range(2))
    optimizer.param_groups[0].update(rounding="nearest", ema_decay=1.0, seed=4)
    before = params[0].clone()
    train(optimizer, params, range(2, 4))
    assert torch.equal(optimizer.state[params[0]]["ema"], before.float())
    optimizer.param_groups[0].update(rounding="stochastic", ema_decay=None)
    train(optimizer, params, range(4, 6))
    assert "ema" not in optimizer.state[params[0]]


def chosen(mode: str, key: str) -> Any:
    default = {"rounding": "stochastic", "master_weights": False, "moment_dtype": None}
    return MODES[mode].get(key, default[key])


@pytest.mark.parametrize(
    ("of", "into"), [(a, b) for a, b in itertools.permutations(MODES, 2)], ids=str
)
def test_another_storage_than_that_of_the_checkpoint_is_refused(of: str, into: str) -> None:
    params = weights(torch.bfloat16)
    optimizer = wd.AdamW(params, backend="eager", **MODES[of])
    train(optimizer, params, range(2))
    other = wd.AdamW(copies(params), backend="eager", **MODES[into])
    before = copy.deepcopy(other.state_dict())
    key = next(
        k
        for k in ("rounding", "master_weights", "moment_dtype")
        if chosen(of, k) != chosen(into, k)
    )
    match = f"group 0 of the state_dict has {key}=.*, this optimizer has .*: construct it with"
    with pytest.raises(ValueError, match=match):
        other.load_state_dict(optimizer.state_dict())
    assert other.state_dict() == before


def test_wide_weights_take_their_options_from_the_checkpoint() -> None:
    w = torch.ones(3)
    optimizer = wd.AdamW([w], backend="eager", moment_dtype=torch.bfloat16, rounding="kahan")
    train(optimizer, [w], range(2))
    other = wd.AdamW([w], backend="eager")
    other.load_state_dict(saved(optimizer.state_dict()))
    assert other.param_groups[0]["moment_dtype"] == torch.bfloat16
    assert other.state[w]["exp_avg"].dtype == torch.bfloat16
    train(other, [w], range(2, 4))


@pytest.mark.parametrize(("mode", "key"), [("kahan", "compensation"), ("master", "master")])
def test_a_checkpoint_that_lacks_a_part_of_the_weight_is_refused(mode: str, key: str) -> None:
    params = weights(torch.bfloat16)
    optimizer = wd.AdamW(params, backend="eager", **MODES[mode])
    train(optimizer, params, range(2))
    checkpoint = copy.deepcopy(optimizer.state_dict())
    del checkpoint["state"][0][key]
    with pytest.raises(ValueError, match=f"parameter 0 of group 0 has no {key}"):
        optimizer.load_state_dict(checkpoint)
    checkpoint["state"][0][key] = torch.ones(7)
    with pytest.raises(ValueError, match=f"{key} of parameter 0 of group 0 has shape"):
        optimizer.load_state_dict(checkpoint)


# ---- states and weights that change between steps ------------------------------------------------


def assert_copied_at_the_first_step(optimizer: Any, w: Tensor) -> None:
    """The master copy or the average is that of what w is now."""
    w.fill_(0.5)
    w.grad = torch.zeros_like(w)
    optimizer.step()
    assert (w == 0.5).all()
    (key,) = {"master", "ema"} & optimizer.state[w].keys()
    assert (optimizer.state[w][key] == 0.5).all()


@every_backend
@pytest.mark.parametrize("options", [{"master_weights": True}, {"ema_decay": 0.5}], ids=str)
@pytest.mark.parametrize("loaded", [True, False])
def test_copies_are_of_the_weights_at_the_first_step(
    backend: str, options: dict[str, Any], loaded: bool
) -> None:
    """A model's checkpoint may be loaded after its optimizer was made, or after its state was."""
    w = torch.zeros(5, dtype=torch.bfloat16)
    kept: dict[str, Any] = {} if loaded else {"anchor": [torch.ones(5, dtype=torch.bfloat16)]}
    optimizer = wd.AdamW([w], lr=0.0, backend=backend, **options, **kept)
    if loaded:
        other = torch.zeros(5, dtype=torch.bfloat16)
        other.grad = torch.zeros_like(other)
        source = torch.optim.AdamW([other], lr=0.0)
        source.step()
        optimizer.load_state_dict(source.state_dict())
    assert_copied_at_the_first_step(optimizer, w)


@every_backend
@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
@pytest.mark.parametrize("options", [{"master_weights": True}, {"ema_decay": 0.5}], ids=str)
def test_copies_that_were_never_stepped_are_no_more_than_copies(
    backend: str, options: dict[str, Any], way: str
) -> None:
    """However they travel, it is the weights at the first step that count."""

    def build(w: Tensor) -> Any:
        return wd.AdamW([w], lr=0.0, backend=backend, anchor=[torch.ones(5)], **options)

    w = torch.zeros(5, dtype=torch.bfloat16)
    optimizer = build(w)
    optimizer.state_dict()  # makes the states, for the anchor that was given
    w.fill_(0.25)  # a model's checkpoint
    if options.get("ema_decay"):
        with optimizer.ema_weights():
            assert (w == 0.25).all()
    if way == "state_dict":
        state_dict = copy.deepcopy(optimizer.state_dict())
        assert (state_dict["state"][0].get("master", w) == 0.25).all()
        w = torch.zeros(5, dtype=torch.bfloat16)
        optimizer = build(w)
        optimizer.load_state_dict(state_dict)
    elif way == "deepcopy":
        w, optimizer = copy.deepcopy((w, optimizer))
    else:
        w, optimizer = pickle.loads(pickle.dumps((w, optimizer)))
    assert_copied_at_the_first_step(optimizer, w)


@every_backend
def test_options_that_change_while_a_parameter_rests(backend: str) -> None:
    """Its state follows, or the change is refused by its name, before it has a gradient again."""
    a, b = (torch.ones(3, dtype=torch.bfloat16) for _ in range(2))
    groups = [{"params": [p]} for p in (a, b)]
    optimizer = wd.AdamW(groups, lr=0.1, backend=backend, rounding="kahan", ema_decay=0.5)
    a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
    optimizer.step()
    b.grad = None
    optimizer.param_groups[1]["rounding"] = "nearest"
    with pytest.raises(ValueError, match="parameter 0 of group 1 has compensation"):
        optimizer.step()
    optimizer.param_groups[1].update(rounding="kahan", ema_decay=None)
    before = b.clone()
    with optimizer.ema_weights():
        assert torch.equal(b, before)
    optimizer.step()
    assert "ema" not in optimizer.state[b]
    optimizer.param_groups[1].update(ema_decay=0.5, amsgrad=True)
    optimizer.step()
    assert torch.equal(optimizer.state[b]["ema"], b.float())


@every_backend
def test_moments_do_not_follow_moment_dtype(backend: str) -> None:
    w = torch.ones(3, dtype=torch.bfloat16)
    w.grad = torch.ones_like(w)
    optimizer = wd.AdamW([w], backend=backend)
    optimizer.step()
    before = snapshot(optimizer, [w])
    optimizer.param_groups[0]["moment_dtype"] = torch.bfloat16
    with pytest.raises(RuntimeError, match=r"exp_avg of .*: convert it first; moment_dtype, on wh"):
        optimizer.step()
    assert_same_bits(snapshot(optimizer, [w]), before)


@every_backend
@pytest.mark.parametrize("mode", ["master", "kahan"])
def test_a_state_of_16_bit_weights_in_a_float32_model(backend: str, mode: str) -> None:
    narrow, wide = torch.ones(3, dtype=torch.bfloat16), torch.ones(3)
    source = wd.AdamW([narrow], lr=0.1, **MODES[mode])
    narrow.grad = torch.ones_like(narrow)
    source.step()
    optimizer = wd.AdamW([wide], lr=0.1, backend=backend)
    optimizer.load_state_dict(source.state_dict())
    wide.grad = torch.ones_like(wide)
    optimizer.step()
    assert not {"master", "compensation"} & optimizer.state[wide].keys()
    assert optimizer.param_groups[0]["rounding"] == "stochastic"
