"""Trained for many epochs, a network depends on the product of learning rate η and decay λ.

A ResNet with BatchNorm reads digits of which three in ten have a wrong label, at a constant
learning rate, over a grid of η and λ; then the learning rate falls to zero. With every kernel's
scale without meaning, η and λ act together: at equilibrium a step turns a kernel by an angle that
depends on ηλ alone. That is the scale of the noise; it keeps the training loss up, and the
network's Jacobian and its test error down.

An average of the weights (EMA) of the noisy run is compared with what the network becomes when the
learning rate falls, and with an ensemble of the run's snapshots. How far two predictions are apart
is their total variation distance: half the sum of the differences of their probabilities, from 0 to
1.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import product

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import wdkernels as wd
from claims import plots
from claims.data import IMAGES, TEST, TRAIN, hard, partly_wrong, rows
from claims.harness import Cell, Experiment, Record, seeds
from claims.networks import error_and_loss, evaluating, grouped, norm, resnet
from claims.statistics import Prediction
from claims.tables import mean_and_spread, number, summary
from claims.training import set_lr, sgd


@dataclass(frozen=True)
class Settings:
    seeds: int = 5
    steps: int = 400  # at a constant learning rate
    fall: int = 120  # while it falls to zero
    batch: int = 32
    wrong: float = 0.3  # share of the training labels that are random
    ema: float = 0.98
    snapshots: int = 10
    every: int = 20  # steps between snapshots
    adamw_lr: tuple[float, ...] = (5e-3, 1e-2, 2e-2)
    adamw_decay: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    sgd_lr: tuple[float, ...] = (0.1, 0.2, 0.4)
    sgd_decay: tuple[float, ...] = (2.5e-3, 5e-3, 1e-2, 2e-2)


SETTINGS = Settings()
TINY = Settings(
    seeds=2, steps=12, fall=4, snapshots=2, every=3, adamw_lr=(5e-3, 1e-2), adamw_decay=(2.0,),
    sgd_lr=(0.1, 0.2), sgd_decay=(1e-2,),
)  # fmt: skip
OPTIMIZERS = "AdamW", "SGD"


def plan(s: Settings) -> list[Cell]:
    grids = {"AdamW": (s.adamw_lr, s.adamw_decay), "SGD": (s.sgd_lr, s.sgd_decay)}
    return [
        {"optimizer": o, "lr": lr, "decay": decay, "seed": seed}
        for seed in seeds(s.seeds)
        for o in OPTIMIZERS
        for lr, decay in product(*grids[o])
    ]


def probabilities(model: nn.Module, images: Tensor) -> Tensor:
    with evaluating(model):
        result: Tensor = model(images).softmax(1)
    return result


def variation(p: Tensor, q: Tensor) -> float:
    """The mean total variation distance of the predictions."""
    return float((p - q).abs().sum(1).mean()) / 2


def jacobian_norm(model: nn.Module, images: Tensor) -> float:
    """The mean Frobenius norm of the logits' derivatives with respect to the pixels."""
    model.eval()
    images = images.clone().requires_grad_()
    logits = model(images).sum(0)
    rows_ = [torch.autograd.grad(logit, images, retain_graph=True)[0] for logit in logits]
    model.train()
    return float(torch.stack(rows_).pow(2).sum((0, 2, 3, 4)).sqrt().mean())


def step_on(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    batch: Tensor,
) -> float:
    """One step; the batch's loss."""
    optimizer.zero_grad()
    loss = F.cross_entropy(model(images[batch]), labels[batch])
    loss.backward()
    optimizer.step()
    return loss.item()


