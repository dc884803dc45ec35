"""Decay in proportion to the effective learning rate ends with smaller gradients.

A ResNet reads digits of which three in ten have a wrong label, while the learning rate falls to
zero. Adam with L2, AdamW, AdamSWD and torch.optim.SGD with L2 each have their own grid of decays;
of each the decay is tuned on other writers' digits, and what is compared are the tuned runs on the
test writers. No decay is shown beside them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F

import wdkernels as wd
from claims import plots
from claims.data import IMAGES, TEST, TRAIN, VALID, hard, partly_wrong, rows
from claims.harness import Cell, Experiment, Record, seeds
from claims.networks import decayed, error_and_loss, grouped, norm, resnet
from claims.statistics import Prediction, at_an_edge, best, by_seed
from claims.tables import mean_and_spread, number, summary
from claims.training import cosine, set_lr, sgd


@dataclass(frozen=True)
class Settings:
    seeds: int = 5
    steps: int = 500
    batch: int = 32
    wrong: float = 0.3
    lr: float = 5e-3
    sgd_lr: float = 0.1
    l2: tuple[float, ...] = (1e-3, 1e-2, 1e-1, 1.0)
    adamw: tuple[float, ...] = (3.0, 10.0, 30.0, 60.0)
    swd: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0)
    sgd: tuple[float, ...] = (1e-2, 3e-2, 1e-1, 3e-1)
    measure_every: int = 50


SETTINGS = Settings()
TINY = Settings(
    seeds=2, steps=8, l2=(1e-3,), adamw=(3.0,), swd=(0.03,), sgd=(1e-2,), measure_every=4
)
METHODS = "none", "Adam, L2", "AdamW", "AdamSWD", "SGD, L2"


def plan(s: Settings) -> list[Cell]:
    grids = dict(zip(METHODS, [(0.0,), s.l2, s.adamw, s.swd, s.sgd], strict=True))
    return [
        {"method": method, "decay": decay, "seed": seed}
        for seed in seeds(s.seeds)
        for method, grid in grids.items()
        for decay in grid
    ]


def optimizer_for(s: Settings, cell: Cell, model: nn.Module) -> torch.optim.Optimizer:
    method, decay = cell["method"], cell["decay"]
    if method == "SGD, L2":
        return sgd(model, s.sgd_lr, decay)
    if method == "Adam, L2":
        return wd.Adam(grouped(model), lr=s.lr, weight_decay=decay)
    if method == "AdamSWD":
        return wd.AdamSWD(grouped(model), lr=s.lr, weight_decay=decay)
    return wd.AdamW(grouped(model), lr=s.lr, weight_decay=decay)


def run(s: Settings, cell: Cell) -> Record:
    images, labels = IMAGES[TRAIN], partly_wrong(TRAIN, s.wrong)
    model = resnet(cell["seed"])
    optimizer = optimizer_for(s, cell, model)
    lr = optimizer.param_groups[0]["lr"]
    weights = list(model.parameters())

    def gradient() -> float:
        """The norm of the whole training set's gradient."""
        return norm(torch.autograd.grad(F.cross_entropy(model(images), labels), weights))

    at, gradients = [], []
    for t, batch in enumerate(rows(cell["seed"], s.steps, s.batch, len(images)), start=1):
        set_lr(optimizer, lr * cosine(t - 1, s.steps))
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
        if t % s.measure_every == 0:
            at.append(t)
            gradients.append(gradient())
    test_error, test_loss = error_and_loss(model, *hard(TEST))
    return {
        "step": at,
        "gradients": gradients,
        "gradient": gradients[-1],
        "norm": norm(decayed(model)),
        "tuning": error_and_loss(model, *hard(VALID))[0],
        "error": test_error,
        "loss": test_loss,
    }


# ---- what was predicted --------------------------------------------------------------------------


def tuned(runs: pd.DataFrame) -> pd.DataFrame:
    """Of each method the runs at the decay that was best on the validation writers."""
    return best(runs, "method", ["decay"], "tuning")


def difference(runs: pd.DataFrame, a: str, b: str) -> pd.Series:
    """By seed: the test error of a less that of b, each tuned."""
    chosen = by_seed(tuned(runs), "error", "method")
    return chosen[a] - chosen[b]


def gradients(runs: pd.DataFrame, a: str, b: str) -> pd.Series:
    """By seed: the last gradient's norm with a over that with b, each tuned."""
    chosen = by_seed(tuned(runs), "gradient", "method")
    return chosen[a] / chosen[b]


