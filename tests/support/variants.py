"""The table that the tests expand: every optimizer, every option it has, every backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import wdkernels as wd
from support.internals import Eager, native_missing
from support.numbers import LOUD, anchors_of
from wdkernels import schedules

needs_native = pytest.mark.skipif(bool(native_missing), reason=native_missing or "-")
BACKENDS = ["eager", pytest.param("native", marks=needs_native)]
REFERENCE = "reference"  # the formulas alone, without an optimizer around them

_OPTIMIZERS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "l2": (wd.Adam, {}),
    "unmixed": (wd.Adam, {"unmixed": True}),
    "decoupled": (wd.AdamW, {}),
    "swd": (wd.AdamSWD, {}),
    "spd": (wd.AdamSPD, {"anchor": "zero"}),
}
METHODS = list(_OPTIMIZERS)
TORCH: dict[str, Any] = {"l2": torch.optim.Adam, "decoupled": torch.optim.AdamW}
# What torch's optimizers take as well.
USUAL: dict[str, Any] = {key: LOUD[key] for key in ("lr", "betas", "eps", "weight_decay")}


class Variant(NamedTuple):
    """A method and its options, as an optimizer of any backend or as the bare reference."""

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
        options = {**self.options, **more}
        if self.anchored:
            options["anchor"] = anchors_of(params) if anchors is None else anchors
        if backend == REFERENCE:
            return Eager(self.method, params, **options)
        kind, own = _OPTIMIZERS[self.method]
        return kind(params, backend=backend, **{**USUAL, **own, **options})

    def reference(self, params: Sequence[Any], anchors: Sequence[Tensor] | None = None) -> Any:
        return self.build(params, REFERENCE, anchors)


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
    ({"decay_schedule": schedules.inverse(offset=3)}, True),
    ({"anchor": "ema", "ema_decay": 0.75}, False),
]
_DECOUPLED: list[tuple[dict[str, Any], bool]] = [
    ({"cautious": True}, False),
    ({"decay_scale": "relative_lr", "lr_max": 0.4}, False),
    ({"decay_scale": "corrected", "lr_max": 0.4, "cautious": True, "amsgrad": True}, True),
    ({"decay_scale": "independent"}, False),
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
every_solver = pytest.mark.parametrize("backend", [REFERENCE, *BACKENDS])
every_method = pytest.mark.parametrize("variant", PLAIN, ids=str)
every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=str)
# For tests that choose the average themselves, or whose weights are stored otherwise than those
# they are compared with: an average follows what is stored, and so does a decay towards it.
every_variant_without_average = pytest.mark.parametrize(
    "variant", [each for each in VARIANTS if each.options.get("anchor") != "ema"], ids=str
)