def run(s: Settings, cell: Cell) -> Record:
    images, labels = IMAGES[TRAIN], partly_wrong(TRAIN, s.wrong)
    test, test_labels = hard(TEST)
    model = resnet(cell["seed"])
    lr, decay = cell["lr"], cell["decay"]
    optimizer: torch.optim.Optimizer
    if cell["optimizer"] == "AdamW":
        optimizer = wd.AdamW(
            grouped(model), lr=lr, weight_decay=decay, ema_decay=s.ema, telemetry_every=10
        )
        average = None
    else:
        optimizer = sgd(model, lr, decay)
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(s.ema), use_buffers=True)
    kernels = [p for p in model.parameters() if p.ndim == 4]
    batches = list(rows(cell["seed"], s.steps + s.fall, s.batch, len(images)))

    losses, turns, ensemble = [], [], []
    for t, batch in enumerate(batches[: s.steps], start=1):
        late = t > s.steps - s.snapshots * s.every
        before = [p.detach().clone() for p in kernels] if late and t % 10 == 0 else []
        losses.append(step_on(model, optimizer, images, labels, batch))
        if average is not None:
            average.update_parameters(model)
        if before:
            moved = norm([p - q for p, q in zip(kernels, before, strict=True)])
            turns.append(moved / norm(before))
        if late and (s.steps - t) % s.every == 0:
            ensemble.append(probabilities(model, test))

    # The average needs statistics of its own for BatchNorm.
    averaged: nn.Module = deepcopy(model)
    if isinstance(optimizer, wd.AdamW):
        with optimizer.ema_weights():
            averaged.load_state_dict(model.state_dict())
    elif average is not None:
        averaged = average.module
    update_bn([images], averaged)
    by_average, by_last = probabilities(averaged, test), probabilities(model, test)
    by_ensemble = torch.stack(ensemble).mean(0)
    noisy_error, _ = error_and_loss(model, test, test_labels)
    jacobian = jacobian_norm(model, images)
    kept = s.snapshots * s.every
    plateau = sum(losses[-kept:]) / kept

    for t, batch in enumerate(batches[s.steps :]):
        set_lr(optimizer, lr * (1 - t / s.fall))
        step_on(model, optimizer, images, labels, batch)
    by_final = probabilities(model, test)
    error, loss = error_and_loss(model, test, test_labels)
    return {
        "product": lr * decay,
        "error": error,
        "loss": loss,
        "noisy_error": noisy_error,
        "average_error": error_and_loss(averaged, test, test_labels)[0],
        "plateau": plateau,  # the training loss at a constant learning rate
        "turn": sum(turns) / max(len(turns), 1),  # |change of w| / |w| of a step: the noise's scale
        "jacobian": jacobian,
        "final_jacobian": jacobian_norm(model, images),
        "average_final": variation(by_average, by_final),
        "last_final": variation(by_last, by_final),
        "average_ensemble": variation(by_average, by_ensemble),
        "snapshot_ensemble": float(np.mean([variation(p, by_ensemble) for p in ensemble])),
    }


# ---- what was predicted --------------------------------------------------------------------------


def excess_explained(runs: pd.DataFrame, optimizer: str, value: str) -> pd.Series:
    """By seed: what a parabola in log(ηλ) explains of the grid's variance, less what it leaves.

    Regressions on log η and log λ, with squares, are the alternatives: the better of the two is
    taken away. Above 0 the product explains more than either factor.
    """
    chosen = runs[runs.optimizer == optimizer]
    return chosen.groupby("seed").apply(
        lambda g: (
            explained(g["product"], g[value])
            - max(explained(g["lr"], g[value]), explained(g["decay"], g[value]))
        ),
        include_groups=False,
    )


def explained(x: pd.Series, y: pd.Series) -> float:
    """R² of a parabola in log x."""
    logs = np.log(x.to_numpy(float))
    values = y.to_numpy(float)
    fit = np.polyval(np.polyfit(logs, values, 2), logs)
    return 1 - float(((values - fit) ** 2).sum() / ((values - values.mean()) ** 2).sum())


def along_contours(runs: pd.DataFrame, optimizer: str, value: str) -> pd.Series:
    """By seed: the share of the grid's variance that lies within contours of equal ηλ."""
    chosen = runs[runs.optimizer == optimizer]

    def share(g: pd.DataFrame) -> float:
        contour = g.groupby(g["product"].map("{:.3g}".format))[value]
        left = ((g[value] - contour.transform("mean")) ** 2).sum()
        return float(left / ((g[value] - g[value].mean()) ** 2).sum())

    return chosen.groupby("seed").apply(share, include_groups=False)


