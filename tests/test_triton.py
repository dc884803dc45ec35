"""The Triton backend: in the interpreter where there is no GPU, and compiled for those there are.

With a GPU the same tests run its kernels there. What every backend has in common is tested in
test_optimizers.py; here are the bits, the launches, the tables and the machine code.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
import triton_compile
from support import (
    METHODS,
    VARIANTS,
    Edge,
    Variant,
    anchors_of,
    assert_as_at,
    assert_same_bits,
    bits,
    every_edge,
    needs_native,
    random,
    snapshot,
    train,
)
from torch import Tensor

import wdkernels as wd
from wdkernels import groups, rounding, state, triton_backend, triton_lists, triton_tables
from wdkernels.coefficients import mix
from wdkernels.options import GROUP_OPTIONS, GroupOptions
from wdkernels.plan import Numbering, Parameter, Request
from wdkernels.state import NARROW
from wdkernels.telemetry import COLUMNS

pytestmark = [
    pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed"),
    # The interpreter computes with numpy, which warns of quotients that a mask then drops.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REDUCING = ("swd", "spd")
ELEMENTWISE = [i for i, v in enumerate(VARIANTS) if v.method not in REDUCING]
# A full chunk and a tail of two blocks; a tail alone; one element; none.
SHAPES = [(3, 5), (), (1024 + 300,), (7,), (0, 3)]
DTYPES = [torch.float32, torch.float64]


@pytest.fixture(scope="module", autouse=True)
def one_patch_for_a_launch() -> Iterator[None]:
    """The interpreter patches Triton's language for every function that a kernel calls, though it
    still is patched for the kernel: half the time of these tests."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    patch = interpreter._patch_lang
    patched: set[int] = set()  # globals in which the language is, of the launch that goes on

    def patch_once(function: Any) -> Any:
        scope_of = id(function.__globals__)
        if scope_of in patched:
            return None
        scope = patch(function)
        if not patched:  # the kernel's: only its scope is ever restored
            restore = scope.restore
            scope.restore = lambda: (patched.clear(), restore())
        patched.add(scope_of)
        return scope

    interpreter._patch_lang = patch_once
    yield
    interpreter._patch_lang = patch


def run(
    build: Callable[[list[Tensor]], Any],
    shapes: Sequence[Any] = SHAPES,
    dtypes: Sequence[torch.dtype] = DTYPES,
    steps: int = 4,
    device: str = DEVICE,
) -> dict[str, Tensor]:
    """Every shape in every dtype, trained on `device`."""
    params = [random(*s, seed=i, dtype=d).to(device) for d in dtypes for i, s in enumerate(shapes)]
    optimizer = build(params)
    found = {}
    for t in range(steps):
        train(optimizer, params, range(t, t + 1))
        if getattr(optimizer, "grad_norm", None) is not None:
            found[f"grad_norm {t}"] = optimizer.grad_norm.clone()
        if getattr(optimizer, "telemetry_every", None) is not None:
            found[f"telemetry {t}"] = optimizer._run.measured[1]
    return on_cpu({**found, **snapshot(optimizer, params)})


def on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.cpu() for name, x in tensors.items()}


# ---- numbers -------------------------------------------------------------------------------------


@cache
def trained(index: int) -> dict[str, Tensor]:
    """A variant's run on this backend. A float32 parameter's v would show in every V."""
    variant = VARIANTS[index]
    dtypes = DTYPES if variant.method not in REDUCING else [torch.float64]
    return run(lambda params: variant.build(params, "triton"), dtypes=dtypes)


@needs_native
@pytest.mark.parametrize("index", ELEMENTWISE, ids=lambda i: str(VARIANTS[i]))
def test_bits_are_those_of_the_native_backend(index: int) -> None:
    expected = run(lambda params: VARIANTS[index].build(params, "native"), device="cpu")
    assert_same_bits(trained(index), expected)


@pytest.mark.parametrize("index", range(len(VARIANTS)), ids=lambda i: str(VARIANTS[i]))
def test_is_the_reference(index: int) -> None:
    variant = VARIANTS[index]
    dtypes = DTYPES if variant.method not in REDUCING else [torch.float64]
    expected = run(variant.reference, dtypes=dtypes, device="cpu")
    wide = {name: x for name, x in expected.items() if x.dtype == torch.float64}
    assert_close({name: trained(index)[name] for name in wide}, wide, 1e-12)


