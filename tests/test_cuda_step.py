"""csrc/cuda.cu and its tables, run by the CPU: see emulated.py. On a GPU: test_gpu.py."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import emulated
import pytest
import torch
from torch import Tensor
from variants import (
    METHODS,
    VARIANTS,
    Variant,
    assert_same_bits,
    gradient,
    needs_native,
    random,
    snapshot,
    train,
)

import wdkernels as wd
from wdkernels.coefficients import Hyper, from_group
from wdkernels.device_memory import DeviceMemory
from wdkernels.native import Plan
from wdkernels.plan import Parameter, Request

pytestmark = [
    needs_native,
    pytest.mark.skipif(emulated.missing() is not None, reason=emulated.missing() or "-"),
]

REDUCING = ("swd", "spd")
ELEMENTWISE = [i for i, v in enumerate(VARIANTS) if v.method not in REDUCING]
# Whole vectors and a rest; one element; none; two chunks and a rest.
SHAPES = [(3, 5), (), (1000,), (7,), (0, 3), (2 * 2048 + 5,)]
DTYPES = [torch.float32, torch.float64]


@pytest.fixture
def gpu() -> Iterator[emulated.Machine]:
    with emulated.gpu() as machine:
        yield machine


def run(
    build: Callable[[list[Tensor]], Any],
    shapes: Sequence[Any] = SHAPES,
    dtypes: Sequence[torch.dtype] = DTYPES,
    steps: int = 4,
) -> dict[str, Tensor]:
    params = [random(*s, seed=i, dtype=d) for d in dtypes for i, s in enumerate(shapes)]
    optimizer = build(params)
    train(optimizer, params, range(steps))
    return snapshot(optimizer, params)


def on_gpu(variant: Variant, **options: Any) -> dict[str, Tensor]:
    with emulated.gpu():
        return run(lambda params: variant.build(params, "native"), **options)


def on_cpu(variant: Variant, **options: Any) -> dict[str, Tensor]:
    return run(lambda params: variant.build(params, "native"), **options)


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, x in actual.items():
        scale = expected[name].abs().max().item() if x.numel() else 0.0
        torch.testing.assert_close(x, expected[name], rtol=0, atol=tolerance * scale, msg=name)


# ---- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", ELEMENTWISE, ids=lambda i: str(VARIANTS[i]))
def test_bits_are_those_of_the_cpu(index: int) -> None:
    assert_same_bits(on_gpu(VARIANTS[index]), on_cpu(VARIANTS[index]))


@cache
def reference(index: int) -> dict[str, Tensor]:
    return run(VARIANTS[index].reference, dtypes=[torch.float64])


@pytest.mark.parametrize("index", range(len(VARIANTS)), ids=lambda i: str(VARIANTS[i]))
def test_is_the_reference(index: int) -> None:
    assert_close(on_gpu(VARIANTS[index], dtypes=[torch.float64]), reference(index), 1e-12)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("method", REDUCING)
def test_sums_over_many_chunks(method: str, amsgrad: bool) -> None:
    """SPD: batches too, each with its second touch. Sums differ from the CPU's in their order
    alone, so float32 weights by the last bit of the decay, if at all."""
    variant = Variant(method, {"amsgrad": amsgrad}, anchored=True)
    shapes = [(40000,), (30,), (1 << 20,), (9000,), (5000,), (1 << 19,)]
    options: dict[str, Any] = {"shapes": shapes, "dtypes": [torch.float32], "steps": 2}
    actual = on_gpu(variant, **options)
    assert_close(actual, on_cpu(variant, **options), 2.0**-22)
    assert_same_bits(actual, on_gpu(variant, **options))


@pytest.mark.parametrize("index", [0, 1, 2], ids=["w", "g", "a"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_streams_that_are_not_aligned(index: int, dtype: torch.dtype, gpu: Any) -> None:
    """A stream that starts one element past 16 bytes is not touched outside of its own."""
    runs = []
    for offset in (0, 1):
        room = [torch.full((64,), 7.0, dtype=dtype) for _ in range(3)]
        views = [x[offset if k == index else 0 :][:50] for k, x in enumerate(room)]
        for k, view in enumerate(views):
            view.copy_(random(50, seed=k, dtype=dtype))
        w, g, a = views
        w.grad = g
        optimizer = wd.AdamW([w], lr=0.1, weight_decay=0.2, anchor=[a], backend="native")
        if index == 2:
            optimizer.state[w]["anchor"] = a
        optimizer.step()
        runs.append(snapshot(optimizer, [w]))
        for k, x in enumerate(room):
            first = offset if k == index else 0
            assert (x[:first] == 7).all()
            assert (x[first + 50 :] == 7).all()
    assert_same_bits(*runs)


# ---- tables --------------------------------------------------------------------------------------


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the copies to the device."""
    sizes: list[int] = []
    send = DeviceMemory.send

    def recorded(self: DeviceMemory, table: memoryview, capturing: bool) -> Tensor:
        sizes.append(len(table))
        return send(self, table, capturing)

    monkeypatch.setattr(DeviceMemory, "send", recorded)
    return sizes


