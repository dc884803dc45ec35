"""Decay in the first half of training does what decay all along does; in the second half, less.

A ResNet with BatchNorm reads digits, under AdamW and under SGD, with decay never, always, early or
late. BatchNorm makes the scale of every kernel w meaningless, but a step of a given size turns a
short w further than a long one. Decay that stops has left short weights behind, and they stay so.

The norm of the gradient and the sharpness (the Hessian's largest eigenvalue) grow as the weights
shrink: they are measured beside the product |w||g|, which does not know the scale.

How far weights grow without decay depends on what they are to learn: true labels, random labels,
few examples, noise in place of images.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

import wdkernels as wd
from claims import plots
from claims.data import IMAGES, LABELS, TEST, TRAIN, hard, rows, seeded
from claims.harness import Cell, Experiment, Record, seeds
from claims.networks import error_and_loss, grouped, norm, resnet
from claims.statistics import Prediction, by_seed
from claims.tables import mean_and_spread, summary
from claims.training import cosine, set_lr, sgd


@dataclass(frozen=True)
class Settings:
    seeds: int = 6
    steps: int = 800
    batch: int = 32
    adamw_lr: float = 5e-3
    adamw_decay: float = 5.0
    sgd_lr: float = 0.1
    sgd_decay: float = 3e-2
    growth_seeds: int = 5
    growth_steps: int = 500
    few: int = 97  # examples, an eighth of all
    power_iterations: int = 20
    measure_every: int = 20


SETTINGS = Settings()
TINY = Settings(
    seeds=2, steps=8, growth_seeds=1, growth_steps=4, power_iterations=1, measure_every=4
)
WINDOWS = "never", "always", "early", "late"
DATA = "true labels", "random labels", "few examples", "noise as input"
OPTIMIZERS = "AdamW", "SGD"
MEASURES = {
    "gradient": "norm of the gradient",
    "sharpness": "sharpness",
    "product": "Σ of norm × gradient",
    "error": "test error",
}


def plan(s: Settings) -> list[Cell]:
    windows = [
        {"part": "windows", "optimizer": o, "window": w, "seed": seed}
        for o in OPTIMIZERS
        for seed in seeds(s.seeds)
        for w in WINDOWS
    ]
    growth = [
        {"part": "growth", "optimizer": o, "data": d, "seed": seed}
        for o in OPTIMIZERS
        for seed in seeds(s.growth_seeds)
        for d in DATA
    ]
    return windows + growth


def kernels(model: nn.Module) -> list[Tensor]:
    """The weights whose scale means nothing, because BatchNorm follows."""
    return [p for p in model.parameters() if p.ndim == 4]


def train(
    s: Settings, cell: Cell, images: Tensor, labels: Tensor, steps: int, schedule: Any, decay: float
) -> tuple[nn.Module, Record]:
    """A trained network, with norms and relative updates of its kernels along the way."""
    model = resnet(cell["seed"])
    adaptive = cell["optimizer"] == "AdamW"
    lr = s.adamw_lr if adaptive else s.sgd_lr
    optimizer: torch.optim.Optimizer
    if adaptive:
        optimizer = wd.AdamW(
            grouped(model), lr=lr, weight_decay=decay, decay_schedule=schedule,
            telemetry_every=s.measure_every,
        )  # fmt: skip
    else:
        optimizer = sgd(model, lr, decay)
    names = [name for name, p in model.named_parameters() if p.ndim == 4]
    at, norms, updates = [], [], []
    batches = rows(cell["seed"], steps, s.batch, len(images))
    for t, batch in enumerate(batches, start=1):
        set_lr(optimizer, lr * cosine(t - 1, steps))
        if not adaptive:  # SGD has no schedule of its own
            optimizer.param_groups[0]["weight_decay"] = decay * wd.schedules.factor(schedule, t)
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        measured = t % s.measure_every == 0
        before = norm(kernels(model)) if measured else 0.0
        optimizer.step()
        if measured:
            if isinstance(optimizer, wd.AdamW):
                told = optimizer.telemetry()
                step = sum(float(told[name]["update_norm"]) ** 2 for name in names) ** 0.5
            else:
                momenta = [optimizer.state[p]["momentum_buffer"] for p in kernels(model)]
                step = lr * cosine(t - 1, steps) * norm(momenta)
            at.append(t)
            norms.append(before)
            updates.append(step / before)
    return model, {"step": at, "norm": norms, "update": updates}


def sharpness(model: nn.Module, images: Tensor, labels: Tensor, iterations: int) -> float:
    """The largest eigenvalue of the loss's Hessian in the kernels, by power iteration."""
    weights = kernels(model)
    gradients = torch.autograd.grad(
        F.cross_entropy(model(images), labels), weights, create_graph=True
    )
    rng = seeded(0)
    direction = [torch.randn(w.shape, generator=rng) for w in weights]
    value = 0.0
    for _ in range(iterations):
        length = norm(direction)
        direction = [d / length for d in direction]
        products = torch.autograd.grad(gradients, weights, direction, retain_graph=True)
        value = sum(float((d * p).sum()) for d, p in zip(direction, products, strict=True))
        direction = list(products)
    return value


