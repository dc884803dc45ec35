"""What a measured step tells of itself: norms, angles and rates, by parameter and in total."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from wdkernels.tables import aligned

# The columns of the table that the backends write, a row for each parameter with a gradient; NaN
# where they have not. Old weights w, the gradient g, Adam's step u (wdkernels/optim.py).
COLUMNS = (
    "weight2",  # sum of w^2
    "gradient2",  # sum of g^2, unscaled, and without what clipping did to it
    "update2",  # sum of u^2
    "decay2",  # sum of the squares of what the decay adds, where it enters
    "distance2",  # sum of (w - a)^2
    "update_weight",  # sum of u w
    "rate",  # sum of eta / (sqrt(v_hat) + eps)
    "lr",  # eta
    "decay",  # what multiplies w - a
    "selected",  # SPD: 1 or 0
    "ratio",  # SPD: r
    "mean_v",  # SWD: V
)


class Telemetry(Mapping[str, Mapping[str, Tensor]]):
    """The quantities of one measured step: `telemetry["fc.weight"]["update_norm"]`, 0-d float64
    tensors on the parameters' device; `total` has those of all parameters together.

        weight_norm            |w|, of the weights before the step
        grad_norm              |g|, unscaled and before clipping
        update_norm            |u|, of Adam's step (for L2 and unmixed the decay is a part of it)
        decay_norm             norm of the decay applied: of d_t (w - a), of SPD's pull, of the
                               decay's part of u if unmixed; for L2 of lambda_t (w - a), which
                               enters the gradient
        anchor_distance        |w - a|
        update_weight_cosine   u.w / (|u| |w|)
        relative_update        |u| / |w|
        effective_lr           mean over the elements of eta / (sqrt(v_hat) + eps)
        lr_over_weight_norm2   eta / |w|^2: of a scale-invariant weight, its learning rate
        weight_grad_product    |w| |g|: of a scale-invariant weight, independent of its scale
        lr, decay              eta, and the number that multiplies w - a in this step
        selected, ratio        SPD: whether (in total: how many) tensors were selected, and r
        sqrt_mean_v            SWD: sqrt(V)

    Of a step that was skipped all are NaN. Quotients are those of IEEE arithmetic: the cosine is
    NaN where |u| or |w| is 0; relative_update is inf where only |w| is 0, and lr_over_weight_norm2
    where |w| is 0 and eta is not; effective_lr is inf where both v_hat and eps are 0 for some
    element, or NaN if eta is 0, too; 0/0 is NaN, as means are of a parameter without elements.

    Sums are in float64, and so are the squares of gradients, for which no float32 is too large or
    too small. Other squares the CPU's loops take in the type that a step computes in: in float32
    the norm of updates below 1e-19 may be 0, that of weights above 1e19 is inf.

    `step` counts the calls of the optimizer's step() since it was constructed or loaded a state.
    Nothing waits for the device until numbers are asked for: `to_dict`, `rows`, `write`.
    """

    def __init__(
        self,
        names: Sequence[str],
        numels: Sequence[int],
        method: str,
        table: Tensor,
        step: int,
    ) -> None:
        self.step = step  # how many-th call of step() since construction or load_state_dict
        columns = dict(zip(COLUMNS, table.unbind(1), strict=True))
        sizes = torch.tensor(numels, dtype=torch.float64, device="cpu")
        sizes = sizes.to(table.device, non_blocking=True)
        each = _quantities(columns, sizes)
        self._names = list(names)
        self._rows = {name: row for row, name in enumerate(names)}
        self._keys = [*each, *_OF_METHOD.get(method, ())]
        each.update(selected=columns["selected"], ratio=columns["ratio"])
        each.update(sqrt_mean_v=columns["mean_v"].sqrt())
        self._each = each

        sums = {name: column.sum() for name, column in columns.items()}
        count = sizes.sum()
        sums["lr"] = (columns["lr"] * sizes).sum() / count
        total = _quantities(sums, count)
        for key in ("lr", "decay"):  # of groups, not of a model
            del total[key]
        if method == "spd":
            total["selected"] = sums["selected"]
        if method == "swd":
            v = columns["mean_v"]
            total["sqrt_mean_v"] = v.max().sqrt() if len(v) else torch.zeros_like(count)
        self.total: Mapping[str, Tensor] = total

    def __getitem__(self, name: str) -> Mapping[str, Tensor]:
        row = self._rows[name]
        return {key: self._each[key][row] for key in self._keys}

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def to_dict(self) -> dict[str, dict[str, float]]:
        """All of it as plain numbers, by parameter's name; that of all parameters is "total"."""
        columns = {key: column.tolist() for key, column in self._each.items()}
        found = {
            name: {key: columns[key][row] for key in self._keys} for name, row in self._rows.items()
        }
        found["total" if "total" not in found else "total of all"] = {
            key: value.item() for key, value in self.total.items()
        }
        return found

    def __str__(self) -> str:
        """A table, a line for each parameter and one for the total."""
        found = self.to_dict()
        keys = list(dict.fromkeys(key for row in found.values() for key in row))
        lines = [[f"step {self.step}", *keys]]
        lines += [
            [name, *(f"{row[key]:.4g}" if key in row else "" for key in keys)]
            for name, row in found.items()
        ]
        return aligned(lines, right=range(1, len(keys) + 1))

    def rows(self) -> list[dict[str, Any]]:
        """A row for each parameter and one for the total, as for `pandas.DataFrame`."""
        return [{"parameter": name, **row} for name, row in self.to_dict().items()]

    def write(self, writer: Any, step: int | None = None) -> None:
        """To TensorBoard's SummaryWriter, or whatever has `add_scalar(tag, value, global_step)`.

        Tags are quantity/parameter, so that a chart's panel holds one quantity.
        """
        for name, row in self.to_dict().items():
            for key, value in row.items():
                writer.add_scalar(f"{key}/{name}", value, self.step if step is None else step)


_OF_METHOD = {"spd": ("selected", "ratio"), "swd": ("sqrt_mean_v",)}


def _quantities(x: Mapping[str, Tensor], sizes: Tensor) -> dict[str, Tensor]:
    weight, grad, update = x["weight2"].sqrt(), x["gradient2"].sqrt(), x["update2"].sqrt()
    return {
        "weight_norm": weight,
        "grad_norm": grad,
        "update_norm": update,
        "decay_norm": x["decay2"].sqrt(),
        "anchor_distance": x["distance2"].sqrt(),
        "update_weight_cosine": x["update_weight"] / (update * weight),
        "relative_update": update / weight,
        "effective_lr": x["rate"] / sizes,
        "lr_over_weight_norm2": x["lr"] / x["weight2"],
        "weight_grad_product": weight * grad,
        "lr": x["lr"],
        "decay": x["decay"],
    }
