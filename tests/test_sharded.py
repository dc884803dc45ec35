"""Parameters in shards (DTensors, as FSDP2 and tensor parallelism make them): what 4 processes do
together is what one does alone."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import METHODS, Variant, bits, native_missing, random, sliced
from support.processes import run_processes
from torch import Tensor

import wdkernels as wd

if not dist.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
    init_device_mesh,
)
from torch.distributed.tensor.placement_types import _StridedShard

# Not all of which 4 processes can share evenly; some have no element of (1, 2).
SHAPES = [(5, 3), (4,), (2, 3, 2), (1, 2), (8, 6), ()]
STEPS = 3
LATE, ABSENT = 1, 2  # a parameter without a gradient in step 0, another in step 1
BACKENDS = ["eager", *([] if native_missing else ["native"])]
BEST = BACKENDS[-1]
LOUD: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.2, "eps": 1e-2}


# ---- the processes -------------------------------------------------------------------------------

CHECKS: dict[int, list[Callable[[], None]]] = {2: [], 4: []}


def processes(count: int) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Makes a function a check, which so many processes run together."""

    def add(check: Callable[[], None]) -> Callable[[], None]:
        CHECKS[count].append(check)
        return check

    return add


@pytest.mark.parametrize("count", [2, 4])
def test_processes(count: int, tmp_path: Path) -> None:
    run_processes(count, tmp_path, run_checks, count)


def run_checks(count: int) -> None:
    warnings.simplefilter("error", UserWarning)
    for check in CHECKS[count]:
        if os.environ.get("CHECK") in (None, check.__name__):
            try:
                check()
            except Exception as error:
                raise AssertionError(
                    f"process {dist.get_rank()}, {check.__name__}: {error}"
                ) from error


@cache
def line() -> Any:
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("all",))


@cache
def grid() -> Any:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))


# ---- runs ----------------------------------------------------------------------------------------


def local(x: Any) -> Any:
    return getattr(x, "_local_tensor", x)


Place = Callable[[Tensor, int], Any]  # a tensor, of which parameter


def on(mesh: Callable[[], Any], *placements: Any) -> Place:
    def place(x: Tensor, i: int) -> Any:
        fitting = [p if p.is_replicate() or p.dim < x.dim() else Replicate() for p in placements]
        return distribute_tensor(x, mesh(), fitting, src_data_rank=None)

    return place


def plain(x: Tensor, i: int) -> Any:
    return x.clone()


def several(x: Tensor, i: int) -> Any:
    """Several meshes, and plain tensors between them."""
    kinds = [
        on(line, Shard(0)),
        plain,
        on(grid, Shard(0), Shard(1)),
        on(grid, Replicate(), Shard(0)),
    ]
    return kinds[i % 4](x, i)


def with_holes(x: Tensor, i: int) -> Any:
    shard = on(line, Shard(0))(x, i)
    return DTensor.from_local(
        sliced(shard.to_local()), line(), shard.placements, shape=x.shape, stride=x.stride()
    )


def strided(x: Tensor, i: int) -> Any:
    """As FSDP2 shards what tensor parallelism has sharded."""
    if x.dim() == 0:
        return on(grid, Replicate(), Replicate())(x, i)
    inner = on(lambda: grid()["tp"], Shard(0))(x, i).to_local()
    shard = on(lambda: grid()["dp"], Shard(0))(inner, i).to_local()
    placements = [_StridedShard(0, split_factor=2), Shard(0)]
    return DTensor.from_local(shard, grid(), placements, shape=x.shape, stride=x.stride())


PLACES: dict[str, Place] = {
    "Shard(0)": on(line, Shard(0)),
    "Shard(1)": on(line, Shard(1)),
    "HSDP": on(grid, Replicate(), Shard(0)),
    "2-D": on(grid, Shard(0), Shard(1)),
    "2-D of one dimension": on(grid, Shard(0), Shard(0)),
    "replicated inside": on(grid, Shard(0), Replicate()),
    "strided": strided,
    "several": several,
    "holes": with_holes,
}

