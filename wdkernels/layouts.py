"""How a tensor's elements lie in memory: which layouts the loops take, and what must not overlap.

The loops see a tensor as a flat run of numbers. That is exact for any dense tensor, whatever the
order of its dimensions (contiguous, channels_last, transposed), as long as every stream of a
parameter has the same order. Everything else passes through a copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Numbering(NamedTuple):
    """Which elements of the whole tensor those of a shard are, in the order of memory:

        number(i) = first + i                               if run is 0
                    first + i // run * pitch + i % run      else

    Random bits depend on an element's number, so that they do not depend on the sharding.
    """

    first: int = 0
    run: int = 0
    pitch: int = 0


def is_dense(x: Tensor) -> bool:
    """Every address between the first and the last element holds exactly one element."""
    expected = 1
    for stride, size in sorted(_steps(x)):
        if stride != expected:
            return False
        expected *= size
    return True


def same_order(x: Tensor, y: Tensor) -> bool:
    """Equal shapes, and equal strides wherever a dimension has more than one element."""
    return x.shape == y.shape and (_steps(x) == _steps(y) or x.numel() == 0)


def like(x: Tensor, weight: Tensor) -> Tensor:
    """x itself if its elements lie in the order of the dense `weight` and not in it; or a copy."""
    shared = x.data_ptr() == weight.data_ptr()  # the weight changes before x is done with
    if same_order(x, weight) and not x.is_conj() and not x.is_neg() and not shared:
        return x
    return torch.empty_like(weight, dtype=x.dtype).copy_(x)


def in_order_of(p: Tensor, x: Tensor) -> Tensor:
    """x itself, or a copy whose elements lie in the order of p, or of the dense copy of p."""
    here, there = local(p.detach()), local(x)
    if not (has_memory(here) and has_memory(there)):
        return x
    dense = here if is_dense(here) else torch.empty_like(here, device="meta")
    if same_order(there, dense) and not there.is_conj() and there.data_ptr() != here.data_ptr():
        return x
    return torch.empty_like(p.detach(), dtype=x.dtype).copy_(x)


def local(x: Tensor) -> Tensor:
    """What this process holds of a DTensor; any other tensor itself."""
    return x if has_memory(x) else getattr(x, "_local_tensor", x)


def has_memory(x: Tensor) -> bool:
    """Plain tensors have; where the numbers of one that wraps others (DTensor) are, they know."""
    return type(x).__torch_dispatch__ is torch.Tensor.__torch_dispatch__


def overlapping(tensors: Sequence[Tensor]) -> tuple[int, int] | None:
    """Two positions whose tensors share an element; twice the same if one overlaps itself."""
    for cluster in _clusters(tensors):
        if len(cluster) > 1 or _may_overlap_itself(tensors[cluster[0]]):
            shared = _shared(tensors, cluster)
            if shared is not None:
                return shared
    return None


def _clusters(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """Positions of the tensors whose spans meet, directly or through others."""
    spans = sorted((*_span(x), i) for i, x in enumerate(tensors) if x.numel() > 0 and not x.is_meta)
    cluster: list[int] = []
    reach = 0
    for begin, end, i in spans:
        if cluster and begin >= reach:
            yield cluster
            cluster = []
        cluster.append(i)
        reach = max(reach, end)
    if cluster:
        yield cluster


def _shared(tensors: Sequence[Tensor], cluster: Sequence[int]) -> tuple[int, int] | None:
    """Slices of one tensor may lie between each other: no run may begin before the last ended."""
    for i in cluster:
        begin, end = _span(tensors[i])
        if tensors[i].numel() * tensors[i].element_size() > end - begin:  # expanded: as many runs
            return i, i
    runs = [_runs(tensors[i]) for i in cluster]
    begins = torch.cat([begins for begins, _ in runs])
    ends = torch.cat([begins + length for begins, length in runs])
    order = begins.argsort()
    met = (begins[order[1:]] < ends[order[:-1]]).nonzero()
    if len(met) == 0:
        return None
    counts = torch.tensor([len(begins) for begins, _ in runs], device="cpu")
    owners = torch.tensor(cluster, device="cpu").repeat_interleave(counts)
    at = int(met[0])
    first, second = sorted(owners[order[at : at + 2]].tolist())
    return first, second


def _steps(x: Tensor) -> list[tuple[int, int]]:
    return [(stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size != 1]


def _may_overlap_itself(x: Tensor) -> bool:
    reach = 0
    for stride, size in sorted(_steps(x)):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _span(x: Tensor) -> tuple[int, int]:
    """First address and the one past the last; devices are far apart in address space."""
    last = sum(stride * (size - 1) for stride, size in _steps(x))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def _runs(x: Tensor) -> tuple[Tensor, int]:
    """The addresses where runs of neighbouring elements begin, and the length of each in bytes."""
    offsets = torch.zeros(1, dtype=torch.int64, device="cpu")
    length = 1
    for stride, size in sorted(_steps(x)):
        if stride == length:
            length *= size
        else:
            steps = torch.arange(size, device="cpu") * stride
            offsets = (steps.unsqueeze(-1) + offsets).flatten()
    return x.data_ptr() + offsets * x.element_size(), length * x.element_size()