def run_windows(s: Settings, cell: Cell) -> Record:
    half = s.steps // 2
    schedule = {"early": wd.schedules.early(half), "late": wd.schedules.late(half)}
    decay = s.adamw_decay if cell["optimizer"] == "AdamW" else s.sgd_decay
    decay = 0.0 if cell["window"] == "never" else decay
    images, labels = IMAGES[TRAIN], LABELS[TRAIN]
    model, curve = train(s, cell, images, labels, s.steps, schedule.get(cell["window"]), decay)
    error, loss = error_and_loss(model, *hard(TEST))
    # With the statistics of the batch, as in training: only then the scale means nothing.
    weights = kernels(model)
    gradients = torch.autograd.grad(F.cross_entropy(model(images), labels), weights)
    products = [norm([w]) * norm([g]) for w, g in zip(weights, gradients, strict=True)]
    return {
        **curve,
        "error": error,
        "loss": loss,
        "last_norm": norm(weights),
        "late_update": sum(curve["update"][-10:]) / len(curve["update"][-10:]),
        "gradient": norm(gradients),
        "product": sum(products),
        "sharpness": sharpness(model, images, labels, s.power_iterations),
    }


def run_growth(s: Settings, cell: Cell) -> Record:
    images, labels = IMAGES[TRAIN], LABELS[TRAIN]
    rng = seeded(cell["seed"])
    if cell["data"] == "random labels":
        labels = labels[torch.randperm(len(labels), generator=rng)]
    if cell["data"] == "noise as input":
        images = images.mean() + images.std() * torch.randn(images.shape, generator=rng)
    if cell["data"] == "few examples":
        chosen = torch.randperm(len(images), generator=rng)[: s.few]
        images, labels = images[chosen], labels[chosen]
    model, curve = train(s, cell, images, labels, s.growth_steps, None, 0.0)
    test_error, _ = error_and_loss(model, IMAGES[TEST], LABELS[TEST])
    train_error, _ = error_and_loss(model, images, labels)
    epochs = [t * s.batch / len(images) for t in curve["step"]]
    return {
        **curve,
        "epoch": epochs,
        "last_norm": norm(kernels(model)),
        "gap": test_error - train_error,
    }


def run(s: Settings, cell: Cell) -> Record:
    return run_windows(s, cell) if cell["part"] == "windows" else run_growth(s, cell)


# ---- what was predicted --------------------------------------------------------------------------


def difference(runs: pd.DataFrame, optimizer: str, value: str, a: str, b: str) -> pd.Series:
    """By seed: the value of window a less that of window b."""
    chosen = by_seed(runs[runs.optimizer == optimizer], value, "window")
    return chosen[a] - chosen[b]


def ratio(runs: pd.DataFrame, optimizer: str, value: str, a: str, b: str, by: str) -> pd.Series:
    """By seed: the value of a over that of b."""
    chosen = by_seed(runs[runs.optimizer == optimizer], value, by)
    return chosen[a] / chosen[b]


