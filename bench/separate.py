"""The whole step in separate passes: clipping, AdamW, an average of the weights, norms.

This is what a training script puts together today from torch's own functions, the fastest for each
part, hence what a step that does it all in one pass is compared with.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class AdamW(torch.optim.AdamW):
    """Weights and gradients are measured in each `norms_every`-th step: the least that telemetry
    asks for. Gradients are written, where wdkernels only reads them once more."""

    def __init__(
        self,
        params: Any,
        *,
        max_grad_norm: float,
        ema_decay: float | None = None,
        norms_every: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(params, fused=True, **options)
        self._max_grad_norm, self._ema_decay = max_grad_norm, ema_decay
        self._norms_every, self._calls = norms_every, 0
        self.norms: tuple[Tensor, ...] = ()  # of weights, then of gradients

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        params = [p for group in self.param_groups for p in group["params"]]
        self._calls += 1
        if self._norms_every is not None and self._calls % self._norms_every == 0:
            grads = [p.grad for p in params]
            self.norms = *torch._foreach_norm(params), *torch._foreach_norm(grads)
        torch.nn.utils.clip_grad_norm_(params, self._max_grad_norm)
        if self._ema_decay is None:
            return super().step()

        first = self._calls == 1  # torch.optim takes a state that holds anything for a whole one
        averages = [p.clone() if first else self.state[p]["ema"] for p in params]
        super().step()
        torch._foreach_lerp_(averages, params, 1 - self._ema_decay)
        if first:
            for p, average in zip(params, averages, strict=True):
                self.state[p]["ema"] = average
        return None