def model(count: int = 100) -> list[Tensor]:
    params = [random(16, seed=i, dtype=torch.float32) for i in range(count)]
    for p in params:
        p.grad = torch.ones(16)
    return params


def test_one_copy_a_step_of_what_changed(gpu: emulated.Machine, sent: list[int]) -> None:
    params = model()
    optimizer = wd.AdamW(params, backend="native")
    optimizer.step()
    tables, everything = sent
    sent.clear()
    optimizer.step()
    (numbers,) = sent
    assert numbers < everything / 10

    sent.clear()
    params[3].grad = torch.ones(16)
    optimizer.step()
    assert sent == [everything]

    sent.clear()
    gpu.stream = 2  # its tables are its own
    optimizer.step()
    optimizer.step()
    assert sent == [tables, everything, numbers]

    sent.clear()
    params[5].grad = None
    optimizer.step()
    optimizer.step()
    assert len(sent) == 3  # another list of tensors: tables once more
    assert sent[1] > 10 * sent[2]


def test_a_copy_in_flight_is_not_overwritten(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every copy has memory of its own, which torch guards until it is done."""
    stagings = []
    pinned = DeviceMemory._pinned

    def recorded(self: DeviceMemory, size: int) -> Tensor:
        stagings.append(pinned(self, size))
        return stagings[-1]

    monkeypatch.setattr(DeviceMemory, "_pinned", recorded)
    optimizer = wd.AdamW(model(), backend="native")
    for _ in range(3):
        optimizer.step()
    assert len(stagings) == 4
    assert len({x.data_ptr() for x in stagings}) == 4


@pytest.mark.parametrize("where", ["send", "empty"])
def test_no_memory_for_a_table(where: str, gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    params = model()
    optimizer = wd.AdamW(params, lr=0.1, backend="native")
    before = [p.clone() for p in params]

    def fails(*arguments: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(DeviceMemory, where, fails)
        with pytest.raises(torch.OutOfMemoryError):
            optimizer.step()
    assert all(map(torch.equal, params, before))
    assert optimizer.state[params[0]]["step"] == 0
    optimizer.step()
    assert optimizer.state[params[0]]["step"] == 1


# ---- capturable ----------------------------------------------------------------------------------


class Captured:
    """An optimizer's plan with step counts, lr and weight_decay on the device."""

    def __init__(self, kind: type[Any], params: list[Tensor], **options: Any) -> None:
        self.params = params
        self.optimizer = kind(params, lr=0.1, weight_decay=0.2, backend="eager", **options)
        self.lr = torch.tensor(0.1, dtype=torch.float64)
        self.weight_decay = torch.tensor(0.2, dtype=torch.float64)
        group = self.optimizer.param_groups[0]
        live = {"lr": self.lr, "weight_decay": self.weight_decay}
        hyper: Hyper = from_group(kind._method, group)
        self.hyper = dataclasses.replace(hyper, lr=0.0, weight_decay=0.0, live=live)
        for p in params:
            self.optimizer._complete_state(p, hyper)
        self.plan: Plan | None = None

    def step(self) -> None:
        state, groups = self.optimizer.state, self.optimizer.param_groups
        if self.plan is None:
            members = [Parameter(p, state[p], 0, str(i)) for i, p in enumerate(self.params)]
            self.plan = Plan(members, [self.hyper], state, groups)
        with torch.no_grad():
            assert self.plan.step(state, groups, Request())


@pytest.mark.parametrize("schedule", [None, wd.schedules.cosine(1.0, 0.0, steps=3)], ids=bool)
@pytest.mark.parametrize("kind", [wd.Adam, wd.AdamW, wd.AdamSWD, wd.AdamSPD])
def test_numbers_of_the_device(kind: type[Any], schedule: Any, gpu: Any, sent: list[int]) -> None:
    """Changed lr and decay are followed, though nothing is sent."""
    runs = []
    for live in (True, False):
        params = [random(*s, seed=i, dtype=torch.float64) for i, s in enumerate(SHAPES)]
        if live:
            optimizer: Any = Captured(kind, params, decay_schedule=schedule)
        else:
            optimizer = kind(
                params, lr=0.1, weight_decay=0.2, decay_schedule=schedule, backend="native"
            )
        grads = [gradient(p, i, 5) for i, p in enumerate(params)]
        for t in range(4):
            lr, decay = 0.1 / (t + 1), 0.2 * t
            if live:
                optimizer.lr.fill_(lr)
                optimizer.weight_decay.fill_(decay)
            else:
                optimizer.param_groups[0].update(lr=lr, weight_decay=decay)
            for p, g in zip(params, grads, strict=True):
                p.grad = g
            sent.clear()
            optimizer.step()
            if live and t > 0:
                assert sent == []
        owner = optimizer.optimizer if live else optimizer
        runs.append(snapshot(owner, params))
    assert_close(runs[0], runs[1], 1e-12)


def test_who_waits_can_read_them() -> None:
    """As the eager formulas do, where they stand in for a backend."""
    hyper = Captured(wd.AdamW, model()).hyper
    assert (hyper.lr, hyper.weight_decay) == (0.0, 0.0)
    assert (hyper.read().lr, hyper.read().weight_decay) == (0.1, 0.2)


def test_a_capture_has_memory_of_its_own(gpu: emulated.Machine, sent: list[int]) -> None:
    optimizer = Captured(wd.AdamW, model())
    optimizer.step()
    _, everything = sent
    sent.clear()
    gpu.capturing, gpu.stream = True, 7
    optimizer.step()
    assert sent == [everything]  # but the tables that last are there
    with pytest.raises(RuntimeError, match="run one, with the same parameters, before each"):
        optimizer.step()
    sent.clear()
    gpu.capturing, gpu.stream = False, 1
    optimizer.step()
    assert sent == []  # what stood there still does
    assert optimizer.optimizer.state[optimizer.params[0]]["step"] == 3


def test_a_capture_needs_steps_before(gpu: emulated.Machine) -> None:
    optimizer = Captured(wd.AdamW, model())
    gpu.capturing = True
    with pytest.raises(RuntimeError, match="only join after steps outside of it"):
        optimizer.step()


def test_a_capture_needs_capturable(gpu: emulated.Machine) -> None:
    params = model()
    optimizer = wd.AdamW(params, backend="native")
    optimizer.step()
    gpu.capturing = True
    with pytest.raises(RuntimeError, match="capturable=True"):
        optimizer.step()
    assert optimizer.state[params[0]]["step"] == 1


# ---- what CUDA may say ---------------------------------------------------------------------------

ILLEGAL_ADDRESS, NO_CODE, OLD_DRIVER = 700, 209, 35  # cudaError_t


def fail(call: str, error: int, passing: int = 0) -> None:
    """The next call but `passing` of a function of the runtime fails."""
    library = ctypes.CDLL(emulated.module().__file__)
    library.wdk_emulate_failure(call.encode(), passing, error)


@pytest.mark.parametrize("method", METHODS)
def test_a_launch_that_fails(method: str, gpu: Any) -> None:
    params = model()
    optimizer = Variant(method).build(params, "native")
    optimizer.step()
    before = snapshot(optimizer, params)
    fail("cudaLaunchKernelEx", ILLEGAL_ADDRESS)
    with pytest.raises(RuntimeError, match=r"failed: .*If an earlier kernel.*CUDA_LAUNCH_BLOCKING"):
        optimizer.step()
    assert_same_bits(snapshot(optimizer, params), before)
    optimizer.step()
    assert optimizer.state[params[0]]["step"] == 2


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            "cudaFuncGetAttributes",
            NO_CODE,
            r"this build has no code for .* 8.0: .*ARCHS=80",
        ),
        (
            "cudaFuncGetAttributes",
            OLD_DRIVER,
            "the driver, for CUDA 13.0, is too old for this build, made with",
        ),
        ("cudaDriverGetVersion", OLD_DRIVER, "there is no NVIDIA driver"),
        ("cudaSetDevice", ILLEGAL_ADDRESS, "CUDA says: "),
    ],
)
def test_a_machine_it_cannot_run_on(call: str, error: int, message: str, gpu: Any) -> None:
    """Said when it is asked for; `auto` goes on to the next backend."""
    fail(call, error)
    with pytest.raises(ValueError, match=f"backend 'native' can't be had: {message}"):
        wd.AdamW(model(), backend="native").step()
    fail(call, error)
    wd.AdamW(model()).step()
