"""The table that the tests expand: every optimizer, every option it has, every backend."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from eager import LOUD, Eager
from torch import Tensor
from torch.utils._pytree import tree_map

import wdkernels as wd
from wdkernels import native, schedules

needs_native = pytest.mark.skipif(bool(native._missing), reason=native._missing or "-")
BACKENDS = ["eager", pytest.param("native", marks=needs_native)]

# The wider type that a run is measured against.
WIDE = {
    torch.float32: torch.float64,
    torch.float64: torch.float64,
    torch.complex64: torch.complex128,
    torch.complex128: torch.complex128,
}

_OPTIMIZERS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "l2": (wd.Adam, {}),
    "unmixed": (wd.Adam, {"unmixed": True}),
    "decoupled": (wd.AdamW, {}),
    "swd": (wd.AdamSWD, {}),
    "spd": (wd.AdamSPD, {"anchor": "zero"}),
}
METHODS = list(_OPTIMIZERS)
_PUBLIC = ("lr", "betas", "eps", "weight_decay")


class Variant(NamedTuple):
    """A method and its options, as an optimizer of any backend and as the bare reference."""

    method: str
    options: dict[str, Any] = {}  # noqa: RUF012 - a NamedTuple's default, never written
    anchored: bool = False

    def __str__(self) -> str:
        values = (f"{k}={v}" if not isinstance(v, dict) else k for k, v in self.options.items())
        return "-".join([self.method, *values, *(["anchor"] if self.anchored else [])])

    def build(
        self,
        params: Sequence[Any],
        backend: str,
        anchors: Sequence[Tensor] | None = None,
        **more: Any,
    ) -> Any:
        """The optimizer; `anchors` default to other numbers than the weights."""
        kind, own = _OPTIMIZERS[self.method]
        options = {**{key: LOUD[key] for key in _PUBLIC}, **own, **self.options, **more}
        if self.anchored:
            options["anchor"] = anchors_of(params) if anchors is None else anchors
        return kind(params, backend=backend, **options)

    def reference(self, params: Sequence[Tensor], anchors: Sequence[Tensor] | None = None) -> Any:
        options = dict(self.options)
        if self.anchored:
            options["anchor"] = anchors_of(params) if anchors is None else anchors
        return Eager(self.method, params, **options)


# Products, so that both factors count; everything changes within the few steps of a test.
_SCHEDULE = schedules.product(schedules.late(2), schedules.linear(1.5, 0.5, steps=4))
_COMMON: list[tuple[dict[str, Any], bool]] = [
    ({}, False),
    ({}, True),
    ({"amsgrad": True}, False),
    ({"maximize": True}, True),
    ({"decay_schedule": _SCHEDULE}, False),
    ({"decay_schedule": schedules.cosine(0.0, 2.0, steps=3)}, False),
    ({"decay_schedule": _SCHEDULE, "amsgrad": True, "maximize": True, "betas": (0.0, 0.5)}, True),
]
_DECOUPLED: list[tuple[dict[str, Any], bool]] = [
    ({"cautious": True}, False),
    ({"decay_scale": "relative_lr", "lr_max": 0.4}, False),
    ({"decay_scale": "corrected", "lr_max": 0.4, "cautious": True, "amsgrad": True}, True),
]
PLAIN = [Variant(method) for method in METHODS]
VARIANTS = [Variant(method, *options) for method in METHODS for options in _COMMON]
VARIANTS += [Variant(method, *options) for method in ("decoupled", "swd") for options in _DECOUPLED]

# Every way to store, with types that it is for, all of them in one optimizer.
NARROW = [torch.bfloat16, torch.float16]
STORAGE: list[tuple[list[torch.dtype], dict[str, Any]]] = [
    ([*NARROW, torch.float32, torch.float64], {"seed": 7}),
    ([*NARROW, torch.float64], {"rounding": "nearest", "ema_decay": 0.75}),
    ([*NARROW, torch.float32], {"rounding": "kahan"}),
    ([*NARROW, torch.float32], {"rounding": "kahan", "moment_dtype": torch.bfloat16, "seed": 1}),
    ([*NARROW, torch.float64], {"master_weights": True}),
    (
        [*NARROW, torch.float32],
        {
            "master_weights": True,
            "moment_dtype": torch.bfloat16,
            "ema_decay": schedules.cosine(0.25, 1.0, steps=3),
        },
    ),
    ([*NARROW, torch.float32], {"moment_dtype": torch.bfloat16, "ema_decay": 0.75, "seed": 2}),
]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_method = pytest.mark.parametrize("variant", PLAIN, ids=str)
every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=str)


# ---- edges of a step's numbers -------------------------------------------------------------------


class Edge(NamedTuple):
    """A parameter whose step leaves the usual numbers, beside one with usual ones."""

    w: list[float]
    g: list[float]
    options: dict[str, Any] = {}  # noqa: RUF012 - a NamedTuple's default, never written
    scale: float = 1.0  # of a GradScaler
    told: dict[str, float] = {}  # noqa: RUF012 - some of its telemetry, the same for every method
    beyond: bool = False  # v is inf or 0 in float32, where SWD's kept sum is not


_INF, _NAN = math.inf, math.nan
_OF_UPDATES = ("update_norm", "relative_update", "update_weight_cosine")
_ONE = [1.0, -2.0, 0.5]
# In float32, squares of 3e38 and of 1e-30 are inf and 0.
EDGES = {
    "share 0": Edge(_ONE, [3.0, 4.0, -1.0], {"max_grad_norm": 0.0}, 64.0),
    "huge": Edge(_ONE, [3e38, -3e38, 1.0], beyond=True),
    "huge, scaled": Edge(_ONE, [3e38, -3e38, 1.0], {}, 65536.0, beyond=True),
    "huge, clipped": Edge(_ONE, [3e38, -3e38, 1.0], {"max_grad_norm": 1.0}, beyond=True),
    "almost clipped away": Edge(_ONE, _ONE, {"max_grad_norm": 1e-30}, 64.0, beyond=True),
    "small, scaled": Edge(_ONE, [1e-25, 2e-25, 0.0], {}, 65536.0, beyond=True),
    "zero": Edge(
        *(_ONE, [0.0] * 3, {"max_grad_norm": 1.0}),
        told={"grad_norm": 0.0, "weight_grad_product": 0.0},
    ),
    "scale 0": Edge(_ONE, [0.0] * 3, {}, 0.0),  # to which a GradScaler falls where all is NaN
    "no learning": Edge(
        *(_ONE, _ONE, {"lr": 0.0}),
        told={"update_norm": 0.0, "relative_update": 0.0, "update_weight_cosine": _NAN}
        | {"effective_lr": 0.0, "lr_over_weight_norm2": 0.0, "lr": 0.0},
    ),
    "no weight": Edge(
        *([0.0] * 3, _ONE),
        told={"weight_norm": 0.0, "relative_update": _INF, "update_weight_cosine": _NAN}
        | {"lr_over_weight_norm2": _INF, "weight_grad_product": 0.0},
    ),
    "no weight, no learning": Edge(
        *([0.0] * 3, _ONE, {"lr": 0.0}),
        told={"relative_update": _NAN, "lr_over_weight_norm2": _NAN},
    ),
    "no elements": Edge(
        *([], [], {"max_grad_norm": 1.0}),
        told={"weight_norm": 0.0, "grad_norm": 0.0, "effective_lr": _NAN, "relative_update": _NAN},
    ),
    "0/0": Edge(
        *(_ONE, [1.0, 0.0, 1.0], {"eps": 0.0, "weight_decay": 0.0}),
        told={"effective_lr": _INF, "update_norm": _NAN},
    ),
    "0/0, no learning": Edge(
        *(_ONE, [1.0, 0.0, 1.0], {"eps": 0.0, "weight_decay": 0.0, "lr": 0.0}),
        told={"effective_lr": _NAN, "update_norm": _NAN},
    ),
    **{
        f"{bad}, share {share}": Edge(_ONE, [1.0, bad, 1.0], {"max_grad_norm": share})
        for bad in (_INF, _NAN)
        for share in (0.0, 1.0, None)
    },
}
every_edge = pytest.mark.parametrize("edge", EDGES.values(), ids=list(EDGES))


def step_at(
    edge: Edge, method: str, backend: str, dtype: torch.dtype, device: str = "cpu"
) -> tuple[dict[str, dict[str, float]], dict[str, Tensor]]:
    """A step: what it has told, and weights and states after it."""
    params = [torch.tensor(w, dtype=dtype, device=device) for w in (edge.w, [1.0, 2.0])]
    options = {"telemetry_every": 1, **edge.options}
    optimizer = Variant(method).build(params, backend, **options)
    for p, g in zip(params, (edge.g, [0.5 * edge.scale, -0.5 * edge.scale]), strict=True):
        p.grad = torch.tensor(g, dtype=dtype, device=device)
    optimizer.grad_scale = torch.tensor(edge.scale, device=device)
    optimizer.found_inf = torch.zeros((), device=device)
    optimizer.step()
    return optimizer.telemetry().to_dict(), snapshot(optimizer, params)


def assert_as_at(
    edge: Edge, method: str, backend: str, dtype: torch.dtype, device: str = "cpu"
) -> None:
    """What the edge says, and what the reference says."""
    found, state = step_at(edge, method, backend, dtype, device)
    # Sums in float64, of what has been rounded to dtype.
    rounded = torch.tensor(edge.g, dtype=dtype).double()
    norm = (rounded.norm() / edge.scale).item()
    assert found["0.0"]["grad_norm"] == pytest.approx(norm, rel=1e-14, nan_ok=True)
    for key, value in edge.told.items():
        assert found["0.0"][key] == pytest.approx(value, nan_ok=True), key

    if edge.beyond and method == "swd" and dtype == torch.float32:
        return
    expected, reference = step_at(edge, method, "eager", dtype)
    # About ten roundings of float32, and twenty times as many in SPD's growth of a norm.
    tolerance = 200 * torch.finfo(torch.float32).eps
    for name, row in expected.items():
        for key, value in row.items():
            if 0 < row["update_norm"] < 1e-19 and key in _OF_UPDATES:
                continue  # whose squares are no float32, which the CPU's loops take them in
            close = pytest.approx(value, rel=tolerance, abs=1e-30, nan_ok=True)
            assert found[name][key] == close, (name, key)
    for name, x in state.items():
        torch.testing.assert_close(
            *(x.cpu(), reference[name]), rtol=tolerance, atol=0, equal_nan=True, msg=name
        )


# ---- numbers -------------------------------------------------------------------------------------


def saved(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Through a file, as a checkpoint is read: tensors and plain data only."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The same numbers for every dtype, but for their rounding."""
    wide = torch.complex128 if dtype.is_complex else torch.float64
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=wide)
    return x.to(dtype)


