"""Records checkpoints of a release, for the later ones to load: tests/test_checkpoints.py.

    PYTHONPATH=CHECKOUT python tests/data/make_checkpoints.py \
        tests/data/checkpoints_NAME.pt.gz eager native

Each run takes some steps, is saved, and goes on; the weights at the save and at the end, for each
backend, are recorded. Numbers are multiples of 1/8, the same in every type and with every torch.
"""

from __future__ import annotations

import gzip
import io
import sys
from typing import Any

import torch
from torch import Tensor

import wdkernels as wd
from wdkernels import schedules

SHAPES = [(3, 4), (5,), (2, 2)]
BEFORE, AFTER = 3, 3  # steps
KINDS = {
    "Adam": {"weight_decay": 0.2},
    "AdamW": {"weight_decay": 0.2},
    "AdamSWD": {"weight_decay": 0.2},
    "AdamSPD": {"weight_decay": 0.5},
}
LOUD = {"lr": 0.1, "eps": 1e-2}


def numbers(shape: Any, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    size = int(torch.Size(shape).numel())
    x = (torch.arange(size) * 7 + seed * 5) % 17 - 8
    return (x / 8).reshape(shape).to(dtype)


def set_gradients(params: list[Tensor], t: int) -> None:
    for i, p in enumerate(params):
        missing = i == 2 and t == 0  # so steps are counted apart
        p.grad = None if missing else numbers(p.shape, 3 * t + i + 1, p.dtype)


def groups_of(params: list[Tensor], options: dict[str, Any]) -> list[dict[str, Any]]:
    """Two groups; `second` holds options of the second one alone."""
    return [{"params": params[:2]}, {"params": params[2:], **options.get("second", {})}]


def build(kind: str, params: list[Tensor], options: dict[str, Any], backend: str) -> Any:
    common = {
        key: value for key, value in options.items() if key not in ("second", "dtype", "before")
    }
    numbers = {**LOUD, **KINDS[kind]}
    return getattr(wd, kind)(groups_of(params, options), backend=backend, **numbers, **common)


def dtype_of(options: dict[str, Any]) -> torch.dtype:
    return torch.bfloat16 if options.get("dtype") == "bfloat16" else torch.float32


def table() -> dict[str, tuple[str, dict[str, Any]]]:
    """What there is to save, as far as the release knows it."""
    early = schedules.early(5)
    anchors = {"anchor": [numbers(SHAPES[2], 9)]}
    found: dict[str, tuple[str, dict[str, Any]]] = {kind: (kind, {}) for kind in KINDS}
    found |= {
        "unmixed": ("Adam", {"unmixed": True, "amsgrad": True}),
        "schedule": ("AdamW", {"decay_schedule": early, "decay_scale": "relative_lr"}),
        "anchors of one group": ("AdamW", {"second": anchors, "cautious": True}),
        "initial anchors": ("AdamSWD", {"anchor": "initial", "amsgrad": True}),
        "SPD to nothing": ("AdamSPD", {"anchor": "zero", "maximize": True}),
        "stochastic": ("AdamSPD", {"dtype": "bfloat16", "seed": 3}),
        "kahan": ("AdamSWD", {"dtype": "bfloat16", "rounding": "kahan"}),
        "master": ("AdamW", {"dtype": "bfloat16", "master_weights": True, "ema_decay": 0.75}),
        "narrow moments": ("Adam", {"moment_dtype": torch.bfloat16}),
        "average of one group": ("AdamSWD", {"ema_decay": None, "second": {"ema_decay": 0.5}}),
        "before the first step": ("AdamSPD", {"before": 0, "second": {**anchors, "lr": 0.2}}),
    }
    return found


def main(path: str, *backends: str) -> None:
    recorded: dict[str, Any] = {}
    for name, (kind, options) in table().items():
        params = [numbers(shape, i, dtype_of(options)) for i, shape in enumerate(SHAPES)]
        try:
            optimizer = build(kind, params, options, "eager")
        except TypeError:  # an option of later releases
            continue
        before = options.get("before", BEFORE)
        for t in range(before):
            set_gradients(params, t)
            optimizer.step()
        saved, weights = optimizer.state_dict(), [p.clone() for p in params]
        file = io.BytesIO()
        torch.save(saved, file)
        ends = {}
        for backend in backends:
            file.seek(0)
            params = [p.clone() for p in weights]
            optimizer = build(kind, params, options, backend)
            optimizer.load_state_dict(torch.load(file, weights_only=True))
            for t in range(before, before + AFTER):
                set_gradients(params, t)
                optimizer.step()
            ends[backend] = params
        file.seek(0)
        recorded[name] = {
            "kind": kind,
            "options": options,
            "saved": torch.load(file, weights_only=True),
            "weights": weights,
            "ends": ends,
        }
    file = io.BytesIO()
    torch.save(recorded, file)
    with open(path, "wb") as out:
        out.write(gzip.compress(file.getvalue(), mtime=0))
    print(path, ", ".join(recorded))


if __name__ == "__main__":
    main(*sys.argv[1:])
