"""Why decoupling helps: L2 drowns the gradient in Adam's buffers; adaptivity is not the culprit.

Three decays: L2, whose penalty enters both of Adam's moments; unmixed L2, whose penalty joins m in
the step, is divided by √v as well, but enters no moment; and AdamW, which does neither. Each has a
grid of learning rates and decays, with a small GPT that reads a few pages of Python over and over,
and with a small DQN that learns gymnasium's CartPole.

If unmixed L2 is as good as AdamW, dividing the decay by √v is not what harms L2: mixing is. How
much of m is penalty is measured by keeping the penalty's own moving average beside m.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import gymnasium
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

import wdkernels as wd
from claims import plots
from claims.data import CONTEXT, VOCABULARY, rows, text, unseen_text
from claims.harness import Cell, Experiment, Record, seeds
from claims.networks import GPT, next_character_loss, norm
from claims.statistics import Prediction, at_an_edge, best, by_seed
from claims.tables import mean_and_spread, summary
from claims.training import cosine, set_lr


@dataclass(frozen=True)
class Settings:
    text_seeds: int = 5
    steps: int = 150
    batch: int = 8
    width: int = 48
    pool: int = 30  # blocks of text, read over and over: without decay they are learnt by heart
    text_lr: tuple[float, ...] = (1e-2, 3e-2)
    # √v divides the first two: theirs are a hundred times lower.
    text_l2: tuple[float, ...] = (1e-2, 3e-2, 1e-1, 3e-1)
    text_unmixed: tuple[float, ...] = (1e-2, 3e-2, 1e-1, 3e-1)
    text_adamw: tuple[float, ...] = (1.0, 3.0, 10.0, 30.0)
    text_eps: float = 1e-3  # unmixed L2 diverges where lr x decay is above 2 eps and v is 0
    game_seeds: int = 5
    moves: int = 5000
    game_lr: tuple[float, ...] = (1e-3, 3e-3)
    game_l2: tuple[float, ...] = (1e-4, 1e-3, 1e-2)
    game_unmixed: tuple[float, ...] = (1e-4, 1e-3, 1e-2)
    game_adamw: tuple[float, ...] = (1e-2, 1e-1, 1.0)
    game_eps: float = 1e-3
    episodes: int = 10  # played greedily at the end


SETTINGS = Settings()
_ONE = (1e-2,)
TINY = Settings(
    text_seeds=2, steps=4, text_lr=(1e-3,), text_l2=_ONE, text_unmixed=_ONE, text_adamw=_ONE,
    game_seeds=2, moves=150, game_lr=(1e-3,), game_l2=_ONE, game_unmixed=_ONE, game_adamw=_ONE,
    episodes=1,
)  # fmt: skip
METHODS = "L2", "unmixed", "AdamW"
PARTS = "text", "game"


def plan(s: Settings) -> list[Cell]:
    grids = {
        ("text", "L2"): (s.text_lr, s.text_l2),
        ("text", "unmixed"): (s.text_lr, s.text_unmixed),
        ("text", "AdamW"): (s.text_lr, s.text_adamw),
        ("game", "L2"): (s.game_lr, s.game_l2),
        ("game", "unmixed"): (s.game_lr, s.game_unmixed),
        ("game", "AdamW"): (s.game_lr, s.game_adamw),
    }
    return [
        {"part": part, "method": method, "lr": lr, "decay": decay, "seed": seed}
        for (part, method), (rates, decays) in grids.items()
        for seed in seeds(s.text_seeds if part == "text" else s.game_seeds, first=300)
        for lr, decay in product(rates, decays)
    ]


def decaying(model: nn.Module) -> list[Tensor]:
    """Matrices, but for embeddings: a character that has not come yet has v = 0.

    Unmixed L2 divides by √v, and would throw it away.
    """
    named = model.named_parameters()
    return [p for name, p in named if p.ndim > 1 and not name.startswith("characters")]


def optimizer_for(cell: Cell, model: nn.Module, eps: float) -> torch.optim.Optimizer:
    weights = decaying(model)
    others = [p for p in model.parameters() if all(p is not w for w in weights)]
    groups: list[dict[str, Any]] = [{"params": weights}, {"params": others, "weight_decay": 0.0}]
    options = {"lr": cell["lr"], "weight_decay": cell["decay"], "eps": eps}
    if cell["method"] == "AdamW":
        return wd.AdamW(groups, **options)
    return wd.Adam(groups, **options, unmixed=cell["method"] == "unmixed")


# ---- text ----------------------------------------------------------------------------------------


def run_text(s: Settings, cell: Cell) -> Record:
    model = GPT(cell["seed"], VOCABULARY, CONTEXT, s.width)
    optimizer = optimizer_for(cell, model, s.text_eps)
    weights = decaying(model)
    mixed = cell["method"] == "L2"
    penalty = [torch.zeros_like(w) for w in weights]
    at, shares = [], []
    pool = text(cell["seed"], 1, s.pool)[0]
    for t, chosen in enumerate(rows(cell["seed"], s.steps, s.batch, s.pool), start=1):
        set_lr(optimizer, cell["lr"] * cosine(t - 1, s.steps))
        optimizer.zero_grad()
        next_character_loss(model, pool[chosen]).backward()
        if mixed:  # the penalty's part of m is its own average, as averages are linear
            for part, w in zip(penalty, weights, strict=True):
                part.lerp_(cell["decay"] * w.detach(), 0.1)
        optimizer.step()
        if mixed and t % 5 == 0:
            means = [optimizer.state[w]["exp_avg"] for w in weights]
            rest = norm([m - part for m, part in zip(means, penalty, strict=True)])
            at.append(t)
            shares.append(100 * norm(penalty) / (norm(penalty) + rest))
    with torch.no_grad():
        loss = next_character_loss(model, unseen_text(512)).item()
        tuning = next_character_loss(model, unseen_text(1024)[512:]).item()
    return {
        "loss": loss,
        "tuning": tuning,
        "norm": norm(weights),
        "step": at,
        "share": shares,
        "last_share": sum(shares[-5:]) / 5 if mixed else None,
    }


# ---- game ----------------------------------------------------------------------------------------


def q_network(seed: int) -> nn.Sequential:
    """The value of both moves."""
    torch.manual_seed(seed)
    layers = nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)
    return nn.Sequential(*layers)


def play(model: nn.Module, episodes: int, seed: int) -> float:
    """The mean return of greedy play; 500 is the most there is."""
    game, total = gymnasium.make("CartPole-v1"), 0.0
    for episode in range(episodes):
        state, _ = game.reset(seed=10_000 * seed + episode)
        over = False
        while not over:
            with torch.no_grad():
                move = int(model(torch.from_numpy(state)).argmax())
            state, reward, ended, cut, _ = game.step(move)
            total, over = total + float(reward), ended or cut
    return total / episodes


def run_game(s: Settings, cell: Cell) -> Record:
    """Double DQN: one step every second move, the target network copied every 200 moves."""
    model, target = q_network(cell["seed"]), q_network(cell["seed"])
    optimizer = optimizer_for(cell, model, s.game_eps)
    game, rng = gymnasium.make("CartPole-v1"), np.random.default_rng(cell["seed"])
    states, following = torch.zeros(s.moves, 4), torch.zeros(s.moves, 4)
    moves = torch.zeros(s.moves, dtype=torch.long)
    rewards, going = torch.zeros(s.moves), torch.zeros(s.moves)
    returns: deque[float] = deque([0.0], maxlen=20)
    episode = 0.0
    state, _ = game.reset(seed=cell["seed"])
    for t in range(s.moves):
        explore = max(0.05, 1 - t / (0.3 * s.moves))
        if rng.random() < explore:
            move = int(rng.integers(2))
        else:
            with torch.no_grad():
                move = int(model(torch.from_numpy(state)).argmax())
        after, reward, ended, cut, _ = game.step(move)
        states[t], following[t] = torch.from_numpy(state), torch.from_numpy(after)
        moves[t], rewards[t], going[t] = move, float(reward), 1.0 - ended
        state, episode = after, episode + float(reward)
        if ended or cut:
            returns.append(episode)
            episode = 0.0
            state, _ = game.reset()
        if t % 200 == 0:
            target.load_state_dict(model.state_dict())
        if t >= 100 and t % 2 == 0:
            k = torch.from_numpy(rng.integers(0, t + 1, 64))
            with torch.no_grad():
                choice = model(following[k]).argmax(1, keepdim=True)
                value = rewards[k] + 0.99 * going[k] * target(following[k]).gather(1, choice)[:, 0]
            optimizer.zero_grad()
            F.smooth_l1_loss(model(states[k]).gather(1, moves[k, None])[:, 0], value).backward()
            optimizer.step()
    return {
        "return": (played := play(model, s.episodes, cell["seed"])),
        "loss": -played,  # so that less is better, as in text
        "tuning": -sum(returns) / len(returns),  # the last 20 episodes of training
        "norm": norm(decaying(model)),
    }


def run(s: Settings, cell: Cell) -> Record:
    return run_text(s, cell) if cell["part"] == "text" else run_game(s, cell)


# ---- what was predicted --------------------------------------------------------------------------


def tuned(runs: pd.DataFrame, part: str) -> pd.DataFrame:
    """Of each method the runs at its best learning rate and decay."""
    return best(runs[runs.part == part], "method", ["lr", "decay"], "tuning")


def difference(runs: pd.DataFrame, part: str, a: str, b: str) -> pd.Series:
    """By seed: the test loss (text) or minus the return (game) of a less that of b, each tuned."""
    chosen = by_seed(tuned(runs, part), "loss", "method")
    return chosen[a] - chosen[b]


def good(runs: pd.DataFrame, part: str) -> pd.DataFrame:
    """By seed and method: the share of the grid, in percent, that is nearly as good as the best.

    Nearly means within 0.1 nats of the seed's best run of any method (text), or half its return.
    """
    chosen = runs[runs.part == part]
    lowest = chosen.groupby("seed")["loss"].transform("min")
    limit = lowest + 0.1 if part == "text" else lowest / 2
    marked = chosen.assign(good=100.0 * (chosen.loss <= limit))
    return by_seed(marked, "good", "method")


def region(runs: pd.DataFrame, part: str, a: str, b: str) -> pd.Series:
    """By seed: the good share of a's grid less that of b's, in percentage points."""
    shares = good(runs, part)
    return shares[a] - shares[b]


def penalty_share(runs: pd.DataFrame) -> pd.Series:
    """By seed: the penalty's share of m at the end, in percent, where L2 is tuned."""
    return by_seed(tuned(runs, "text"), "last_share", "method")["L2"]


