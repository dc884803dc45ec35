"""bfloat16 rounded to nearest eats the decay; stochastic, Kahan's and master weights keep it.

Two parts. In the first there is no gradient, so that AdamW's weights follow (1 − ηλ)^t w exactly:
the norm of a ViT's weights is compared with that closed form. In the second the ViT learns digits,
with weights stored in bfloat16 and computed with in float32: the norm is compared with that of the
same run in float32. "nearest" sums step and decay before it rounds, torch.optim rounds after each.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

import wdkernels as wd
from claims import plots
from claims.data import IMAGES, LABELS, TEST, TRAIN, rows
from claims.harness import Cell, Experiment, Record, seeds
from claims.networks import ViT, norm
from claims.statistics import Prediction, by_seed
from claims.tables import mean_and_spread, summary


@dataclass(frozen=True)
class Settings:
    seeds: int = 6
    lr: float = 1e-3
    decay: float = 0.1
    still_steps: int = 4000
    steps: int = 600
    batch: int = 32
    trained_decay: float = 1.0
    points: int = 40


SETTINGS = Settings()
TINY = Settings(seeds=2, still_steps=40, steps=8, points=4)
MODES = "float32", "stochastic", "kahan", "master", "nearest", "torch.optim"


def plan(s: Settings) -> list[Cell]:
    return [
        {"part": part, "mode": mode, "seed": seed}
        for part in ("still", "training")
        for seed in seeds(s.seeds)
        for mode in MODES
    ]


def optimizer_for(
    mode: str, weights: dict[str, Tensor], lr: float, decay: float, seed: int
) -> torch.optim.Optimizer:
    """AdamW, ours in every mode but the last."""
    groups = [  # gains and biases do not decay
        {"params": [w for w in weights.values() if w.ndim > 1], "weight_decay": decay},
        {"params": [w for w in weights.values() if w.ndim < 2], "weight_decay": 0.0},
    ]
    if mode == "torch.optim":
        return torch.optim.AdamW(groups, lr=lr)
    if mode == "master":
        return wd.AdamW(groups, lr=lr, rounding="nearest", master_weights=True, seed=seed)
    rounding = mode if mode != "float32" else "nearest"
    return wd.AdamW(groups, lr=lr, rounding=rounding, seed=seed)


def run(s: Settings, cell: Cell) -> Record:
    model, mode = ViT(cell["seed"]), cell["mode"]
    dtype = torch.float32 if mode == "float32" else torch.bfloat16
    weights = {k: p.detach().to(dtype).requires_grad_() for k, p in model.named_parameters()}
    decaying = [w for w in weights.values() if w.ndim > 1]
    still = cell["part"] == "still"
    decay, steps = (s.decay, s.still_steps) if still else (s.trained_decay, s.steps)
    optimizer = optimizer_for(mode, weights, s.lr, decay, cell["seed"])
    first = norm(decaying)
    if still:
        for w in weights.values():
            w.grad = torch.zeros_like(w)
    every = max(1, steps // s.points)
    at, norms = [0], [first]
    images, labels = IMAGES[TRAIN], LABELS[TRAIN]
    for t, batch in enumerate(rows(cell["seed"], steps, s.batch, len(images)), start=1):
        if not still:
            optimizer.zero_grad()
            widened = {k: w.float() for k, w in weights.items()}
            logits = torch.func.functional_call(model, widened, (images[batch],))
            F.cross_entropy(logits, labels[batch]).backward()
        optimizer.step()
        if t % every == 0:
            at.append(t)
            norms.append(norm(decaying))
    with torch.no_grad():
        widened = {k: w.float() for k, w in weights.items()}
        logits = torch.func.functional_call(model, widened, (IMAGES[TEST],))
    closed = first * (1 - s.lr * decay) ** steps
    return {
        "step": at,
        "norm": norms,
        "last_norm": norms[-1],
        "of_closed_form": norms[-1] / closed if still else None,
        "decay_done": (first - norms[-1]) / (first - closed) if still else None,
        "error": 100 * float((logits.argmax(1) != LABELS[TEST]).float().mean()),
    }


# ---- what was predicted --------------------------------------------------------------------------


def off_closed_form(runs: pd.DataFrame, mode: str) -> pd.Series:
    """By seed, in percent: how far the last norm is off the closed form."""
    return 100 * (by_seed(runs[runs.part == "still"], "of_closed_form", "mode")[mode] - 1)


def decay_done(runs: pd.DataFrame, mode: str) -> pd.Series:
    """By seed, in percent: how much of the exact decay of the norm came about."""
    return 100 * by_seed(runs[runs.part == "still"], "decay_done", "mode")[mode]


def off_float32(runs: pd.DataFrame, mode: str) -> pd.Series:
    """By seed, in percent: how far the last norm is off that of the same run in float32."""
    norms = by_seed(runs[runs.part == "training"], "last_norm", "mode")
    return 100 * (norms[mode] / norms["float32"] - 1)


_N = SETTINGS.seeds
KEEPING = "stochastic", "kahan", "master"
PREDICTIONS = (
    *(
        Prediction(
            f"{mode}: the norm follows the closed form",
            "norm at the end off |w|(1 − ηλ)^t, percent, no gradient",
            partial(off_closed_form, mode=mode),
            "within", 0.5, _N, "the closed form",
        )
        for mode in KEEPING
    ),
    *(
        Prediction(
            f"{mode}{' in bfloat16' if mode != 'nearest' else ''}: the decay is lost",
            "share of the exact decay of the norm that came about, percent",
            partial(decay_done, mode=mode),
            "below", 5.0, _N, "the closed form",
        )
        for mode in ("nearest", "torch.optim")
    ),
    *(
        Prediction(
            f"{mode}: in training the norm is that of float32",
            "norm at the end off that of the float32 run, percent",
            partial(off_float32, mode=mode),
            "within", 2.0, _N, "the same run in float32",
        )
        for mode in KEEPING
    ),
    *(
        Prediction(
            f"{mode}: in training the norm stays larger",
            "norm at the end off that of the float32 run, percent",
            partial(off_float32, mode=mode),
            "above", 2.0, _N, "the same run in float32",
        )
        for mode in ("nearest", "torch.optim")
    ),
)  # fmt: skip


# ---- how it is shown -----------------------------------------------------------------------------


def table(runs: pd.DataFrame) -> pd.DataFrame:
    shown = {
        "last_norm": "norm at the end",
        "of_closed_form": "of the closed form",
        "decay_done": "share of the decay",
        "error": "test error, %",
    }
    return summary(runs, ["part", "mode"], shown)


def figure(runs: pd.DataFrame) -> Figure:
    """Norms against steps, without and with a gradient, and how far off they end."""
    figure, axes = plots.new_figure(1, 3, 16, 5.2)
    seeds = runs.seed.nunique()
    for ax, part, title in (
        (axes[0][0], "still", "no gradient: only the decay moves weights"),
        (axes[0][1], "training", "a ViT learns digits"),
    ):
        data = runs[runs.part == part][["mode", "seed", "step", "norm"]]
        plots.lines(ax, plots.curves(data, "step", "norm"), "step", "norm", "mode", MODES)
        ax.set(xlabel="step", ylabel="norm of the weights that decay")
        ax.set_title(f"{title}, {seeds} seeds")
    start = runs[(runs.part == "still") & (runs["mode"] == "float32")].norm
    at = runs[(runs.part == "still") & (runs["mode"] == "float32")].step.iloc[0]
    first = sum(curve[0] for curve in start) / len(start)
    closed = [first * (1 - SETTINGS.lr * SETTINGS.decay) ** t for t in at]
    axes[0][0].plot(at, closed, "k--", label="closed form |w|(1 − ηλ)^t")
    axes[0][0].legend(fontsize="small")
    pieces = [
        pd.DataFrame({"mode": m, "off": off_float32(runs, m)}) for m in MODES if m != "float32"
    ]
    plots.dots(axes[0][2], pd.concat(pieces), "mode", "off", MODES[1:])
    axes[0][2].axhline(0, color="black", linewidth=1)
    axes[0][2].set(xlabel="weights in bfloat16", ylabel="norm at the end off float32, %")
    axes[0][2].set_title(f"after training, {seeds} seeds")
    figure.suptitle(f"Weights stored in bfloat16, by how they are rounded. {plots.READING}")
    return figure


def notes(runs: pd.DataFrame) -> list[str]:
    errors = by_seed(runs[runs.part == "training"], "error", "mode")
    listed = ", ".join(f"{m} {mean_and_spread(errors[m])}" for m in MODES)
    return [f"Test error after training, %: {listed}."]


EXPERIMENT = Experiment(
    number="7",
    name="bfloat16",
    title="bfloat16 eats decay",
    source="our own; stochastic and compensated rounding: Zamirai et al. 2020 (arXiv 2010.06192)",
    method=__doc__ or "",
    settings=SETTINGS,
    tiny=TINY,
    seconds=1.5,
    plan=plan,
    run=run,
    predictions=PREDICTIONS,
    table=table,
    figure=figure,
    notes=notes,
)
