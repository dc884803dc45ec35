"""In one epoch decay is a schedule of the effective learning rate, if the weights can follow it.

A small GPT reads Python's source once; the learning rate η is constant and then falls to zero.
Three questions. Does decay lower the training loss that is reached? Is it explained by the
effective learning rate: does a run without decay get there whose η_t follows the decayed run's
η/|w|² (and, as an alternative, η/|w|, which is what turns a weight under Adam)? And does that need
float32: the same with weights stored in bfloat16, rounded to nearest and stochastically?

One epoch leaves no room to learn by heart: the losses on blocks that were read and on others are
compared, over all decays.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from math import nan

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

import wdkernels as wd
from claims import plots
from claims.data import CONTEXT, VOCABULARY, text, unseen_text
from claims.harness import Cell, Experiment, Record, seeds
from claims.networks import GPT, norm
from claims.statistics import Prediction, by_seed
from claims.tables import mean_and_spread, summary
from claims.training import set_lr


@dataclass(frozen=True)
class Settings:
    seeds: int = 5
    steps: int = 600
    fall: int = 200  # of them, while η falls
    batch: int = 8
    width: int = 64
    lr: float = 1e-2
    decay: float = 0.3
    others: tuple[float, ...] = (0.1, 1.0)  # decays beside it, in float32
    blocks: int = 1024  # on which the losses at the end are taken


SETTINGS = Settings()
TINY = Settings(seeds=2, steps=8, fall=4, width=16, others=(0.1,), blocks=8)
RUNAWAY = 1e4  # a norm: longer weights, larger steps, longer weights
STORAGES = "float32", "nearest", "stochastic"
KINDS = "no decay", "decay", "follows η/|w|²", "follows η/|w|"
POWER = {"follows η/|w|²": 2, "follows η/|w|": 1}


def plan(s: Settings) -> list[Cell]:
    cells: list[Cell] = []
    for seed in seeds(s.seeds, first=300):
        for storage in STORAGES:
            for kind in KINDS:
                decay = s.decay if kind == "decay" else 0.0
                cells.append({"storage": storage, "kind": kind, "decay": decay, "seed": seed})
        cells += [
            {"storage": "float32", "kind": "decay", "decay": decay, "seed": seed}
            for decay in s.others
        ]
    return cells


def rate(s: Settings, t: int) -> float:
    """The learning rate at step t = 0, 1, 2...: constant, then in a straight line to zero."""
    return s.lr * min(1.0, (s.steps - t) / s.fall)


def train(
    s: Settings, seed: int, storage: str, decay: float, goal: tuple[float, ...], power: int
) -> tuple[list[float], list[float], list[float], float, float]:
    """Losses, norms and learning rates of each step, and the losses on seen and unseen blocks.

    With a goal, the norms of another run, the learning rate of the weights that decay is such that
    η/|w|^power is that of the other run. The weights are stored as `storage` says and computed with
    in float32. Where following makes the weights run away, what is left of the lists is NaN.
    """
    model = GPT(seed, VOCABULARY, CONTEXT, s.width)
    dtype = torch.float32 if storage == "float32" else torch.bfloat16
    weights = {k: p.detach().to(dtype).requires_grad_() for k, p in model.named_parameters()}
    matrices = [w for w in weights.values() if w.ndim > 1]
    groups = [
        {"params": matrices, "weight_decay": decay},
        {"params": [w for w in weights.values() if w.ndim < 2], "weight_decay": 0.0},
    ]
    rounding = "nearest" if storage == "float32" else storage
    optimizer = wd.AdamW(groups, betas=(0.9, 0.95), rounding=rounding, seed=seed)

    def loss_on(blocks: Tensor) -> Tensor:
        widened = {k: w.float() for k, w in weights.items()}
        logits = torch.func.functional_call(model, widened, (blocks[:, :-1],))
        return F.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten())

    batches = text(seed, s.steps, s.batch)
    losses: list[float] = []
    norms: list[float] = []
    rates: list[float] = []
    for t, blocks in enumerate(batches):
        set_lr(optimizer, rate(s, t))
        norms.append(norm(matrices))
        if goal:
            optimizer.param_groups[0]["lr"] = rate(s, t) * (norms[-1] / goal[t]) ** power
            if not norms[-1] < RUNAWAY:
                rest = [nan] * (s.steps - t)
                return losses + rest, norms[:t] + rest, rates[:t] + rest, nan, nan
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.zero_grad()
        loss = loss_on(blocks)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        seen = loss_on(batches.flatten(0, 1)[-s.blocks :]).item()
        unseen = loss_on(unseen_text(s.blocks)).item()
    return losses, norms, rates, seen, unseen


@cache  # a worker meets the same seed several times
def norms_with_decay(s: Settings, seed: int) -> tuple[float, ...]:
    """The norms of the decayed run in float32, step by step."""
    return tuple(train(s, seed, "float32", s.decay, (), 0)[1])


def run(s: Settings, cell: Cell) -> Record:
    power = POWER.get(cell["kind"], 0)
    goal = norms_with_decay(s, cell["seed"]) if power else ()
    losses, norms, rates, seen, unseen = train(
        s, cell["seed"], cell["storage"], cell["decay"], goal, power
    )
    size = max(1, s.steps // 30)
    at = list(range(0, s.steps - size + 1, size))
    tail = max(1, s.steps // 12)
    return {
        "step": [t + size / 2 for t in at],
        "losses": [sum(losses[t : t + size]) / size for t in at],
        "norms": [norms[t] for t in at],
        "effective": [rates[t] / norms[t] ** 2 for t in at],
        "final": sum(losses[-tail:]) / tail,  # the same blocks for every run of a seed
        "seen": seen,
        "unseen": unseen,
        "gap": unseen - seen,
        "last_norm": norms[-1],
    }


# ---- what was predicted --------------------------------------------------------------------------


def label(runs: pd.DataFrame) -> pd.Series:
    return runs.storage + ", " + runs.kind


def difference(runs: pd.DataFrame, a: str, b: str) -> pd.Series:
    """By seed: the final training loss of a less that of b."""
    main = runs[(runs.decay == 0) | (runs.decay == SETTINGS.decay)]
    chosen = by_seed(main.assign(label=label(main)), "final", "label")
    return chosen[a] - chosen[b]


def gap(runs: pd.DataFrame) -> pd.Series:
    """By seed: the loss on unseen less that on seen blocks, the mean over all decays in float32."""
    return runs[runs.storage == "float32"].groupby("seed")["gap"].mean()


def scatter(runs: pd.DataFrame) -> pd.Series:
    """By seed: the standard deviation of that gap over the runs in float32."""
    return runs[runs.storage == "float32"].groupby("seed")["gap"].std()


_N = SETTINGS.seeds
_DECAYED = "the decayed run in float32 (λ chosen in pilot runs)"
PREDICTIONS = (
    Prediction(
        "decay lowers the final training loss",
        "loss over the last twelfth, float32, decay − no decay, nats a character",
        partial(difference, a="float32, decay", b="float32, no decay"),
        "below", 0.0, _N, "no decay, the same η",
    ),
    Prediction(
        "a run without decay at the same η/|w|² reproduces it in float32",
        "final loss, follows η/|w|² − decay, nats a character",
        partial(difference, a="float32, follows η/|w|²", b="float32, decay"),
        "within", 0.02, _N, _DECAYED,
    ),
    Prediction(
        "so does one at the same η/|w|",
        "final loss, follows η/|w| − decay, nats a character",
        partial(difference, a="float32, follows η/|w|", b="float32, decay"),
        "within", 0.02, _N, _DECAYED,
    ),
    Prediction(
        "with bfloat16 rounded to nearest it does not",
        "final loss, nearest, follows η/|w|² − decay in float32, nats a character",
        partial(difference, a="nearest, follows η/|w|²", b="float32, decay"),
        "above", 0.02, _N, _DECAYED,
    ),
    Prediction(
        "nor does it at the same η/|w|",
        "final loss, nearest, follows η/|w| − decay in float32, nats a character",
        partial(difference, a="nearest, follows η/|w|", b="float32, decay"),
        "above", 0.02, _N, _DECAYED,
    ),
    Prediction(
        "stochastic rounding gives it back",
        "final loss, stochastic − nearest, follows η/|w|², nats a character",
        partial(difference, a="stochastic, follows η/|w|²", b="nearest, follows η/|w|²"),
        "below", 0.0, _N, "rounded to nearest, the same η",
    ),
    Prediction(
        "and at the same η/|w|",
        "final loss, stochastic − nearest, follows η/|w|, nats a character",
        partial(difference, a="stochastic, follows η/|w|", b="nearest, follows η/|w|"),
        "below", 0.0, _N, "rounded to nearest, the same η",
    ),
    Prediction(
        "nothing is learnt by heart",
        "loss on unseen − on seen blocks, mean over the decays, nats a character",
        gap,
        "within", 0.05, _N, "none",
    ),
    Prediction(
        "training and validation loss fall on one line whatever the decay",
        "standard deviation of that gap over the runs in float32, nats a character",
        scatter,
        "below", 0.02, _N, "none",
    ),
)  # fmt: skip


# ---- how it is shown -----------------------------------------------------------------------------


def table(runs: pd.DataFrame) -> pd.DataFrame:
    shown = {
        "final": "final training loss, nats",
        "seen": "on seen blocks",
        "unseen": "on unseen blocks",
        "gap": "gap",
        "last_norm": "norm of the weights",
    }
    return summary(runs, ["storage", "kind", "decay"], shown)


def figure(runs: pd.DataFrame) -> Figure:
    """Losses by storage, norms, effective rates, and training beside validation loss."""
    figure, axes = plots.new_figure(2, 3, 16, 10)
    seeds_ = runs.seed.nunique()
    main = runs[(runs.decay == 0) | (runs.decay == SETTINGS.decay)]
    for ax, storage in zip(axes[0], STORAGES, strict=True):
        data = main[main.storage == storage][["kind", "seed", "step", "losses"]].copy()
        reference = main[(main.storage == "float32") & (main.kind == "no decay")]
        base = dict(zip(reference.seed, reference.losses, strict=True))
        data["losses"] = [
            [nan if a is None else a - b for a, b in zip(x, base[seed], strict=True)]
            for seed, x in zip(data.seed, data.losses, strict=True)
        ]
        plots.lines(ax, plots.curves(data, "step", "losses"), "step", "losses", "kind", KINDS)
        ax.axhline(0, color="black", linewidth=1)
        ax.set(xlabel="step", ylabel="training loss less that of float32\nwithout decay, nats")
        ax.set_ylim(-0.3, 0.3)  # runs that run away leave it
        stored = storage if storage == "float32" else f"bfloat16, {storage}"
        ax.set_title(f"weights in {stored}, {seeds_} seeds")
    full = main[main.storage == "float32"]
    for ax, value, title in (
        (axes[1][0], "norms", "norm of the weights"),
        (axes[1][1], "effective", "effective learning rate η/|w|²"),
    ):
        data = full[["kind", "seed", "step", value]]
        plots.lines(ax, plots.curves(data, "step", value), "step", value, "kind", KINDS)
        ax.set(xlabel="step", ylabel=title, yscale="log")
        ax.set_title(f"float32: {title}, {seeds_} seeds")
    ax = axes[1][2]
    whole = runs[runs.storage == "float32"]
    for k, (decay, group) in enumerate(whole.groupby("decay")):
        ax.scatter(group.seen, group.unseen, color=plots.PALETTE[k], label=f"decay {decay:g}")
    ends = [min(whole.seen.min(), whole.unseen.min()), max(whole.seen.max(), whole.unseen.max())]
    ax.plot(ends, ends, color="black", linewidth=1, label="equal")
    ax.set(xlabel="loss on blocks read once, nats", ylabel="loss on unseen blocks, nats")
    ax.set_title(f"float32: one dot a run, {seeds_} seeds")
    ax.legend()
    figure.suptitle(f"A GPT in one epoch; η falls at the end. {plots.READING}")
    return figure


def notes(runs: pd.DataFrame) -> list[str]:
    full = runs[runs.storage == "float32"]
    plain = full[full.kind == "no decay"].set_index("seed")["final"]
    gains = {
        decay: group.set_index("seed")["final"] - plain
        for decay, group in full[full.kind == "decay"].groupby("decay")
    }
    listed = ", ".join(f"{mean_and_spread(x)} at λ = {decay:g}" for decay, x in gains.items())
    said = [f"float32: final training loss less that without decay, nats: {listed}."]
    for storage in STORAGES:
        own = {k: f"{storage}, {k}" for k in KINDS[:3]}
        gain = mean_and_spread(difference(runs, own["decay"], own["no decay"]))
        said.append(f"{storage}: decay changes the final loss by {gain} nats.")
        for kind in POWER:
            follows = mean_and_spread(difference(runs, f"{storage}, {kind}", own["decay"]))
            off = mean_and_spread(difference(runs, f"{storage}, {kind}", "float32, decay"))
            said.append(
                f"{storage}, {kind}: ends {follows} nats above the decayed run stored alike, and "
                f"{off} above that in float32 (runs that ran away left out)."
            )
    slopes = (
        full.dropna(subset=["seen"])
        .groupby("seed")
        .apply(lambda g: float(np.polyfit(g.seen, g.unseen, 1)[0]), include_groups=False)
    )
    said.append(
        f"Slope of validation against training loss over the decays: {mean_and_spread(slopes)}."
    )
    for kind in POWER:
        group = runs[runs.kind == kind]
        lost = group[group.final.isna()].groupby("storage").size().to_dict()
        said.append(f"{kind}: runs whose weights ran away, of {SETTINGS.seeds}: {lost or 'none'}.")
    return said


EXPERIMENT = Experiment(
    number="4b",
    name="under_training",
    title="Under-training: decay as a schedule",
    source="Andriushchenko, D'Angelo, Varre & Flammarion, NeurIPS 2024 (arXiv 2310.04415)",
    method=__doc__ or "",
    settings=SETTINGS,
    tiny=TINY,
    seconds=4.2,
    plan=plan,
    run=run,
    predictions=PREDICTIONS,
    table=table,
    figure=figure,
    notes=notes,
)
