"""What is measured: lists of tensor shapes, as models have them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

Shape = tuple[int, ...]

# The parts of the comparison. Each has plain AdamW and the limit in its own rounds, so that ratios
# are taken within these and no round becomes so long that the machine changes meanwhile.
DECAYS = "decays"  # AdamW by everybody, and every decay
WHOLE = "whole step"  # 16-bit storage, clipping, averages, telemetry
MANY = "many tensors"  # beside the decays: a learning rate that changes in each step
ONE_THREAD = "one thread"  # AdamW by everybody, in a process of its own
SHARDED = "sharded"  # by FSDP2 over processes: see distributed.py


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
    without: tuple[str, ...] = ()  # makers whose one step would take what the others' rounds take
    parts: tuple[str, ...] = (DECAYS,)

    @property
    def numel(self) -> int:
        return sum(map(math.prod, self.shapes))


def _gpt2(layers: int = 12, vocabulary: int = 50257) -> Iterator[Shape]:
    """GPT-2 124M: 12 layers of width 768, embeddings tied."""
    width = 768
    norm: tuple[Shape, ...] = ((width,), (width,))
    yield from ((vocabulary, width), (1024, width))
    for _ in range(layers):
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


def _llama3(layers: int) -> Iterator[Shape]:
    """Llama-3-8B: layers of width 4096, 8 heads of 128 for keys and values, embeddings untied."""
    width, keys, inner, vocabulary = 4096, 1024, 14336, 128256
    yield (vocabulary, width)
    for _ in range(layers):
        yield from ((width,), (width, width), (keys, width), (keys, width), (width, width))
        yield from ((width,), (inner, width), (inner, width), (width, inner))
    yield from ((width,), (vocabulary, width))


# What the arena and its contenders hold at a time, per element, while one warms up: weights, two
# sets of gradients and a fresh one, two moments, the largest of one, an anchor; once more both
# moments and the anchor, until they are shared; and what foreach needs for a moment. 4 bytes each.
MOST_HELD = 4 * 13


def llama_layers(memory: int) -> int:
    """How many of the 32 layers a device with so many bytes has room for; below 1: not even one."""
    without, one = (Workload("", "", tuple(_llama3(layers))).numel for layers in (0, 1))
    return min(32, (memory // MOST_HELD - without) // (one - without))


def _llama(memory: int) -> Iterator[Workload]:
    layers = llama_layers(memory)
    if layers > 0:
        part = "" if layers == 32 else f", {layers} of 32 layers"
        yield Workload("llama3-8b", f"Llama-3-8B{part}", tuple(_llama3(layers)), seconds=20)


def _many(count: int, numel: int, groups: tuple[int, ...] = (1,)) -> Workload:
    name, title = f"{count}x{numel}", f"{count:,} × {numel}"
    return Workload(name, title, ((numel,),) * count, groups, untimed=1, parts=(DECAYS, MANY))


def _whole(workload: Workload, seconds: float) -> Workload:
    """The same tensors, for the other part of the comparison."""
    return replace(
        workload,
        name=f"{workload.name}-whole",
        title=f"{workload.title}, {WHOLE}",
        seconds=seconds,
        parts=(WHOLE,),
    )


def _transformer(layers: int, width: int, vocabulary: int) -> Iterator[Shape]:
    """Embeddings, and layers with twelve parameters each, as nn.TransformerEncoderLayer has."""
    norm: tuple[Shape, ...] = ((width,), (width,))
    yield (vocabulary, width)
    for _ in range(layers):
        yield from ((3 * width, width), (3 * width,), (width, width), (width,))
        yield from ((4 * width, width), (4 * width,), (width, 4 * width), (width,), *norm, *norm)


def sharded(name: str, title: str, shapes: Iterable[Shape], rounds: int) -> Workload:
    """A number of rounds, not of seconds: all processes must come to the same end."""
    return Workload(
        f"{name}-sharded",
        f"{title}, {SHARDED}",
        tuple(shapes),
        seconds=0,
        rounds=rounds,
        untimed=1,
        parts=(SHARDED,),
    )


def _on_one_thread(name: str, title: str, shapes: Iterable[Shape]) -> Workload:
    title = f"{title}, {ONE_THREAD}"
    return Workload(f"{name}-1-thread", title, tuple(shapes), seconds=20, parts=(ONE_THREAD,))


_LARGE = Workload("32M", "one tensor of 32M", ((1 << 25,),), seconds=50)
_GPT2 = Workload("gpt2", "GPT-2 124M", tuple(_gpt2()), seconds=100)
_RESNET50 = Workload("resnet50", "ResNet-50", tuple(_resnet50()), seconds=50)

_SHARDED = (
    sharded("300x256", "300 × 256", ((256,),) * 300, rounds=30),
    sharded("38M", "a transformer of 38M", _transformer(6, 512, 37120), rounds=15),
)

FULL: tuple[Workload, ...] = (
    *(_LARGE, _GPT2, _RESNET50),
    *(_whole(_LARGE, 30), _whole(_GPT2, 50), _whole(_RESNET50, 20)),
    _many(300, 256),
    _many(10000, 64),
    _many(1000, 16, groups=(1, 10, 100)),
    _many(1000, 256, groups=(1, 10, 100)),
    _on_one_thread("32M", _LARGE.title, _LARGE.shapes),
    _on_one_thread("half-gpt2", "half of GPT-2", _gpt2(layers=6, vocabulary=25128)),
    *_SHARDED,
)

MI = 1 << 20


def on_gpu(memory: int) -> tuple[Workload, ...]:
    """For a GPU with so many bytes to use, the most telling ones first; about three minutes."""
    large = Workload("1G", "one tensor of 1G", ((1 << 30,),), seconds=20, rounds=8)
    gpt2, resnet50 = replace(_GPT2, seconds=12), replace(_RESNET50, seconds=8)
    small = replace(_many(10000, 64), seconds=30, rounds=8, untimed=0, without=("paper",))
    return (
        large,
        _whole(large, 12),
        small,
        gpt2,
        resnet50,
        _whole(gpt2, 8),
        _whole(resnet50, 5),
        Workload("200x1M", "200 × 1M", ((MI,),) * 200, seconds=8),
        Workload("10x16M", "10 × 16M", ((16 * MI,),) * 10, seconds=8),
        *_SHARDED,
        *_llama(memory),
    )


_SMALL = Workload("1M", "one tensor of 1M", ((1 << 20,),), seconds=2, rounds=4)

QUICK: tuple[Workload, ...] = (
    _SMALL,
    _whole(_SMALL, 2),
    replace(_many(100, 256, groups=(1, 10)), seconds=2, rounds=4),
    sharded("100x256", "100 × 256", ((256,),) * 100, rounds=4),
)
