"""csrc/cuda.cu and its tables, run by the CPU: see emulated.py. On a GPU: test_gpu.py."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import emulated
import pytest
import torch
from support import (
    METHODS,
    NARROW,
    STORAGE,
    VARIANTS,
    Edge,
    Variant,
    assert_as_at,
    assert_same_bits,
    every_edge,
    gradient,
    needs_native,
    random,
    scaled,
    snapshot,
    train,
)
from support.phases import step_in_phases, take
from torch import Tensor

import wdkernels as wd
from wdkernels import groups, state
from wdkernels.device_memory import DeviceMemory
from wdkernels.native import Plan
from wdkernels.options import GroupOptions, from_group
from wdkernels.plan import Numbering, Request
from wdkernels.telemetry import COLUMNS

pytestmark = [
    needs_native,
    pytest.mark.skipif(emulated.missing() is not None, reason=emulated.missing() or "-"),
]

REDUCING = ("swd", "spd")
ELEMENTWISE = [i for i, v in enumerate(VARIANTS) if v.method not in REDUCING]
# Whole vectors and a rest; one element; none; two chunks and a rest.
SHAPES = [(3, 5), (), (1000,), (7,), (0, 3), (2 * 2048 + 5,)]
DTYPES = [torch.float32, torch.float64]
EVERYTHING = [torch.bfloat16, *DTYPES]


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


def assert_almost_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """But for what follows from sums in another order: the last bits, of 16 only now and then."""
    assert actual.keys() == expected.keys()
    for name, x in actual.items():
        y = expected[name]
        assert x.dtype == y.dtype
        scale = y.abs().max().item() if x.numel() else 0.0
        eps = 1e-12 if x.dtype == torch.float64 else 2 * torch.finfo(x.dtype).eps
        torch.testing.assert_close(x, y, rtol=0, atol=eps * scale, msg=name)
        if x.dtype in NARROW:
            assert (x != y).sum() <= 0.005 * x.numel(), name


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


STREAMS = ["w", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "anchor", "ema"]
UNALIGNED: list[tuple[torch.dtype, str, dict[str, Any]]] = [
    *((dtype, name, {}) for dtype in (torch.float32, torch.float64) for name in STREAMS),
    *((torch.bfloat16, name, {"moment_dtype": torch.bfloat16}) for name in STREAMS),
    (torch.float16, "w", {}),
    (torch.float16, "compensation", {"rounding": "kahan"}),
    (torch.float16, "master", {"master_weights": True}),
]


@pytest.mark.parametrize(("dtype", "name", "options"), UNALIGNED, ids=str)
def test_streams_that_are_not_aligned(
    dtype: torch.dtype, name: str, options: dict[str, Any], gpu: Any
) -> None:
    """One that starts an element later has the same bits; nothing around it is touched."""
    variant = Variant("decoupled", {"amsgrad": True, "ema_decay": 0.75, **options}, True)

    def trained(offset: int) -> dict[str, Tensor]:
        def place(x: Tensor, called: str) -> Tensor:
            if called != name:
                return x.clone()
            rooms.append(torch.full((64,), 7.0, dtype=x.dtype))
            return rooms[-1][offset:][:50].copy_(x)

        rooms: list[Tensor] = []
        w = place(random(50, seed=1, dtype=dtype), "w")
        optimizer = variant.build([w], "native")
        for t in range(2):
            w.grad = place(random(50, seed=2 + t, dtype=dtype), "grad")
            optimizer.step()
            state = optimizer.state[w]
            if t == 0 and name in state:
                state[name] = place(state[name], name)
        assert rooms
        for room in rooms:
            assert (room[:offset] == 7).all()
            assert (room[offset + 50 :] == 7).all()
        return snapshot(optimizer, [w])

    assert_same_bits(trained(0), trained(1))


OF_STORAGE = pytest.mark.parametrize(
    ("dtypes", "options"), STORAGE, ids=lambda x: "-".join(x) if isinstance(x, dict) else ""
)


@OF_STORAGE
@pytest.mark.parametrize(
    "variant",
    [
        Variant("l2", {"maximize": True}),
        Variant("unmixed", {"amsgrad": True}, anchored=True),
        Variant("decoupled", {"amsgrad": True, "cautious": True}),
        Variant("decoupled", {}, anchored=True),
    ],
    ids=str,
)
def test_bits_of_every_storage(
    variant: Variant, dtypes: list[torch.dtype], options: dict[str, Any]
) -> None:
    variant = variant._replace(options={**variant.options, **options})
    assert_same_bits(on_gpu(variant, dtypes=dtypes), on_cpu(variant, dtypes=dtypes))


def test_anchors_of_other_types() -> None:
    """Anchors may be of any type that is no wider than what is computed in."""
    pairs = [(w, a) for w in (torch.float64, torch.float32, *NARROW)
             for a in (torch.float32, *NARROW) if w != a]  # fmt: skip

    def trained() -> dict[str, Tensor]:
        params = [random(1001, seed=i, dtype=w) for i, (w, _) in enumerate(pairs)]
        anchors = [random(1001, seed=50 + i, dtype=a) for i, (_, a) in enumerate(pairs)]
        optimizer = Variant("decoupled", {}, True).build(params, "native", anchors)
        train(optimizer, params, range(3))
        assert [optimizer.state[p]["anchor"].dtype for p in params] == [a for _, a in pairs]
        return snapshot(optimizer, params)

    expected = trained()
    with emulated.gpu():
        assert_same_bits(trained(), expected)


@pytest.mark.parametrize("method", METHODS)
def test_the_average_as_an_anchor(method: str) -> None:
    """Both are one stream: what is decayed to is the average before the step."""
    variant = Variant(method, {"anchor": "ema", "ema_decay": 0.75})
    actual, expected = (train_it(variant, dtypes=EVERYTHING) for train_it in (on_gpu, on_cpu))
    check = assert_almost_same if method in REDUCING else assert_same_bits
    check(actual, expected)


@OF_STORAGE
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("method", REDUCING)
def test_sums_of_every_storage(
    method: str, amsgrad: bool, dtypes: list[torch.dtype], options: dict[str, Any]
) -> None:
    """SPD's second touch included, of tensors of one chunk and of several."""
    variant = Variant(method, {"amsgrad": amsgrad, **options}, anchored=method == "spd")
    assert_almost_same(on_gpu(variant, dtypes=dtypes), on_cpu(variant, dtypes=dtypes))