def rank_correlation(runs: pd.DataFrame, optimizer: str, value: str) -> pd.Series:
    """By seed: Spearman's correlation, over the grid, of the value with ηλ."""
    chosen = runs[runs.optimizer == optimizer]
    return chosen.groupby("seed").apply(
        lambda g: g["product"].corr(g[value], method="spearman"), include_groups=False
    )


def nearer(runs: pd.DataFrame, optimizer: str, a: str, b: str) -> pd.Series:
    """By seed: distance a over distance b, the mean over the half of the grid with the larger η."""
    chosen = runs[(runs.optimizer == optimizer)]
    chosen = chosen[chosen.lr > chosen.lr.median()]
    means = chosen.groupby("seed")[[a, b]].mean()
    return means[a] / means[b]


def _predictions(o: str) -> list[Prediction]:
    n = SETTINGS.seeds
    shuffled = "a share of 6/11 would be chance: the grid has 12 cells on 6 contours"
    return [
        Prediction(
            f"{o}: the test error is constant along the contours of ηλ",
            "share of its variance over the grid that lies within contours",
            partial(along_contours, optimizer=o, value="error"),
            "below", 0.4, n, shuffled,
        ),
        Prediction(
            f"{o}: so is the scale of the noise",
            "share of the variance of |Δw|/|w| that lies within contours",
            partial(along_contours, optimizer=o, value="turn"),
            "below", 0.4, n, shuffled,
        ),
        Prediction(
            f"{o}: the test error follows the product more than either factor",
            "R² of a parabola in log ηλ less the better one of log η and log λ",
            partial(excess_explained, optimizer=o, value="error"),
            "above", 0.0, n, "η alone, λ alone",
        ),
        Prediction(
            f"{o}: the test error falls with the product",
            "rank correlation over the grid of ηλ with the test error",
            partial(rank_correlation, optimizer=o, value="error"),
            "below", -0.5, n, "none",
        ),
        Prediction(
            f"{o}: the noise grows with the product",
            "rank correlation of ηλ with |Δw|/|w|",
            partial(rank_correlation, optimizer=o, value="turn"),
            "above", 0.5, n, "none",
        ),
        Prediction(
            f"{o}: the norm of the network's Jacobian falls with it",
            "rank correlation of ηλ with the Jacobian's norm after the learning rate fell",
            partial(rank_correlation, optimizer=o, value="final_jacobian"),
            "below", -0.5, n, "none",
        ),
        Prediction(
            f"{o}: the average of a run at a large η predicts the network fine-tuned from it",
            "total variation to the fine-tuned network: of the average / of the last weights",
            partial(nearer, optimizer=o, a="average_final", b="last_final"),
            "below", 1.0, n, "the last weights of the same run",
        ),
        Prediction(
            f"{o}: the average stands for the ensemble of its snapshots",
            "total variation to the ensemble: of the average / of a snapshot",
            partial(nearer, optimizer=o, a="average_ensemble", b="snapshot_ensemble"),
            "below", 1.0, n, "the mean single snapshot",
        ),
    ]  # fmt: skip


# ---- how it is shown -----------------------------------------------------------------------------


def table(runs: pd.DataFrame) -> pd.DataFrame:
    runs = runs.assign(contour=runs["product"].map("{:.3g}".format)).sort_values(
        ["optimizer", "product"]
    )
    shown = {
        "error": "test error, %",
        "noisy_error": "before η fell, %",
        "average_error": "of the average, %",
        "turn": "noise |Δw|/|w|",
        "plateau": "training loss, η constant",
        "final_jacobian": "Jacobian",
        "average_final": "TV average – fine-tuned",
        "last_final": "TV last – fine-tuned",
        "average_ensemble": "TV average – ensemble",
        "snapshot_ensemble": "TV snapshot – ensemble",
    }
    return summary(runs, ["optimizer", "contour"], shown).rename(columns={"contour": "ηλ"})