# dtype, options, and whether some number of a step is a sum over several tensors.
OPTIONS: list[tuple[torch.dtype, dict[str, Any], bool]] = [
    (torch.float32, {}, False),
    (torch.bfloat16, {"moment_dtype": torch.bfloat16, "amsgrad": True, "seed": 3}, False),
    (torch.bfloat16, {"rounding": "kahan", "max_grad_norm": 0.5}, True),
    (torch.bfloat16, {"master_weights": True, "ema_decay": 0.5, "skip_nonfinite": True}, False),
    (torch.float32, {"max_grad_norm": 0.5, "telemetry_every": 1, "amsgrad": True}, True),
    (torch.float64, {"telemetry_every": 1, "ema_decay": 0.5}, False),
]


def gradient(shape: Sequence[int], i: int, t: int, dtype: torch.dtype) -> Tensor | None:
    if (i, t) in ((LATE, 0), (ABSENT, 1)):
        return None
    return (random(*shape, seed=100 * t + i) + 0.3).to(dtype)


def parameters(dtype: torch.dtype, place: Place, shapes: Sequence[Any] = SHAPES) -> list[Any]:
    return [place(random(*shape, seed=i, dtype=dtype), i) for i, shape in enumerate(shapes)]


def train(optimizer: Any, params: Sequence[Any], place: Place, steps: range) -> None:
    for t in steps:
        for i, p in enumerate(params):
            g = gradient(p.shape, i, t, p.dtype)
            p.grad = None if g is None else place(g, i)
        optimizer.step()


def results(optimizer: Any, params: Sequence[Any]) -> dict[str, Tensor]:
    """All that a run leaves; of DTensors what lies in this process."""
    found = {"skipped": optimizer.skipped_steps}
    if optimizer.grad_norm is not None:
        found["norm"] = optimizer.grad_norm
    for i, p in enumerate(params):
        entries = {"weight": p, **optimizer.state[p]}
        found |= {f"{key} of {i}": local(x).detach().clone() for key, x in entries.items()}
    if optimizer.telemetry_every is not None:
        told = optimizer.telemetry()
        found |= {f"{name} {key}": x for name in told for key, x in told[name].items()}
        found |= {f"total {key}": x for key, x in told.total.items()}
    return found


def run(
    method: str, backend: str, dtype: torch.dtype, options: dict[str, Any], place: Place
) -> dict[str, Tensor]:
    params = parameters(dtype, place)
    anchors = [place(random(*s, seed=10 + i).to(dtype), i) for i, s in enumerate(SHAPES)]
    optimizer = Variant(method, anchored=True).build(params, backend, anchors, **options)
    train(optimizer, params, place, range(STEPS))
    return results(optimizer, params)


_alone: dict[str, dict[str, Tensor]] = {}


def alone(method: str, backend: str, dtype: torch.dtype, options: Any) -> dict[str, Tensor]:
    key = f"{method} {backend} {dtype} {options}"
    if key not in _alone:
        _alone[key] = run(method, backend, dtype, options, plain)
    return _alone[key]


def assert_same(
    actual: dict[str, Tensor],
    expected: dict[str, Tensor],
    where: str,
    place: Place = plain,
    summed: bool = False,
) -> None:
    """The same bits; or, where numbers of a step are sums over processes, as good as these.

    `place`: how what is expected is shared.
    """
    assert actual.keys() == expected.keys(), where
    for name, x in actual.items():
        y = expected[name]
        if " of " in name and y.dim() > 0:
            y = local(place(y, int(name.split(" of ")[1])))
        what = f"{where}: {name}\n{x}\n{y}"
        assert x.dtype == y.dtype, what
        assert x.shape == y.shape, what
        if summed or (x.dim() == 0 and x.dtype == torch.float64):
            tolerance = 1e-12 if x.dtype == torch.float64 else 1e-6
            torch.testing.assert_close(
                x, y, rtol=tolerance, atol=tolerance, equal_nan=True, msg=what
            )
        else:
            assert torch.equal(bits(x), bits(y)), what


def compare(place: str, backend: str) -> None:
    for method in METHODS:
        for dtype, options, summed in OPTIONS:
            actual = run(method, backend, dtype, options, PLACES[place])
            expected = alone(method, backend, dtype, options)
            summed = summed or method in ("swd", "spd")
            where = f"{place} {backend} {method} {options}"
            assert_same(actual, expected, where, PLACES[place], summed)


