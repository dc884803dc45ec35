"""The data: scikit-learn's digits under shifts, and the source of Python's standard library.

Nothing is downloaded. The digits come writer after writer, so that the three parts below have no
writer in common: what is tested is reading the digits of people who were never seen.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Generator, Tensor
from torch.nn import functional as F

# ---- digits --------------------------------------------------------------------------------------

_DIGITS = load_digits()  # 1797 images of 8 x 8
IMAGES = torch.tensor(_DIGITS.images, dtype=torch.float32)[:, None] / 16
LABELS = torch.tensor(_DIGITS.target)
TRAIN, VALID, TEST = slice(0, 776), slice(776, 1287), slice(1287, 1797)  # 6, 4 and 4 writers


def seeded(seed: int) -> Generator:
    """A generator of its own, so that one source of chance does not move another."""
    return Generator().manual_seed(seed)


def rotated(images: Tensor, degrees: Tensor | float) -> Tensor:
    """The images turned about their centre, all alike or each by its own angle."""
    angle = torch.deg2rad(torch.as_tensor(degrees, dtype=torch.float32)).expand(len(images))
    zero = torch.zeros_like(angle)
    turns = [angle.cos(), -angle.sin(), zero], [angle.sin(), angle.cos(), zero]
    matrices = torch.stack([torch.stack(turn, dim=1) for turn in turns], dim=1)
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def noisy(images: Tensor, amount: float, seed: int = 0) -> Tensor:
    """The images with Gaussian noise of this standard deviation, kept within 0 and 1."""
    return (images + amount * torch.randn(images.shape, generator=seeded(seed))).clamp(0, 1)


def blurred(images: Tensor) -> Tensor:
    """The images averaged over 3 x 3 pixels."""
    return F.avg_pool2d(images, 3, stride=1, padding=1)


def inverted(images: Tensor) -> Tensor:
    """Black on white in place of white on black."""
    return 1 - images


def hard(part: slice) -> tuple[Tensor, Tensor]:
    """Images and labels of a part, each image upright, turned both ways, noisy and blurred.

    Upright digits alone are read almost without errors, and then no decay can be told from another.
    """
    images = IMAGES[part]
    views = images, rotated(images, 20), rotated(images, -20), noisy(images, 0.3), blurred(images)
    return torch.cat(views), LABELS[part].repeat(len(views))


def partly_wrong(part: slice, share: float) -> Tensor:
    """The labels of a part, this share of them drawn anew: learning by heart then misleads."""
    labels, rng = LABELS[part].clone(), seeded(0)
    wrong = torch.rand(len(labels), generator=rng) < share
    labels[wrong] = torch.randint(0, 10, (int(wrong.sum()),), generator=rng)
    return labels


def rows(seed: int, steps: int, batch: int, examples: int) -> Iterator[Tensor]:
    """Indices of each step's batch; every example is seen once before any is seen again."""
    rng = seeded(seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        while len(order) < batch:
            order = torch.cat([order, torch.randperm(examples, generator=rng)])
        yield order[:batch]
        order = order[batch:]


# ---- text ----------------------------------------------------------------------------------------

CONTEXT = 64
_KNOWN = "\n" + "".join(map(chr, range(32, 127)))
VOCABULARY = len(_KNOWN) + 1  # the last stands for every other character


@cache
def _blocks() -> Tensor:
    """The text cut into blocks of CONTEXT + 1 characters, in an order mixed once and for all."""
    folder = Path(sysconfig.get_path("stdlib"))
    text = "".join(p.read_text(encoding="utf-8") for p in sorted(folder.glob("*.py")))
    number = {character: k for k, character in enumerate(_KNOWN)}
    text = text[: len(text) // (CONTEXT + 1) * (CONTEXT + 1)]
    ids = torch.tensor([number.get(c, VOCABULARY - 1) for c in text], dtype=torch.uint8)
    blocks = ids.view(-1, CONTEXT + 1)
    return blocks[torch.randperm(len(blocks), generator=seeded(0))]


def unseen_text(count: int) -> Tensor:
    """Blocks that no run trains on."""
    return _blocks()[:count].long()


def text(seed: int, steps: int, batch: int, held_out: int = 2048) -> Tensor:
    """Batches of blocks, [steps, batch, CONTEXT + 1]; no block comes twice: it is one epoch."""
    blocks = _blocks()[held_out:]
    chosen = torch.randperm(len(blocks), generator=seeded(seed))[: steps * batch]
    return blocks[chosen].long().view(steps, batch, CONTEXT + 1)
