"""Weights, gradients, a run of steps, and comparisons of what is left of it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

# The wider type that a run is measured against.
WIDE = {
    torch.float32: torch.float64,
    torch.float64: torch.float64,
    torch.complex64: torch.complex128,
    torch.complex128: torch.complex128,
}
# A matrix, one element in no dimension and in one, less and more than a vector, none at all.
SHAPES = [(3, 5), (), (17,), (2, 2, 3), (0, 3), (1,), (130,)]

# Loud: at lr 1e-3, weight decay 1e-2, eps 1e-8 a decay or an eps in the wrong place passes unseen.
LOUD: dict[str, Any] = {
    "lr": 0.1,
    "betas": (0.9, 0.999),
    "eps": 1e-2,
    "weight_decay": 0.2,
    "decay_schedule": None,
    "decay_scale": "lr",
    "lr_max": 0.1,
    "amsgrad": False,
    "maximize": False,
    "cautious": False,
    "anchor": "zero",
}


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The same numbers for every dtype, but for their rounding."""
    wide = torch.complex128 if dtype.is_complex else torch.float64
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=wide)
    return x.to(dtype)


def weights(
    dtype: torch.dtype = torch.float64, shapes: Sequence[Any] = SHAPES, seed: int = 0
) -> list[Tensor]:
    tensors = (random(*shape, seed=seed + i, dtype=dtype) for i, shape in enumerate(shapes))
    return [w.requires_grad_() for w in tensors]


def copies(params: Sequence[Tensor]) -> list[Tensor]:
    return [p.detach().clone().requires_grad_() for p in params]


def anchors_of(params: Sequence[Any], seed: int = 500) -> list[Tensor]:
    tensors = [p[1] if isinstance(p, tuple) else p for p in params]
    return [
        random(*p.shape, seed=seed + i, dtype=p.dtype).to(p.device) for i, p in enumerate(tensors)
    ]


def gradient(p: Tensor, i: int, t: int) -> Tensor | None:
    """Parameter i's gradient at step t, rounded to p's dtype.

    It falls from step to step, so that amsgrad's maximum is not v, and does not average to zero.
    One parameter has none at each third step, another none until the third: step counts differ.
    """
    if (i == 2 and t % 3 == 1) or (i == 3 and t < 2):
        return None
    return ((random(*p.shape, seed=1000 * t + i, dtype=p.dtype) + 0.3) * 0.7**t).to(p.dtype)


# ---- runs ----------------------------------------------------------------------------------------


def set_gradients(
    params: Sequence[Tensor], t: int, scale: float = 1.0, like: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """Those of step t that there are, rounded as gradients of tensors `like` these would be."""
    for i, (p, q) in enumerate(zip(params, like or params, strict=True)):
        g = gradient(q, i, t)
        p.grad = None if g is None else (g * scale).to(p.device, p.dtype)
    return [p.grad for p in params if p.grad is not None]


def train(
    optimizer: Any, params: Sequence[Tensor], steps: range, like: Sequence[Tensor] | None = None
) -> None:
    for t in steps:
        set_gradients(params, t, like=like)
        optimizer.step()


def trained(
    optimizer: Any, params: Sequence[Tensor], steps: int, like: Sequence[Tensor] | None = None
) -> dict[str, Tensor]:
    """All weights and states after so many steps."""
    train(optimizer, params, range(steps), like)
    return snapshot(optimizer, params)


def scaled(optimizer: Any, scale: float | None, found_inf: float = 0.0) -> None:
    """What a GradScaler tells the optimizer for the next step."""
    optimizer.grad_scale = None if scale is None else torch.tensor(scale)
    optimizer.found_inf = torch.tensor(found_inf)


def snapshot(optimizer: Any, params: Sequence[Tensor]) -> dict[str, Tensor]:
    """All weights and states, copied, by name."""
    found = {f"weight {i}": p.detach().clone() for i, p in enumerate(params)}
    for i, p in enumerate(params):
        for key, value in optimizer.state.get(p, {}).items():
            found[f"{key} {i}"] = value.clone()
    return found


def saved(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Through a file, as a checkpoint is read: tensors and plain data only."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


# ---- comparisons ---------------------------------------------------------------------------------


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-12, **how: Any) -> None:
    """Tensors, or lists and dicts of them."""
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, **how)


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, x in actual.items():
        y = expected[name]
        assert x.dtype == y.dtype, name
        assert x.shape == y.shape, name
        same = (bits(x) == bits(y)).flatten()
        assert same.all(), f"{name} differs first at element {(~same).nonzero()[0].item()}"


def bits(x: Tensor) -> Tensor:
    x = x.resolve_conj().resolve_neg()
    x = torch.view_as_real(x) if x.is_complex() else x
    return x.contiguous().view(
        {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    )


# ---- other kinds of memory -----------------------------------------------------------------------


def other_order(x: Tensor) -> Tensor:
    """The same values with the last two dimensions swapped in memory."""
    return x.mT.contiguous().mT if x.dim() > 1 else x.clone()


def sliced(x: Tensor) -> Tensor:
    """The same values with holes between them."""
    return torch.full((*x.shape, 2), 7, dtype=x.dtype)[..., 0].copy_(x)


class Wrapper(Tensor):
    """A tensor without memory of its own, like DTensor."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        def unwrap(x: Any) -> Any:
            return x.inner if isinstance(x, cls) else x

        def wrap(x: Any) -> Any:
            return cls(x) if isinstance(x, Tensor) else x

        args, kwargs = tree_map(unwrap, (args, kwargs or {}))
        return tree_map(wrap, function(*args, **kwargs))
