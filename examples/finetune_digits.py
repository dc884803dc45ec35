"""Fine-tune a small network under a shift with every kind of weight decay, and time each of them.

A network of half a million weights is pretrained on the digits of 6 writers, broadly augmented. It
is then fine-tuned on digits of 4 other writers, all tilted by 45 degrees, once with each optimizer,
and tested on 4 writers it has never seen:

* in distribution: their digits tilted by 45 degrees, what it was fine-tuned for;
* out of distribution: the same digits upright, tilted back, noisy, moved, faint and blurred, most
  of which the pretrained network could read; the mean of the six.

Every optimizer learns the task, and forgets. Decay to zero also pulls at what pretraining learned;
decay to the pretrained weights (L2-SP) and Selective Projection Decay hold on to it. All share the
learning rate, the batches and, within a family, the decay: this shows what each decay does, and is
no contest of tuned settings. Accuracies are means and standard deviations over the seeds.

optimizer.step() is timed alone, on the same network: ours and what one takes today take turns,
torch.optim's fused optimizer where torch has the method, else the paper's formulas in PyTorch
(bench/papers.py). Medians of processor time are shown.
"""

import sys
import time
from collections import defaultdict
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Generator, Tensor, nn
from torch.nn import functional as F

import wdkernels as wd

sys.path.append(str(Path(__file__).resolve().parent.parent))  # where bench/ is
from bench import papers

SEEDS = range(5)
BATCH = 32
PRETRAIN_STEPS, FINETUNE_STEPS, TIMED_STEPS = 600, 300, 30
LR = 1e-3

# Unmixed L2 divides the decay by sqrt(v) + eps, and weights of units that stay silent have v = 0:
# with the usual eps of 1e-8 each step would take away ten times the weight, and diverge.
EPS = 1e-6

# A decoupled decay of 1 removes, by itself, LR * FINETUNE_STEPS = 30% of what separates a weight
# from its anchor. An L2 penalty counts by its size beside the gradient. SWD and SPD: defaults.
Method = Callable[..., torch.optim.Optimizer]
l2, adamw = partial(wd.Adam, weight_decay=1e-4), partial(wd.AdamW, weight_decay=1.0)
METHODS: dict[str, Method] = {
    "no decay": partial(wd.AdamW, weight_decay=0.0),
    "Adam, L2": l2,
    "Adam, unmixed": partial(l2, unmixed=True),
    "AdamW": adamw,
    "AdamW, cautious": partial(adamw, cautious=True),
    "AdamW, early": partial(adamw, decay_schedule=wd.schedules.early(FINETUNE_STEPS // 2)),
    "AdamSWD": wd.AdamSWD,
    "AdamW, L2-SP": partial(adamw, anchor="initial"),
    "AdamSPD": wd.AdamSPD,
}
# What computes the same without us; an early decay is AdamW's up to the step at which it ends.
torch_adamw = partial(torch.optim.AdamW, fused=True, weight_decay=1.0)
OTHERS: dict[str, partial[Any]] = {
    "no decay": partial(torch_adamw, weight_decay=0.0),
    "Adam, L2": partial(torch.optim.Adam, fused=True, weight_decay=1e-4),
    "Adam, unmixed": partial(papers.AdamUnmixed, weight_decay=1e-4),
    "AdamW": torch_adamw,
    "AdamW, cautious": partial(papers.AdamWCautious, weight_decay=1.0),
    "AdamW, early": torch_adamw,
    "AdamSWD": partial(papers.AdamSWD, weight_decay=5e-4),
    "AdamW, L2-SP": partial(papers.AdamWAnchored, weight_decay=1.0),
    "AdamSPD": partial(papers.AdamSPD, weight_decay=1.0),
}
BEFORE = "not fine-tuned"
Results = dict[str, dict[str, list[float]]]  # method -> quantity -> values

# ---- the digits and their shifts -----------------------------------------------------------------

DIGITS = load_digits()  # 1797 images of 8 x 8, writer after writer
IMAGES = torch.tensor(DIGITS.images, dtype=torch.float32)[:, None] / 16
LABELS = torch.tensor(DIGITS.target)
PRETRAIN, FINETUNE, TEST = (0, 776), (776, 1287), slice(1287, 1797)  # 6, 4 and 4 writers


def warp(images: Tensor, degrees: Tensor | float = 0.0, pixels: Tensor | float = 0.0) -> Tensor:
    """Rotate each image about its centre, then move it sideways."""
    angle = torch.deg2rad(torch.as_tensor(degrees)).expand(len(images))
    move = torch.as_tensor(pixels).expand(len(images)) * 2 / images.shape[-1]
    rows = [angle.cos(), -angle.sin(), move], [angle.sin(), angle.cos(), torch.zeros_like(move)]
    matrices = torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def add_noise(images: Tensor, amount: float, rng: Generator) -> Tensor:
    return (images + amount * torch.randn(images.shape, generator=rng)).clamp(0, 1)


def augment(images: Tensor, rng: Generator) -> Tensor:
    """What pretraining sees: tilted up to 20 degrees, moved up to a pixel, fainter and noisy."""
    tilt, move, fade = torch.rand(3, len(images), generator=rng)
    images = warp(images, 40 * tilt - 20, 2 * move - 1)
    return add_noise(images * (1 - 0.6 * fade)[:, None, None, None], 0.15, rng)


TARGET = warp(IMAGES, 45)
UNSEEN = IMAGES[TEST]
OUT_OF_DISTRIBUTION = {
    "upright": UNSEEN,
    "tilted back": warp(UNSEEN, -30),
    "noisy": add_noise(UNSEEN, 0.3, Generator().manual_seed(0)),
    "moved": warp(UNSEEN, pixels=1.0),
    "faint": UNSEEN * 0.3,
    "blurred": F.avg_pool2d(UNSEEN, 3, stride=1, padding=1),
}

# ---- training and measuring ----------------------------------------------------------------------


def network() -> nn.Module:
    first, second, third = nn.Linear(64, 512), nn.Linear(512, 512), nn.Linear(512, 512)
    hidden = first, nn.ReLU(), second, nn.ReLU(), third, nn.ReLU()
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(512, 10))


def train(
    model: nn.Module, method: Method, batches: Tensor, view: Callable[[Tensor], Tensor]
) -> nn.Module:
    """One step for each row of indices in `batches`; view(row) are the images to read."""
    optimizer = method(model.parameters(), lr=LR, eps=EPS)
    for batch in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(view(batch)), LABELS[batch]).backward()
        optimizer.step()
    return model