@needs_native
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("method", ["swd", "spd"])
def test_sums_differ_from_the_native_ones_by_rounding_in_float64(
    method: str, amsgrad: bool
) -> None:
    """So float32 weights differ by the last bit of the decay, if at all. A span and a tail."""
    variant = Variant(method, {"amsgrad": amsgrad}, anchored=True)
    options: dict[str, Any] = {"shapes": [(16384 + 1030,), (40,)], "dtypes": [torch.float32]}
    actual = run(lambda params: variant.build(params, "triton"), steps=2, **options)
    expected = run(lambda params: variant.build(params, "native"), steps=2, device="cpu", **options)
    assert_close(actual, expected, 2.0**-22)


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, x in actual.items():
        scale = expected[name].abs().max().item() if x.numel() else 0.0
        atol = tolerance * scale if scale < torch.inf else 0.0
        torch.testing.assert_close(x, expected[name], rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize("method", ["swd", "spd"])
def test_same_bits_for_every_run(method: str) -> None:
    options: dict[str, Any] = {"shapes": [(2000,), (5,)], "dtypes": [torch.float32], "steps": 2}
    runs = [run(lambda p: Variant(method).build(p, "triton"), **options) for _ in range(2)]
    assert_same_bits(*runs)


@needs_native
def test_sums_of_v_that_overflow_or_have_no_elements() -> None:
    """They are those of v: inf stays, nothing stays 0, whatever clipping makes of the gradients."""
    runs = []
    for backend, device in (("triton", DEVICE), ("native", "cpu")):
        params = [torch.ones(n, dtype=torch.float64, device=device) for n in (3, 0)]
        optimizer = Variant("swd").build(params, backend, max_grad_norm=1.0)
        for t in range(3):
            for p in params:
                p.grad = torch.full_like(p, torch.nan if t == 2 else 0.5)
            if t == 1:
                optimizer.state[params[0]]["exp_avg_sq_sum"].fill_(torch.inf)
            optimizer.step()
            found = on_cpu(snapshot(optimizer, params))
            runs.append({name: x.nan_to_num(123.0, torch.inf) for name, x in found.items()})
    for actual, expected in zip(runs[:3], runs[3:], strict=True):
        assert_close(actual, expected, 1e-15)
    assert runs[1]["exp_avg_sq_sum 0"] == torch.inf
    assert runs[2]["exp_avg_sq_sum 1"] == 0


@needs_native
@pytest.mark.parametrize("method", ["l2", "decoupled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_overflow_inf_nan_and_subnormals(method: str, dtype: torch.dtype) -> None:
    tiny, huge = torch.finfo(dtype).tiny, torch.finfo(dtype).max
    inf, nan = float("inf"), float("nan")
    first = torch.tensor([huge, -huge, inf, -inf, nan, 0, -0.0, tiny, tiny / 8], dtype=dtype)
    runs = []
    for backend, device in (("triton", DEVICE), ("native", "cpu")):
        w = torch.ones(9, dtype=dtype, device=device)
        optimizer = Variant(method, {"amsgrad": True}).build([w], backend, weight_decay=0.0)
        for t in range(3):
            w.grad = (first if t == 0 else torch.full_like(first, tiny / 8)).to(device)
            optimizer.step()
        # Which NaN it is, no standard says.
        runs.append(
            {k: x.nan_to_num(123.0, inf, -inf) for k, x in snapshot(optimizer, [w]).items()}
        )
    assert_same_bits(on_cpu(runs[0]), runs[1])


# ---- storage, and the whole step -----------------------------------------------------------------

BF16, FP16 = NARROW
AVERAGE = wd.schedules.product(
    wd.schedules.linear(0.2, 0.9, steps=2), wd.schedules.cosine(0.5, 1.0, steps=3)
)


class Stored(NamedTuple):
    """A variant, how its tensors are kept, and in which type its anchors are."""

    variant: Variant
    dtypes: Sequence[torch.dtype]
    options: dict[str, Any]
    anchors: torch.dtype | None = None

    def __str__(self) -> str:
        options = (f"{k}={v}" for k, v in self.options.items() if not isinstance(v, dict))
        return "-".join([str(self.variant), *options]).replace("torch.", "")

    def build(self, params: list[Tensor], backend: str) -> Any:
        anchors = anchors_of(params) if self.variant.anchored else None
        if anchors is not None and self.anchors is not None:
            anchors = [a.to(self.anchors) for a in anchors]
        return self.variant.build(params, backend, anchors, **self.options)


# Every way to keep 16-bit weights, moments and anchors, each in some method.
STORED = [
    Stored(Variant("decoupled"), [BF16, FP16], {}),
    Stored(
        Variant("decoupled", {"amsgrad": True, "cautious": True}, True),
        [BF16, FP16],
        {"moment_dtype": BF16, "rounding": "kahan", "seed": 2**32 - 1},
    ),
    Stored(Variant("l2", {"amsgrad": True}, True), [BF16, FP16], {"rounding": "nearest"}, BF16),
    Stored(
        Variant("unmixed", {"maximize": True}, True),
        [BF16, FP16],
        {"master_weights": True, "ema_decay": AVERAGE},
        torch.float32,
    ),
    Stored(
        Variant("decoupled", {}, True),
        [torch.float32],
        {"moment_dtype": BF16, "ema_decay": AVERAGE, "seed": 5},
        FP16,
    ),
    Stored(Variant("l2", {}, True), [torch.float64, torch.complex64], {"ema_decay": 0.75}),
    Stored(Variant("spd", {}, True), [BF16, FP16], {"ema_decay": 0.75}),
    Stored(
        Variant("spd", {}, True),
        [BF16, FP16],
        {"rounding": "kahan", "moment_dtype": BF16, "ema_decay": AVERAGE},
        torch.float32,
    ),
    Stored(Variant("spd"), [FP16], {"master_weights": True}),
    Stored(Variant("swd", {}, True), [BF16], {}, torch.float32),
    Stored(Variant("swd", {"amsgrad": True}), [FP16], {"rounding": "kahan", "moment_dtype": BF16}),
]


@cache
def stored(index: int, backend: str) -> dict[str, Tensor]:
    case = STORED[index]
    device = DEVICE if backend == "triton" else "cpu"
    return run(lambda params: case.build(params, backend), dtypes=case.dtypes, device=device)


@needs_native
@pytest.mark.parametrize(
    "index",
    [i for i, case in enumerate(STORED) if case.variant.method != "swd"],
    ids=lambda i: str(STORED[i]),
)
def test_stored_bits_are_those_of_the_native_backend(index: int) -> None:
    """SPD's are among them: what a sum's order changes in lambda r is lost in the rounding."""
    assert_same_bits(stored(index, "triton"), stored(index, "native"))


@pytest.mark.parametrize("index", range(len(STORED)), ids=lambda i: str(STORED[i]))
def test_storage_is_that_of_the_reference(index: int) -> None:
    """What the formulas' order changes in float32's last bits may decide which way a number is
    rounded to 16 bits: rarely, and then it is the next one. With what is kept of it, a weight is
    as exact as that is."""
    case = STORED[index]
    actual, expected = stored(index, "triton"), stored(index, "eager")
    assert actual.keys() == expected.keys()
    for name, x in actual.items():
        y = expected[name]
        assert x.dtype == y.dtype, name
        if x.numel() == 0:
            continue
        key, i = name.split()
        if key in ("weight", "compensation") and f"compensation {i}" in actual:
            x, y = (
                each[f"weight {i}"].double() + each[f"compensation {i}"].double()
                for each in (actual, expected)
            )
            tolerance = 2.0**-15  # twice bfloat16's 8 bits
        elif x.dtype in NARROW:
            assert (bits(x) != bits(y)).double().mean() <= 0.05, name
            assert (bits(x).int() - bits(y).int()).abs().max() <= 1, name
            continue
        else:
            tolerance = 2.0**-48 if x.dtype == torch.float64 else 2.0**-19
            if case.variant.method == "swd" and key == "exp_avg_sq_sum":
                tolerance = 2.0**-19  # of squares in float32, there
        scale = y.abs().max().item()
        if key == "ema" and f"compensation {i}" in actual and case.variant.method == "spd":
            # It follows the weight without its compensation, which is stored twice a step: a few
            # elements have had the next one, half a last bit of bfloat16 away from the middle.
            assert ((x - y).abs() > tolerance * scale).double().mean() <= 0.01, name
            tolerance = 2.0**-8
        torch.testing.assert_close(x, y, rtol=0, atol=tolerance * scale, msg=name)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_every_number_is_rounded_as_written(dtype: torch.dtype) -> None:
    """By steps that go all the way to the anchor: around every exponent, subnormals, inf, NaN."""
    exponents = torch.arange(256).repeat_interleave(32) << 23
    mantissas = torch.randint(2**23, (8192,), generator=torch.Generator().manual_seed(1))
    mantissas[::32], mantissas[1::32], mantissas[2::32] = 0, 1, 2**23 - 1
    mantissas[3::32], mantissas[4::32], mantissas[5::32] = 2**15, 2**12, 3 * 2**12  # middles
    patterns = torch.cat([exponents | mantissas, (exponents | mantissas) - 2**31])
    x = patterns.to(torch.int32).view(torch.float32) + 0.0  # there is no way to -0
    modes: list[dict[str, Any]] = [{"seed": 3}, {"rounding": "nearest"}, {"master_weights": True}]
    params = [torch.zeros(len(x), dtype=dtype, device=DEVICE) for _ in modes]
    groups = [
        {"params": [p], "anchor": [x.to(DEVICE)], **mode}
        for p, mode in zip(params, modes, strict=True)
    ]
    optimizer = wd.AdamW(groups, lr=1.0, weight_decay=1.0, backend="triton")
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    random_bits = rounding.noise(rounding.key(mix(mix(3) + 1), 0), x, Numbering())
    for p, given in zip(params, [random_bits, None, None], strict=True):
        expected = rounding.narrow(x, dtype, given)
        same = bits(p.cpu()) == bits(expected)
        assert (same | x.isnan()).all()
        assert p.cpu()[x.isnan()].isnan().all()
    assert bits(optimizer.state[params[2]]["master"].cpu())[~x.isnan()].equal(bits(x)[~x.isnan()])


EVERYTHING = {"max_grad_norm": 0.5, "telemetry_every": 1, "ema_decay": AVERAGE}
MEASURED = [
    Variant("l2", {"maximize": True}, True),
    Variant("l2", {"amsgrad": True, "decay_schedule": wd.schedules.late(2)}),
    Variant("unmixed", {}, True),
    Variant("decoupled", {"cautious": True, "amsgrad": True}, True),
    Variant("decoupled", {"decay_scale": "corrected", "lr_max": 0.4}),
    Variant("swd", {}, True),
    Variant("swd", {"amsgrad": True, "cautious": True}),
    Variant("spd", {}, True),
    Variant("spd", {"amsgrad": True, "maximize": True}),
]


@pytest.mark.parametrize("variant", MEASURED, ids=str)
def test_a_clipped_measured_averaged_step_is_the_reference(variant: Variant) -> None:
    """The norm, and V, over lists of several types; numbers of the first are exact."""

    def runs(backend: str, device: str, **options: Any) -> dict[str, Tensor]:
        return run(lambda p: variant.build(p, backend, **EVERYTHING), device=device, **options)

    wide: dict[str, Any] = {
        "dtypes": [torch.float64],
        "shapes": [(3, 5), (), (1024 + 300,), (0, 3)],
        "steps": 3,
    }
    assert_close_by_column(runs("triton", DEVICE, **wide), runs("eager", "cpu", **wide), 1e-12)
    mixed: dict[str, Any] = {
        "dtypes": [torch.complex128, torch.float32, BF16],
        "shapes": [(3, 5), ()],
        "steps": 1,
    }
    assert_close_by_column(runs("triton", DEVICE, **mixed), runs("eager", "cpu", **mixed), 1e-5)


def assert_close_by_column(
    actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float
) -> None:
    def columns(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, x in tensors.items():
            if name.startswith("telemetry"):
                assert x.shape[1] == len(COLUMNS)
                found.update({f"{name} {c}": y for c, y in zip(COLUMNS, x.T, strict=True)})
            else:
                # A bfloat16 that a last bit of float32 decides may be the next one.
                x = torch.view_as_real(x) if x.is_complex() else x
                found[name] = x.double() if x.dtype != BF16 else x.double() * 2.0**-9
        return found

    found, wanted = columns(actual), columns(expected)
    assert found.keys() == wanted.keys()
    for name, x in found.items():
        scale = wanted[name].abs().max().item() if x.numel() else 0.0
        torch.testing.assert_close(x, wanted[name], rtol=0, atol=tolerance * scale, msg=name)


@pytest.mark.parametrize("method", METHODS)
def test_a_measured_step_has_the_same_bits(method: str) -> None:
    runs = []
    for every in (None, 1):
        case = Stored(Variant(method, {}, True), [BF16], {"telemetry_every": every})
        options: dict[str, Any] = {"dtypes": [BF16, torch.float32], "steps": 2}
        found = run(lambda params, case=case: case.build(params, "triton"), **options)
        runs.append({k: x for k, x in found.items() if not k.startswith("telemetry")})
    assert_same_bits(*runs)


@pytest.mark.parametrize("method", METHODS)
def test_an_average_may_be_the_anchor(method: str) -> None:
    """It is in the same memory, and read before the step moves it."""
    where: dict[str, Any] = {"dtypes": [torch.float64], "shapes": [(3, 5), (1024 + 300,), ()]}

    def anchored_to(anchor: str, backend: str, device: str) -> dict[str, Tensor]:
        options = {"ema_decay": 0.75, "anchor": anchor, "max_grad_norm": 0.5}
        build = Variant(method).build
        return run(lambda p: build(p, backend, **options), device=device, **where)

    found = anchored_to("ema", "triton", DEVICE)
    assert_close(found, anchored_to("ema", "eager", "cpu"), 1e-12)
    assert not any(name.startswith("anchor") for name in found)
    other = anchored_to("zero", "triton", DEVICE)
    assert any(not x.equal(other[name]) for name, x in found.items() if "weight" in name)


def test_gradients_are_not_written() -> None:
    params = [random(1030, seed=1, dtype=torch.float32).to(DEVICE)]
    optimizer = Variant("l2").build(params, "triton", max_grad_norm=0.1)
    params[0].grad = random(1030, seed=2, dtype=torch.float32).to(DEVICE)
    before = params[0].grad.clone()
    optimizer.step()
    assert_same_bits({"g": params[0].grad}, {"g": before})
    assert optimizer.grad_norm.item() == pytest.approx(before.double().norm().item())


class Scaled:
    """An optimizer that a GradScaler tells, before its steps, of a scale and of overflows."""

    def __init__(self, optimizer: Any, scale: float, skipped: Sequence[int]) -> None:
        self._optimizer, self._scale, self._skipped = optimizer, scale, skipped
        self._calls = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)

    def step(self) -> None:
        device = next(iter(self._optimizer.param_groups[0]["params"])).device
        self._optimizer.grad_scale = torch.tensor(self._scale, device=device)
        overflow = float(self._calls in self._skipped)
        self._optimizer.found_inf = torch.tensor(overflow, device=device)
        self._calls += 1
        self._optimizer.step()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("clipped", [False, True])
def test_a_grad_scaler_scales_and_skips(method: str, clipped: bool) -> None:
    """Whatever the step does before it writes: the same as the eager formulas."""
    options: dict[str, Any] = {"max_grad_norm": 0.5} if clipped else {}
    runs = []
    for backend, device in (("triton", DEVICE), ("eager", "cpu")):
        optimizers = []

        def build(params: list[Tensor], backend: str = backend, kept: Any = optimizers) -> Any:
            kept.append(Variant(method, {"amsgrad": clipped}).build(params, backend, **options))
            return Scaled(kept[0], 4.0, skipped=[1])

        shapes: dict[str, Any] = {"shapes": [(5,), (2, 3)], "dtypes": [torch.float64]}
        runs.append(run(build, device=device, steps=3, **shapes))
        assert optimizers[0].skipped_steps.item() == 1
    assert_close(runs[0], runs[1], 1e-12)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("method", METHODS)
def test_a_skipped_step_writes_nothing(method: str, bad: float) -> None:
    """Neither weights nor states, of which steps are counted by the host; but what was asked."""
    params = [random(1100, seed=i, dtype=torch.float32).to(DEVICE) for i in range(2)]
    options: dict[str, Any] = {"skip_nonfinite": True, "telemetry_every": 1, "ema_decay": 0.5}
    optimizer = Variant(method).build(params, "triton", **options)
    train(optimizer, params, range(1))
    before = snapshot(optimizer, params)
    for p in params:
        p.grad = random(1100, seed=9, dtype=torch.float32).to(DEVICE)
    params[1].grad[7] = bad
    optimizer.step()
    assert_same_bits(snapshot(optimizer, params), before)
    assert optimizer.skipped_steps.item() == 1
    assert not optimizer.grad_norm.isfinite()
    assert optimizer._run.measured[1].isnan().all()
    train(optimizer, params, range(1, 2))
    assert optimizer.skipped_steps.item() == 1
    assert optimizer.grad_norm.isfinite()
    assert {optimizer.state[p]["step"].item() for p in params} == {2.0}


@every_edge
@pytest.mark.parametrize("method", METHODS)
def test_edges(method: str, edge: Edge) -> None:
    for dtype in DTYPES:
        assert_as_at(edge, method, "triton", dtype, DEVICE)


def test_max_norm_may_change_and_be_left_out() -> None:
    runs = []
    for backend, device in (("triton", DEVICE), ("eager", "cpu")):
        params = [random(6, seed=i).to(device) for i in range(2)]
        optimizer = Variant("l2").build(params, backend)
        for t, bound in enumerate([None, 0.5, 0.25, 0.0, None, 1e9]):
            optimizer.max_grad_norm = bound
            train(optimizer, params, range(t, t + 1))
        runs.append(on_cpu(snapshot(optimizer, params)))
    assert_close(*runs, 1e-12)


def test_a_step_without_any_gradient_still_answers() -> None:
    p = torch.ones(3, device=DEVICE)
    optimizer = wd.AdamW([p], max_grad_norm=1.0, telemetry_every=1, backend="triton")
    optimizer.found_inf = torch.ones((), device=DEVICE)
    optimizer.step()
    assert optimizer.grad_norm.item() == 0.0
    assert optimizer.skipped_steps.item() == 1


# ---- groups, and what is launched ----------------------------------------------------------------


def groups_of(method: str, params: list[Tensor]) -> list[dict[str, Any]]:
    """Groups that differ in whatever a group may hold."""
    anchors = anchors_of(params)
    more: list[dict[str, Any]] = [
        {},
        {"amsgrad": True, "eps": 0.1},
        {"anchor": [anchors[2].to(params[2].device)]},
        {"maximize": True, "amsgrad": True, "anchor": [anchors[3].to(params[3].device)]},
        {"betas": (0.0, 0.9), "weight_decay": 0.4},
        {"decay_schedule": wd.schedules.early(2), "lr": 0.05},
    ]
    if method in ("decoupled", "swd"):
        more[0]["cautious"] = True
        more[3] |= {"cautious": True, "decay_scale": "corrected", "lr_max": 0.3}
    return [{"params": [p], **each} for p, each in zip(params, more, strict=True)]


@pytest.mark.parametrize("method", METHODS)
def test_groups_mix_options(method: str) -> None:
    """In one dtype, so that one launch has all of them."""
    options: dict[str, Any] = {"shapes": [(5,), (3, 7), (), (40,), (6,), (30,)]}

    def build(params: list[Tensor], backend: str) -> Any:
        return Variant(method).build(groups_of(method, params), backend)

    options["dtypes"] = [torch.float64 if method in REDUCING else torch.float32]
    other = "eager" if method in REDUCING else "native"
    actual = run(lambda params: build(params, "triton"), **options)
    expected = run(lambda params: build(params, other), device="cpu", **options)
    assert_close(actual, expected, 1e-12 if method in REDUCING else 0.0)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The kernels that have been launched."""
    found: list[Any] = []
    launch = triton_lists.launch

    def counting(device: Any, kernel: Any, *arguments: Any, **constants: Any) -> None:
        found.append(kernel)
        launch(device, kernel, *arguments, **constants)

    for module in (triton_lists, triton_backend):
        monkeypatch.setattr(module, "launch", counting)
    return found


@pytest.mark.parametrize("groups", [1, 10])
@pytest.mark.parametrize(
    ("method", "launches"), [("l2", 1), ("unmixed", 1), ("decoupled", 1), ("swd", 4), ("spd", 3)]
)
def test_launches_do_not_grow_with_tensors_and_groups(
    method: str, launches: int, groups: int, launched: list[Any]
) -> None:
    params = [random(3, seed=i, dtype=torch.float32).to(DEVICE) for i in range(20)]
    size = len(params) // groups
    parts = [{"params": params[k : k + size], "eps": 0.1 + k} for k in range(0, 20, size)]
    optimizer = Variant(method).build(parts, "triton")
    train(optimizer, params, range(1))
    assert len(launched) == launches


@pytest.mark.parametrize(
    ("options", "launches"),
    [
        ({"ema_decay": 0.5, "moment_dtype": torch.bfloat16}, {"l2": 1, "swd": 4, "spd": 3}),
        ({"max_grad_norm": 1.0}, {"l2": 3, "swd": 5, "spd": 5}),  # norm and V share the sums
        ({"max_grad_norm": 1.0, "amsgrad": True}, {"l2": 3, "swd": 6, "spd": 5}),  # maxima do not
        ({"telemetry_every": 1}, {"l2": 2, "swd": 5, "spd": 4}),
    ],
    ids=lambda x: "-".join(x),
)
def test_launches_of_a_whole_step(
    options: dict[str, Any], launches: dict[str, int], launched: list[Any]
) -> None:
    for method, expected in launches.items():
        params = [random(3, seed=i, dtype=torch.float32).to(DEVICE) for i in range(4)]
        optimizer = Variant(method).build(params, "triton", **options)
        launched.clear()
        train(optimizer, params, range(1))
        assert len(launched) == expected, method


def test_types_have_launches_of_their_own(launched: list[Any]) -> None:
    """Types of weights, moments, anchors, and how 16 bits are rounded; anchored or not is one."""
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.complex64]
    params = [random(3, seed=i, dtype=d).to(DEVICE) for i, d in enumerate(dtypes * 2)]
    anchored = {"params": params[4:], "anchor": anchors_of(params[4:])}
    optimizer = Variant("l2").build([{"params": params[:4]}, anchored], "triton")
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert len(launched) == 3  # complex numbers are pairs of float32
    launched.clear()
    optimizer.param_groups[1]["rounding"] = "nearest"
    optimizer.step()
    assert len(launched) == 5  # rounding is nothing to float32


# ---- tables --------------------------------------------------------------------------------------


def test_pieces_cover_every_element_once() -> None:
    sizes = [0, 1, 1024, 0, 1025, 5000, 3]
    pieces, firsts = triton_lists.pieces(sizes, 1024, torch.device("cpu"))
    covered = [torch.zeros(size, dtype=torch.int64) for size in sizes]
    for tensor, number in pieces.tolist():
        covered[tensor][1024 * number : 1024 * (number + 1)] += 1
    assert all((each == 1).all() for each in covered)
    for i in range(len(sizes)):
        assert (pieces[firsts[i] : firsts[i + 1], 0] == i).all()
    assert firsts[-1] == len(pieces)


def test_pieces_of_a_tensor_with_more_elements_than_an_int32_counts() -> None:
    pieces, firsts = triton_lists.pieces([2**33 + 1], 2**20, torch.device("cpu"))
    assert pieces[-1].tolist() == [0, 2**13]
    assert firsts.tolist() == [0, 2**13 + 1]


@needs_native
@pytest.mark.parametrize("method", ["l2", "decoupled"])
def test_views_at_any_address(method: str) -> None:
    """Streams that lie at odd places of larger tensors, as gradients in flat buckets do."""
    runs = []
    for backend, device in (("triton", DEVICE), ("native", "cpu")):
        buffer = random(4, 2100, seed=1, dtype=torch.float32).to(device)
        params = [row[k : k + 2090] for k, row in enumerate(buffer)]
        optimizer = Variant(method, anchored=True).build(params, backend)
        for t in range(2):
            bucket = random(4, 2100, seed=10 + t, dtype=torch.float32).to(device)
            for k, p in enumerate(params):
                p.grad = bucket[k, 3 * k : 3 * k + 2090]
            optimizer.step()
        runs.append(on_cpu({**snapshot(optimizer, params), "buffer": buffer}))
    assert_same_bits(*runs)


@needs_native
def test_every_layout() -> None:
    """Dense in another order, slices, and gradients in an order of their own; as they change."""
    runs = []
    for backend, device in (("triton", DEVICE), ("native", "cpu")):
        image = random(2, 3, 5, 7, seed=1, dtype=torch.float32).to(device)
        params = [
            image.to(memory_format=torch.channels_last),
            random(6, 8, seed=2, dtype=torch.float64).to(device)[::2, 1:5],
            random(4, 9, seed=3, dtype=torch.float32).to(device).T,
        ]
        optimizer = Variant("decoupled", anchored=True).build(params, backend)
        for t in range(4):
            for i, p in enumerate(params):
                g = random(*p.shape, seed=10 * t + i, dtype=p.dtype).to(device)
                p.grad = torch.empty_like(p).copy_(g) if t % 2 else g
            optimizer.step()
        runs.append(on_cpu(snapshot(optimizer, params)))
    assert_same_bits(*runs)


@needs_native
def test_gradients_that_are_lazily_conjugated_or_negated() -> None:
    """They have the layout of any other; `imag` of a conjugated number is the negative of it."""
    runs = []
    for backend, device in (("triton", DEVICE), ("native", "cpu")):
        params = [
            torch.ones(5, dtype=torch.complex64, device=device),
            torch.ones((), device=device),
        ]
        optimizer = Variant("decoupled").build(params, backend)
        for t in range(3):
            g = random(5, seed=t, dtype=torch.complex64).to(device)
            params[0].grad = g.conj() if t == 1 else g
            params[1].grad = g[0].conj().imag if t == 2 else g[0].real.clone()
            optimizer.step()
        runs.append(on_cpu(snapshot(optimizer, params)))
    assert_same_bits(*runs)


def move_weights(p: Tensor, state: dict[str, Any]) -> None:
    p.data = p.data.clone()


def replace_a_moment(p: Tensor, state: dict[str, Any]) -> None:
    state["exp_avg"] = state["exp_avg"] * 2


def move_a_moment(p: Tensor, state: dict[str, Any]) -> None:
    state["exp_avg_sq"].data = state["exp_avg_sq"].data * 2


def set_the_step(p: Tensor, state: dict[str, Any]) -> None:
    state["step"].fill_(7)


def replace_the_step(p: Tensor, state: dict[str, Any]) -> None:
    state["step"] = torch.tensor(3.0, dtype=torch.float64)


def turn_the_weights(p: Tensor, state: dict[str, Any]) -> None:
    p.data = p.data.T  # same address, same shape


@needs_native
@pytest.mark.parametrize(
    "change",
    [
        move_weights,
        replace_a_moment,
        move_a_moment,
        set_the_step,
        replace_the_step,
        turn_the_weights,
    ],
)
def test_tensors_that_change_between_steps(
    change: Callable[[Tensor, dict[str, Any]], None],
) -> None:
    runs = []
    for backend, device in (("triton", DEVICE), ("native", "cpu")):
        params = [random(5, 5, seed=i, dtype=torch.float32).to(device) for i in range(2)]
        optimizer = Variant("decoupled").build(params, backend)
        train(optimizer, params, range(2))
        params[1].grad = None
        change(params[1], optimizer.state[params[1]])
        for t in range(2, 5):
            train(optimizer, params, range(t, t + 1))
        runs.append(on_cpu(snapshot(optimizer, params)))
    assert_same_bits(*runs)


@needs_native
def test_options_that_change_between_steps() -> None:
    changes: list[dict[str, Any]] = [
        {"lr": 0.2},
        {"cautious": True},
        {"weight_decay": 0.5, "decay_schedule": wd.schedules.late(2)},
        {"amsgrad": True},
        {"maximize": True},
    ]
    runs = []
    for backend, device in (("triton", DEVICE), ("native", "cpu")):
        params = [random(7, seed=i, dtype=torch.float32).to(device) for i in range(2)]
        optimizer = Variant("decoupled").build([{"params": [p]} for p in params], backend)
        for t, change in enumerate([{}, *changes]):
            optimizer.param_groups[1].update(change)
            train(optimizer, params, range(t, t + 1))
        runs.append(on_cpu(snapshot(optimizer, params)))
    assert_same_bits(*runs)


def test_autograd_notices_the_update() -> None:
    p = torch.ones(3, device=DEVICE)
    before = p._version
    train(Variant("decoupled").build([p], "triton"), [p], range(1))
    assert p._version > before


# ---- numbers on the device -----------------------------------------------------------------------


def options_of(optimizer: Any) -> list[GroupOptions]:
    return [optimizer._read(group, i) for i, group in enumerate(optimizer.param_groups)]


def parameters_of(optimizer: Any, options: Sequence[GroupOptions]) -> list[Parameter]:
    """All parameters as a backend is handed them, with complete states."""
    for i, _, _, p in groups.parameters(optimizer.param_groups):
        given = optimizer._run.given.pop(p, None)
        state.complete(p, optimizer.state[p], options[i], given)
    return groups.as_parameters(optimizer.param_groups, optimizer.state, options)


class Counting:
    """An optimizer's groups and states, stepped by a plan whose numbers are on the device."""

    def __init__(self, optimizer: Any, params: list[Tensor]) -> None:
        self.state, param_groups = optimizer.state, optimizer.param_groups
        (before,) = options_of(optimizer)
        self.lr, self.weight_decay = (
            torch.tensor(x, dtype=torch.float64, device=params[0].device)
            for x in (before.lr, before.weight_decay)
        )
        options = before.replace(
            device_numbers={"lr": self.lr, "weight_decay": self.weight_decay},
            lr=float("nan"),
            weight_decay=float("nan"),
        )
        param_groups[0]["capturable"] = True
        self._arguments = self.state, param_groups
        self.request = Request()
        self._plan = triton_backend.Plan(
            parameters_of(optimizer, [options]), [options], *self._arguments
        )

    @torch.no_grad()
    def step(self) -> None:
        assert self._plan.step(*self._arguments, self.request)


SCHEDULED = [
    Variant("decoupled", {"decay_scale": "independent", "decay_schedule": wd.schedules.inverse(2)}),
    Variant(
        "spd",
        {"decay_schedule": wd.schedules.product(wd.schedules.late(2), wd.schedules.inverse(1))},
    ),
]


@pytest.mark.parametrize("variant", [*VARIANTS, *SCHEDULED], ids=str)
def test_numbers_of_the_device_are_those_of_the_host(variant: Variant) -> None:
    """Other functions compute 1 - beta^t, so a float64 may differ in its last digits."""
    options: dict[str, Any] = {"shapes": [(5,), (2, 3)], "dtypes": [torch.float64]}
    actual = run(lambda params: Counting(variant.build(params, "eager"), params), **options)
    expected = run(lambda params: variant.build(params, "eager"), device="cpu", **options)
    assert_close(actual, expected, 1e-12)


CHANGED: dict[str, Any] = {
    "lr": 0.5,
    "betas": (0.1, 0.2),
    "eps": 0.5,
    "weight_decay": 0.5,
    "maximize": True,
    "decay_schedule": wd.schedules.inverse(3),
    "seed": 5,
    "ema_decay": wd.schedules.linear(0.1, 0.2, steps=7),
    "decay_scale": "independent",
    "lr_max": 3.0,
}


def test_every_option_and_stream_has_a_word() -> None:
    """Options that decide over streams, the kernels know from those; `cautious` is a tensor's."""
    before = options_of(Variant("decoupled").build([torch.ones(1)], "triton"))[0]
    words = triton_tables.option_words(before)
    assert len(words) == len(triton_tables.OPTIONS)
    numbers = {name for name, row in GROUP_OPTIONS.items() if not row.streams} | {"ema_decay"}
    assert numbers - {*triton_tables.TensorWords._fields} == CHANGED.keys()
    for name, value in CHANGED.items():
        assert triton_tables.option_words(before.replace(**{name: value})) != words, name
    streams = {entry.stream or entry.name for entry in state.ENTRIES} - {"step"}
    assert streams == {*triton_tables.STREAMS}
    kinds = {kind for kind in wd.schedules._KEYS if kind != "product"}
    assert kinds == {*triton_tables.SCHEDULE_KINDS}


def test_lr_and_weight_decay_are_read_at_every_step() -> None:
    runs = []
    for capturable in (False, True):
        params = [random(6, seed=i).to(DEVICE) for i in range(2)]
        optimizer: Any = Variant("decoupled").build(params, "eager")
        if capturable:
            optimizer = Counting(optimizer, params)
        for t, (lr, weight_decay) in enumerate([(0.1, 0.2), (0.3, 0.2), (0.3, 0.0)]):
            if capturable:
                optimizer.lr.fill_(lr)
                optimizer.weight_decay.fill_(weight_decay)
            else:
                optimizer.param_groups[0].update(lr=lr, weight_decay=weight_decay)
            train(optimizer, params, range(t, t + 1))
        runs.append(on_cpu(snapshot(optimizer, params)))
    assert_close(runs[1], runs[0], 1e-13)


def capturing(patch: pytest.MonkeyPatch) -> None:
    for module in (triton_lists, triton_backend):
        patch.setattr(module, "capturing", lambda: True)


def test_each_capture_needs_a_step_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a graph copies from is set aside outside of it, for one graph alone."""
    params = [random(6, seed=i).to(DEVICE) for i in range(2)]
    optimizer = Counting(Variant("decoupled").build(params, "eager"), params)
    train(optimizer, params, range(1))
    with monkeypatch.context() as patch:
        capturing(patch)
        optimizer.step()
        with pytest.raises(RuntimeError, match="run one, with the same parameters, before each"):
            optimizer.step()
    before = snapshot(optimizer, params)
    optimizer.step()
    assert snapshot(optimizer, params)["step 0"] == before["step 0"] + 1 == 3


def test_a_capture_needs_capturable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it lr and weight_decay would stay as they are, though the device counts the steps."""
    params = [random(6, seed=i).to(DEVICE) for i in range(2)]
    plain = Variant("decoupled").build(params, "eager")
    optimizer = Counting(plain, params)
    train(optimizer, params, range(1))
    before = snapshot(optimizer, params)
    plain.param_groups[0]["capturable"] = False
    capturing(monkeypatch)
    with pytest.raises(RuntimeError, match="only join with capturable=True"):
        optimizer.step()
    assert_same_bits(snapshot(optimizer, params), before)


@pytest.mark.parametrize("index", [0, 1, 4, 6], ids=lambda i: str(STORED[i]))
def test_random_bits_and_averages_from_steps_that_the_device_counts(index: int) -> None:
    case = STORED[index]
    options: dict[str, Any] = {"shapes": [(5,), (2, 3)], "dtypes": case.dtypes}
    actual = run(lambda p: Counting(case.build(p, "eager"), p), **options)
    expected = run(lambda p: case.build(p, "triton"), **options)
    assert actual.keys() == expected.keys()
    for name, x in actual.items():  # but for the last bit of a coefficient
        if x.dtype in NARROW:
            assert (bits(x).int() - bits(expected[name]).int()).abs().max() <= 1, name
            assert (bits(x) == bits(expected[name])).double().mean() >= 0.9, name
        else:
            torch.testing.assert_close(x, expected[name], rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_the_device_alone_knows_that_a_step_is_skipped(method: str, amsgrad: bool) -> None:
    """Kernels write nothing, and count nothing but the skipped step; then it goes on from there."""
    params = [random(1100, seed=i, dtype=torch.float32).to(DEVICE) for i in range(2)]
    options: dict[str, Any] = {"ema_decay": 0.5, "moment_dtype": torch.bfloat16}
    optimizer = Counting(
        Variant(method, {"amsgrad": amsgrad}).build(params, "eager", **options), params
    )
    table = torch.zeros(2, len(COLUMNS), dtype=torch.float64, device=DEVICE)
    norm = torch.zeros((), dtype=torch.float64, device=DEVICE)
    skipped = torch.zeros((), dtype=torch.int64, device=DEVICE)
    no, yes = torch.zeros((), device=DEVICE), torch.ones((), device=DEVICE)
    asked = Request(
        found_inf=no, max_grad_norm=1.0, skip_nonfinite=True, grad_norm=norm, skipped=skipped
    )
    optimizer.request = asked
    train(optimizer, params, range(1))
    before = snapshot(optimizer, params)
    assert before["step 0"].item() == 1

    optimizer.request = asked._replace(found_inf=yes, telemetry=table)
    train(optimizer, params, range(1, 2))
    optimizer.request = asked._replace(telemetry=table)
    params[0].grad[3] = float("nan")
    optimizer.step()
    assert_same_bits(snapshot(optimizer, params), before)
    assert skipped.item() == 2
    assert norm.isnan()
    assert (table == 0).all()

    train(optimizer, params, range(1, 2))
    assert skipped.item() == 2
    assert snapshot(optimizer, params)["step 1"].item() == 2
    assert (table[:, 0] > 0).all()


# ---- phase by phase ------------------------------------------------------------------------------


def by_phases(plans: Sequence[Any], arguments: Sequence[Any], request: Sequence[Request]) -> bool:
    """A step of several plans at once, whose rows of the sums are added up as those of shards."""
    steps = [plan.begin(*a, r) for plan, a, r in zip(plans, arguments, request, strict=True)]
    if None in steps:
        return False

    def add_up(columns: slice) -> None:
        added = torch.stack([step.sums[:, columns] for step in steps]).sum(0)
        for step in steps:
            step.sums[:, columns] = added

    rounds = steps[0].reductions
    for each in range(max(1, rounds)):
        if each < rounds:
            for step in steps:
                step.reduce(each)
            add_up(slice(int(each > 0), 1 if rounds - each > 1 else 2))
        proceed = [step.decide(each) for step in steps]
        if not all(proceed):
            return True
    for step in steps:
        step.update()
    add_up(slice(2, None))
    for step in steps:
        step.finish()
    return True


@pytest.fixture
def in_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(plan: Any, states: Any, param_groups: Any, request: Request) -> bool:
        return by_phases([plan], [(states, param_groups)], [request])

    monkeypatch.setattr(triton_backend.Plan, "step", step)


@pytest.mark.parametrize("index", range(len(STORED)), ids=lambda i: str(STORED[i]))
def test_phases_have_the_bits_of_the_whole_step(index: int, in_phases: None) -> None:
    """What is fused is compared with what is not: the one is cached, of other tests' runs."""
    case = STORED[index]
    found = run(lambda params: case.build(params, "triton"), dtypes=case.dtypes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_backend.Plan, "step", FUSED)
        assert_same_bits(found, stored(index, "triton"))


FUSED = triton_backend.Plan.step


@pytest.mark.parametrize("variant", MEASURED, ids=str)
def test_phases_clip_measure_and_average_with_the_same_bits(
    variant: Variant, monkeypatch: pytest.MonkeyPatch, in_phases: None
) -> None:
    """In lists of several types, one of them with tensors that have no elements."""
    options: dict[str, Any] = {
        "dtypes": [torch.float64, torch.float32],
        "shapes": [(3, 5), (), (0, 3), (300,)],
        "steps": 3,
    }
    found = run(lambda p: variant.build(p, "triton", **EVERYTHING), **options)
    monkeypatch.setattr(triton_backend.Plan, "step", FUSED)
    assert_same_bits(found, run(lambda p: variant.build(p, "triton", **EVERYTHING), **options))


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("method", REDUCING)
def test_phases_of_large_tensors_differ_by_the_order_of_a_norm(
    method: str, amsgrad: bool, monkeypatch: pytest.MonkeyPatch, in_phases: None
) -> None:
    """A whole step adds up the parts of all tensors at once, where the table has one number for
    each tensor; everything else has the same bits."""
    variant = Variant(method, {"amsgrad": amsgrad}, anchored=True)
    more: dict[str, Any] = {"max_grad_norm": 0.5, "telemetry_every": 1}
    where: dict[str, Any] = {"dtypes": [torch.float64], "shapes": [(16384 + 1030,), (4,)]}

    def runs() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return (
            run(lambda p: variant.build(p, "triton"), steps=1, **where),
            run(lambda p: variant.build(p, "triton", **more), steps=1, **where),
        )

    plain, clipped = runs()
    monkeypatch.setattr(triton_backend.Plan, "step", FUSED)
    whole, whole_clipped = runs()
    assert_same_bits(plain, whole)
    assert_close(clipped, whole_clipped, 1e-14)


@pytest.mark.parametrize("method", METHODS)
def test_phases_of_a_scaled_step_and_of_a_skipped_one(
    method: str, monkeypatch: pytest.MonkeyPatch, in_phases: None
) -> None:
    def build(params: list[Tensor]) -> Any:
        kept = Variant(method, {"amsgrad": True}).build(params, "triton", telemetry_every=1)
        return Scaled(kept, 4.0, skipped=[1])

    options: dict[str, Any] = {"shapes": [(5,), (2, 3)], "dtypes": [torch.float64], "steps": 3}
    found = run(build, **options)
    monkeypatch.setattr(triton_backend.Plan, "step", FUSED)
    assert_same_bits(found, run(build, **options))


@pytest.mark.parametrize(
    ("options", "rounds"),
    [
        ({}, {"l2": 0, "swd": 1, "spd": 0}),
        ({"amsgrad": True}, {"l2": 0, "swd": 1, "spd": 0}),
        ({"telemetry_every": 1}, {"l2": 1, "swd": 1, "spd": 1}),
        ({"max_grad_norm": 1.0}, {"l2": 1, "swd": 1, "spd": 1}),
        ({"max_grad_norm": 1.0, "amsgrad": True}, {"l2": 1, "swd": 2, "spd": 1}),
    ],
    ids=lambda x: "-".join(x),
)
def test_rounds_of_sums_before_the_update(
    options: dict[str, Any], rounds: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for method, expected in rounds.items():
        found: list[int] = []

        def step(plan: Any, *arguments: Any, kept: list[int] = found) -> bool:
            kept.append(plan.begin(*arguments).reductions)
            return FUSED(plan, *arguments)

        monkeypatch.setattr(triton_backend.Plan, "step", step)
        params = [random(5, seed=1).to(DEVICE)]
        train(Variant(method).build(params, "triton", **options), params, range(1))
        assert found == [expected], method


# Shapes of tensors in two shards, the dimension that is split, and the first one's part of it.
SHARDS = [((6, 4), 0, 4), ((3,), 0, 3), ((700, 2), 0, 1), ((5, 6), 1, 2)]


def shard(x: Tensor, i: int, rank: int) -> Tensor:
    _, dim, size = SHARDS[i]
    return x.tensor_split([size], dim)[rank].contiguous()


def numbering(i: int, rank: int) -> Numbering:
    shape, dim, size = SHARDS[i]
    if dim == 0:
        return Numbering(first=rank * size * (shape[1] if len(shape) > 1 else 1))
    return Numbering(first=rank * size, run=(size, shape[1] - size)[rank], pitch=shape[1])


class Sharded:
    """An optimizer's groups and states in a process that holds a shard of each tensor."""

    def __init__(self, optimizer: Any, rank: int) -> None:
        self.arguments = optimizer.state, optimizer.param_groups
        options = options_of(optimizer)
        parameters = [
            p._replace(total=torch.Size(SHARDS[i][0]).numel(), numbering=numbering(i, rank))
            for i, p in enumerate(parameters_of(optimizer, options))
        ]
        self.plan = triton_backend.Plan(parameters, options, *self.arguments)


@pytest.mark.parametrize(
    ("dtype", "count"), [(torch.float64, 4), (BF16, 4), (BF16, 3)], ids=lambda x: str(x)
)
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_two_shards_step_as_the_whole(
    method: str, amsgrad: bool, dtype: torch.dtype, count: int
) -> None:
    """Also one without elements. Random bits are those of the whole tensor's elements, whether some
    tensor is in runs, and another kernel then numbers them, or none is."""
    variant = Variant(method, {"amsgrad": amsgrad}, anchored=True)
    more: dict[str, Any] = {"moment_dtype": BF16} if dtype == BF16 else {}
    kept = [random(*shape, seed=i, dtype=dtype) for i, (shape, *_) in enumerate(SHARDS[:count])]
    anchors = anchors_of(kept)

    def request(norm: bool) -> Request:
        asked = {"telemetry": torch.zeros(count, len(COLUMNS), dtype=torch.float64, device=DEVICE)}
        if norm:
            asked["grad_norm"] = torch.zeros((), dtype=torch.float64, device=DEVICE)
        return Request(**asked, max_grad_norm=0.5 if norm else float("inf"))

    whole = [w.clone().to(DEVICE) for w in kept]
    one = variant.build(whole, "triton", [a.to(DEVICE) for a in anchors], **more)
    options = options_of(one)
    plan = triton_backend.Plan(parameters_of(one, options), options, one.state, one.param_groups)
    parts = [[shard(w, i, rank).to(DEVICE) for i, w in enumerate(kept)] for rank in range(2)]
    built = [
        variant.build(
            part, "triton", [shard(a, i, rank).to(DEVICE) for i, a in enumerate(anchors)], **more
        )
        for rank, part in enumerate(parts)
    ]
    ranks = [Sharded(optimizer, rank) for rank, optimizer in enumerate(built)]
    for t in range(2):
        asked = [request(norm=t > 0) for _ in range(3)]
        for i, w in enumerate(whole):
            g = random(*w.shape, seed=50 * t + i, dtype=dtype)
            w.grad = g.to(DEVICE)
            for rank in range(2):
                parts[rank][i].grad = shard(g, i, rank).to(DEVICE)
        with torch.no_grad():
            assert plan.step(one.state, one.param_groups, asked[0])
            arguments = [each.arguments for each in ranks]
            assert by_phases([each.plan for each in ranks], arguments, asked[1:])
        for other in asked[1:]:
            torch.testing.assert_close(other.telemetry, asked[0].telemetry, rtol=1e-12, atol=1e-15)
            if t > 0:
                torch.testing.assert_close(other.grad_norm, asked[0].grad_norm)

    for i, (_, dim, _) in enumerate(SHARDS[:count]):
        together = {"weight": torch.cat([part[i] for part in parts], dim)}
        expected = {"weight": whole[i]}
        for key in one.state[whole[i]]:
            own = [each.state[part[i]][key] for each, part in zip(built, parts, strict=True)]
            together[key] = torch.cat(own, dim) if own[0].dim() else own[0]
            expected[key] = one.state[whole[i]][key]
        if dtype == BF16:
            assert_same_bits(together, expected)
        else:
            assert_close(together, expected, 1e-13)


# ---- what can't be had ---------------------------------------------------------------------------


def refusal(monkeypatch: pytest.MonkeyPatch, *tensors: Tensor) -> str | None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    return triton_backend.refuses(tensors)


def test_says_why_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.ones(1)
    assert refusal(monkeypatch, cpu) == "it has no kernels for cpu tensors"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_backend.refuses([cpu]) is None
    strange = torch.empty(1, dtype=torch.float8_e5m2)
    assert triton_backend.refuses([strange]) == "it has no kernels for torch.float8_e5m2"
    assert "meta" in str(triton_backend.refuses([cpu.to("meta")]))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "not installed" in str(triton_backend.refuses([cpu]))


def test_an_explicit_choice_that_cannot_be_had_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    p = torch.ones(3)
    p.grad = torch.ones(3)
    optimizer = wd.AdamW([p], backend="triton")
    with pytest.raises(
        ValueError, match="backend 'triton' can't be had: it has no kernels for cpu"
    ):
        optimizer.step()
    assert (p == 1).all()


# ---- machine code --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with triton_compile.compilers(str(tmp_path_factory.mktemp("triton"))) as futures:
        yield lambda variant, target: futures[variant, target].result()


@pytest.fixture(scope="module", autouse=True)
def compile_meanwhile(request: pytest.FixtureRequest) -> None:
    """Compilers take as long as the interpreter: let them begin with the first test."""
    if any("code" in getattr(item, "fixturenames", ()) for item in request.session.items):
        request.getfixturevalue("code")


def cases(make: str) -> pytest.MarkDecorator:
    chosen = [case for case in triton_compile.CASES if case[1].startswith(make)]
    return pytest.mark.parametrize(("variant", "target"), chosen, ids=str)


SIZES = {"fp32": 4, "fp64": 8, "bf16": 2, "fp16": 2}


def streams(variant: triton_compile.Variant) -> tuple[list[int], list[int]]:
    """The sizes of an element of each stream that a full chunk reads, and that it writes."""
    weights, moments, anchors = (
        SIZES[variant.get(name) or variant.dtype] for name in ("weights", "moments", "anchors")
    )
    real = SIZES[variant.dtype]
    storage = variant.get("storage")
    copy = {"kahan": [weights], "master": [real]}.get(storage, [])
    weight = copy if storage == "master" else [weights, *copy]
    ema = [real] if variant.has("AVERAGED") else []
    anchor = [anchors] if variant.has("anchors") else []
    if variant.kernel == "update_kernel":
        kept = [moments] * (2 + variant.has("AMSGRAD"))
        if variant.get("decay") == "projection":
            ema = []
        return [*weight, weights, *kept, *anchor, *ema], [weights, *copy, *kept, *ema]
    if variant.kernel == "reduce_kernel":
        return [weights] + [moments] * 2 * variant.has("MAXIMA"), []
    if variant.kernel == "pull_kernel":
        stepped = [weights] if ema else []
        return [*weight, *anchor, *stepped, *ema], [weights, *copy, *ema]
    return [], []


def wide_accesses(sizes: Sequence[int], widest: int) -> dict[str, int]:
    """How many of each width there are: a thread has 8 elements, and takes as many of each stream
    at once as are 16 bytes of the widest."""
    found = {"v4.b32": 0, "v2.b32": 0, "v2.b64": 0}
    for size in sizes:
        width = 16 // widest * size
        kind = "v2.b64" if size == 8 else "v4.b32" if width == 16 else "v2.b32"
        found[kind] += 8 // (16 // widest)
    return found


@cases("sm_")
def test_ptx(variant: triton_compile.Variant, target: str, code: Any) -> None:
    ptx = code(variant, target)["asm"]
    loads, stores = streams(variant)
    copies = (
        variant.dtype if variant.get("storage") == "master" or variant.has("AVERAGED") else None
    )
    types = [variant.get(name) for name in ("weights", "moments", "anchors")]
    if variant.kernel == "reduce_kernel" and not variant.has("MAXIMA"):
        types[1] = None
    if loads:
        widest = max(SIZES[x] for x in [*types, copies] if x)
        for sizes, access in ((loads, "ld"), (stores, "st")):
            for kind, expected in wide_accesses(sizes, widest).items():
                count = len(re.findall(rf"{access}\.global\S*\.{kind}", ptx))
                if variant.kernel == "reduce_kernel" and count > expected > 0:
                    count = expected + count % expected  # its loop may be unrolled
                assert count == expected, kind
        # A thread has the same elements of all streams; sums alone are exchanged.
        sums = variant.kernel == "reduce_kernel" or "partials" not in dict(variant.constants)
        assert sums or "shared" not in ptx.replace("extern .shared", "")

    # No operation is contracted, may be (without ".rn" ptxas may), or rounds as it likes.
    if variant.kernel != "coefficients_kernel":  # which calls exp, log and cos
        assert not re.search(r"\b(fma|mad)\S*\.f(32|64)|\b(add|sub|mul)\.f|approx|\.ftz", ptx)
    if variant.kernel == "update_kernel":
        bits = variant.dtype[2:]
        assert f"sqrt.rn.f{bits}" in ptx
        assert f"div.rn.f{bits}" in ptx


@cases("gfx")
def test_code_for_amd(variant: triton_compile.Variant, target: str, code: Any) -> None:
    compiled = code(variant, target)
    asm = compiled["asm"]
    loads, stores = streams(variant)
    wide = r"(?:global|buffer)_{}_dwordx[24]"
    assert len(re.findall(wide.format("load"), asm)) >= len(loads)
    assert len(re.findall(wide.format("store"), asm)) >= len(stores)
    # Subnormals are kept; nothing may be contracted, nor a root or quotient be less than exact.
    assert ".amdhsa_float_denorm_mode_32 3" in asm
    assert not re.search(r"\b(fadd|fsub|fmul|fdiv) \w*(contract|fast)|!fpmath", compiled["llvm"])