_N = SETTINGS.seeds
PREDICTIONS = (
    Prediction(
        "constant decay leaves large gradients at the end",
        "norm of the full gradient at the end, AdamW / no decay",
        partial(gradients, a="AdamW", b="none"),
        "above", 1.0, _N, "no decay: nothing to be tuned",
    ),
    Prediction(
        "AdamSWD ends with smaller gradients than AdamW",
        "norm of the full gradient at the end, AdamSWD / AdamW",
        partial(gradients, a="AdamSWD", b="AdamW"),
        "below", 1.0, _N, "AdamW, its decay tuned",
    ),
    Prediction(
        "AdamSWD ends with smaller gradients than Adam with L2",
        "norm of the full gradient at the end, AdamSWD / Adam L2",
        partial(gradients, a="AdamSWD", b="Adam, L2"),
        "below", 1.0, _N, "Adam L2, its decay tuned",
    ),
    Prediction(
        "AdamSWD generalises better than Adam with L2",
        "test error, AdamSWD − Adam L2, points",
        partial(difference, a="AdamSWD", b="Adam, L2"),
        "below", 0.0, _N, "Adam L2, its decay tuned",
    ),
    Prediction(
        "and at least as well as AdamW",
        "test error, AdamSWD − AdamW, points",
        partial(difference, a="AdamSWD", b="AdamW"),
        "below", 1.0, _N, "AdamW, its decay tuned",
    ),
)  # fmt: skip


# ---- how it is shown -----------------------------------------------------------------------------


def table(runs: pd.DataFrame) -> pd.DataFrame:
    shown = {
        "error": "test error, %",
        "tuning": "validation error, %",
        "loss": "test loss, nats",
        "gradient": "gradient at the end",
        "norm": "norm of the weights",
    }
    every = summary(runs, ["method", "decay"], shown)
    best_of = tuned(runs).groupby("method")["decay"].first()
    pairs = zip(every.method, every.decay, strict=True)
    every["decay"] = [f"{d:g}{' (tuned)' if best_of[m] == d else ''}" for m, d in pairs]
    return every


def figure(runs: pd.DataFrame) -> Figure:
    """Gradients over time, gradients and errors at the end, and errors over the grids."""
    figure, axes = plots.new_figure(2, 2, 14, 10.5)
    along, last, errors, grid = axes.flat
    chosen, seeds = tuned(runs), runs.seed.nunique()
    color = plots.colors(METHODS)
    curves = plots.curves(chosen[["method", "seed", "step", "gradients"]], "step", "gradients")
    plots.lines(along, curves, "step", "gradients", "method", METHODS)
    along.set(xlabel="step", ylabel="norm of the full gradient, nats", yscale="log")
    along.set_title(f"gradients along training, decay tuned, {seeds} seeds")
    plots.dots(last, chosen, "method", "gradient", METHODS)
    last.set(xlabel="", ylabel="norm of the full gradient, nats", yscale="log")
    last.set_title(f"gradients at the end, decay tuned, {seeds} seeds")
    plots.dots(errors, chosen, "method", "error", METHODS)
    errors.set(xlabel="", ylabel="test error, %")
    errors.set_title(f"test error, decay tuned, {seeds} seeds")
    for name in METHODS:
        group = runs[runs.method == name].groupby("decay")["error"]
        style = {"color": color[name], "label": name, "capsize": 2, "marker": "o"}
        if name == "none":
            grid.axhline(float(group.mean().iloc[0]), color=color[name], label=name)
        else:
            grid.errorbar(group.mean().index, group.mean(), yerr=group.std(), **style)
    grid.set(xlabel="decay λ (of another meaning in each method)", ylabel="test error, %")
    grid.set(xscale="log")
    grid.set_title(f"every decay of the grids, {seeds} seeds")
    grid.legend(fontsize="small")
    figure.suptitle(f"Gradients and errors by kind of decay. {plots.READING}")
    return figure


def notes(runs: pd.DataFrame) -> list[str]:
    chosen = tuned(runs)
    listed = ", ".join(
        f"{m} {mean_and_spread(g.error)} % (decay {g.decay.iloc[0]:g}, gradient "
        f"{mean_and_spread(g.gradient)})"
        for m, g in chosen.groupby("method", sort=False)
    )
    said = [f"Test error, tuned: {listed}."]
    edges = ", ".join(at_an_edge(runs, chosen, "method", "decay")) or "none"
    said.append(f"Tuned to an edge of their grid: {edges}.")
    # Larger decays give larger gradients: the trade is told apart from the method at equal norms.
    for m in ("AdamW", "AdamSWD"):
        points = runs[runs.method == m].groupby("decay")[["norm", "gradient", "error"]].mean()
        listed = "; ".join(
            f"decay {d:g}: norm {number(p.norm)}, gradient {number(p.gradient)}, error "
            f"{number(p.error)} %"
            for d, p in zip(points.index, points.itertuples(), strict=True)
        )
        said.append(f"{m}, the whole grid: {listed}.")
    return said


EXPERIMENT = Experiment(
    number="5",
    name="scheduled_decay",
    title="Scheduled Weight Decay",
    source="Xie et al., NeurIPS 2023 (arXiv 2011.11152)",
    method=__doc__ or "",
    settings=SETTINGS,
    tiny=TINY,
    seconds=2.0,
    plan=plan,
    run=run,
    predictions=PREDICTIONS,
    table=table,
    figure=figure,
    notes=notes,
)
