"""Who is measured. Contenders with the same `method` compute the same numbers."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

import wdkernels as wd
from bench import limit, papers

Groups = list[dict[str, Any]]

ADAM = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}

# Bytes that a step must move per float32 element, however it is programmed: each stream that it
# needs is read once, and written once if it changes.
PLAIN = 28  # w, g, m, v read; w, m, v written
ANCHOR = 4  # read
AMSGRAD = 8  # the largest v, read and written
NORM = 4  # g read once more, because a sum over all gradients is needed before the first write


@dataclass(frozen=True)
class Contender:
    maker: str
    method: str
    build: Callable[[Groups], Any]  # an Optimizer; Any because `partial` of a class is not typed
    bytes: int = PLAIN  # per element
    total_bytes: int = 0  # instead, where they do not depend on the workload
    # SPD alone: whether the decay of every tensor fires in every step, or of none in any. What a
    # step moves again for those that fired is not counted, for it may come from the cache.
    fires: bool = False
    every: int = 1  # takes part in every so many-th round; the slow ones need not be in each
    look_up: Callable[[Any], None] = lambda optimizer: None  # done before the clock starts

    @property
    def name(self) -> str:
        return f"{self.maker} {self.method}".strip()


def contenders(device: torch.device) -> list[Contender]:
    ours = _ours() if device.type == "cpu" else [*_ours("native"), *_ours_in_triton()]
    return [*_limit(device), *ours, *_torch(), *_apex(device), *_deepspeed(device), *_eager()]


def _contender(
    maker: str,
    method: str,
    factory: Any,
    *,
    more: int = 0,
    fires: bool = False,
    every: int = 1,
    **options: Any,
) -> Contender:
    build = partial(factory, **{**ADAM, **options})
    return Contender(maker, method, build, PLAIN + more, fires=fires, every=every)


def _limit(device: torch.device) -> list[Contender]:
    if device.type != "cpu":
        return [Contender("memory", "limit", limit.Copy, total_bytes=limit.Copy.BYTES)]
    if limit.compiler() is None:
        return []
    return [Contender("memory", "limit", limit.Stream, look_up=limit.Stream.look_up)]


def _ours(backend: str = "auto") -> list[Contender]:
    ours = partial(_contender, "wdkernels", backend=backend)
    adamw = partial(ours, factory=wd.AdamW)
    spd = partial(ours, factory=wd.AdamSPD, weight_decay=1.0)
    return [
        adamw("AdamW"),
        adamw("AdamW schedule", decay_schedule=wd.schedules.cosine(1.0, 0.5, steps=1000)),
        adamw("AdamW relative_lr", decay_scale="relative_lr", weight_decay=1e-5),
        adamw("AdamW corrected", decay_scale="corrected"),
        adamw("AdamW cautious", cautious=True),
        adamw("AdamW anchor", anchor="initial", more=ANCHOR),
        adamw("AdamW amsgrad", amsgrad=True, more=AMSGRAD),
        ours("Adam", wd.Adam),
        ours("Adam unmixed", wd.Adam, unmixed=True),
        ours("Adam anchor", wd.Adam, anchor="initial", more=ANCHOR),
        ours("AdamSWD", wd.AdamSWD, more=NORM),
        spd("AdamSPD fires", more=ANCHOR, fires=True),
        spd("AdamSPD rests", more=ANCHOR),
        spd("AdamSPD zero fires", anchor="zero", fires=True),
        spd("AdamSPD zero rests", anchor="zero"),
    ]


def _ours_in_triton() -> list[Contender]:
    ours = partial(_contender, "wdkernels triton", backend="triton")
    spd = partial(ours, factory=wd.AdamSPD, weight_decay=1.0, more=ANCHOR)
    return [
        ours("AdamW", wd.AdamW),
        ours("AdamSWD", wd.AdamSWD, more=NORM),
        spd("AdamSPD fires", fires=True),
        spd("AdamSPD rests"),
    ]


def _torch() -> list[Contender]:
    adamw = partial(_contender, method="AdamW", factory=torch.optim.AdamW)
    return [
        adamw("torch fused", fused=True),
        adamw("torch foreach", foreach=True, every=4),
        adamw("torch single", foreach=False, every=4),
        adamw("torch fused", method="AdamW amsgrad", fused=True, amsgrad=True, more=AMSGRAD),
        _contender("torch fused", "Adam", torch.optim.Adam, fused=True),
    ]


def _apex(device: torch.device) -> list[Contender]:
    """FusedAdam, where apex is installed with its kernels."""
    if device.type == "cpu" or not (find_spec("apex") and find_spec("amp_C")):
        return []

    def build(params: Groups, **options: Any) -> Any:
        return import_module("apex.optimizers").FusedAdam(params, adam_w_mode=True, **options)

    return [_contender("apex", "AdamW", build)]


def _deepspeed(device: torch.device) -> list[Contender]:
    """DeepSpeedCPUAdam or FusedAdam, where it is installed. The first use compiles it: minutes."""
    if find_spec("deepspeed") is None:
        return []

    def build(params: Groups, **options: Any) -> Any:
        if device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it looks for one, and says so
        module = import_module("deepspeed.ops.adam")
        if device.type == "cpu":
            return module.DeepSpeedCPUAdam(params, adamw_mode=True, **options)
        return module.FusedAdam(params, adam_w_mode=True, **options)

    return [_contender("DeepSpeed", "AdamW", build)]


def _eager() -> list[Contender]:
    eager = partial(_contender, "eager", backend="eager", every=6)
    paper = partial(_contender, "paper", every=4)
    return [
        eager("AdamW", wd.AdamW),
        eager("AdamSWD", wd.AdamSWD, more=NORM),
        eager("AdamSPD fires", wd.AdamSPD, weight_decay=1.0, more=ANCHOR, fires=True),
        paper("AdamSWD", papers.AdamSWD, more=NORM),
        paper("AdamSPD fires", papers.AdamSPD, weight_decay=1.0, more=ANCHOR, fires=True),
        paper("AdamSPD rests", papers.AdamSPD, weight_decay=1.0, more=ANCHOR),
    ]
