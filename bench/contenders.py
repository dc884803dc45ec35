"""Who is measured. Contenders with the same `method` compute the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

import wdkernels as wd
from bench import deepspeed, distributed, limit, papers, separate
from bench.workloads import DECAYS, MANY, ONE_THREAD, SHARDED, WHOLE

Groups = list[dict[str, Any]]
EVERYWHERE = (DECAYS, WHOLE, ONE_THREAD)

ADAM = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
MAX_NORM = 1.0  # far less than the gradients have: they are clipped in each step
EMA_DECAY = 0.999
NOW_AND_THEN = 10  # so many-th steps are measured

# Bytes that a step must move per element, however it is programmed: each stream that it needs is
# read once, and written once if it changes.
PLAIN = 28  # w, g, m, v read; w, m, v written
ANCHOR = 4  # read
AMSGRAD = 8  # the largest v, read and written
NORM = 4  # g read once more, because a sum over all gradients is needed before the first write
EMA = 8  # read and written
# Telemetry adds nothing: its sums are of what the step reads.

# With weights and gradients in bfloat16:
BF16 = 22  # w and g in 2 bytes each, m and v in 4
KAHAN = 4  # what rounding lost of w, in 2 bytes, read and written
MASTER = 6  # read and written in 4 bytes, instead of w, which is written only
BF16_MOMENTS = -8  # m and v in 2 bytes each


def nothing(optimizer: Any) -> None:
    pass


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
    dtype: torch.dtype = torch.float32  # of weights and gradients
    parts: tuple[str, ...] = (DECAYS,)  # those of the comparison that it belongs to
    prepare: Callable[[Any], None] = nothing  # done before the clock starts

    @property
    def name(self) -> str:
        return f"{self.maker} {self.method}".strip()


def contenders(device: torch.device) -> list[Contender]:
    on_cpu = device.type == "cpu"
    backend = "auto" if on_cpu else "native"
    return [
        *_limit(device),
        *_ours(backend),
        *_ours_in_bf16(backend),
        *_our_whole_steps(backend),
        *([] if on_cpu else _ours_in_triton()),
        *_ours_sharded(backend),
        *_torch(),
        *_apex(device),
        *_deepspeed(device),
        *_separate(),
        *_papers(),
    ]


def _contender(
    maker: str,
    method: str,
    factory: Any,
    *,
    dtype: torch.dtype = torch.float32,
    more: int = 0,
    fires: bool = False,
    every: int = 1,
    parts: tuple[str, ...] = (DECAYS,),
    prepare: Callable[[Any], None] = nothing,
    **options: Any,
) -> Contender:
    return Contender(
        maker,
        method,
        partial(factory, **{**ADAM, **options}),
        (PLAIN if dtype == torch.float32 else BF16) + more,
        fires=fires,
        every=every,
        dtype=dtype,
        parts=parts,
        prepare=prepare,
    )


def next_lr(optimizer: Any) -> None:
    """What a scheduler does between two steps."""
    for group in optimizer.param_groups:
        group["lr"] *= 0.999


def _limit(device: torch.device) -> list[Contender]:
    if device.type != "cpu":
        total = limit.Copy.BYTES
        return [Contender("memory", "limit", limit.Copy, total_bytes=total, parts=EVERYWHERE)]
    if limit.compiler() is None:
        return []
    look_up = limit.Stream.look_up
    return [Contender("memory", "limit", limit.Stream, prepare=look_up, parts=EVERYWHERE)]


def _ours(backend: str) -> list[Contender]:
    ours = partial(_contender, "wdkernels", backend=backend)
    adamw = partial(ours, factory=wd.AdamW)
    spd = partial(ours, factory=wd.AdamSPD, weight_decay=1.0)
    return [
        adamw("AdamW", parts=(*EVERYWHERE, SHARDED)),
        adamw("AdamW, scheduled", prepare=next_lr, parts=(MANY,)),
        adamw("AdamW schedule", decay_schedule=wd.schedules.cosine(1.0, 0.5, steps=1000)),
        adamw("AdamW relative_lr", decay_scale="relative_lr", weight_decay=1e-5),
        adamw("AdamW corrected", decay_scale="corrected"),
        adamw("AdamW cautious", cautious=True),
        adamw("AdamW anchor", anchor="initial", more=ANCHOR),
        adamw("AdamW amsgrad", amsgrad=True, more=AMSGRAD),
        ours("Adam", wd.Adam),
        ours("Adam unmixed", wd.Adam, unmixed=True),
        ours("Adam anchor", wd.Adam, anchor="initial", more=ANCHOR),
        ours("AdamSWD", wd.AdamSWD, more=NORM, parts=(DECAYS, SHARDED)),
        spd("AdamSPD fires", more=ANCHOR, fires=True, parts=(DECAYS, SHARDED)),
        spd("AdamSPD rests", more=ANCHOR, parts=(DECAYS, SHARDED)),
        spd("AdamSPD zero fires", anchor="zero", fires=True),
        spd("AdamSPD zero rests", anchor="zero"),
    ]


def _ours_in_bf16(backend: str, maker: str = "wdkernels") -> list[Contender]:
    """Moments are float32, where nothing else is said, and weights rounded stochastically."""
    adamw = partial(_contender, maker, factory=wd.AdamW, backend=backend, parts=(WHOLE,))
    bf16 = partial(adamw, dtype=torch.bfloat16)
    return [
        bf16("AdamW bf16"),
        bf16("AdamW bf16 kahan", rounding="kahan", more=KAHAN),
        bf16("AdamW bf16 nearest", rounding="nearest"),
        bf16("AdamW bf16 master_weights", master_weights=True, more=MASTER),
        bf16("AdamW bf16 moments", moment_dtype=torch.bfloat16, more=BF16_MOMENTS),
    ]


def _our_whole_steps(backend: str, maker: str = "wdkernels") -> list[Contender]:
    """*All* is clipping, averaging and telemetry, now and then or, *measured*, in each step."""
    adamw = partial(_contender, maker, factory=wd.AdamW, backend=backend, parts=(WHOLE,))
    clip = partial(adamw, max_grad_norm=MAX_NORM)
    both = partial(clip, ema_decay=EMA_DECAY, more=NORM + EMA)
    return [
        clip("AdamW clip", more=NORM, parts=(WHOLE, SHARDED)),
        adamw("AdamW EMA", ema_decay=EMA_DECAY, more=EMA),
        both("AdamW clip + EMA"),
        adamw("AdamW telemetry", telemetry_every=1),
        both("AdamW all", telemetry_every=NOW_AND_THEN),
        both("AdamW all, measured", telemetry_every=1, parts=(WHOLE, SHARDED)),
    ]


def _ours_sharded(backend: str) -> list[Contender]:
    """Beside what is measured unsharded too; *plain* has the shards as tensors of their own."""
    ours = partial(_contender, "wdkernels", backend=backend, parts=(SHARDED,))
    plain = distributed.PlainAdamW
    return [ours("AdamW plain", plain, prepare=plain.prepare)]


def _ours_in_triton() -> list[Contender]:
    maker, backend = "wdkernels triton", "triton"
    ours = partial(_contender, maker, backend=backend)
    spd = partial(ours, factory=wd.AdamSPD, weight_decay=1.0, more=ANCHOR)
    wholes = {each.method: each for each in _our_whole_steps(backend, maker)}
    return [
        ours("AdamW", wd.AdamW, parts=EVERYWHERE),
        _ours_in_bf16(backend, maker)[0],
        *(wholes[method] for method in ("AdamW all", "AdamW all, measured")),
        ours("AdamSWD", wd.AdamSWD, more=NORM),
        spd("AdamSPD fires", fires=True),
        spd("AdamSPD rests"),
    ]


def _torch() -> list[Contender]:
    def adamw(maker: str, method: str = "AdamW", **options: Any) -> Contender:
        return _contender(maker, method, torch.optim.AdamW, **options)

    return [
        adamw("torch fused", fused=True, parts=(*EVERYWHERE, SHARDED)),
        adamw("torch fused", "AdamW, scheduled", fused=True, prepare=next_lr, parts=(MANY,)),
        adamw(
            "torch fused",
            "AdamW bf16",  # moments have the weights' type in torch
            dtype=torch.bfloat16,
            fused=True,
            more=BF16_MOMENTS,
            parts=(WHOLE,),
        ),
        adamw("torch foreach", foreach=True, every=4, parts=(DECAYS, SHARDED)),
        adamw("torch single", foreach=False, every=4),
        adamw("torch fused", "AdamW amsgrad", fused=True, amsgrad=True, more=AMSGRAD),
        _contender("torch fused", "Adam", torch.optim.Adam, fused=True),
    ]


def _apex(device: torch.device) -> list[Contender]:
    """FusedAdam, where apex is installed with its kernels."""
    if device.type == "cpu" or not (find_spec("apex") and find_spec("amp_C")):
        return []

    def build(params: Groups, **options: Any) -> Any:
        return import_module("apex.optimizers").FusedAdam(params, adam_w_mode=True, **options)

    return [_contender("apex", "AdamW", build, parts=EVERYWHERE)]


def _deepspeed(device: torch.device) -> list[Contender]:
    """DeepSpeedCPUAdam or FusedAdam, where it is installed. The first use compiles it: minutes."""
    installed = find_spec("deepspeed")
    if installed is None:
        return []
    if device.type != "cpu":

        def build(params: Groups, **options: Any) -> Any:
            fused_adam = import_module("deepspeed.ops.adam").FusedAdam
            return fused_adam(params, adam_w_mode=True, **options)

        return [_contender("DeepSpeed", "AdamW", build, parts=EVERYWHERE)]

    contenders = [
        _contender("DeepSpeed", "AdamW", deepspeed.adamw, parts=EVERYWHERE),
        _contender(
            "DeepSpeed", "AdamW bf16", deepspeed.adamw, dtype=torch.bfloat16, parts=(WHOLE,)
        ),
        _contender(
            *("DeepSpeed", "AdamW bf16 master_weights", deepspeed.WithMasters),
            dtype=torch.bfloat16,
            more=MASTER,
            parts=(WHOLE,),
        ),
    ]
    if deepspeed.has_multi(installed.submodule_search_locations or []):
        contenders.append(_contender("DeepSpeed multi", "AdamW", deepspeed.adamw_multi))
    return contenders


def _separate() -> list[Contender]:
    """Bytes are those of the method, not of these passes, which move more."""
    clip = partial(
        _contender, "separate", factory=separate.AdamW, max_grad_norm=MAX_NORM, parts=(WHOLE,)
    )
    both = partial(clip, ema_decay=EMA_DECAY, more=NORM + EMA)
    return [
        clip("AdamW clip", more=NORM),
        both("AdamW clip + EMA"),
        both("AdamW all", norms_every=NOW_AND_THEN),
        both("AdamW all, measured", norms_every=1),
    ]


def _papers() -> list[Contender]:
    paper = partial(_contender, "paper", every=6)
    spd = partial(paper, factory=papers.AdamSPD, weight_decay=1.0, more=ANCHOR)
    return [
        paper("Adam unmixed", papers.AdamUnmixed),
        paper("AdamW cautious", papers.AdamWCautious),
        paper("AdamW anchor", papers.AdamWAnchored, more=ANCHOR),
        paper("AdamSWD", papers.AdamSWD, more=NORM, every=4),
        spd("AdamSPD fires", fires=True, every=4),
        spd("AdamSPD rests", every=4),
    ]