def rank_correlation(runs: pd.DataFrame, optimizer: str, value: str) -> pd.Series:
    """By seed: Spearman's correlation, over the four windows, of the value with the test error."""
    groups = runs[(runs.part == "windows") & (runs.optimizer == optimizer)].groupby("seed")
    return groups.apply(
        lambda g: g[value].corr(g["error"], method="spearman"), include_groups=False
    )


def _predictions(o: str) -> list[Prediction]:
    n, m = SETTINGS.seeds, SETTINGS.growth_seeds
    all_along = "decay all along (untuned, the same λ)"
    return [
        Prediction(
            f"{o}: early decay keeps the weights short to the end",
            "norm of the kernels at the end, early / never",
            partial(ratio, optimizer=o, value="last_norm", a="early", b="never", by="window"),
            "below", 0.75, n, "no decay",
        ),
        Prediction(
            f"{o}: early decay generalises like decay all along",
            "test error, early − always, points",
            partial(difference, optimizer=o, value="error", a="early", b="always"),
            "within", 2.5, n, all_along,
        ),
        Prediction(
            f"{o}: late decay does not",
            "test error, late − always, points",
            partial(difference, optimizer=o, value="error", a="late", b="always"),
            "above", 0.0, n, all_along,
        ),
        Prediction(
            f"{o}: after early decay the updates stay larger beside the weights",
            "|update|/|w| over the last quarter, early / never",
            partial(ratio, optimizer=o, value="late_update", a="early", b="never", by="window"),
            "above", 1.0, n, "no decay",
        ),
        Prediction(
            f"{o}: the gradient's norm misjudges: it ranks the windows the wrong way round",
            "rank correlation of |g| with the test error over the windows",
            partial(rank_correlation, optimizer=o, value="gradient"),
            "below", 0.0, n, "none",
        ),
        Prediction(
            f"{o}: so does sharpness",
            "rank correlation of the Hessian's largest eigenvalue with the test error",
            partial(rank_correlation, optimizer=o, value="sharpness"),
            "below", 0.0, n, "none",
        ),
        Prediction(
            f"{o}: the product |w||g| ranks them the right way round",
            "rank correlation of Σ|w||g| with the test error",
            partial(rank_correlation, optimizer=o, value="product"),
            "above", 0.0, n, "none",
        ),
        Prediction(
            f"{o}: weights grow further on random labels",
            "norm at the end, random / true labels",
            partial(ratio, optimizer=o, value="last_norm", a=DATA[1], b=DATA[0], by="data"),
            "above", 1.0, m, "true labels",
        ),
        Prediction(
            f"{o}: and less on few examples",
            "norm at the end, few / all examples, after equally many steps",
            partial(ratio, optimizer=o, value="last_norm", a=DATA[2], b=DATA[0], by="data"),
            "below", 1.0, m, "all examples",
        ),
        Prediction(
            f"{o}: and further on noise than on images",
            "norm at the end, noise / images",
            partial(ratio, optimizer=o, value="last_norm", a=DATA[3], b=DATA[0], by="data"),
            "above", 1.0, m, "images",
        ),
    ]  # fmt: skip


# ---- how it is shown -----------------------------------------------------------------------------


def table(runs: pd.DataFrame) -> pd.DataFrame:
    shown = {
        "error": "test error, %",
        "last_norm": "norm of the kernels",
        "late_update": "update / weight, late",
        "gradient": "norm of the gradient",
        "sharpness": "sharpness",
        "product": "Σ of norm × gradient",
    }
    return summary(runs[runs.part == "windows"], ["optimizer", "window"], shown)


