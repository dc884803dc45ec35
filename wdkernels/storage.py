"""In which types a parameter's state is kept.

A step computes in float32, or in float64 for weights of twice that width. Weights of 16 bits lose
what a step adds if it is less than half of their last bit, unless it is rounded stochastically or
kept elsewhere: hence `rounding` and `master_weights` (docs/methods.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from wdkernels.coefficients import Hyper

NARROW = (torch.bfloat16, torch.float16)
_WIDE = (torch.float64, torch.complex128)

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
COPIES = ("master", "compensation", "ema")  # of the weight, in one sense or another
ALIKE = (*MOMENTS, "anchor", *COPIES)  # entries shaped like the parameter


def computed_in(p: Tensor) -> torch.dtype:
    """The type of the arithmetic, or its complex counterpart."""
    return torch.float32 if p.dtype in NARROW else p.dtype


def dtypes_of(key: str, p: Tensor, hyper: Hyper) -> tuple[torch.dtype, ...]:
    """The dtypes that an entry of p's state may have, that of a new one first."""
    if key == "anchor":
        return anchor_dtypes(p)
    if key == "compensation":
        return (p.dtype,)
    if key in MOMENTS and hyper.moment_dtype is not None:
        return (hyper.moment_dtype,)
    return (computed_in(p),)


def anchor_dtypes(p: Tensor) -> tuple[torch.dtype, ...]:
    """An anchor is only read, in any type no wider than the arithmetic; float32's may be half."""
    if p.is_complex() or p.dtype not in (torch.float32, torch.float64, *NARROW):
        return (p.dtype,)
    return (p.dtype, *(x for x in (torch.float32, *NARROW) if x != p.dtype))


def entries(p: Tensor, hyper: Hyper) -> tuple[str, ...]:
    """What a step of p needs in its state, beside the anchor, `step` and sums."""
    narrow = p.dtype in NARROW
    return (
        *MOMENTS[: 3 if hyper.amsgrad else 2],
        *(["master"] if narrow and hyper.master_weights else []),
        *(["compensation"] if narrow and hyper.rounding == "kahan" else []),
        *(["ema"] if hyper.ema_decay is not None else []),
    )


def check(p: Tensor, hyper: Hyper, name: str) -> None:
    """Raise a ValueError for options that p's dtype does not go with."""
    if hyper.moment_dtype is not None and (p.dtype in _WIDE or p.is_complex()):
        raise ValueError(
            f"moment_dtype={hyper.moment_dtype} is for float32 and 16-bit weights, not for {name}, "
            f"which is {p.dtype}: put it into a group with moment_dtype=None"
        )


def check_group(params: list[Tensor], hyper: Hyper, place: str) -> None:
    if hyper.master_weights and params and not any(p.dtype in NARROW for p in params):
        raise ValueError(
            f"{place}: master_weights=True keeps float32 copies of 16-bit weights, and none of "
            f"these is one ({params[0].dtype}): leave it out, or set it to False in this group"
        )