_N, _M = SETTINGS.text_seeds, SETTINGS.game_seeds
PREDICTIONS = (
    Prediction(
        "text: under L2 a good part of m is penalty",
        "|penalty in m| / (|penalty in m| + |rest of m|) at the end, L2 tuned, percent",
        penalty_share,
        "above", 10.0, _N, "none",
    ),
    Prediction(
        "text: AdamW ends lower than L2",
        "test loss, L2 − AdamW, nats a character",
        partial(difference, part="text", a="L2", b="AdamW"),
        "above", 0.0, _N, "L2, learning rate and decay tuned",
    ),
    Prediction(
        "text: unmixed L2 behaves like AdamW",
        "test loss, unmixed − AdamW, nats a character",
        partial(difference, part="text", a="unmixed", b="AdamW"),
        "within", 0.05, _N, "AdamW, learning rate and decay tuned",
    ),
    Prediction(
        "text: AdamW's good region is larger than that of L2",
        "share of the grid within 0.1 nats of the best run, AdamW − L2, points",
        partial(region, part="text", a="AdamW", b="L2"),
        "above", 0.0, _N, "L2, its whole grid (untuned)",
    ),
    Prediction(
        "text: so is that of unmixed L2",
        "share of the grid within 0.1 nats of the best run, unmixed − L2, points",
        partial(region, part="text", a="unmixed", b="L2"),
        "above", 0.0, _N, "L2, its whole grid (untuned)",
    ),
    Prediction(
        "game: AdamW's return is higher than that of L2",
        "return of CartPole, AdamW − L2",
        partial(difference, part="game", a="L2", b="AdamW"),
        "above", 0.0, _M, "L2, learning rate and decay tuned",
    ),
    Prediction(
        "game: unmixed L2 behaves like AdamW",
        "return of CartPole, AdamW − unmixed",
        partial(difference, part="game", a="unmixed", b="AdamW"),
        "within", 50.0, _M, "AdamW, learning rate and decay tuned",
    ),
    Prediction(
        "game: AdamW's good region is larger than that of L2",
        "share of the grid with half the best return or more, AdamW − L2, points",
        partial(region, part="game", a="AdamW", b="L2"),
        "above", 0.0, _M, "L2, its whole grid (untuned)",
    ),
    Prediction(
        "game: so is that of unmixed L2",
        "share of the grid with half the best return or more, unmixed − L2, points",
        partial(region, part="game", a="unmixed", b="L2"),
        "above", 0.0, _M, "L2, its whole grid (untuned)",
    ),
)  # fmt: skip


