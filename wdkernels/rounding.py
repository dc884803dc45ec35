"""How float32 becomes 16 bits, to nearest or by chance, with the same bits on every device.

Stochastic rounding adds random bits below the last one that is kept and then drops them: x is
rounded up with the probability of the share that it has of the way up, so that nothing is lost on
average (Zamirai et al. 2020, arXiv 2010.06192). The random bits are a hash of seed, step, parameter
and element, and of nothing else: whoever repeats a step rounds as it was rounded before.

Integers of 32 bits are kept in int64, as torch has no whole arithmetic for unsigned ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wdkernels.coefficients import mix
from wdkernels.layouts import Numbering

_32_BITS = 0xFFFFFFFF


def key(step_key: int, index: int) -> int:
    """K, the key of parameter `index` (from 0, over all groups) at a step (`random_key`)."""
    return mix(step_key ^ (index * 0x9E3779B9 & _32_BITS))


def noise(key: int, x: Tensor, numbering: Numbering) -> Tensor:
    """32 random bits for each element of x: a hash of the key and of the element's number.

    An element's number is its position in the memory of the dense tensor `torch.empty_like(x)`, so
    x may have holes; where x is a shard, that in the whole tensor.
    """
    element = torch.zeros_like(x, dtype=torch.int64)
    for dim, stride in enumerate(torch.empty_like(x, device="meta").stride()):
        index = torch.arange(x.shape[dim], device=x.device)
        element = element + index.view(-1, *[1] * (x.dim() - dim - 1)) * stride
    first, run, pitch = numbering
    if run:
        element = element // run * pitch + element % run
    return _mix((first + element) & _32_BITS ^ key)


def narrow(x: Tensor, dtype: torch.dtype, random: Tensor | None = None) -> Tensor:
    """float32 x in bfloat16 or float16; to nearest, ties to even, if there are no random bits."""
    bits = x.view(torch.int32).to(torch.int64) & _32_BITS
    found = (_bfloat16 if dtype == torch.bfloat16 else _float16)(bits, random)
    return found.to(torch.int16).view(dtype)  # the lower 16 bits


def _bfloat16(bits: Tensor, random: Tensor | None) -> Tensor:
    """The upper half of a float32's bits. A carry runs into the exponent, as it should."""
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    up = 0x7FFF + ((bits >> 16) & 1) if random is None else random & 0xFFFF
    return torch.where(nan, 0x7FC0, (bits + up) >> 16)


def _float16(bits: Tensor, random: Tensor | None) -> Tensor:
    """5 bits of exponent, 10 of mantissa; subnormals share the exponent of the smallest normal."""
    magnitude = bits & 0x7FFFFFFF
    own = (magnitude >> 23).clamp(min=1)  # float32's subnormals share theirs, too
    kept = own.clamp(min=113)
    mantissa = (magnitude & 0x7FFFFF) | torch.where((magnitude >> 23) > 0, 1 << 23, 0)
    distance = 13 + kept - own
    dropped = distance.clamp(max=31)
    mantissa = mantissa >> (distance - dropped).clamp(max=31)  # whose chance is nil
    half = torch.bitwise_left_shift(torch.ones_like(bits), dropped - 1)
    tie = half - 1 + ((mantissa >> dropped) & 1)
    up = tie if random is None else random & (2 * half - 1)
    found = ((mantissa + up) >> dropped) + (kept - 113) * 1024
    found = found.clamp(max=0x7C00) | ((bits >> 16) & 0x8000)  # what is too large is inf
    return torch.where(magnitude > 0x7F800000, 0x7E00, found)


def _mix(x: Tensor) -> Tensor:
    """`coefficients.mix` of a tensor. int64 products wrap around; their lower 32 bits are right."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D & _32_BITS
    x = x ^ (x >> 15)
    x = x * 0x846CA68B & _32_BITS
    return x ^ (x >> 16)