# ---- the whole step ------------------------------------------------------------------------------


def norm_of(params: Sequence[Tensor]) -> float:
    squares = [p.grad.double().pow(2).sum() for p in params if p.grad is not None]
    return torch.stack(squares).sum().sqrt().item()


WHOLE: list[dict[str, Any]] = [{"amsgrad": False}, {"amsgrad": True}]


@pytest.mark.parametrize("options", WHOLE, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_clipping(method: str, options: dict[str, Any]) -> None:
    """The first step is clipped, the third, of small gradients, is not."""

    def trained() -> tuple[dict[str, Tensor], list[float], list[float]]:
        params = [random(*s, seed=i, dtype=d) for d in EVERYTHING for i, s in enumerate(SHAPES)]
        optimizer = Variant(method, options).build(
            params, "native", max_grad_norm=90.0, rounding="kahan", ema_decay=0.75
        )
        norms, found = [], []
        for t in range(3):
            for i, p in enumerate(params):
                g = gradient(p, i, t)
                p.grad = None if g is None else g * 4
            scaled(optimizer, 4.0, 0.0)
            norms.append(norm_of(params) / 4)
            optimizer.step()
            found.append(optimizer.grad_norm.item())
        return snapshot(optimizer, params), norms, found

    with emulated.gpu():
        actual, norms, found = trained()
    assert norms[0] > 90 > norms[2]
    assert found == pytest.approx(norms, rel=1e-12)
    assert_almost_same(actual, trained()[0])


def test_a_norm_that_is_not_finite_clips_to_nan(gpu: Any) -> None:
    """As torch.nn.utils.clip_grad_norm_: nothing hides it."""
    params = model(3)
    optimizer = wd.AdamW(params, lr=0.1, max_grad_norm=1.0, backend="native")
    params[1].grad[3] = torch.nan
    optimizer.step()
    assert optimizer.grad_norm.isnan()
    assert all(p.isnan().all() for p in params)


@pytest.mark.parametrize("cause", ["found_inf", "skip_nonfinite"])
@pytest.mark.parametrize("options", WHOLE, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_a_skipped_step(method: str, options: dict[str, Any], cause: str) -> None:
    """Changes nothing, and the others are what they are without it."""

    def trained(calls: Sequence[int | None]) -> dict[str, Tensor]:
        dtypes = [torch.bfloat16, torch.float32]
        params = [random(*s, seed=i, dtype=d) for d in dtypes for i, s in enumerate(SHAPES)]
        skip_nonfinite = cause == "skip_nonfinite"
        optimizer = Variant(method, options).build(
            params, "native", ema_decay=0.75, telemetry_every=1, skip_nonfinite=skip_nonfinite
        )
        for t in calls:
            skipped = t is None
            for i, p in enumerate(params):
                p.grad = gradient(p, i, 0 if t is None else t)
            if skip_nonfinite and skipped:
                params[0].grad[1, 2] = torch.inf
            if not skip_nonfinite:
                scaled(optimizer, 1.0, float(skipped))
            before = snapshot(optimizer, params)
            optimizer.step()
            _, table, _ = optimizer._run.measured
            assert table.isnan().all() == skipped
            if skip_nonfinite:
                assert optimizer.grad_norm.isfinite() != skipped
            if skipped:
                assert_same_bits(snapshot(optimizer, params), before)
        assert optimizer.skipped_steps == calls.count(None)
        return snapshot(optimizer, params)

    with emulated.gpu():
        assert_same_bits(trained([0, 1, None, 2, None, 3]), trained([0, 1, 2, 3]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "variant",
    [
        *map(Variant, METHODS),
        Variant("decoupled", {"cautious": True, "amsgrad": True, "maximize": True}, True),
        Variant("swd", {"amsgrad": True}, True),
        Variant("spd", {"amsgrad": True, "master_weights": True}, True),
    ],
    ids=str,
)
def test_telemetry(variant: Variant, dtype: torch.dtype) -> None:
    """The CPU's, but for the order of the sums; and the bits of a step that is not measured."""
    if dtype != torch.bfloat16:
        variant.options.pop("master_weights", None)

    def trained(**more: Any) -> tuple[dict[str, Tensor], list[Tensor]]:
        params = [random(*s, seed=i, dtype=dtype) for i, s in enumerate([*SHAPES, (5 * 2048,)])]
        optimizer = variant.build(params, "native", **more)
        tables = []
        for t in range(3):
            train(optimizer, params, range(t, t + 1))
            if optimizer._run.measured:
                tables.append(optimizer._run.measured[1])
        return snapshot(optimizer, params), tables

    whole: dict[str, Any] = {"ema_decay": 0.75, "max_grad_norm": 30.0}
    _, on_cpu = trained(telemetry_every=1, **whole)
    with emulated.gpu():
        actual, tables = trained(telemetry_every=1, **whole)
        assert_same_bits(actual, trained(**whole)[0])
    # A run of the CPU's terms is added in float32.
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for table, of_cpu in zip(tables, on_cpu, strict=True):
        scale = of_cpu.abs().amax(0, keepdim=True).clamp(min=1e-300)
        torch.testing.assert_close(table / scale, of_cpu / scale, rtol=0, atol=tolerance)


@every_edge
@pytest.mark.parametrize("method", METHODS)
def test_edges(method: str, edge: Edge, gpu: Any) -> None:
    for dtype in DTYPES:
        assert_as_at(edge, method, "native", dtype)


def test_lr_of_telemetry_is_read_on_the_device(gpu: Any) -> None:
    optimizer = Captured(wd.AdamW, model(2))
    table = torch.zeros(2, 12, dtype=torch.float64)
    optimizer.lr.fill_(0.375)
    optimizer.step(Request(telemetry=table))
    assert table[:, 7].tolist() == [0.375, 0.375]


@pytest.mark.parametrize("method", METHODS)
def test_without_gradients(method: str, gpu: Any) -> None:
    """There is a norm, and nothing else."""
    params = model(3)
    optimizer = Variant(method).build(
        params, "native", max_grad_norm=1.0, skip_nonfinite=True, telemetry_every=1
    )
    optimizer.step()
    before = snapshot(optimizer, params)
    for p in params:
        p.grad = None
    optimizer.step()
    assert optimizer.grad_norm == 0
    assert optimizer.skipped_steps == 0
    assert_same_bits(snapshot(optimizer, params), before)


@pytest.mark.parametrize("method", METHODS)
def test_parameters_without_elements(method: str) -> None:
    """Their steps are counted, and they have rows of telemetry."""

    def trained() -> tuple[dict[str, Tensor], Tensor]:
        params = [torch.zeros(0, 3), torch.zeros(0)]
        optimizer = Variant(method).build(params, "native", skip_nonfinite=True, telemetry_every=1)
        for _ in range(2):
            for p in params:
                p.grad = torch.zeros_like(p)
            optimizer.step()
        assert optimizer.grad_norm == 0
        return snapshot(optimizer, params), optimizer._run.measured[1]

    expected, table = trained()
    with emulated.gpu():
        actual, on_gpu = trained()
    assert_same_bits(actual, expected)
    assert torch.equal(on_gpu, table)
    assert actual["step 0"] == 2


# What a step asks of the device: kernels, and tables that are cleared.
CALLS: list[tuple[str, dict[str, Any], tuple[int, int]]] = [
    ("decoupled", {}, (1, 0)),
    ("decoupled", {"ema_decay": 0.75, "rounding": "kahan"}, (1, 0)),
    ("swd", {}, (2, 1)),
    ("swd", {"amsgrad": True}, (2, 1)),
    ("spd", {}, (1, 1)),
    ("spd", {"ema_decay": 0.75}, (1, 1)),
    ("decoupled", {"max_grad_norm": 1.0}, (2, 1)),
    ("decoupled", {"skip_nonfinite": True}, (2, 1)),
    ("swd", {"max_grad_norm": 1.0, "skip_nonfinite": True}, (2, 1)),
    ("swd", {"max_grad_norm": 1.0, "amsgrad": True}, (3, 2)),
    ("spd", {"max_grad_norm": 1.0}, (2, 2)),
    ("decoupled", {"telemetry_every": 1}, (2, 0)),
    ("decoupled", {"found_inf": 0.0}, (2, 0)),
]


@pytest.mark.parametrize("dtypes", [[torch.float32], [torch.bfloat16, *DTYPES]], ids=len)
@pytest.mark.parametrize(("method", "options", "expected"), CALLS, ids=str)
def test_launches(
    method: str,
    options: dict[str, Any],
    expected: tuple[int, int],
    dtypes: list[torch.dtype],
    gpu: Any,
) -> None:
    """All types in the same, but that float64 has a kernel of its own for the step."""
    params = [torch.ones(100, dtype=dtype) for dtype in dtypes for _ in range(2)]
    options = dict(options)
    found_inf = options.pop("found_inf", None)
    optimizer = Variant(method, options).build(params, "native")
    counts = []
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        if found_inf is not None:
            scaled(optimizer, 2.0, found_inf)
        counts.append([emulated.calls(x) for x in ("cudaLaunchKernelEx", "cudaMemsetAsync")])
        optimizer.step()
    counts.append([emulated.calls(x) for x in ("cudaLaunchKernelEx", "cudaMemsetAsync")])
    launches, cleared = (after - before for before, after in zip(counts[1], counts[2], strict=True))
    assert (launches - (torch.float64 in dtypes), cleared) == expected


# ---- phases --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtypes", "options"), STORAGE[::3], ids=["random", "kahan", "averaged"])
@pytest.mark.parametrize("asked", [False, True], ids=["plain", "asked"])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_phases_have_the_bits_of_a_step(
    *,
    method: str,
    amsgrad: bool,
    asked: bool,
    dtypes: list[torch.dtype],
    options: dict[str, Any],
    gpu: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So it is with all that a step may be asked for."""
    more: dict[str, Any] = {"max_grad_norm": 40.0, "skip_nonfinite": True, "telemetry_every": 1}

    def trained() -> tuple[dict[str, Tensor], list[Tensor]]:
        params = [random(*s, seed=i, dtype=d) for d in dtypes for i, s in enumerate(SHAPES)]
        variant = Variant(method, {"amsgrad": amsgrad, **options}, anchored=method == "spd")
        optimizer = variant.build(params, "native", **(more if asked else {}))
        tables = []
        for t in range(3):
            if asked:
                scaled(optimizer, 2.0, float(t == 1))
            train(optimizer, params, range(t, t + 1))
            if asked:
                tables += [optimizer._run.measured[1], optimizer.grad_norm.clone()]
        return snapshot(optimizer, params), tables

    expected, tables = trained()
    monkeypatch.setattr(Plan, "step", step_in_phases)
    actual, of_phases = trained()
    assert_same_bits(actual, expected)
    # Telemetry's g^2 is summed before the step here, 16 bytes at a time, and during the step there.
    for table, other in zip(of_phases, tables, strict=True):
        torch.testing.assert_close(table, other, rtol=1e-14, atol=0, equal_nan=True)


class Shard:
    """A plan over a part of a matrix."""

    def __init__(
        self, variant: Variant, w: Tensor, anchor: Tensor, total: int, numbering: Numbering
    ) -> None:
        self.w = w
        self.optimizer = variant.build([w], "eager", [anchor])
        (group,) = self.optimizer.param_groups
        options = from_group(type(self.optimizer)._method, group)
        self.state = self.optimizer.state
        state.complete(w, self.state[w], options, self.optimizer._run.given[w])
        self.groups = self.optimizer.param_groups
        (parameter,) = groups.as_parameters(self.groups, self.state, [options])
        parameter = parameter._replace(total=total, numbering=numbering)
        self.plan = Plan([parameter], [options], self.state, self.groups)
        self.request = Request(
            max_grad_norm=variant.options.get("max_grad_norm", math.inf),
            grad_norm=torch.zeros((), dtype=torch.float64),
            telemetry=torch.zeros(1, len(COLUMNS), dtype=torch.float64),
        )

    def begin(self, g: Tensor) -> Any:
        self.w.grad = g
        return self.plan.begin(self.state, self.groups, self.request)


# Parts of a matrix that has several chunks: rows, columns, a single column. The last one has no
# elements.
_ALL, _NONE = slice(0, None), slice(0)
PARTS = {
    "rows": [(slice(0, 40), _ALL), (slice(40, 67), _ALL), (_NONE, _ALL)],
    "columns": [(_ALL, slice(0, 65)), (_ALL, slice(65, 130)), (_ALL, _NONE)],
    "column": [(_ALL, slice(0, 129)), (_ALL, slice(129, 130)), (_ALL, _NONE)],
}


@pytest.mark.parametrize("parts", PARTS.values(), ids=list(PARTS))
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_shards(method: str, amsgrad: bool, parts: Sequence[Any], gpu: Any) -> None:
    """Parts whose sums are added up between the phases take the step of the whole, with the same
    random bits."""
    clipped = {"max_grad_norm": 30.0} if method in REDUCING else {}
    variant = Variant(
        method, {"amsgrad": amsgrad, "moment_dtype": torch.bfloat16, "seed": 3, **clipped}, True
    )
    whole, anchor = (random(67, 130, seed=i, dtype=torch.bfloat16) for i in (1, 2))

    def numbering(rows: slice, columns: slice) -> Numbering:
        width = len(range(*columns.indices(130)))
        first = (rows.start or 0) * 130 + (columns.start or 0)
        return Numbering(first) if width in (0, 130) else Numbering(first, width, 130)

    def part(x: Tensor, where: Any) -> Tensor:
        return x[where].contiguous().clone()

    one = Shard(variant, whole.clone(), anchor, whole.numel(), Numbering())
    shards = [
        Shard(variant, part(whole, each), part(anchor, each), whole.numel(), numbering(*each))
        for each in parts
    ]
    for t in range(3):
        g = random(67, 130, seed=10 + t, dtype=torch.bfloat16)
        take([one.begin(g)])
        take([shard.begin(part(g, each)) for shard, each in zip(shards, parts, strict=True)])
        for shard in shards:
            for name in ("grad_norm", "telemetry"):
                actual, expected = getattr(shard.request, name), getattr(one.request, name)
                torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-12)
    for shard, each in zip(shards, parts, strict=True):
        for name, x in snapshot(shard.optimizer, [shard.w]).items():
            y = snapshot(one.optimizer, [one.w])[name]
            y = part(y, each) if y.dim() else y
            if method in REDUCING:
                assert_almost_same({name: x}, {name: y})
            else:
                assert_same_bits({name: x}, {name: y})


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


NOTHING = Request()


class Captured:
    """An optimizer's plan with step counts, lr and weight_decay on the device."""

    def __init__(self, kind: type[Any], params: list[Tensor], **options: Any) -> None:
        self.params = params
        self.optimizer = kind(params, lr=0.1, weight_decay=0.2, backend="eager", **options)
        self.lr = torch.tensor(0.1, dtype=torch.float64)
        self.weight_decay = torch.tensor(0.2, dtype=torch.float64)
        (group,) = self.optimizer.param_groups
        group["capturable"] = True
        numbers = {"lr": self.lr, "weight_decay": self.weight_decay}
        plain: GroupOptions = from_group(kind._method, group)
        self.options = plain.replace(lr=0.0, weight_decay=0.0, device_numbers=numbers)
        for p in params:
            state.complete(p, self.optimizer.state[p], plain, None)
        self.plan: Plan | None = None

    def step(self, request: Request = NOTHING) -> None:
        states, param_groups = self.optimizer.state, self.optimizer.param_groups
        if self.plan is None:
            members = groups.as_parameters(param_groups, states, [self.options])
            self.plan = Plan(members, [self.options], states, param_groups)
        with torch.no_grad():
            assert self.plan.step(states, param_groups, request)


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
    options = Captured(wd.AdamW, model()).options
    assert (options.lr, options.weight_decay) == (0.0, 0.0)
    assert (options.read().lr, options.read().weight_decay) == (0.1, 0.2)


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


@pytest.mark.parametrize("counted", [False, True])
def test_a_capture_needs_capturable(counted: bool, gpu: emulated.Machine) -> None:
    """Without it lr and weight_decay would stay as they are, wherever steps are counted."""
    params = model()
    optimizer = wd.AdamW(params, backend="native", skip_nonfinite=counted)
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