# ---- what 4 processes do is what one does --------------------------------------------------------


@processes(4)
def native_gives_what_one_process_gives() -> None:
    for place in PLACES:
        compare(place, BEST)


@processes(4)
def eager_gives_what_one_process_gives() -> None:
    for place in ("Shard(0)", "several", "strided"):
        compare(place, "eager")


@processes(4)
def triton_gives_what_one_process_gives() -> None:
    pytest.importorskip("triton")
    for method, (dtype, options, _) in (("swd", OPTIONS[4]), ("spd", OPTIONS[2])):
        actual = run(method, "triton", dtype, options, PLACES["several"])
        assert_same(
            actual, alone(method, "triton", dtype, options), method, PLACES["several"], True
        )


@processes(4)
def channels_last() -> None:
    def memory(x: Tensor) -> Tensor:
        return x.to(memory_format=torch.channels_last)

    def trained(place: Place) -> dict[str, Tensor]:
        params = [place(memory(random(8, 3, 2, 2, seed=0, dtype=torch.bfloat16)), 0)]
        optimizer = wd.AdamW(params, **LOUD, moment_dtype=torch.bfloat16)
        for t in range(STEPS):
            params[0].grad = place(memory(random(8, 3, 2, 2, seed=t + 1, dtype=torch.bfloat16)), 0)
            optimizer.step()
        return results(optimizer, params)

    def cut(x: Tensor, i: int) -> Any:
        local = x.chunk(4)[dist.get_rank()].contiguous(memory_format=torch.channels_last)
        return DTensor.from_local(local, line(), [Shard(0)], shape=x.shape, stride=x.stride())

    assert_same(trained(cut), trained(plain), "channels_last", cut)


# ---- what is communicated ------------------------------------------------------------------------


