"""Decay keeps a run in bfloat16 from diverging at a learning rate at which it otherwise does.

A small GPT reads Python's source once, at constant learning rates of which the larger ones are too
large. Its weights are stored in float32, or in bfloat16 rounded to nearest or stochastically, and
what it computes with is their value, in float32. A run has diverged if its loss was ever more than
half a nat above what it had been before, or was no number.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import isfinite

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch.nn import functional as F

import wdkernels as wd
from claims import plots
from claims.data import CONTEXT, VOCABULARY, text
from claims.harness import Cell, Experiment, Record, seeds
from claims.networks import GPT, norm
from claims.statistics import Prediction
from claims.tables import summary


@dataclass(frozen=True)
class Settings:
    seeds: int = 5
    steps: int = 300
    batch: int = 8
    width: int = 48
    warmup: int = 20
    lr: tuple[float, ...] = (0.1, 0.2, 0.3)
    decay: float = 0.1


SETTINGS = Settings()
RISE = 0.5  # nats: what counts as diverged
TINY = Settings(seeds=2, steps=6, width=16, warmup=2, lr=(3e-2, 0.1))
STORAGES = "float32", "nearest", "stochastic"


def plan(s: Settings) -> list[Cell]:
    return [
        {"storage": storage, "lr": lr, "decay": decay, "seed": seed}
        for seed in seeds(s.seeds)
        for storage in STORAGES
        for lr in s.lr
        for decay in (0.0, s.decay)
    ]


def run(s: Settings, cell: Cell) -> Record:
    model = GPT(cell["seed"], VOCABULARY, CONTEXT, s.width)
    dtype = torch.float32 if cell["storage"] == "float32" else torch.bfloat16
    weights = {k: p.detach().to(dtype).requires_grad_() for k, p in model.named_parameters()}
    matrices = [w for w in weights.values() if w.ndim > 1]
    groups = [
        {"params": matrices, "weight_decay": cell["decay"]},
        {"params": [w for w in weights.values() if w.ndim < 2], "weight_decay": 0.0},
    ]
    rounding = "nearest" if cell["storage"] == "float32" else cell["storage"]
    optimizer = wd.AdamW(groups, lr=cell["lr"], rounding=rounding, seed=cell["seed"])
    losses = []
    for t, blocks in enumerate(text(cell["seed"], s.steps, s.batch), start=1):
        for group in optimizer.param_groups:
            group["lr"] = cell["lr"] * min(1.0, t / s.warmup)
        optimizer.zero_grad()
        widened = {k: w.float() for k, w in weights.items()}
        logits = torch.func.functional_call(model, widened, (blocks[:, :-1],))
        loss = F.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    size = max(1, s.steps // 25)
    at = list(range(0, s.steps - size + 1, size))
    means = [sum(losses[t : t + size]) / size for t in at]
    climbs = [a - min(means[: k + 1]) for k, a in enumerate(means)]
    return {
        "climb": max(climbs) if all(map(isfinite, means)) else None,
        "step": [t + size / 2 for t in at],
        "losses": means,
        "final": means[-1],
        "last_norm": norm(matrices),
    }


# ---- what was predicted --------------------------------------------------------------------------


def diverged(runs: pd.DataFrame) -> pd.Series:
    """For each run, whether its loss climbed by more than RISE or was no number."""
    return ~(runs.climb.astype(float) <= RISE)


def saved(runs: pd.DataFrame, storage: str) -> pd.Series:
    """By seed: learning rates at which only the run without decay diverged, less the reverse."""
    chosen = runs[runs.storage == storage]
    counts = chosen.assign(diverged=diverged(chosen)).groupby(["decay", "seed"])["diverged"].sum()
    decays = sorted(chosen.decay.unique())
    return counts[decays[0]] - counts[decays[1]]


def climb(runs: pd.DataFrame, storage: str) -> pd.Series:
    """By seed: how much higher the loss climbed without decay, the mean of log10(1 + climb)."""
    chosen = runs[runs.storage == storage]
    logs = chosen.assign(log=np.log10(1 + chosen.climb.astype(float).fillna(1e9)))
    means = logs.groupby(["decay", "seed"])["log"].mean()
    decays = sorted(chosen.decay.unique())
    return means[decays[0]] - means[decays[1]]


def precision(runs: pd.DataFrame) -> pd.Series:
    """By seed, without decay: at how many more rates bfloat16 to nearest diverges than float32."""
    chosen = runs[runs.decay == 0]
    counts = chosen.assign(diverged=diverged(chosen)).groupby(["storage", "seed"])["diverged"].sum()
    return counts["nearest"] - counts["float32"]


_N = SETTINGS.seeds
PREDICTIONS = (
    Prediction(
        "bfloat16, to nearest: without decay runs diverge at rates at which decayed ones do not",
        f"of {len(SETTINGS.lr)} learning rates: diverged without decay − diverged with it",
        partial(saved, storage="nearest"),
        "above", 0.0, _N, "no decay (learning rates untuned: they are too large on purpose)",
    ),
    Prediction(
        "bfloat16, to nearest: without decay the loss climbs higher",
        "log10(1 + highest climb of the loss, nats), mean over the rates, no decay − decay",
        partial(climb, storage="nearest"),
        "above", 0.0, _N, "no decay, the same rates",
    ),
    Prediction(
        "bfloat16, stochastic: the same",
        f"of {len(SETTINGS.lr)} learning rates: diverged without decay − diverged with it",
        partial(saved, storage="stochastic"),
        "above", 0.0, _N, "no decay, the same rates",
    ),
    Prediction(
        "it is bfloat16 that diverges: float32 without decay does so at fewer learning rates",
        f"of {len(SETTINGS.lr)} learning rates, no decay: diverged to nearest − in float32",
        precision,
        "above", 0.0, _N, "no decay in float32, the same rates",
    ),
)  # fmt: skip


# ---- how it is shown -----------------------------------------------------------------------------


def table(runs: pd.DataFrame) -> pd.DataFrame:
    shown = {
        "diverged": "diverged, % of the runs",
        "climb": "highest climb, nats",
        "final": "last loss, nats",
        "last_norm": "norm of the weights",
    }
    marked = runs.assign(diverged=100.0 * diverged(runs))
    return summary(marked, ["storage", "decay", "lr"], shown)


def figure(runs: pd.DataFrame) -> Figure:
    """Every run's loss at the largest rates, and how many diverged at each."""
    figure, axes = plots.new_figure(2, 3, 15, 8.5)
    seeds_, largest = runs.seed.nunique(), runs.lr.max()
    decays = sorted(runs.decay.unique())
    color = dict(zip(decays, (plots.PALETTE[3], plots.PALETTE[0]), strict=True))
    for column, storage in zip(axes.T, STORAGES, strict=True):
        chosen = runs[runs.storage == storage]
        stored = storage if storage == "float32" else f"bfloat16, {storage}"
        for decay in decays:
            group = chosen[chosen.decay == decay]
            shares = group.assign(diverged=100.0 * diverged(group)).groupby("lr")["diverged"].mean()
            style = {"color": color[decay], "marker": "o", "label": f"decay {decay:g}"}
            column[0].plot(shares.index, shares, **style)
            for k, record in enumerate(group[group.lr == largest].itertuples()):
                label = f"decay {decay:g}" if k == 0 else None
                column[1].plot(
                    record.step, record.losses, color=color[decay], alpha=0.7, label=label
                )
        column[0].set(xlabel="learning rate", ylabel="runs that diverged, %", ylim=(-4, 104))
        column[0].set_xticks(sorted(runs.lr.unique()))
        column[0].set_title(f"weights in {stored}, {seeds_} seeds")
        column[0].legend()
        column[1].set(xlabel="step", ylabel="training loss, nats a character", yscale="log")
        column[1].set_yticks(ticks := [3, 5, 10, 20, 50], ticks)
        column[1].set_yticks([], minor=True)
        column[1].set_title(f"{stored}, rate {largest:g}, {seeds_} seeds")
        column[1].legend()
    figure.suptitle("Which runs diverge; below, the loss of every run at the largest rate")
    return figure


def notes(runs: pd.DataFrame) -> list[str]:
    marked = runs.assign(diverged=diverged(runs))
    counts = marked.groupby(["storage", "decay", "lr"])["diverged"].agg(["sum", "count"])
    said = []
    for (storage, decay), group in counts.groupby(["storage", "decay"]):
        listed = ", ".join(
            f"{r['sum']} of {r['count']} at {lr:g}" for (_, _, lr), r in group.iterrows()
        )
        said.append(f"{storage}, decay {decay:g}: diverged, by learning rate: {listed}.")
    return said


EXPERIMENT = Experiment(
    number="4c",
    name="divergence",
    title="Decay keeps bfloat16 from diverging",
    source="Andriushchenko, D'Angelo, Varre & Flammarion, NeurIPS 2024 (arXiv 2310.04415)",
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
