"""How a tensor's elements lie in memory: which layouts the loops take, and what must not overlap.

The loops see a tensor as a flat run of numbers. That is exact for any dense tensor, whatever the
order of its dimensions (contiguous, channels_last, transposed), as long as every stream of a
parameter has the same order. Everything else passes through a copy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
    return torch.empty_like(weight).copy_(x)


def has_memory(x: Tensor) -> bool:
    """Plain tensors have; where the numbers of one that wraps others (DTensor) are, they know."""
    return type(x).__torch_dispatch__ is torch.Tensor.__torch_dispatch__


def overlapping(tensors: Sequence[Tensor]) -> tuple[int, int] | None:
    """Two positions whose tensors share an element; twice the same if one overlaps itself."""
    for i, x in enumerate(tensors):
        if not _may_overlap_itself(x):
            continue
        if len(torch.unique(_addresses(x, x.element_size()))) < x.numel():
            return i, i

    spans = sorted((*_span(x), i) for i, x in enumerate(tensors) if x.numel() > 0 and not x.is_meta)
    reach: list[tuple[int, int]] = []  # (end, position) of the tensors that may still be met
    for begin, end, i in spans:
        reach = [other for other in reach if other[0] > begin]
        for _, k in reach:
            if is_dense(tensors[i]) and is_dense(tensors[k]):
                return k, i
            # Slices of one tensor may lie between each other without sharing an element.
            unit = min(tensors[i].element_size(), tensors[k].element_size())
            if torch.isin(_addresses(tensors[i], unit), _addresses(tensors[k], unit)).any():
                return k, i
        reach.append((end, i))
    return None


def _steps(x: Tensor) -> list[tuple[int, int]]:
    return [(stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size != 1]


def _may_overlap_itself(x: Tensor) -> bool:
    reach = 0
    for stride, size in sorted(_steps(x)):
        if stride <= reach:
            return x.numel() > 0
        reach += stride * (size - 1)
    return False


def _span(x: Tensor) -> tuple[int, int]:
    """First address and the one past the last; devices are far apart in address space."""
    last = sum(stride * (size - 1) for stride, size in _steps(x))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def _addresses(x: Tensor, unit: int) -> Tensor:
    """The byte addresses of every element, of each `unit` bytes of it."""
    offsets = torch.zeros((), dtype=torch.int64, device="cpu")
    for stride, size in _steps(x):
        offsets = offsets.unsqueeze(-1) + torch.arange(size, device="cpu") * stride
    begins = x.data_ptr() + offsets.flatten() * x.element_size()
    return (begins.unsqueeze(-1) + torch.arange(0, x.element_size(), unit)).flatten()
