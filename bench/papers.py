"""Decays as research code has them: a Python loop over the parameters, a few tensor operations for
each, and a number fetched to the host wherever a decision needs one.

This is what somebody who wants these methods runs today, hence what a fused kernel is compared
with. Written from the formulas of arXiv 2012.13841 (the ablation), 2510.12402, 1802.01483 (but
decoupled, as AdamW's decay is), 2011.11152 and 2411.01713.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


class _ResearchAdam(torch.optim.Optimizer):
    def __init__(
        self,
        params: Any,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "wd": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                state = self._update_moments(p, group)
                correction1 = 1 - group["betas"][0] ** state["step"]
                correction2 = 1 - group["betas"][1] ** state["step"]
                denominator = (state["exp_avg_sq"] / correction2).sqrt().add_(group["eps"])
                self._update(p, state["exp_avg"] / correction1, denominator, group)

    def _update(self, p: Tensor, m: Tensor, denominator: Tensor, group: dict[str, Any]) -> None:
        raise NotImplementedError

    def _update_moments(self, p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        assert p.grad is not None
        beta1, beta2 = group["betas"]
        state: dict[str, Any] = self.state[p]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(p)
            state["exp_avg_sq"] = torch.zeros_like(p)
            self._init_more(p, state)
        state["step"] += 1
        state["exp_avg"].mul_(beta1).add_(p.grad, alpha=1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
        return state

    def _init_more(self, p: Tensor, state: dict[str, Any]) -> None:
        pass


class _Anchored(_ResearchAdam):
    """Towards the weights of the first step."""

    def _init_more(self, p: Tensor, state: dict[str, Any]) -> None:
        state["anchor"] = p.detach().clone()


class AdamUnmixed(_ResearchAdam):
    """L2 that the moments do not see, divided as the step is."""

    def _update(self, p: Tensor, m: Tensor, denominator: Tensor, group: dict[str, Any]) -> None:
        p.addcdiv_(m + group["wd"] * p, denominator, value=-group["lr"])


class AdamWCautious(_ResearchAdam):
    """Decoupled decay where it does not oppose the step."""

    def _update(self, p: Tensor, m: Tensor, denominator: Tensor, group: dict[str, Any]) -> None:
        update = m / denominator
        mask = (update * p >= 0).to(p.dtype)
        p.sub_(group["lr"] * (update + group["wd"] * mask * p))


class AdamWAnchored(_Anchored):
    """Decoupled decay, L2-SP."""

    def _update(self, p: Tensor, m: Tensor, denominator: Tensor, group: dict[str, Any]) -> None:
        p.sub_(p - self.state[p]["anchor"], alpha=group["lr"] * group["wd"])
        p.addcdiv_(m, denominator, value=-group["lr"])


class AdamSWD(_ResearchAdam):
    """Scheduled weight decay: decay by lr * wd / sqrt(mean of the corrected second moments)."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        total, count = 0.0, 0
        for group in self.param_groups:
            for p in group["params"]:
                state = self._update_moments(p, group)
                correction = 1 - group["betas"][1] ** state["step"]
                total += state["exp_avg_sq"].sum().item() / correction
                count += p.numel()
        scale = math.sqrt(total / count)

        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                correction1 = 1 - group["betas"][0] ** state["step"]
                correction2 = 1 - group["betas"][1] ** state["step"]
                p.mul_(1 - group["lr"] * group["wd"] / scale)
                denominator = (state["exp_avg_sq"] / correction2).sqrt().add_(group["eps"])
                p.addcdiv_(state["exp_avg"], denominator, value=-group["lr"] / correction1)


class AdamSPD(_Anchored):
    """Selective projection decay towards the weights of the first step."""

    def _update(self, p: Tensor, m: Tensor, denominator: Tensor, group: dict[str, Any]) -> None:
        assert p.grad is not None
        new = p - group["lr"] * m / denominator
        moved = p - self.state[p]["anchor"]
        condition = -torch.sum(p.grad * moved)
        if condition.item() < 0:
            moved_new = new - self.state[p]["anchor"]
            norm, norm_new = torch.norm(moved), torch.norm(moved_new)
            ratio = ((norm_new - norm) / norm_new).clamp(0, 1)
            new = new - group["wd"] * ratio * moved_new
        p.copy_(new)
