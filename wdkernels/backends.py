"""The choice of a backend: the first of the table that does not refuse the tensors."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

from torch import Tensor

from wdkernels import native, triton_backend

MODULES: dict[str, ModuleType] = {"native": native, "triton": triton_backend}  # the best one first


def chosen(wanted: str, tensors: Sequence[Tensor]) -> ModuleType | None:
    """The backend that updates these tensors; None for the eager formulas.

    `wanted` is an option of the optimizer; a ValueError says why what it names can't be had.
    """
    for name, module in MODULES.items():
        if wanted not in (name, "auto"):
            continue
        refusal = module.refuses(tensors)
        if refusal is None:
            return module
        if wanted == name:
            raise ValueError(f"backend {name!r} can't be had: {refusal}; try backend='auto'")
    return None
