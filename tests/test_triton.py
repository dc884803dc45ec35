"""The Triton backend: in the interpreter where there is no GPU, and compiled for those there are.

With a GPU the same tests run its kernels there. What every backend has in common is tested in
test_optimizers.py; here are the bits, the launches, the tables and the machine code.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import pytest
import torch
import triton_compile
from torch import Tensor
from variants import (
    METHODS,
    VARIANTS,
    Variant,
    anchors_of,
    assert_same_bits,
    gradient,
    needs_native,
    random,
    snapshot,
)

import wdkernels as wd
from wdkernels import triton_backend
from wdkernels.plan import Parameter, Request

pytestmark = [
    pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed"),
    # The interpreter computes with numpy, which warns of quotients that a mask then drops.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REDUCING = ("swd", "spd")
ELEMENTWISE = [i for i, v in enumerate(VARIANTS) if v.method not in REDUCING]
# A whole chunk and a tail of two blocks; a tail alone; one element; none.
SHAPES = [(3, 5), (), (1024 + 300,), (7,), (0, 3)]
DTYPES = [torch.float32, torch.float64]


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
    train(optimizer, params, range(steps))
    return on_cpu(snapshot(optimizer, params))


def train(optimizer: Any, params: Sequence[Tensor], steps: range) -> None:
    for t in steps:
        for i, p in enumerate(params):
            g = gradient(p, i, t)
            p.grad = None if g is None else g.to(p.device)
        optimizer.step()


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
        torch.testing.assert_close(x, expected[name], rtol=0, atol=tolerance * scale, msg=name)


@pytest.mark.parametrize("method", ["swd", "spd"])
def test_same_bits_for_every_run(method: str) -> None:
    options: dict[str, Any] = {"shapes": [(2000,), (5,)], "dtypes": [torch.float32], "steps": 2}
    runs = [run(lambda p: Variant(method).build(p, "triton"), **options) for _ in range(2)]
    assert_same_bits(*runs)


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


@pytest.mark.parametrize("groups", [1, 10])
@pytest.mark.parametrize(
    ("method", "launches"), [("l2", 1), ("unmixed", 1), ("decoupled", 1), ("swd", 4), ("spd", 3)]
)
def test_launches_do_not_grow_with_tensors_and_groups(
    method: str, launches: int, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = []
    launch = triton_backend._launch

    def counting(device: Any, kernel: Any, *arguments: Any, **constants: Any) -> None:
        launched.append(kernel)
        launch(device, kernel, *arguments, **constants)

    monkeypatch.setattr(triton_backend, "_launch", counting)
    params = [random(3, seed=i, dtype=torch.float32).to(DEVICE) for i in range(20)]
    size = len(params) // groups
    parts = [{"params": params[k : k + size], "eps": 0.1 + k} for k in range(0, 20, size)]
    optimizer = Variant(method).build(parts, "triton")
    train(optimizer, params, range(1))
    assert len(launched) == launches


# ---- tables --------------------------------------------------------------------------------------


def test_pieces_cover_every_element_once() -> None:
    sizes = [0, 1, 1024, 0, 1025, 5000, 3]
    pieces, firsts = triton_backend._pieces(sizes, 1024, torch.device("cpu"))
    covered = [torch.zeros(size, dtype=torch.int64) for size in sizes]
    for tensor, number in pieces.tolist():
        covered[tensor][1024 * number : 1024 * (number + 1)] += 1
    assert all((each == 1).all() for each in covered)
    for i in range(len(sizes)):
        assert (pieces[firsts[i] : firsts[i + 1], 0] == i).all()
    assert firsts[-1] == len(pieces)


def test_pieces_of_a_tensor_with_more_elements_than_an_int32_counts() -> None:
    pieces, firsts = triton_backend._pieces([2**33 + 1], 2**20, torch.device("cpu"))
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
def test_hyper_parameters_that_change_between_steps() -> None:
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


class Capturable:
    """An optimizer's groups and states, stepped by a plan whose numbers live on the device."""

    def __init__(self, optimizer: Any, params: list[Tensor]) -> None:
        optimizer._refresh_hypers()
        self.state, groups, hypers = optimizer.state, optimizer.param_groups, optimizer._hypers
        for p in params:
            state = optimizer._complete_state(p, hypers[0])
            state["step"] = state["step"].to(p.device)
        device = params[0].device
        self.lr = torch.tensor(hypers[0].lr, dtype=torch.float64, device=device)
        self.weight_decay = torch.tensor(hypers[0].weight_decay, dtype=torch.float64, device=device)
        live = {"lr": self.lr, "weight_decay": self.weight_decay}
        self._arguments = self.state, groups
        self.request = Request()
        self._plan = triton_backend.Plan(
            [Parameter(p, self.state[p], 0, "") for p in params],
            [dataclasses.replace(hypers[0], live=live, lr=float("nan"), weight_decay=float("nan"))],
            *self._arguments,
        )

    @torch.no_grad()
    def step(self) -> None:
        assert self._plan.step(*self._arguments, self.request)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_numbers_of_the_device_are_those_of_the_host(variant: Variant) -> None:
    """Other functions compute 1 - beta^t, so a float64 may differ in its last digits."""
    options: dict[str, Any] = {"shapes": [(5,), (2, 3)], "dtypes": [torch.float64]}
    actual = run(lambda params: Capturable(variant.build(params, "eager"), params), **options)
    expected = run(lambda params: variant.build(params, "eager"), device="cpu", **options)
    assert_close(actual, expected, 1e-12)


