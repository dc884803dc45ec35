"""AdamW averages over the last τ = 1/(ηλ) steps; what counts is τ in passes over the data.

A weight under AdamW is an exponential average of the updates u/(ηλ) over 1/(ηλ) steps. A ResNet
reads digits of which three in ten have a wrong label, with batches of 16, 32 and 64 over 24 epochs,
and with batches of 32 over 12 epochs. Decays are such that τ, counted in epochs, takes the
same values in each; with batches twice as large, the same τ is twice the λ.

If τ in epochs is what counts, the test errors of equal τ agree, and those of equal λ do not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from torch.nn import functional as F

import wdkernels as wd
from claims import plots
from claims.data import IMAGES, TEST, TRAIN, hard, partly_wrong, rows
from claims.harness import Cell, Experiment, Record, seeds
from claims.networks import decayed, error_and_loss, grouped, norm, resnet
from claims.statistics import Prediction
from claims.tables import number, summary
from claims.training import cosine, set_lr


@dataclass(frozen=True)
class Settings:
    seeds: int = 5
    lr: float = 5e-3
    wrong: float = 0.3
    epochs: int = 24
    batches: tuple[int, ...] = (16, 32, 64)
    batch: int = 32
    lengths: tuple[int, ...] = (12,)  # epochs, beside the 24
    taus: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0, 8.0)  # in epochs


SETTINGS = Settings()
TINY = Settings(seeds=2, epochs=1, batches=(64, 128), batch=64, lengths=(2,), taus=(1.0, 2.0))
EXAMPLES = len(IMAGES[TRAIN])


def plan(s: Settings) -> list[Cell]:
    kinds = [(batch, s.epochs) for batch in s.batches] + [(s.batch, n) for n in s.lengths]
    return [
        {"batch": batch, "epochs": epochs, "tau": tau, "seed": seed}
        for seed in seeds(s.seeds)
        for batch, epochs in kinds
        for tau in s.taus
    ]


def run(s: Settings, cell: Cell) -> Record:
    images, labels = IMAGES[TRAIN], partly_wrong(TRAIN, s.wrong)
    model = resnet(cell["seed"])
    steps_per_epoch = len(images) / cell["batch"]
    steps = round(cell["epochs"] * steps_per_epoch)
    decay = 1 / (s.lr * cell["tau"] * steps_per_epoch)
    optimizer = wd.AdamW(grouped(model), lr=s.lr, weight_decay=decay)
    for t, batch in enumerate(rows(cell["seed"], steps, cell["batch"], len(images))):
        set_lr(optimizer, s.lr * cosine(t, steps))
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
    error, loss = error_and_loss(model, *hard(TEST))
    train_error, train_loss = error_and_loss(model, images, labels)
    return {
        "decay": decay,
        "steps": steps,
        "error": error,
        "loss": loss,
        "train_error": train_error,
        "train_loss": train_loss,
        "norm": norm(decayed(model)),
    }


# ---- what was predicted --------------------------------------------------------------------------


Quantity: TypeAlias = Callable[[pd.DataFrame], pd.Series]


def disagreement(runs: pd.DataFrame, kind: str, like: Quantity, value: str = "error") -> np.float64:
    """The mean difference of neighbouring values of `kind` at the same `like`."""
    table = runs.assign(like=like(runs).map("{:.4g}".format)).pivot_table(
        index="like", columns=kind, values=value
    )
    gaps = [(table[a] - table[b]).abs() for a, b in pairwise(table)]
    return np.float64(pd.concat(gaps).mean())  # which divides by 0


def chosen(runs: pd.DataFrame, kind: str) -> pd.DataFrame:
    """The runs in which only the batch, or only the length, differs."""
    other = "epochs" if kind == "batch" else "batch"
    return runs[runs[other] == runs[other].mode()[0]]


def _tau(runs: pd.DataFrame) -> pd.Series:
    return runs.tau


def _lambda(runs: pd.DataFrame) -> pd.Series:
    return runs.decay


def _share(runs: pd.DataFrame) -> pd.Series:
    return runs.tau / runs.epochs


def ratio(runs: pd.DataFrame, kind: str, other: Quantity, value: str = "error") -> pd.Series:
    """By seed: the disagreement at equal τ over that at equal `other`."""
    groups = chosen(runs, kind).groupby("seed")
    return groups.apply(
        lambda g: disagreement(g, kind, _tau, value) / disagreement(g, kind, other, value),
        include_groups=False,
    )


def shift(runs: pd.DataFrame, kind: str) -> pd.Series:
    """By seed: how much more the test error changes from τ to 2τ than from one kind to the next."""
    return (
        chosen(runs, kind)
        .groupby("seed")
        .apply(
            lambda g: disagreement(g, kind, _tau) / disagreement(g, "tau", lambda r: r[kind]),
            include_groups=False,
        )
    )


_N = SETTINGS.seeds
PREDICTIONS = (
    Prediction(
        "across batch sizes, runs of equal τ agree better than runs of equal λ",
        "mean difference in test error between batch sizes, at equal τ / at equal λ",
        partial(ratio, kind="batch", other=_lambda),
        "below", 1.0, _N, "the same λ at every batch size",
    ),
    Prediction(
        "so do their training losses",
        "mean difference in training loss between batch sizes, at equal τ / at equal λ",
        partial(ratio, kind="batch", other=_lambda, value="train_loss"),
        "below", 0.5, _N, "the same λ at every batch size",
    ),
    Prediction(
        "a batch twice as large changes less than a τ twice as long",
        "mean difference in test error, batch doubled / τ doubled",
        partial(shift, kind="batch"),
        "below", 1.0, _N, "the same batch, τ doubled",
    ),
    Prediction(
        "across lengths, runs of equal τ agree better than runs in which τ is an equal share",
        "mean difference in test error between lengths, at equal τ / at equal τ/length",
        partial(ratio, kind="epochs", other=_share),
        "below", 1.0, _N, "τ the same share of the length",
    ),
    Prediction(
        "a training twice as long changes less than a τ twice as long",
        "mean difference in test error, length doubled / τ doubled",
        partial(shift, kind="epochs"),
        "below", 1.0, _N, "the same length, τ doubled",
    ),
)  # fmt: skip


# ---- how it is shown -----------------------------------------------------------------------------


def table(runs: pd.DataFrame) -> pd.DataFrame:
    shown = {
        "error": "test error, %",
        "loss": "test loss, nats",
        "train_loss": "training loss, nats",
        "norm": "norm of the weights",
        "decay": "λ",
    }
    heads = {"tau": "τ, epochs"}
    return summary(runs, ["batch", "epochs", "tau"], shown).rename(columns=heads)


def figure(runs: pd.DataFrame) -> Figure:
    """The same runs against τ, and against what does not bring them together."""
    figure, axes = plots.new_figure(2, 2, 13, 10)
    seeds = runs.seed.nunique()
    for ax, kind, x, label, title in (
        (axes[0][0], "batch", _tau, "τ = 1/(ηλ), epochs", "batch sizes against τ"),
        (axes[0][1], "batch", _lambda, "decay λ", "batch sizes against λ"),
        (axes[1][0], "epochs", _tau, "τ = 1/(ηλ), epochs", "lengths against τ"),
        (axes[1][1], "epochs", _share, "τ as a share of the length", "lengths against τ/length"),
    ):
        for k, (name, group) in enumerate(chosen(runs, kind).groupby(kind)):
            errors = group.assign(x=x(group)).groupby("x")["error"]
            style = {"color": plots.PALETTE[k], "marker": "o", "capsize": 2}
            text = f"batch {name}" if kind == "batch" else f"{name} epochs"
            ax.errorbar(errors.mean().index, errors.mean(), yerr=errors.std(), label=text, **style)
        ax.set(xlabel=label, ylabel="test error, %", xscale="log")
        ax.set_title(f"{title}, {seeds} seeds")
        ax.legend()
    figure.suptitle("Runs of equal τ beside runs that are equal in something else; bars: one s.d.")
    return figure


def notes(runs: pd.DataFrame) -> list[str]:
    said = []
    for kind in ("batch", "epochs"):
        lowest = chosen(runs, kind).groupby([kind, "tau", "decay"])["error"].mean().reset_index()
        best_of = lowest.loc[lowest.groupby(kind)["error"].idxmin()]
        listed = ", ".join(
            f"{r[kind]:g}: τ = {r.tau:g} epochs, λ = {number(r.decay)}"
            for _, r in best_of.iterrows()
        )
        said.append(f"Best of the grid by {kind}: {listed}.")
    return said


EXPERIMENT = Experiment(
    number="6",
    name="averaging_time",
    title="AdamW as an average",
    source="Wang & Aitchison 2024 (arXiv 2405.13698)",
    method=__doc__ or "",
    settings=SETTINGS,
    tiny=TINY,
    seconds=1.7,
    weight=lambda cell: cell["epochs"] / 24 * (0.3 + 22 / cell["batch"]),
    plan=plan,
    run=run,
    predictions=PREDICTIONS,
    table=table,
    figure=figure,
    notes=notes,
)