@contextmanager
def counted() -> Iterator[list[str]]:
    """The collectives of torch.distributed that are called meanwhile."""
    names = ["all_reduce", "all_gather_object", "all_gather", "broadcast"]
    found: list[str] = []
    originals = {name: getattr(dist, name) for name in names}

    def counting(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            found.append(name)
            return originals[name](*args, **kwargs)

        return call

    for name in names:
        setattr(dist, name, counting(name))
    try:
        yield found
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


COLLECTIVES: list[tuple[str, dict[str, Any], int]] = [
    ("decoupled", {}, 0),
    ("decoupled", {"amsgrad": True, "ema_decay": 0.5}, 0),
    ("decoupled", {"max_grad_norm": 1.0}, 1),
    ("decoupled", {"skip_nonfinite": True}, 1),
    ("decoupled", {"telemetry_every": 1}, 1),
    ("decoupled", {"max_grad_norm": 1.0, "telemetry_every": 1}, 2),
    ("swd", {}, 1),
    ("swd", {"max_grad_norm": 1.0}, 1),
    ("swd", {"amsgrad": True}, 1),
    ("swd", {"amsgrad": True, "max_grad_norm": 1.0}, 2),
    ("swd", {"telemetry_every": 1}, 2),
    ("spd", {}, 1),
    ("spd", {"telemetry_every": 1}, 1),
    ("spd", {"max_grad_norm": 1.0}, 2),
]


@processes(4)
def collectives_are_counted() -> None:
    dimensions = {"Shard(0)": 1, "HSDP": 1, "2-D": 2, "replicated inside": 1, "several": 3}
    if native_missing:
        return
    for place, shards in dimensions.items():
        for method, options, expected in COLLECTIVES:
            params = parameters(torch.float32, PLACES[place])
            optimizer = Variant(method).build(params, "native", **options)
            train(optimizer, params, PLACES[place], range(2))
            with counted() as found:
                optimizer.step()
            assert found == ["all_reduce"] * expected * shards, (place, method, options, found)


# ---- gradients and anchors that are placed otherwise ---------------------------------------------


@processes(4)
def gradients_in_other_placements() -> None:
    expected = alone("decoupled", BEST, torch.float32, {})
    for place in ("Shard(0)", "HSDP"):
        params = parameters(torch.float32, PLACES[place])
        anchors = [random(*s, seed=10 + i).float() for i, s in enumerate(SHAPES)]
        optimizer = wd.AdamW(params, **LOUD, backend=BEST, anchor=anchors)
        for t in range(STEPS):
            for i, p in enumerate(params):
                g = gradient(p.shape, i, t, p.dtype)
                if g is None:
                    p.grad = None
                    continue
                other: list[Any] = [Replicate() for _ in p.placements]
                p.grad = distribute_tensor(g, p.device_mesh, other, src_data_rank=None)
                if i == 4:  # a quarter, or half, in each process
                    size = p.device_mesh.size(p.device_mesh.ndim - 1)
                    other[-1] = Partial()
                    p.grad = DTensor.from_local(g / size, p.device_mesh, other)
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                optimizer.step()
            assert any("parameter 4 of group 0" in str(each.message) for each in told), told
        assert_same(results(optimizer, params), expected, place, PLACES[place])


@processes(4)
def gradients_of_other_processes_are_refused() -> None:
    params = parameters(torch.float32, PLACES["Shard(0)"])
    optimizer = wd.AdamW(params, **LOUD, max_grad_norm=1.0)
    train(optimizer, params, PLACES["Shard(0)"], range(1))
    others = [
        random(*SHAPES[0], seed=1).float(),
        on(grid, Shard(0), Replicate())(params[0].full_tensor(), 0),
    ]
    for other in others:
        before = results(optimizer, params)
        for i, p in enumerate(params):
            p.grad = PLACES["Shard(0)"](random(*p.shape, seed=i).float(), i)
        params[0]._grad = None
        params[0].grad = None
        try:
            params[0].grad = other
        except RuntimeError:
            continue  # torch refuses it
        with pytest.raises(RuntimeError, match="parameter 0 of group 0"):
            optimizer.step()
        assert_same(results(optimizer, params), before, "refused")


@processes(4)
def anchors_of_any_placement() -> None:
    full = [random(*s, seed=10 + i).float() for i, s in enumerate(SHAPES)]
    expected = alone("decoupled", BEST, torch.float32, {})
    for name in ("Shard(0)", "2-D", "strided", "several"):
        place = PLACES[name]
        for anchors in (full, [on(line, Replicate())(a, i) for i, a in enumerate(full)]):
            params = parameters(torch.float32, place)
            given = [
                a if isinstance(p, DTensor) else f
                for a, p, f in zip(anchors, params, full, strict=True)
            ]
            if name == "strided" and anchors is not full:
                continue
            optimizer = wd.AdamW(params, **LOUD, backend=BEST, anchor=given)
            train(optimizer, params, place, range(STEPS))
            assert_same(results(optimizer, params), expected, name, place)


@processes(4)
def partial_parameters_are_refused() -> None:
    p = DTensor.from_local(torch.ones(4), line(), [Partial()])
    p.grad = p.clone()
    with pytest.raises(ValueError, match=r"parameter 0 of group 0.*partial"):
        wd.AdamW([p]).step()


@processes(4)
def a_mesh_of_one_process_communicates_nothing() -> None:
    groups = [dist.new_group([rank]) for rank in range(4)]
    mesh = dist.DeviceMesh.from_group(groups[dist.get_rank()], "cpu")

    def place(x: Tensor, i: int) -> Any:
        return distribute_tensor(
            x, mesh, [Shard(0) if x.dim() else Replicate()], src_data_rank=None
        )

    for method in ("swd", "spd"):
        with counted() as found:
            actual = run(method, BEST, *OPTIONS[4][:2], place)
        assert not found, found
        assert_same(actual, alone(method, BEST, *OPTIONS[4][:2]), method, place)


# ---- one process fails ---------------------------------------------------------------------------


def _wrong_shape(optimizer: Any, p: Any) -> None:
    p.grad._local_tensor = torch.ones(7, 7)


def _wrong_dtype(optimizer: Any, p: Any) -> None:
    p.grad._local_tensor = p.grad._local_tensor.double()


def _sparse(optimizer: Any, p: Any) -> None:
    p.grad._local_tensor = p.grad._local_tensor.to_sparse()


def _freed(optimizer: Any, p: Any) -> None:
    p.grad._local_tensor.untyped_storage().resize_(0)


def _missing(optimizer: Any, p: Any) -> None:
    p.grad = None


def _damaged(optimizer: Any, p: Any) -> None:
    optimizer.state[p]["step"] = torch.tensor(-1.0)


def _no_sum(optimizer: Any, p: Any) -> None:
    optimizer.state[p].pop("exp_avg_sq_sum", None)


FAILURES: dict[str, Callable[[Any, Any], None]] = {
    "shape": _wrong_shape,
    "dtype": _wrong_dtype,
    "sparse": _sparse,
    "freed": _freed,
    "missing": _missing,
    "state": _damaged,
    "no sum": _no_sum,
}


def _failure(
    kind: str, method: str, options: dict[str, Any], backend: str, place: Place, first: bool
) -> None:
    where = f"{kind} {method} {options} {backend} first={first}"
    params = parameters(torch.float32, place)
    twins = parameters(torch.float32, place)
    optimizer, twin = (Variant(method).build(x, backend, **options) for x in (params, twins))
    steps = 0 if first else 2
    train(twin, twins, place, range(steps + 3))
    train(optimizer, params, place, range(steps))
    before = results(optimizer, params)
    for i, p in enumerate(params):
        g = gradient(p.shape, i, steps, p.dtype)
        p.grad = None if g is None else place(g, i)
    communicates = "max_grad_norm" in options or method in ("swd", "spd")
    state = dict(optimizer.state.get(params[4], {}))
    if dist.get_rank() == 1:
        FAILURES[kind](optimizer, params[4])
    if not communicates:
        if dist.get_rank() == 1:
            with pytest.raises((RuntimeError, ValueError), match="parameter 4 of group 0"):
                optimizer.step()
        else:
            optimizer.step()
    else:
        with pytest.raises((RuntimeError, ValueError), match="parameter 4 of group 0"):
            optimizer.step()
    if dist.get_rank() == 1 and state:
        optimizer.state[params[4]].update(state)
    before_update = "max_grad_norm" in options or method == "swd"
    if before_update:
        if not first:
            assert_same(results(optimizer, params), before, where)
        train(optimizer, params, place, range(steps, steps + 3))
        assert_same(results(optimizer, params), results(twin, twins), where)


@processes(4)
def one_process_fails_before_others_write() -> None:
    for method, options in (("swd", {}), ("spd", {"max_grad_norm": 0.5})):
        for backend in BACKENDS:
            for kind in FAILURES:
                for first in (True, False):
                    if kind in ("state", "no sum") and (first or method != "swd"):
                        continue
                    place = PLACES["2-D" if first else "Shard(0)"]
                    _failure(kind, method, options, backend, place, first)


@processes(4)
def one_process_fails_where_others_have_written() -> None:
    for kind in ("sparse", "missing"):
        _failure(kind, "spd", {}, BEST, PLACES["Shard(0)"], False)


@processes(4)
def one_process_fails_and_nobody_waits() -> None:
    for kind in ("sparse", "shape", "freed", "state"):
        _failure(kind, "decoupled", {}, BEST, PLACES["Shard(0)"], False)


# ---- GradScaler ----------------------------------------------------------------------------------


@processes(4)
def an_overflow_in_one_process_skips_the_step_in_all() -> None:
    for place in (PLACES["Shard(0)"], PLACES["2-D"]):
        params = parameters(torch.float32, place)
        optimizer = wd.AdamSPD(params, anchor="zero", backend=BEST)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        train(optimizer, params, place, range(2))
        before = results(optimizer, params)
        scaler.scale(torch.ones(()))
        for i, p in enumerate(params):
            p.grad = place(4 * random(*p.shape, seed=i).float(), i)
        if dist.get_rank() == 3:
            params[4].grad.to_local()[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 2
        after = results(optimizer, params)
        assert after.pop("skipped") == 1
        before.pop("skipped")
        assert_same(after, before, "skipped")


# ---- processes that hide what they hold ----------------------------------------------------------

HIDDEN: list[tuple[str, dict[str, Any]]] = [
    ("decoupled", {"max_grad_norm": 0.5}),
    ("l2", {"skip_nonfinite": True}),
    ("swd", {}),
    ("swd", {"max_grad_norm": 0.5, "telemetry_every": 1}),
    ("swd", {"amsgrad": True}),
    ("swd", {"amsgrad": True, "max_grad_norm": 0.5}),
]


@processes(2)
def plain_tensors_with_a_process_group() -> None:
    world, rank = dist.group.WORLD, dist.get_rank()
    for backend in (*BACKENDS, "triton"):
        for method, options in HIDDEN:
            if backend == "triton" and len(options) != 2:
                continue
            params = parameters(torch.float32, plain)
            twins = parameters(torch.float32, plain)
            own = range(rank, len(params), 2)
            hiding = Variant(method).build(
                [params[i] for i in own], backend, process_group=world, **options
            )
            twin = Variant(method).build(twins, backend, **options)
            for t in range(STEPS):
                for i, (p, q) in enumerate(zip(params, twins, strict=True)):
                    p.grad, q.grad = (gradient(p.shape, i, t, p.dtype) for _ in range(2))
                with counted() as found:
                    hiding.step()
                twin.step()
            rounds = 2 if options.get("amsgrad") and (backend == "eager" or len(options) > 1) else 1
            assert found == ["all_reduce"] * rounds, (backend, method, options, found)
            where = f"{backend} {method} {options}"
            if twin.grad_norm is not None:
                torch.testing.assert_close(hiding.grad_norm, twin.grad_norm, rtol=1e-12, atol=0)
            for i in own:
                torch.testing.assert_close(params[i], twins[i], rtol=1e-6, atol=1e-6, msg=where)


@processes(2)
def a_process_group_tells_of_failures() -> None:
    p = random(3, seed=dist.get_rank()).float()
    optimizer = wd.AdamSWD([p], **LOUD, process_group=dist.group.WORLD)
    p.grad = torch.ones(3)
    optimizer.step()
    before = results(optimizer, [p])
    p.grad = torch.ones(3).to_sparse() if dist.get_rank() else torch.ones(3)
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0 is sparse"):
        optimizer.step()
    assert_same(results(optimizer, [p]), before, "nothing is written")
    p.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(RuntimeError, match="process_group"):
        copy.deepcopy(optimizer)
    with pytest.raises(ValueError, match="process_group"):
        wd.AdamW([p], process_group="world")
    shard = on(line, Shard(0))(p, 0)
    shard.grad = shard.clone()
    with pytest.raises(ValueError, match="process_group"):
        wd.AdamW([shard], process_group=dist.group.WORLD).step()


def _models() -> tuple[torch.nn.Module, torch.nn.Module]:
    def model() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))

    return model(), model()


