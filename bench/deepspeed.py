"""DeepSpeedCPUAdam, with AdamW's decay and moments in float32, whatever the type of the weights."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch


def adamw(params: Any, **options: Any) -> Any:
    return _kind()(params, adamw_mode=True, fp32_optimizer_states=True, **options)


def adamw_multi(params: Any, **options: Any) -> Any:
    """With one call for all tensors of a group, which DeepSpeed itself makes for ZenFlow alone."""
    return multi(_kind())(params, adamw_mode=True, fp32_optimizer_states=True, **options)


class WithMasters:
    """bfloat16 weights that follow float32 ones, as ZeRO offloads them: gradients are widened into
    those of the masters, DeepSpeedCPUAdam updates these, and they are copied to the weights."""

    def __init__(self, params: Any, **options: Any) -> None:
        self._weights = [p for group in params for p in group["params"]]
        self._masters = [p.detach().float() for p in self._weights]
        for master in self._masters:
            master.grad = torch.empty_like(master)
        self._optimizer = adamw(self._masters, **options)
        self.param_groups = self._optimizer.param_groups

    @property
    def state(self) -> dict[torch.Tensor, dict[str, Any]]:
        return {
            p: {"master": master, **self._optimizer.state[master]}
            for p, master in zip(self._weights, self._masters, strict=True)
        }

    @torch.no_grad()
    def step(self) -> None:
        torch._foreach_copy_([x.grad for x in self._masters], [p.grad for p in self._weights])
        self._optimizer.step()
        torch._foreach_copy_(self._weights, self._masters)


def has_multi(folders: Iterable[str]) -> bool:
    """Whether the DeepSpeed installed there has such a call; to ask its module would compile it."""
    sources = (path for folder in folders for path in Path(folder).rglob("cpu_adam.cpp"))
    return any("adam_update_multi" in path.read_text() for path in sources)


@cache
def _kind() -> Any:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it looks for one, and says so
    return import_module("deepspeed.ops.adam").DeepSpeedCPUAdam


@cache
def multi(kind: Any) -> Any:
    class Multi(kind):  # type: ignore[misc]
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            if not self.state:
                return super().step()  # makes it
            for group in self.param_groups:
                states = [self.state[p] for p in group["params"]]
                for state in states:
                    state["step"] += 1
                self.ds_opt_adam.adam_update_multi(
                    self.opt_id,
                    states[0]["step"],
                    group["lr"],
                    *group["betas"],
                    group["eps"],
                    group["weight_decay"],
                    group["bias_correction"],
                    [p.data for p in group["params"]],
                    [p.grad.data for p in group["params"]],
                    [state["exp_avg"] for state in states],
                    [state["exp_avg_sq"] for state in states],
                    [],  # copies of the weights that it would make
                )

    return Multi