def figure(runs: pd.DataFrame) -> Figure:
    """A row for each optimizer: heat maps over the grid, the Jacobian, distances."""
    figure, axes = plots.new_figure(4, 2, 14, 21)
    seeds = runs.seed.nunique()
    for k, o in enumerate(OPTIMIZERS):
        row = [*axes[2 * k], *axes[2 * k + 1]]
        chosen = runs[runs.optimizer == o]
        for ax, value, label, fmt in (
            (row[0], "error", "test error, %", ".1f"),
            (row[1], "turn", "noise |Δw|/|w| of a step, %", ".2f"),
        ):
            grid = chosen.pivot_table(index="decay", columns="lr", values=value)
            grid = (grid if value == "error" else 100 * grid).sort_index(ascending=False)
            grid.index, grid.columns = map("{:g}".format, grid.index), map("{:g}".format, grid)
            plots.heat(ax, grid, label, fmt)
            ax.set(xlabel="learning rate η", ylabel="decay λ")
            ax.set_title(
                f"{o}: {label}, mean of {seeds} seeds\n(ηλ is equal along falling diagonals)"
            )
        for value, label, i in (
            ("jacobian", "η constant", 0),
            ("final_jacobian", "after η fell", 1),
        ):
            color = plots.PALETTE[i]
            row[2].scatter(chosen["product"], chosen[value], s=12, alpha=0.4, color=color)
            means = chosen.groupby("product")[value].mean()
            row[2].plot(means.index, means, color=color, label=label)
        row[2].set(xlabel="product ηλ, 1/step", ylabel="Frobenius norm, logits per unit of pixel")
        row[2].set(xscale="log", yscale="log")
        row[2].set_title(f"{o}: norm of the network's Jacobian, {seeds} seeds")
        row[2].legend()
        for value, label, i in (
            ("last_final", "last weights – fine-tuned", 1),
            ("average_final", "average – fine-tuned", 0),
            ("snapshot_ensemble", "snapshot – ensemble", 3),
            ("average_ensemble", "average – ensemble", 2),
        ):
            means = chosen.groupby("product")[value]
            style = {"color": plots.PALETTE[i], "label": label, "capsize": 2, "marker": "o"}
            row[3].errorbar(means.mean().index, means.mean(), yerr=means.std(), **style)
        row[3].set(
            xlabel="product ηλ, 1/step", ylabel="total variation distance, 0 to 1", xscale="log"
        )
        row[3].set_title(f"{o}: how far predictions are apart, {seeds} seeds")
        row[3].legend()
    figure.suptitle("A ResNet in many epochs, 30% of its labels wrong. Dots: runs; bars: one s.d.")
    return figure


def notes(runs: pd.DataFrame) -> list[str]:
    said = []
    for o in OPTIMIZERS:
        chosen = runs[runs.optimizer == o]
        fits = chosen.groupby("seed").apply(
            lambda g: pd.Series(
                {x: explained(g[x], g["error"]) for x in ("product", "lr", "decay")}
            ),
            include_groups=False,
        )
        said.append(
            f"{o}: a parabola in the logarithm explains this share of the test error's variance: "
            f"of ηλ {mean_and_spread(fits['product'])}, of η {mean_and_spread(fits.lr)}, of λ "
            f"{mean_and_spread(fits.decay)}."
        )
        means = chosen.groupby("product")[["error", "average_error", "noisy_error"]].mean()
        low = means.error.idxmin()
        said.append(
            f"{o}: the lowest test error after η fell is {number(means.error.min())} %, at ηλ = "
            f"{number(low)}; there the average of the weights, before η falls, has "
            f"{number(means.average_error[low])} % and the last weights "
            f"{number(means.noisy_error[low])} %."
        )
        turns = chosen.groupby("product")["turn"].mean()
        slope = np.polyfit(np.log(turns.index), np.log(turns), 1)[0]
        said.append(
            f"{o}: |Δw|/|w| grows as (ηλ) to the power {number(float(slope))}; at equilibrium it "
            "would be 0.5."
        )
    return said


EXPERIMENT = Experiment(
    number="4a",
    name="over_training",
    title="Over-training: learning rate times decay",
    source="Andriushchenko, D'Angelo, Varre & Flammarion, NeurIPS 2024 (arXiv 2310.04415)",
    method=__doc__ or "",
    settings=SETTINGS,
    tiny=TINY,
    seconds=2.2,
    plan=plan,
    run=run,
    predictions=tuple(p for o in OPTIMIZERS for p in _predictions(o)),
    table=table,
    figure=figure,
    notes=notes,
)
