"""What is refused of parameters, gradients and memory, and in which words: every message names the
parameter and says what to do. A step calls these before it writes anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from wdkernels import layouts


def name_of(group: Mapping[str, Any], group_index: int, index: int) -> str:
    """A parameter's name in messages: its own, if the optimizer was given named parameters."""
    position = f"parameter {index} of group {group_index}"
    names = group.get("param_names")
    return f"'{names[index]}' ({position})" if names else position


def check_parameter(p: Tensor, name: str) -> None:
    if not (p.is_floating_point() or p.is_complex()):
        raise TypeError(f"{name} has dtype {p.dtype}; only floating and complex tensors can learn")
    if p.layout != torch.strided:
        raise TypeError(f"{name} has layout {p.layout}; only strided tensors are supported")
    check_not_lazy(p, name)


def check_memory(tensors: Sequence[Tensor], names: Sequence[str]) -> None:
    """No element may belong to two tensors that a step writes, or twice to one."""
    shared = layouts.overlapping(tensors)
    if shared is None:
        return
    first, second = (names[i] for i in shared)
    if first == second:
        raise RuntimeError(
            f"{first} holds several elements at one address (an expanded tensor?), so its update "
            "has no meaning: make it a tensor of its own with .clone()"
        )
    raise RuntimeError(
        f"{first} and {second} share memory and would be updated twice: pass only one of them, "
        "or make one a tensor of its own with .clone()"
    )


def check_gradient(p: Tensor, name: str) -> None:
    g = p.grad
    if g is None:
        return
    layout = layouts.local(g).layout
    if layout != torch.strided:
        raise RuntimeError(
            f"the gradient of {name} is sparse ({layout}): use a dense one "
            "(for an embedding, sparse=False), or torch.optim.SparseAdam"
        )
    check_has_memory(p, p, name, RuntimeError)
    check_has_memory(g, p, f"the gradient of {name}", RuntimeError)
    check_writable(p, name)
    for what in ("shape", "dtype", "device"):
        has, needs = getattr(g, what), getattr(p, what)
        if has != needs:
            has, needs = (tuple(x) if what == "shape" else x for x in (has, needs))
            raise RuntimeError(
                f"the gradient of {name} has {what} {has} but the parameter has {needs}: "
                "convert it, or clear it with zero_grad() and run backward again"
            )


def check_alike(
    x: Tensor,
    p: Tensor,
    dtypes: Sequence[torch.dtype],
    what: str,
    error: type[Exception],
    remedy: str = "convert it first",
) -> None:
    """Raise `error` unless x has p's shape and device, and any of the dtypes."""
    wanted = {
        "shape": p.shape,
        "dtype": x.dtype if x.dtype in dtypes else dtypes[0],
        "device": p.device,
    }
    for attribute, needs in wanted.items():
        has = getattr(x, attribute)
        if has != needs:
            whose = "the parameter has" if needs == getattr(p, attribute) else "it must be"
            if attribute == "shape":
                has, needs = tuple(x.shape), tuple(p.shape)
            raise error(f"{what} has {attribute} {has} but {whose} {needs}: {remedy}")


def check_has_memory(x: Tensor, p: Tensor, what: str, error: type[Exception]) -> None:
    """What goes with a parameter that has memory of its own must have some too."""
    if layouts.has_memory(p) and not x.is_meta and not layouts.has_memory(x):
        raise error(
            f"{what} is a {type(x).__name__}, which has no memory of its own: make it a plain "
            "tensor, as the parameter is"
        )
    x = layouts.local(x)
    if not layouts.has_memory(x) or x.is_meta:
        return
    if is_dense(x) and x.numel() > 0 and x.data_ptr() == 0:
        raise error(f"the memory of {what} has been given back: allocate it again first")


def check_not_lazy(x: Tensor, what: str) -> None:
    if x.is_conj() or x.is_neg():
        raise ValueError(
            f"{what} is a lazily conjugated or negated view, whose memory holds other numbers: "
            "make it a tensor of its own with .resolve_conj().resolve_neg()"
        )


def check_writable(x: Tensor, what: str) -> None:
    if x.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{what} was made in torch.inference_mode(), outside of which torch does not write it: "
            "make it a tensor of its own with .clone()"
        )


def is_dense(x: Tensor) -> bool:
    return x.layout == torch.strided and not x.is_nested


def is_number(x: Any) -> bool:
    return isinstance(x, Tensor) and is_dense(x) and x.numel() == 1 and x.is_floating_point()