def anchors_of(params: Sequence[Any], seed: int = 500) -> list[Tensor]:
    tensors = [p[1] if isinstance(p, tuple) else p for p in params]
    return [
        random(*p.shape, seed=seed + i, dtype=p.dtype).to(p.device) for i, p in enumerate(tensors)
    ]


def gradient(p: Tensor, i: int, t: int) -> Tensor | None:
    """Parameter i's gradient at step t, rounded to p's dtype.

    It falls from step to step, so that amsgrad's maximum is not v, and does not average to zero.
    One parameter has none at each third step, another none until the third: step counts differ.
    """
    if (i == 2 and t % 3 == 1) or (i == 3 and t < 2):
        return None
    return ((random(*p.shape, seed=1000 * t + i, dtype=p.dtype) + 0.3) * 0.7**t).to(p.dtype)


def train(optimizer: Any, params: Sequence[Tensor], steps: range) -> None:
    for t in steps:
        for i, p in enumerate(params):
            p.grad = gradient(p, i, t)
        optimizer.step()


def snapshot(optimizer: Any, params: Sequence[Tensor]) -> dict[str, Tensor]:
    """All weights and states, copied, by name."""
    found = {f"weight {i}": p.detach().clone() for i, p in enumerate(params)}
    for i, p in enumerate(params):
        for key, value in optimizer.state.get(p, {}).items():
            found[f"{key} {i}"] = value.clone()
    return found


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, x in actual.items():
        y = expected[name]
        assert x.dtype == y.dtype, name
        assert x.shape == y.shape, name
        same = (bits(x) == bits(y)).flatten()
        assert same.all(), f"{name} differs first at element {(~same).nonzero()[0].item()}"


def bits(x: Tensor) -> Tensor:
    x = x.resolve_conj().resolve_neg()
    x = torch.view_as_real(x) if x.is_complex() else x
    return x.contiguous().view(
        {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    )


class Wrapper(Tensor):
    """A tensor without memory of its own, like DTensor."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        def unwrap(x: Any) -> Any:
            return x.inner if isinstance(x, cls) else x

        def wrap(x: Any) -> Any:
            return cls(x) if isinstance(x, Tensor) else x

        args, kwargs = tree_map(unwrap, (args, kwargs or {}))
        return tree_map(wrap, function(*args, **kwargs))
