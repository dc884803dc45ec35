"""Weights and gradients whose step leaves the usual numbers, and what comes of them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from support.numbers import snapshot
from support.variants import Variant


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