def test_lr_and_weight_decay_are_read_at_every_step() -> None:
    runs = []
    for capturable in (False, True):
        params = [random(6, seed=i).to(DEVICE) for i in range(2)]
        optimizer: Any = Variant("decoupled").build(params, "eager")
        if capturable:
            optimizer = Capturable(optimizer, params)
        for t, (lr, weight_decay) in enumerate([(0.1, 0.2), (0.3, 0.2), (0.3, 0.0)]):
            if capturable:
                optimizer.lr.fill_(lr)
                optimizer.weight_decay.fill_(weight_decay)
            else:
                optimizer.param_groups[0].update(lr=lr, weight_decay=weight_decay)
            train(optimizer, params, range(t, t + 1))
        runs.append(on_cpu(snapshot(optimizer, params)))
    assert_close(runs[1], runs[0], 1e-13)


# ---- what can't be had ---------------------------------------------------------------------------


def refusal(monkeypatch: pytest.MonkeyPatch, *tensors: Tensor) -> str | None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    return triton_backend.refuses(tensors)


def test_says_why_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.ones(1)
    assert refusal(monkeypatch, cpu) == "it has no kernels for cpu tensors"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_backend.refuses([cpu]) is None
    assert triton_backend.refuses([cpu.bfloat16()]) == "it has no kernels for torch.bfloat16"
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


def wide_accesses(variant: triton_compile.Variant) -> tuple[int, int]:
    """How many streams a whole chunk reads, and how many it writes."""
    anchored, amsgrad = variant.has("ANCHORED"), variant.has("AMSGRAD")
    return {
        "update_kernel": (4 + anchored + amsgrad, 3 + amsgrad),
        "reduce_kernel": (1 + 2 * amsgrad, 0),
        "pull_kernel": (1 + anchored, 1),
    }.get(variant.kernel, (0, 0))


@cases("sm_")
def test_ptx(variant: triton_compile.Variant, target: str, code: Any) -> None:
    ptx = code(variant, target)["asm"]
    kind, per_thread = ("v4.b32", 2) if variant.dtype == "fp32" else ("v2.b64", 4)
    loads, stores = wide_accesses(variant)
    if loads:
        assert len(re.findall(rf"ld\.global\S*\.{kind}", ptx)) == loads * per_thread
        assert len(re.findall(rf"st\.global\S*\.{kind}", ptx)) == stores * per_thread

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
    loads, stores = wide_accesses(variant)
    if loads:
        assert len(re.findall(r"(?:global|buffer)_load_dwordx4", asm)) >= loads
        assert len(re.findall(r"(?:global|buffer)_store_dwordx4", asm)) >= stores
    # Subnormals are kept; nothing may be contracted, nor a root or quotient be less than exact.
    assert ".amdhsa_float_denorm_mode_32 3" in asm
    assert not re.search(r"\b(fadd|fsub|fmul|fdiv) \w*(contract|fast)|!fpmath", compiled["llvm"])
