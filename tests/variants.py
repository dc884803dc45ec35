"""The table that the tests expand: every optimizer, every option it has, every backend."""

from __future__ import annotations

import io
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