def pretrain(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    rng = Generator().manual_seed(seed)
    batches = torch.randint(*PRETRAIN, (PRETRAIN_STEPS, BATCH), generator=rng)
    return train(network(), wd.AdamW, batches, lambda batch: augment(IMAGES[batch], rng))


def finetune(pretrained: nn.Module, method: Method, seed: int) -> nn.Module:
    rng = Generator().manual_seed(seed)
    batches = torch.randint(*FINETUNE, (FINETUNE_STEPS, BATCH), generator=rng)
    return train(deepcopy(pretrained), method, batches, lambda batch: TARGET[batch])


@torch.no_grad()
def measure(model: nn.Module, pretrained: nn.Module) -> dict[str, float]:
    """Accuracies in percent; norms over all parameters together."""

    def accuracy(images: Tensor) -> float:
        return 100 * float((model(images).argmax(1) == LABELS[TEST]).float().mean())

    weights = nn.utils.parameters_to_vector(model.parameters())
    anchor = nn.utils.parameters_to_vector(pretrained.parameters())
    return {
        "inside": accuracy(TARGET[TEST]),
        "outside": mean(accuracy(images) for images in OUT_OF_DISTRIBUTION.values()),
        "norm": float(weights.norm()),
        "distance": float((weights - anchor).norm()),
    }


def time_step(name: str) -> dict[str, list[float]]:
    """Milliseconds of optimizer.step() alone, ours and the other's taking turns."""
    rng = Generator().manual_seed(0)
    methods: dict[str, Method] = {"ours": METHODS[name], "other": OTHERS[name]}
    contenders = {
        k: method(network().parameters(), lr=LR, eps=EPS) for k, method in methods.items()
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(TIMED_STEPS):
        for whose, optimizer in contenders.items():
            for weight in optimizer.param_groups[0]["params"]:
                weight.grad = torch.randn(weight.shape, generator=rng)
            start = time.thread_time()
            optimizer.step()
            times[whose].append(1e3 * (time.thread_time() - start))
    return times


# ---- showing -------------------------------------------------------------------------------------


def table(results: Results) -> Table:
    quality = "in\ndistr., %", "out of\ndistr., %", "weight\nnorm", "distance\nmoved"
    headers = "optimizer", *quality, "ours\nms", "torch¹,\npaper² ms", "\nratio"
    shown = Table(*headers, box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    shown.title = f"Fine-tuned to digits tilted by 45°: {len(SEEDS)} seeds, times on one thread"
    for column in shown.columns[1:]:
        column.justify = "right"
    for name, r in results.items():
        cells = [f"{mean(r[key]):.1f} ± {stdev(r[key]):.1f}" for key in ("inside", "outside")]
        cells += [f"{mean(r[key]):.1f}" for key in ("norm", "distance")]
        if name != BEFORE:
            ours, other = median(r["ours"]), median(r["other"])
            cells += [f"{ours:.2f}", f"{other:.2f}{whose(name)}", f"{other / ours:.1f}×"]
        shown.add_row(name, *cells, end_section=name == BEFORE)
    return shown


def whose(name: str) -> str:
    """A mark of who the other one is: torch's fused optimizer or the paper's formulas."""
    return "²" if OTHERS[name].func.__module__ == papers.__name__ else "¹"


def picture(results: Results) -> Figure:
    """One row per optimizer: what it can read, how far it went, how long its step takes."""
    blue, orange, gray = "#1f6fb4", "#e07b10", "#b8b8b8"
    figure = Figure(figsize=(12.5, 7.2), dpi=120, layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[1, 3])

    tiles = {"tilted": TARGET[TEST], **OUT_OF_DISTRIBUTION}
    for axes, (name, images) in zip(top.subplots(1, len(tiles)), tiles.items(), strict=True):
        axes.imshow(images[5, 0].numpy(), cmap="gray_r", vmin=0, vmax=1)
        axes.set_title(name, color=orange if name in OUT_OF_DISTRIBUTION else blue)
        axes.set(xticks=[], yticks=[])
    top.suptitle("A digit as in fine-tuning (in distribution) and otherwise (out of distribution)")

    accuracy, distance, speed = bottom.subplots(1, 3, sharey=True, width_ratios=[1.8, 1, 1.2])
    rows = range(len(results))
    accuracy.set_yticks(rows, list(results))
    accuracy.invert_yaxis()

    accuracy.set_title(f"accuracy on unseen writers, % ({len(SEEDS)} seeds)")
    for key, label, color in (
        ("inside", "in distribution", blue),
        ("outside", "out of distribution", orange),
    ):
        values = [r[key] for r in results.values()]
        style = {"fmt": "o", "capsize": 3, "color": color, "label": label}
        accuracy.errorbar([mean(v) for v in values], rows, xerr=[stdev(v) for v in values], **style)
    plain = mean(results["no decay"]["outside"])
    accuracy.axvline(plain, color=orange, linestyle=":", zorder=0, label="the same without decay")

    distance.set_title("distance from pretraining")
    bars = distance.barh(rows, [mean(r["distance"]) for r in results.values()], color=gray)
    distance.bar_label(bars, fmt="%.1f", padding=4)

    speed.set_title("optimizer step, ms (one thread)")
    ours, other = ([median(results[name][key]) for name in METHODS] for key in ("ours", "other"))
    speed.barh(rows[1:], ours, -0.4, align="edge", color=blue, label="ours")
    label = "torch fused¹ or the paper's formulas²"
    bars = speed.barh(rows[1:], other, 0.4, align="edge", color=gray, label=label)
    ratios = [o / u for u, o in zip(ours, other, strict=True)]
    labels = [f"{x:.1f}×{whose(name)}" for x, name in zip(ratios, METHODS, strict=True)]
    speed.bar_label(bars, labels, padding=4)

    for axes in (accuracy, distance, speed):
        axes.spines[["left", "right", "top"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.margins(x=0.12)
    for axes in (accuracy, speed):
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.05), ncols=3, frameon=False)
    return figure


def main() -> None:
    # Batches this small gain nothing from more threads, and the processor time of a single thread
    # can be measured beside other work.
    torch.set_num_threads(1)
    console = Console(width=None if sys.stdout.isatty() else 100)
    results: Results = {name: defaultdict(list) for name in (BEFORE, *METHODS)}

    runs = list(product(SEEDS, results))
    for seed, name in track(runs, f"fine-tuning, {len(SEEDS)} seeds", console=console):
        if name == BEFORE:
            model = pretrained = pretrain(seed)
        else:
            model = finetune(pretrained, METHODS[name], seed)
        for key, value in measure(model, pretrained).items():
            results[name][key].append(value)
    for name in track(METHODS, "timing", console=console):
        results[name] |= time_step(name)

    console.print(table(results))
    path = Path(__file__).parent / "out" / "finetune_digits.png"
    path.parent.mkdir(exist_ok=True)
    picture(results).savefig(path)
    console.print(f"The same as a picture: {path}", soft_wrap=True)


if __name__ == "__main__":
    main()
