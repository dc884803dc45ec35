"""On a GPU: both backends there, against the float64 reference, the CPU and each other."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from support import (
    METHODS,
    NARROW,
    STORAGE,
    VARIANTS,
    WIDE,
    Variant,
    assert_same_bits,
    gradient,
    random,
    snapshot,
)
from support.phases import step_in_phases
from torch import Tensor

import wdkernels as wd
from wdkernels import native, triton_backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning"),
]

MODULES = {"native": native, "triton": triton_backend}
REDUCING = ("swd", "spd")
SHAPES = [(3, 5), (), (1000,), (4, 3, 8, 8), (0, 3), (3 * 16384 + 5,)]
DTYPES = [torch.float32, torch.float64, torch.complex64]


@pytest.fixture(params=MODULES)
def backend(request: pytest.FixtureRequest) -> str:
    refusal = MODULES[request.param].refuses([torch.zeros(1, device="cuda")])
    if refusal:
        pytest.skip(f"{request.param}: {refusal}")
    return str(request.param)


@pytest.fixture
def never_waits() -> Iterator[None]:
    """An operation that makes the host wait for the device is an error."""
    yield
    torch.cuda.set_sync_debug_mode("default")


def layouts_of(x: Tensor) -> Iterator[Tensor]:
    """The same numbers: contiguous, in another order, and with gaps."""
    yield x.clone()
    yield x.clone(memory_format=torch.channels_last) if x.dim() == 4 else x.mT.contiguous().mT
    yield torch.stack([x, x], -1)[..., 0]


def run(
    build: Callable[[list[Tensor]], Any],
    dtypes: Sequence[torch.dtype],
    device: str = "cuda",
    computed: dict[torch.dtype, torch.dtype] | None = None,
    steps: int = 4,
) -> dict[str, Tensor]:
    """Every shape in every dtype and layout, in one optimizer; results on the CPU."""
    params = []
    for dtype in dtypes:
        for i, shape in enumerate(SHAPES):
            x = random(*shape, seed=i, dtype=dtype).to((computed or {}).get(dtype, dtype))
            x = x.to(device)  # first: it would be dense afterwards
            params += [*layouts_of(x)] if x.dim() > 1 else [x]
    optimizer = build(params)
    for t in range(steps):
        for i, p in enumerate(params):
            narrow = {wide: d for d, wide in (computed or {}).items()}.get(p.dtype, p.dtype)
            g = gradient(p.cpu().to(narrow), i, t)
            p.grad = None if g is None else g.to(p.device, p.dtype)
        optimizer.step()
    return {name: x.cpu() for name, x in snapshot(optimizer, params).items()}


@cache
def exact(index: int, dtype: torch.dtype, computed: torch.dtype) -> dict[str, Tensor]:
    reference = VARIANTS[index].reference
    return run(reference, [dtype], device="cpu", computed={dtype: computed})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index", range(len(VARIANTS)), ids=map(str, VARIANTS))
def test_is_the_reference(index: int, dtype: torch.dtype, backend: str) -> None:
    """Errs at most twice as much as the formulas in the same dtype; see test_optimizers.py."""
    actual = run(lambda params: VARIANTS[index].build(params, backend), [dtype])
    wide, plain = exact(index, dtype, WIDE[dtype]), exact(index, dtype, dtype)
    for kind in {name.split()[0] for name in wide}:
        names = [name for name in wide if name.split()[0] == kind and wide[name].numel() > 0]
        scale = max(wide[name].abs().max().item() for name in names)
        own = max((plain[k].to(wide[k].dtype) - wide[k]).abs().max().item() for k in names)
        ulp = torch.finfo(dtype).eps * scale
        tolerance = 1e-12 * scale if dtype == WIDE[dtype] else max(2 * own, 4 * ulp)
        for name in names:
            off = (actual[name].to(wide[name].dtype) - wide[name]).abs().max().item()
            assert off <= tolerance, f"{name} is off by {off}, more than {tolerance}"


@pytest.mark.parametrize("index", range(len(VARIANTS)), ids=map(str, VARIANTS))
def test_bits_are_those_of_the_cpu(index: int, backend: str) -> None:
    if VARIANTS[index].method in REDUCING:
        pytest.skip("sums are added in another order")
    actual = run(lambda params: VARIANTS[index].build(params, backend), DTYPES)
    expected = run(lambda params: VARIANTS[index].build(params, "native"), DTYPES, device="cpu")
    assert_same_bits(actual, expected)


@pytest.mark.parametrize(("dtypes", "options"), STORAGE, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_every_storage(
    method: str, dtypes: Sequence[torch.dtype], options: dict[str, Any], backend: str
) -> None:
    """The CPU's bits, but for what follows from the order of sums."""
    variant = Variant(method, options, anchored=method in ("unmixed", "spd"))
    actual = run(lambda params: variant.build(params, backend), dtypes)
    expected = run(lambda params: variant.build(params, "native"), dtypes, device="cpu")
    if method in REDUCING:
        assert_almost_same(actual, expected)
    else:
        assert_same_bits(actual, expected)


