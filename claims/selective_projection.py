"""Selective Projection Decay holds on to what pretraining knew, where that helps.

A ViT learns the digits of six writers, broadly augmented. It is then fine-tuned on digits of four
other writers, all tilted by 45 degrees: with no decay, decay to zero (AdamW), decay to the
pretrained weights (L2-SP) and Selective Projection Decay (SPD), each over its own grid of decays;
under torch.optim.SGD too, with L2. It is tested on writers it has never seen: in distribution,
tilted by 45 degrees; out of distribution, under six other shifts. With LoRA only the added weights
learn, and decay to zero, which leaves the pretrained network.

A decay is tuned on the writers it is fine-tuned on but with a fifth of the images held out, by the
mean of the accuracies in and out of distribution; the test writers play no part in it.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from functools import cache, partial
from itertools import product

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

import wdkernels as wd
from claims import plots
from claims.data import (
    IMAGES,
    LABELS,
    TEST,
    TRAIN,
    VALID,
    blurred,
    inverted,
    noisy,
    rotated,
    rows,
    seeded,
)  # fmt: skip
from claims.harness import Cell, Experiment, Record, seeds
from claims.networks import ViT, error_and_loss, grouped, norm, with_lora
from claims.statistics import Direction, Prediction, at_an_edge, best, by_seed
from claims.tables import mean_and_spread, number, summary
from claims.training import cosine, set_lr, sgd


@dataclass(frozen=True)
class Settings:
    seeds: int = 5
    pretrain_steps: int = 1200
    pretrain_batch: int = 64
    steps: int = 200
    batch: int = 32
    lr: float = 1e-3
    sgd_lr: float = 3e-2
    lora_lr: float = 3e-3
    rank: int = 4
    held_out: int = 100  # images of the fine-tuning writers on which decays are tuned
    adamw: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0)
    l2sp: tuple[float, ...] = (3.0, 10.0, 30.0, 100.0)
    spd: tuple[float, ...] = (1.0, 4.0, 16.0, 64.0)
    sgd: tuple[float, ...] = (1e-3, 1e-2)
    lora_adamw: tuple[float, ...] = (3.0, 10.0)
    lora_spd: tuple[float, ...] = (4.0, 16.0)


SETTINGS = Settings()
TINY = Settings(
    seeds=2, pretrain_steps=4, steps=4, adamw=(1.0,), l2sp=(1.0,), spd=(1.0,), sgd=(1e-3,),
    lora_adamw=(1.0,), lora_spd=(1.0,),
)  # fmt: skip
FULL = "none", "AdamW", "L2-SP", "SPD", "SGD, none", "SGD, L2"
LORA = "LoRA, none", "LoRA, AdamW", "LoRA, SPD"


def plan(s: Settings) -> list[Cell]:
    grids = {
        "none": (0.0,),
        "AdamW": s.adamw,
        "L2-SP": s.l2sp,
        "SPD": s.spd,
        "SGD, none": (0.0,),
        "SGD, L2": s.sgd,
        "LoRA, none": (0.0,),
        "LoRA, AdamW": s.lora_adamw,
        "LoRA, SPD": s.lora_spd,
    }
    cells = [(method, decay) for method, grid in grids.items() for decay in grid]
    return [
        {"method": method, "decay": decay, "seed": seed}
        for seed, (method, decay) in product(seeds(s.seeds), cells)
    ]


def shifted(part: slice) -> dict[str, Tensor]:
    """The images of a part under each shift that fine-tuning does not see."""
    images = IMAGES[part]
    return {
        "upright": images,
        "tilted back": rotated(images, -20),
        "noisy": noisy(images, 0.3),
        "blurred": blurred(images),
        "faint": 0.4 * images,
        "inverted": inverted(images),
    }


def augmented(images: Tensor, rng: torch.Generator) -> Tensor:
    """What pretraining sees: turned up to 30 degrees, fainter, noisy, every third one inverted."""
    turn, fade, invert = torch.rand(3, len(images), 1, 1, 1, generator=rng)
    images = rotated(images, (60 * turn - 30).flatten()) * (1 - 0.6 * fade)
    images = (images + 0.2 * torch.randn(images.shape, generator=rng)).clamp(0, 1)
    return torch.where(invert < 1 / 3, inverted(images), images)


@cache  # a worker meets the same seed several times
def pretrained(seed: int, steps: int, batch: int) -> ViT:
    model, rng = ViT(seed), seeded(seed)
    optimizer = wd.AdamW(grouped(model), lr=2e-3, weight_decay=0.1)
    images, labels = IMAGES[TRAIN], LABELS[TRAIN]
    for t, chosen in enumerate(rows(seed, steps, batch, len(images))):
        set_lr(optimizer, 2e-3 * cosine(t, steps))
        optimizer.zero_grad()
        F.cross_entropy(model(augmented(images[chosen], rng)), labels[chosen]).backward()
        optimizer.step()
    return model


def optimizer_for(s: Settings, cell: Cell, model: nn.Module) -> torch.optim.Optimizer:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    method, decay = cell["method"], cell["decay"]
    if method.startswith("SGD"):
        return sgd(model, s.sgd_lr, decay)
    if method.startswith("LoRA"):
        if method == "LoRA, SPD":
            return wd.AdamSPD(named, lr=s.lora_lr, weight_decay=decay, anchor="zero")
        return wd.AdamW(named, lr=s.lora_lr, weight_decay=decay)
    if method == "SPD":
        return wd.AdamSPD(named, lr=s.lr, weight_decay=decay, telemetry_every=1)
    if method == "L2-SP":
        return wd.AdamW(named, lr=s.lr, weight_decay=decay, anchor="initial")
    return wd.AdamW(named, lr=s.lr, weight_decay=decay)


def accuracies(model: nn.Module, part: slice) -> tuple[float, dict[str, float]]:
    """In percent, in distribution and under each shift out of it."""
    inside = 100 - error_and_loss(model, rotated(IMAGES[part], 45), LABELS[part])[0]
    shifts = shifted(part).items()
    return inside, {k: 100 - error_and_loss(model, x, LABELS[part])[0] for k, x in shifts}


def run(s: Settings, cell: Cell) -> Record:
    before = pretrained(cell["seed"], s.pretrain_steps, s.pretrain_batch)
    before_inside, before_outside = accuracies(before, TEST)
    model = deepcopy(before)
    if cell["method"].startswith("LoRA"):
        torch.manual_seed(cell["seed"])
        model = with_lora(model, s.rank)
    optimizer = optimizer_for(s, cell, model)
    lr = optimizer.param_groups[0]["lr"]
    tuned_on = slice(VALID.stop - s.held_out, VALID.stop)
    tilted = rotated(IMAGES[VALID.start : tuned_on.start], 45)
    labels = LABELS[VALID.start : tuned_on.start]
    ratios: dict[str, list[float]] = {}
    selected: dict[str, list[float]] = {}
    for t, batch in enumerate(rows(cell["seed"], s.steps, s.batch, len(tilted))):
        set_lr(optimizer, lr * cosine(t, s.steps))
        optimizer.zero_grad()
        F.cross_entropy(model(tilted[batch]), labels[batch]).backward()
        optimizer.step()
        if cell["method"] == "SPD":
            assert isinstance(optimizer, wd.AdamSPD)
            for name, told in optimizer.telemetry().to_dict().items():
                if name != "total":
                    selected.setdefault(name, []).append(told["selected"])
                    ratios.setdefault(name, []).append(told["selected"] * told["ratio"])
    inside, outside = accuracies(model, TEST)
    valid_inside, valid_outside = accuracies(model, tuned_on)
    full = not cell["method"].startswith("LoRA")
    pairs = zip(model.parameters(), before.parameters(), strict=True) if full else ()
    return {
        "before_inside": before_inside,
        "before_outside": sum(before_outside.values()) / len(before_outside),
        "inside": inside,
        **outside,
        "outside": sum(outside.values()) / len(outside),
        "tuning": -(valid_inside + sum(valid_outside.values()) / len(valid_outside)) / 2,
        "distance": norm([p - q for p, q in pairs]) if full else None,
        "selected": {name: _tenths(x) for name, x in selected.items()},
        "ratios": {name: _tenths(x) for name, x in ratios.items()},
    }


def _tenths(x: list[float]) -> list[float]:
    """The means of up to 20 stretches: enough for a picture."""
    size = max(1, len(x) // 20)
    return [sum(x[k : k + size]) / size for k in range(0, len(x) - size + 1, size)]


# ---- what was predicted --------------------------------------------------------------------------


def tuned(runs: pd.DataFrame) -> pd.DataFrame:
    """Of each method the runs at the decay that was best on the held-out images."""
    return best(runs, "method", ["decay"], "tuning")


def gain(runs: pd.DataFrame, value: str, a: str, b: str) -> pd.Series:
    """By seed: accuracy with method a less that with method b, each tuned, in points."""
    chosen = by_seed(tuned(runs), value, "method")
    return chosen[a] - chosen[b]


def _gain(
    says: str, value: str, a: str, b: str, direction: Direction, threshold: float
) -> Prediction:
    where = {"inside": "in distribution", "outside": "out of distribution, mean of six shifts"}
    measure = f"accuracy {where[value]}, {a} − {b}, points"
    numbers = partial(gain, value=value, a=a, b=b)
    baseline = f"{b}, its decay tuned" if "none" not in b else "no decay: nothing to be tuned"
    return Prediction(says, measure, numbers, direction, threshold, SETTINGS.seeds, baseline)


PREDICTIONS = (
    _gain("SPD keeps more out of distribution than no decay", "outside", "SPD", "none", "above", 0),
    _gain("and more than AdamW", "outside", "SPD", "AdamW", "above", 0),
    _gain("and more than L2-SP", "outside", "SPD", "L2-SP", "above", 0),
    _gain("SPD learns the task as well as no decay", "inside", "SPD", "none", "above", -1),
    _gain("SPD learns the task better than L2-SP", "inside", "SPD", "L2-SP", "above", 0),
    _gain("LoRA: SPD keeps more than no decay", "outside", "LoRA, SPD", "LoRA, none", "above", 0),
    _gain("LoRA: and more than AdamW", "outside", "LoRA, SPD", "LoRA, AdamW", "above", 0),
    _gain("LoRA: SPD learns the task as well", "inside", "LoRA, SPD", "LoRA, none", "above", -1),
)


# ---- how it is shown -----------------------------------------------------------------------------


def table(runs: pd.DataFrame) -> pd.DataFrame:
    shown = {"inside": "in distribution, %", "outside": "out of distribution, %"}
    shown |= {name: f"{name}, %" for name in shifted(slice(0, 1))} | {"distance": "distance moved"}
    every = summary(runs, ["method", "decay"], shown)
    best_of = tuned(runs).groupby("method")["decay"].first()
    pairs = zip(every.method, every.decay, strict=True)
    every["decay"] = [f"{d:g}{' (tuned)' if best_of[m] == d else ''}" for m, d in pairs]
    return every


def figure(runs: pd.DataFrame) -> Figure:
    """Accuracies over the grids, the tuned ones, and which layers SPD contracted when."""
    figure, axes = plots.new_figure(2, 2, 16, 13)
    names = [*FULL, *LORA]
    color = plots.colors(names)
    seeds = runs.seed.nunique()
    trade, layers, inside, outside = axes.flat
    for name in names:
        means = runs[runs.method == name].groupby("decay")[["inside", "outside"]].mean()
        style = {"marker": "o", "color": color[name], "label": name}
        line = "--" if name.startswith("LoRA") else ":" if name.startswith("SGD") else "-"
        trade.plot(means.inside, means.outside, linestyle=line, **style)
        for decay, point in means.iterrows():
            trade.annotate(f"{decay:g}", (point.inside, point.outside), fontsize=7)
    trade.set(xlabel="accuracy in distribution, %", ylabel="accuracy out of distribution, %")
    trade.set_title(f"every decay of the grids (numbers at dots), mean of {seeds} seeds")
    trade.legend(fontsize="small")
    chosen = tuned(runs)
    for ax, value, title in (
        (inside, "inside", "in distribution"),
        (outside, "outside", "out of distribution"),
    ):
        plots.dots(ax, chosen, "method", value, names)
        ax.set(xlabel="", ylabel=f"accuracy {title}, %")
        ax.set_title(f"{title}, decay tuned, {seeds} seeds")
        ax.tick_params(axis="x", rotation=60)
    spd = chosen[chosen.method == "SPD"]
    mean = pd.concat([pd.DataFrame(r) for r in spd.ratios]).groupby(level=0).mean().T
    every = SETTINGS.steps // 20
    mean.columns = [every * k for k in mean.columns]
    plots.heat(layers, 1000 * mean, "r × 1000, mean over steps and seeds", annot=False)
    layers.set(xlabel="step", ylabel="")
    layers.tick_params(axis="y", labelsize=8)
    layers.set_title(f"what SPD contracted when (decay {spd.decay.iloc[0]:g}, {seeds} seeds)")
    figure.suptitle(f"Fine-tuning a ViT to digits tilted by 45°. {plots.READING}")
    return figure


def notes(runs: pd.DataFrame) -> list[str]:
    plain = runs[runs.method == "none"]
    said = [
        f"Before fine-tuning the network reads {mean_and_spread(plain.before_inside)} % in "
        f"distribution and {mean_and_spread(plain.before_outside)} % out of distribution."
    ]
    chosen = tuned(runs)
    listed = ", ".join(f"{m} {g.decay.iloc[0]:g}" for m, g in chosen.groupby("method", sort=False))
    edges = ", ".join(at_an_edge(runs, chosen, "method", "decay")) or "none"
    said.append(f"Tuned decays: {listed}. At an edge of their grid: {edges}.")
    listed = ", ".join(
        f"{m} {mean_and_spread(g.distance)}"
        for m, g in chosen.groupby("method", sort=False)
        if not m.startswith("LoRA")
    )
    said.append(f"Distance from the pretrained weights, tuned: {listed}.")
    spd = chosen[chosen.method == "SPD"]
    share = pd.concat([pd.DataFrame(x) for x in spd.selected])
    means = 100 * share.mean().sort_values(ascending=False)
    said.append(
        f"SPD, tuned, selected a tensor in {number(float(means.mean()))} % of the steps: "
        f"most often {means.index[0]} ({number(means.iloc[0])} %), least often {means.index[-1]} "
        f"({number(means.iloc[-1])} %)."
    )
    # The same decay for SPD and L2-SP means nothing; the same distance moved does.
    points = runs[runs.method.isin(["SPD", "L2-SP"])].groupby(["method", "decay"])
    table_ = points[["distance", "inside", "outside"]].mean().reset_index()
    listed = "; ".join(
        f"{r.method} {r.decay:g}: moved {number(r.distance)}, {number(r.inside)} % in, "
        f"{number(r.outside)} % out"
        for r in table_.itertuples()
    )
    said.append(f"The whole grids, to compare at equal distance: {listed}.")
    return said


EXPERIMENT = Experiment(
    number="3",
    name="selective_projection",
    title="Selective Projection Decay",
    source="Tian, Huang & Kira, NeurIPS 2024 (arXiv 2411.01713)",
    method=__doc__ or "",
    settings=SETTINGS,
    tiny=TINY,
    seconds=1.8,
    plan=plan,
    run=run,
    predictions=PREDICTIONS,
    table=table,
    figure=figure,
    notes=notes,
)