def figure(runs: pd.DataFrame) -> Figure:
    """Two rows for each optimizer: the windows, how their runs measure, and growth by data."""
    figure, axes = plots.new_figure(4, 3, 15, 18)
    for k, o in enumerate(OPTIMIZERS):
        windows = runs[(runs.part == "windows") & (runs.optimizer == o)]
        growth = runs[(runs.part == "growth") & (runs.optimizer == o)]
        norms, updates, errors = axes[2 * k]
        measures, growing, gaps = axes[2 * k + 1]
        several, fewer = f"{windows.seed.nunique()} seeds", f"{growth.seed.nunique()} seeds"
        along = plots.curves(windows[["window", "seed", "step", "norm"]], "step", "norm")
        plots.lines(norms, along, "step", "norm", "window", WINDOWS)
        norms.set(xlabel="step", ylabel="norm of the kernels", yscale="log")
        norms.set_title(f"{o}: norm, by when there is decay, {several}")
        along = plots.curves(windows[["window", "seed", "step", "update"]], "step", "update")
        plots.lines(updates, along, "step", "update", "window", WINDOWS)
        updates.set(xlabel="step", ylabel="|update| / |w|", yscale="log", ylim=(1e-6, 0.3))
        updates.set_title(f"{o}: update beside the weights, {several}")
        plots.dots(errors, windows, "window", "error", WINDOWS)
        errors.set(xlabel="when there is decay", ylabel="test error, %")
        errors.set_title(f"{o}: test error, {several}")
        for i, (value, label) in enumerate(MEASURES.items()):
            chosen = by_seed(windows, value, "window")
            apart = chosen.div(chosen["never"], axis=0)[list(WINDOWS)]
            style = {"color": plots.PALETTE[i], "fmt": "o:", "capsize": 3, "label": label}
            measures.errorbar(WINDOWS, apart.mean(), yerr=apart.std(), **style)
        measures.set(xlabel="when there is decay", ylabel="at the end, over that of never")
        measures.set_yscale("log")
        measures.set_ylim(bottom=0.03)
        measures.set_title(f"{o}: what measures say, {several}")
        measures.legend(fontsize="small", loc="lower center", ncols=2)
        along = plots.curves(growth[["data", "seed", "epoch", "norm"]], "epoch", "norm")
        plots.lines(growing, along, "epoch", "norm", "data", DATA)
        growing.set(xlabel="epochs", ylabel="norm of the kernels", xscale="log")
        growing.set_title(f"{o} without decay: growth, {fewer}")
        plots.dots(gaps, growth, "data", "gap", DATA)
        gaps.set(xlabel="", ylabel="test − training error, points")
        gaps.set_xticks(range(4), [d.replace(" ", "\n", 1) for d in DATA])
        gaps.set_title(f"{o} without decay: generalisation gap, {fewer}")
    figure.suptitle(f"When decay acts, and what weights grow from. {plots.READING}")
    return figure


def notes(runs: pd.DataFrame) -> list[str]:
    said = []
    for o in OPTIMIZERS:
        apart = {
            value: mean_and_spread(
                ratio(runs, optimizer=o, value=value, a="always", b="never", by="window")
            )
            for value in ("gradient", "sharpness", "product")
        }
        loss = mean_and_spread(difference(runs, o, "loss", "early", "always"))
        late = mean_and_spread(difference(runs, o, "loss", "late", "always"))
        said.append(
            f"{o}: decay all along multiplies the gradient's norm at the end by "
            f"{apart['gradient']}, the sharpness by {apart['sharpness']} and Σ|w||g| by "
            f"{apart['product']}, against no decay. In test loss (nats) early decay is {loss} and "
            f"late decay {late} above decay all along."
        )
        gaps = by_seed(runs[(runs.part == "growth") & (runs.optimizer == o)], "gap", "data")
        listed = ", ".join(f"{d} {mean_and_spread(gaps[d])}" for d in DATA)
        said.append(f"{o} without decay, generalisation gap in points: {listed}.")
    return said


EXPERIMENT = Experiment(
    number="1",
    name="early_decay",
    title="Early decay",
    source="Bjorck, Weinberger & Gomes, AAAI 2021 (arXiv 2012.13841); Golatkar, Achille & Soatto, "
    "NeurIPS 2019 (arXiv 1905.13277)",
    method=__doc__ or "",
    settings=SETTINGS,
    tiny=TINY,
    seconds=3.0,
    plan=plan,
    run=run,
    predictions=tuple(p for o in OPTIMIZERS for p in _predictions(o)),
    table=table,
    figure=figure,
    notes=notes,
)