# ---- how it is shown -----------------------------------------------------------------------------


def table(runs: pd.DataFrame) -> pd.DataFrame:
    chosen = pd.concat([tuned(runs, part) for part in PARTS])
    shares = {p: good(runs, p).stack().rename("good").reset_index() for p in PARTS}
    regions = pd.concat([share.assign(part=part) for part, share in shares.items()])
    chosen = chosen.merge(regions, on=["part", "method", "seed"])
    shown = {
        "loss": "test loss, nats",
        "return": "return",
        "last_share": "penalty in m, %",
        "norm": "norm of the weights",
        "good": "good part of the grid, %",
    }
    named = chosen.assign(loss=chosen.loss.where(chosen.part == "text"))
    return summary(named, ["part", "method", "lr", "decay"], shown).rename(
        columns={"lr": "lr (tuned)", "decay": "decay (tuned)"}
    )


def figure(runs: pd.DataFrame) -> Figure:
    """A row for text and one for the game: a heat map for each method, and what else was seen."""
    figure, axes = plots.new_figure(3, 3, 16, 14)
    for row, part, value, label, fmt in (
        (axes[0], "text", "loss", "test loss, nats a character", ".2f"),
        (axes[1], "game", "return", "return", ".0f"),
    ):
        chosen = runs[runs.part == part]
        n = chosen.seed.nunique()
        means = chosen.groupby(["method", "decay", "lr"])[value].agg(lambda x: x.mean(skipna=False))
        low, high = means.min(), means.max() if part == "game" else means.quantile(0.8)
        for ax, method in zip(row, METHODS, strict=False):
            grid = means[method].unstack("lr").sort_index(ascending=False)
            grid.index, grid.columns = map("{:g}".format, grid.index), map("{:g}".format, grid)
            cmap = "viridis" if part == "game" else "viridis_r"
            plots.heat(ax, grid, label, fmt, vmin=low, vmax=high, cmap=cmap)
            ax.set(xlabel="learning rate", ylabel="decay")
            ax.set_title(f"{part}, {method}: {label}\nmean of {n} seeds; blank: diverged")
    l2 = runs[(runs.part == "text") & (runs.method == "L2")]
    l2 = l2[l2.lr == SETTINGS.text_lr[0]]
    names = [f"{d:g}" for d in sorted(l2.decay.unique())]
    data = plots.curves(
        l2.assign(decay=l2.decay.map("{:g}".format))[["decay", "seed", "step", "share"]],
        "step", "share",
    )  # fmt: skip
    plots.lines(axes[2][0], data, "step", "share", "decay", names)
    axes[2][0].set(xlabel="step", ylabel="penalty's share of m, %", ylim=(0, 100))
    axes[2][0].set_title(
        f"text, L2 at lr {SETTINGS.text_lr[0]:g}: how much of m is penalty\n"
        f"by decay, {l2.seed.nunique()} seeds"
    )
    for ax, part, value, label in (
        (axes[2][1], "text", "loss", "test loss, nats a character"),
        (axes[2][2], "game", "return", "return (500 is the most)"),
    ):
        chosen = tuned(runs, part)
        plots.dots(ax, chosen, "method", value, METHODS)
        ax.set(xlabel="", ylabel=label)
        ax.set_title(f"{part}: lr and decay tuned, {chosen.seed.nunique()} seeds")
    figure.suptitle(f"Three ways to decay under Adam. {plots.READING}")
    return figure


