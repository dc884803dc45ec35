"""What is measured: lists of tensor shapes, as models have them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Workload:
    name: str
    title: str
    shapes: tuple[Shape, ...]
    groups: tuple[int, ...] = (1,)  # numbers of param groups to deal the tensors out to
    seconds: float = 20  # to spend on it, about, if that is enough for so many rounds:
    rounds: int = 12
    # Steps of a turn before the one that is timed. Where the host's work counts, the caches should
    # hold what they hold in training: this optimizer's objects, not those of eighty others.
    untimed: int = 0

    @property
    def numel(self) -> int:
        return sum(map(math.prod, self.shapes))


def _gpt2() -> Iterator[Shape]:
    """GPT-2 124M: 12 layers of width 768, embeddings tied."""
    width = 768
    norm: tuple[Shape, ...] = ((width,), (width,))
    yield from ((50257, width), (1024, width))
    for _ in range(12):
        yield from (*norm, (width, 3 * width), (3 * width,), (width, width), (width,))
        yield from (*norm, (width, 4 * width), (4 * width,), (4 * width, width), (width,))
    yield from norm


def _resnet50() -> Iterator[Shape]:
    """ResNet-50 for 1000 classes: stages of bottlenecks, each convolution with its batch norm."""

    def convolution(out: int, inputs: int, size: int) -> Iterator[Shape]:
        yield from ((out, inputs, size, size), (out,), (out,))

    yield from convolution(64, 3, 7)
    inputs = 64
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            yield from convolution(width, inputs, 1)
            yield from convolution(width, width, 3)
            yield from convolution(4 * width, width, 1)
            if block == 0:
                yield from convolution(4 * width, inputs, 1)
            inputs = 4 * width
    yield from ((1000, inputs), (1000,))


def _many(count: int, numel: int, groups: tuple[int, ...] = (1,)) -> Workload:
    name, title = f"{count}x{numel}", f"{count:,} × {numel}"
    return Workload(name, title, ((numel,),) * count, groups, untimed=1)


FULL: tuple[Workload, ...] = (
    Workload("32M", "one tensor of 32M", ((1 << 25,),), seconds=80),
    Workload("gpt2", "GPT-2 124M", tuple(_gpt2()), seconds=150),
    Workload("resnet50", "ResNet-50", tuple(_resnet50()), seconds=80),
    _many(300, 256),
    _many(10000, 64),
    _many(1000, 16, groups=(1, 10, 100)),
    _many(1000, 256, groups=(1, 10, 100)),
)

QUICK: tuple[Workload, ...] = (
    Workload("1M", "one tensor of 1M", ((1 << 20,),), seconds=2, rounds=4),
    Workload("100x256", "100 × 256", ((256,),) * 100, (1, 10), seconds=2, rounds=4, untimed=1),
)