def assert_almost_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, x in actual.items():
        y = expected[name]
        scale = y.abs().max().item() if x.numel() else 0.0
        eps = 1e-12 if x.dtype == torch.float64 else 2 * torch.finfo(x.dtype).eps
        torch.testing.assert_close(x, y, rtol=0, atol=eps * scale, msg=name)
        if x.dtype in NARROW:
            assert (x != y).sum() <= 0.005 * x.numel(), name


# The whole step: what a GradScaler hands over, clipping, skipping, an average, telemetry.
CALLS = [0.0, 0.0, 1.0, 0.0, 1.0, 0.0]  # found_inf
WHOLE: dict[str, Any] = {
    "max_grad_norm": 0.5,
    "skip_nonfinite": True,
    "telemetry_every": 1,
    "ema_decay": 0.75,
    "rounding": "kahan",
}


def model(device: str, dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    return [random(n, seed=n, dtype=d).to(device) for d in dtypes for n in (3000, 100_000, 7)]


def prepare(params: Sequence[Tensor], t: int) -> None:
    """Gradients, twice too large; where they are, if they are there."""
    for i, p in enumerate(params):
        g = (2 * random(p.numel(), seed=50 * t + i, dtype=p.dtype)).to(p.device)
        p.grad = g if p.grad is None else p.grad.copy_(g)


def whole_steps(method: str, chosen: str, device: str) -> tuple[dict[str, Tensor], list[Tensor]]:
    params = model(device, [torch.bfloat16, torch.float32, torch.float64])
    optimizer = Variant(method).build(params, chosen, **WHOLE)
    optimizer.grad_scale = torch.tensor(2.0, device=device)
    measured = []
    for t, found_inf in enumerate(CALLS):
        prepare(params, t)
        optimizer.found_inf = torch.tensor(found_inf, device=device)
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error" if t > 1 else "default")
        optimizer.step()
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        measured += [
            optimizer._run.measured[1],
            optimizer.grad_norm,
            optimizer.skipped_steps.double(),
        ]
        measured[-1] = measured[-1].clone()
    return snapshot(optimizer, params), measured


@pytest.mark.parametrize("method", METHODS)
def test_the_whole_step(method: str, backend: str, never_waits: None) -> None:
    actual, measured = whole_steps(method, backend, "cuda")
    expected, of_cpu = whole_steps(method, "native", "cpu")
    assert_almost_same({name: x.cpu() for name, x in actual.items()}, expected)
    assert measured[-1] == sum(CALLS)
    for x, y in zip(measured, of_cpu, strict=True):
        scale = y.abs().amax(0).clamp(min=1e-300)
        torch.testing.assert_close(x.cpu() / scale, y / scale, rtol=0, atol=2e-6)


@pytest.mark.parametrize("method", METHODS)
def test_phases_have_the_bits_of_a_step(
    method: str, backend: str, monkeypatch: pytest.MonkeyPatch, never_waits: None
) -> None:
    expected, told = whole_steps(method, backend, "cuda")
    monkeypatch.setattr(MODULES[backend].Plan, "step", step_in_phases)
    actual, of_phases = whole_steps(method, backend, "cuda")
    assert_same_bits(actual, expected)
    for x, y in zip(of_phases, told, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-14, atol=0, equal_nan=True)


@pytest.mark.parametrize("method", METHODS)
def test_a_graph_of_the_whole_step(method: str, backend: str) -> None:
    """A replay skips what a step outside would skip."""
    runs = []
    for captured in (True, False):
        params = model("cuda", [torch.bfloat16, torch.float32])
        optimizer = Variant(method).build(params, backend, capturable=True, **WHOLE)
        optimizer.grad_scale = torch.tensor(2.0, device="cuda")
        optimizer.found_inf = torch.zeros((), device="cuda")
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for t in range(2):
                prepare(params, t)
                optimizer.step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(graph):
                optimizer.step()
        for t in range(2, len(CALLS)):
            prepare(params, t)
            optimizer.found_inf.fill_(CALLS[t])
            if captured:
                graph.replay()
            else:
                optimizer.step()
        torch.cuda.synchronize()
        runs.append(snapshot(optimizer, params))
        assert optimizer.skipped_steps == sum(CALLS)
        assert optimizer.state[params[0]]["step"] == len(CALLS) - sum(CALLS)
    assert_same_bits(*runs)


def test_a_grad_scaler(backend: str) -> None:
    """That finds an overflow: the step is skipped, the scale halved."""
    w = torch.ones(1000, device="cuda", dtype=torch.float16)
    optimizer = wd.AdamW([w], lr=0.1, backend=backend)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    for gradient_of_w in (1.0, float("inf"), 1.0):
        loss = scaler.scale(torch.zeros((), device="cuda"))  # for the scaler to begin
        w.grad = torch.full_like(w, gradient_of_w) * (loss * 0 + 1).half()
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.skipped_steps == 1
    assert optimizer.state[w]["step"] == 2
    assert scaler.get_scale() == 512.0


@pytest.mark.parametrize("method", REDUCING)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_large_sums(method: str, amsgrad: bool, backend: str) -> None:
    """Tensors of many chunks, in several batches. The same bits in two runs, and the CPU's but for
    the last bit of the decay."""
    variant = Variant(method, {"amsgrad": amsgrad}, anchored=True)
    sizes = [5_000_000, 1 << 20, 100, 3_000_000, 1 << 21, 40_000]
    runs = []
    for device, chosen in (("cuda", backend), ("cuda", backend), ("cpu", "native")):
        params = [random(n, seed=n, dtype=torch.float32).to(device) for n in sizes]
        optimizer = variant.build(params, chosen)
        for t in range(3):
            for i, p in enumerate(params):
                p.grad = random(p.numel(), seed=10 * t + i, dtype=torch.float32).to(device)
            optimizer.step()
        runs.append({name: x.cpu() for name, x in snapshot(optimizer, params).items()})
    assert_same_bits(runs[0], runs[1])
    for name, x in runs[0].items():
        scale = runs[2][name].abs().max().item()
        torch.testing.assert_close(x, runs[2][name], rtol=0, atol=2.0**-22 * scale, msg=name)


@pytest.mark.parametrize("method", METHODS)
def test_never_waits_for_the_device(method: str, backend: str, never_waits: None) -> None:
    params = [torch.randn(1000, device="cuda") for _ in range(3)]
    optimizer = Variant(method).build(params, backend)
    for t in range(4):
        for p in params:
            p.grad = torch.randn_like(p)
        torch.cuda.set_sync_debug_mode("error" if t else "default")
        optimizer.step()


def capturable(method: str, params: list[Tensor], backend: str) -> Any:
    lr, decay = (torch.tensor(x, device="cuda") for x in (0.1, 0.2))
    return Variant(method).build(params, backend, lr=lr, weight_decay=decay, capturable=True)


@pytest.mark.parametrize("method", METHODS)
def test_a_graph_follows_lr_and_decay(method: str, backend: str) -> None:
    shapes = [(7, 9), (40_000,), ()]
    make = [random(*s, seed=i, dtype=torch.float64) for i, s in enumerate(shapes)]
    grads = [[random(*s, seed=50 * t + i, dtype=torch.float64) for i, s in enumerate(shapes)]
             for t in range(8)]  # fmt: skip
    schedule = [(0.1 / (t + 1), 0.3 * t) for t in range(8)]

    params = [w.clone().cuda() for w in make]
    for p in params:
        p.grad = torch.empty_like(p)
    optimizer = capturable(method, params, backend)
    (group,) = optimizer.param_groups

    def prepare(t: int) -> None:
        group["lr"].fill_(schedule[t][0])
        group["weight_decay"].fill_(schedule[t][1])
        for p, g in zip(params, grads[t], strict=True):
            p.grad.copy_(g)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for t in range(3):
            prepare(t)
            optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for t in range(3, 8):
        prepare(t)
        graph.replay()

    plain = [w.clone() for w in make]
    expected = Variant(method).build(plain, "native")
    for t in range(8):
        expected.param_groups[0].update(lr=schedule[t][0], weight_decay=schedule[t][1])
        for p, g in zip(plain, grads[t], strict=True):
            p.grad = g
        expected.step()
    # lr stands on the device in float32
    actual = {name: x.cpu() for name, x in snapshot(optimizer, params).items()}
    for name, x in snapshot(expected, plain).items():
        scale = x.abs().max().item()
        torch.testing.assert_close(
            actual[name].to(x.dtype), x, rtol=0, atol=1e-6 * scale + 1e-12, msg=name
        )


@pytest.mark.parametrize("method", METHODS)
def test_steps_on_two_streams(method: str, backend: str) -> None:
    """Each step waits for the one before, by events only: nothing else orders the streams."""

    def train(streams: list[torch.cuda.Stream]) -> dict[str, Tensor]:
        params = [random(200_000, seed=i, dtype=torch.float32).cuda() for i in range(4)]
        optimizer = Variant(method).build(params, backend)
        last = torch.cuda.current_stream()
        for t in range(6):
            stream = streams[t % len(streams)]
            stream.wait_stream(last)
            with torch.cuda.stream(stream):
                for i, p in enumerate(params):
                    p.grad = random(200_000, seed=10 * t + i, dtype=torch.float32).cuda()
                optimizer.step()
                torch.empty(1 << 22, device="cuda").fill_(float("nan"))  # over freed tables, if any
            last = stream
        torch.cuda.synchronize()
        return snapshot(optimizer, params)

    assert_same_bits(
        train([torch.cuda.Stream(), torch.cuda.Stream()]), train([torch.cuda.Stream()])
    )


def test_the_host_runs_ahead(backend: str) -> None:
    """Many steps are queued while the device is busy: each has numbers and addresses of its own."""

    def train(busy: bool) -> dict[str, Tensor]:
        params = [random(3000, seed=i, dtype=torch.float32).cuda() for i in range(3)]
        grads = [[torch.full_like(p, 0.1 * t + 0.3) for p in params] for t in range(20)]
        optimizer = wd.AdamW(params, lr=0.1, weight_decay=0.2, backend=backend)
        torch.cuda.synchronize()
        if busy:
            torch.cuda._sleep(200_000_000)
        for t in range(20):
            optimizer.param_groups[0]["lr"] = 0.1 / (t + 1)
            for p, g in zip(params, grads[t], strict=True):
                p.grad = g
            optimizer.step()
        return snapshot(optimizer, params)

    assert_same_bits(train(True), train(False))


def test_stale_addresses(backend: str) -> None:
    """Memory is given back and out again between steps; the plan must look at every tensor."""
    runs = []
    for disturbed in (False, True):
        params = [random(5000, seed=i, dtype=torch.float32).cuda() for i in range(3)]
        optimizer = wd.AdamW(params, lr=0.1, weight_decay=0.2, backend=backend)
        for t in range(5):
            for i, p in enumerate(params):
                p.grad = random(5000, seed=10 * t + i, dtype=torch.float32).cuda()
            if disturbed and t == 2:
                params[0].data = params[0].data.clone()
                state = optimizer.state[params[1]]
                state["exp_avg"] = state["exp_avg"].clone()
                optimizer.load_state_dict(optimizer.state_dict())
                gc.collect()
                torch.cuda.empty_cache()
                torch.empty(1 << 20, device="cuda").fill_(float("nan"))
            optimizer.step()
        runs.append(snapshot(optimizer, params))
    assert_same_bits(*runs)


def test_more_than_two_to_the_31_elements() -> None:
    """64-bit offsets: the last element is updated as the first is. One backend after the other, as
    each needs 32 GiB."""
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 48 << 30:
        pytest.skip("needs 48 GiB of memory")
    for backend, module in MODULES.items():
        if module.refuses([torch.zeros(1, device="cuda")]):
            continue
        w = torch.ones((1 << 31) + 10, device="cuda")
        w.grad = torch.ones_like(w)
        wd.AdamW([w], lr=0.1, weight_decay=0.2, backend=backend).step()
        first, last = w[0].item(), w[-1].item()
        assert first == last != 1
        assert (w[:: 1 << 20] == first).all()
        assert (w[-50:] == first).all()
        del w
        gc.collect()
        torch.cuda.empty_cache()


def test_eager_formulas_read_lr_from_the_device() -> None:
    w = torch.ones(3, device="cuda")
    w.grad = torch.ones_like(w)
    lr = torch.tensor(0.125, device="cuda")
    wd.AdamW([w], lr=lr, weight_decay=0.0, capturable=True, backend="eager").step()
    torch.testing.assert_close(w, torch.full_like(w, 0.875))


def test_lr_on_the_device_needs_capturable(backend: str) -> None:
    w = torch.ones(3, device="cuda")
    with pytest.raises(ValueError, match="lr is a tensor on cuda:0"):
        wd.AdamW([w], lr=torch.tensor(0.1, device="cuda"), backend=backend)


@pytest.mark.parametrize("index", [0, 1])
def test_the_device_of_the_tensors_counts(index: int, backend: str) -> None:
    """Whatever the current one is."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    w = torch.ones(1000, device=f"cuda:{index}")
    w.grad = torch.ones_like(w)
    with torch.cuda.device(1 - index):
        wd.AdamW([w], lr=0.1, backend=backend).step()
        assert torch.cuda.current_device() == 1 - index
    assert (w != 1).all()


def test_a_tensor_on_another_device(backend: str) -> None:
    w = torch.ones(3, device="cuda")
    with pytest.raises(ValueError, match="device"):
        wd.AdamW([w], anchor=[torch.ones(3)], backend=backend)
    optimizer = wd.AdamW([w], backend=backend)
    w.grad = torch.ones(3, device="cuda")
    optimizer.step()
    optimizer.state[w]["exp_avg"] = torch.zeros(3)
    before = w.clone()
    with pytest.raises(RuntimeError, match="exp_avg of parameter 0 of group 0 has device cpu"):
        optimizer.step()
    assert torch.equal(w, before)