def notes(runs: pd.DataFrame) -> list[str]:
    said = []
    for part, unit in (("text", "nats"), ("game", "of return")):
        chosen = tuned(runs, part)
        value = "loss" if part == "text" else "return"
        listed = ", ".join(
            f"{m} {mean_and_spread(g[value])} (lr {g.lr.iloc[0]:g}, decay {g.decay.iloc[0]:g})"
            for m, g in chosen.groupby("method", sort=False)
        )
        said.append(f"{part}, tuned, {unit}: {listed}.")
        edges = [
            edge
            for setting in ("lr", "decay")
            for edge in at_an_edge(runs[runs.part == part], chosen, "method", setting)
        ]
        said.append(f"{part}: tuned to an edge of the grid: {', '.join(edges) or 'none'}.")
        shares = good(runs, part)
        listed = ", ".join(f"{m} {mean_and_spread(shares[m])}" for m in METHODS)
        said.append(f"{part}: good part of the grid in percent: {listed}.")
        lost = runs[(runs.part == part) & runs.loss.isna()]
        counts = lost.groupby("method").size().to_dict()
        said.append(f"{part}: runs that ended in no number: {counts or 'none'}.")
    l2 = runs[(runs.part == "text") & (runs.method == "L2")]
    listed = ", ".join(
        f"{mean_and_spread(g.last_share)} at decay {d:g}" for d, g in l2.groupby("decay")
    )
    said.append(
        f"text: penalty's share of L2's m at the end, percent, all learning rates: {listed}."
    )
    return said


EXPERIMENT = Experiment(
    number="2",
    name="decoupling",
    title="Why decoupling helps",
    source="Bjorck, Weinberger & Gomes, AAAI 2021 (arXiv 2012.13841)",
    method=__doc__ or "",
    settings=SETTINGS,
    tiny=TINY,
    seconds=1.6,
    plan=plan,
    run=run,
    predictions=PREDICTIONS,
    table=table,
    figure=figure,
    notes=notes,
)