@processes(2)
def zero_redundancy_optimizer() -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    options: dict[str, Any] = {**LOUD, "max_grad_norm": 0.1}
    for kind in (wd.AdamSWD, wd.AdamW):
        model, twin = _models()
        hiding = ZeroRedundancyOptimizer(
            model.parameters(),
            partial(kind, process_group=dist.group.WORLD),
            **options,
        )
        whole = kind(twin.parameters(), **options)
        for t in range(STEPS):
            for each, optimizer in ((model, hiding), (twin, whole)):
                optimizer.zero_grad()
                each(random(5, 6, seed=t).float()).square().sum().backward()
                optimizer.step()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(hiding.optim.grad_norm, whole.grad_norm, rtol=1e-6, atol=0)


@processes(2)
def fully_sharded_data_parallel() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    options: dict[str, Any] = {**LOUD, "max_grad_norm": 0.1}
    for kind in (wd.AdamSWD, wd.AdamW):
        model, twin = _models()
        hiding = FullyShardedDataParallel(
            model, use_orig_params=True, device_id=torch.device("cpu")
        )
        optimizers = [
            kind(hiding.parameters(), **options, process_group=dist.group.WORLD),
            kind(twin.parameters(), **options),
        ]
        for t in range(STEPS):
            for each, optimizer in zip((hiding, twin), optimizers, strict=True):
                optimizer.zero_grad()
                each(random(5, 6, seed=t).float()).square().sum().backward()
                optimizer.step()
        with FullyShardedDataParallel.summon_full_params(hiding):
            for p, q in zip(hiding.parameters(), twin.parameters(), strict=True):
                torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)
        norms = [optimizer.grad_norm for optimizer in optimizers]
        torch.testing.assert_close(*norms, rtol=1e-5, atol=0)
