"""The choice of a backend: the first of the table that does not refuse the tensors."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

from torch import Tensor

from wdkernels import native, reference, triton_backend

# The best one first. The last one refuses nothing.
MODULES: dict[str, ModuleType] = {
    "native": native,
    "triton": triton_backend,
    "eager": reference,
}


def chosen(wanted: str, tensors: Sequence[Tensor]) -> ModuleType:
    """The backend that updates these tensors.

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
    raise AssertionError("the last backend refuses nothing")
