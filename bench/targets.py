"""What the project asks of itself. Each question is about a ratio of two times."""

from __future__ import annotations

import math
from typing import NamedTuple

from bench.results import Results, Row

# Every decay that needs no sum over tensors first, and so should cost what AdamW costs.
PLAIN_DECAYS = (
    "wdkernels AdamW schedule",
    "wdkernels AdamW relative_lr",
    "wdkernels AdamW corrected",
    "wdkernels AdamW cautious",
    "wdkernels AdamW anchor",
    "wdkernels AdamW amsgrad",
    "wdkernels Adam",
    "wdkernels Adam unmixed",
    "wdkernels Adam anchor",
)
LARGE = ("32M", "gpt2", "resnet50")
LARGE_ON_GPU = ("1G", "10x16M", "200x1M", "gpt2", "resnet50", "llama3-8b")
WHOLE = ("32M-whole", "gpt2-whole", "resnet50-whole")
ONE_THREAD = ("32M-1-thread", "half-gpt2-1-thread")
SMALL_SHARDED, LARGE_SHARDED = ("300x256-sharded",), ("38M-sharded",)
WHOLE_ON_GPU = ("1G-whole", "gpt2-whole", "resnet50-whole")
ADAMW, SWD, SPD = "wdkernels AdamW", "wdkernels AdamSWD", "wdkernels AdamSPD"
FUSED = "torch fused AdamW"
SCHEDULED = f"{ADAMW}, scheduled"
CLIP, PLAIN = f"{ADAMW} clip", f"{ADAMW} plain"
BF16, ALL, MEASURED = f"{ADAMW} bf16", f"{ADAMW} all", f"{ADAMW} all, measured"


class Target(NamedTuple):
    question: str
    sign: str
    bound: float | None  # None: only told
    workloads: tuple[str, ...]
    time: str | tuple[str, ...]  # of several contenders, the slowest is taken
    over: str | None  # None: the time itself, in milliseconds
    per_byte: bool = False
    wall: bool = False  # on a GPU: by the host's clock instead of the device's own
    per_parameter: bool = False  # how much more the host needs than the other, in microseconds
    collectives: bool = False  # their number, not a time

    @property
    def unit(self) -> str:
        if self.collectives:
            return ""
        if self.per_parameter:
            return " µs"
        return "×" if self.over else " ms"

    def measured(self, results: Results, workload: str) -> float | None:
        """None if this run has not got it."""
        names = (self.time,) if isinstance(self.time, str) else self.time
        rows = [row for name in names if (row := results.find(workload, name))]
        over = results.find(workload, self.over) if self.over else None
        if not rows or (self.over and not over):
            return None
        return max(self._figure(row, over) for row in rows)

    def met(self, figure: float) -> bool:
        if self.bound is None:
            return True
        return figure >= self.bound if self.sign == "≥" else figure <= self.bound

    def _figure(self, row: Row, over: Row | None) -> float:
        if self.collectives:
            return math.nan if row.collectives is None else row.collectives
        if over is None:
            return row.ms(self.wall)
        if self.per_parameter:
            return row.us_each - over.us_each
        return over.rate_over(row) if self.per_byte else row.time_over(over, self.wall)


def targets(results: Results) -> tuple[Target, ...]:
    return ON_GPU if results.on_gpu else ON_CPU


SHARDED = (
    Target(
        "AdamW, sharded: speed over torch fused", "≥", 10, SMALL_SHARDED, FUSED, ADAMW, wall=True
    ),
    Target(
        "AdamW, sharded: speed over torch fused", "≥", 1, LARGE_SHARDED, FUSED, ADAMW, wall=True
    ),
    Target(
        "AdamW, sharded: a parameter's time over a plain one's",
        "≤",
        1.5,
        SMALL_SHARDED,
        ADAMW,
        PLAIN,
        per_parameter=True,
    ),
    Target("AdamSWD, sharded: time over AdamW", "≤", 1.35, LARGE_SHARDED, SWD, ADAMW),
    Target(
        "AdamSPD, sharded, rests: time over AdamW", "≤", 1.5, LARGE_SHARDED, f"{SPD} rests", ADAMW
    ),
    Target(
        "AdamSPD, sharded, fires: time over AdamW", "≤", 1.5, LARGE_SHARDED, f"{SPD} fires", ADAMW
    ),
    Target(
        "AdamW, sharded: collectives in a step",
        "≤",
        0,
        (*SMALL_SHARDED, *LARGE_SHARDED),
        ADAMW,
        None,
        collectives=True,
    ),
    Target(
        "AdamSWD, AdamSPD or clipping, sharded: collectives in a step",
        "≤",
        1,
        (*SMALL_SHARDED, *LARGE_SHARDED),
        (SWD, f"{SPD} rests", f"{SPD} fires", CLIP),
        None,
        collectives=True,
    ),
    Target(
        "AdamW all, measured, sharded: collectives in a step",
        "≤",
        2,
        (*SMALL_SHARDED, *LARGE_SHARDED),
        MEASURED,
        None,
        collectives=True,
    ),
)

ON_CPU = (
    Target("AdamW: speed over torch fused", "≥", 1, LARGE, "torch fused AdamW", ADAMW),
    Target("AdamW: speed over DeepSpeedCPUAdam", "≥", 1, LARGE, "DeepSpeed AdamW", ADAMW),
    Target("AdamW: speed over that of memory", "≥", 0.95, LARGE, "memory limit", ADAMW),
    Target("AdamW: speed over torch fused", "≥", 25, ("300x256",), "torch fused AdamW", ADAMW),
    Target("AdamW: a step of 1,000 parameters", "≤", 0.6, ("1000x16",), ADAMW, None),
    Target(
        "AdamW, scheduled: time over constant lr",
        "≤",
        1.15,
        ("1000x16",),
        SCHEDULED,
        ADAMW,
    ),
    Target(
        "AdamW, scheduled: the same in 100 groups",
        "≤",
        1.5,
        ("1000x16",),
        f"{SCHEDULED} (100 groups)",
        f"{ADAMW} (100 groups)",
    ),
    Target("AdamW: speed over torch fused", "≥", 1, ONE_THREAD, "torch fused AdamW", ADAMW),
    Target(
        "AdamW: time in 100 groups over one",
        "≤",
        1.1,
        ("1000x16", "1000x256"),
        f"{ADAMW} (100 groups)",
        ADAMW,
    ),
    Target(
        "Slowest decay without a sum: time per byte over AdamW",
        "≤",
        1.03,
        LARGE,
        PLAIN_DECAYS,
        ADAMW,
        per_byte=True,
    ),
    Target("AdamSWD: time over AdamW", "≤", 1.3, LARGE, SWD, ADAMW),
    Target("AdamSWD: speed over the paper's code", "≥", 5, LARGE, "paper AdamSWD", SWD),
    Target("AdamSPD, rests: time over AdamW", "≤", 1.45, LARGE, f"{SPD} rests", ADAMW),
    Target("AdamSPD, fires: time over AdamW", "≤", 1.45, LARGE, f"{SPD} fires", ADAMW),
    Target(
        "AdamSPD, rests: speed over the paper's code",
        "≥",
        8,
        LARGE,
        "paper AdamSPD rests",
        f"{SPD} rests",
    ),
    Target(
        "AdamSPD, fires: speed over the paper's code",
        "≥",
        8,
        LARGE,
        "paper AdamSPD fires",
        f"{SPD} fires",
    ),
    Target("AdamW bf16: time over float32", "≤", 1, WHOLE, BF16, ADAMW),
    Target(
        "AdamW bf16, float32 masters: speed over DeepSpeedCPUAdam",
        "≥",
        1,
        WHOLE,
        "DeepSpeed AdamW bf16 master_weights",
        f"{BF16} master_weights",
    ),
    Target("AdamW bf16: speed over DeepSpeedCPUAdam", "≥", 3, WHOLE, "DeepSpeed AdamW bf16", BF16),
    Target("AdamW all: time over AdamW", "≤", 1.5, WHOLE, ALL, ADAMW),
    Target("AdamW all: speed over separate passes", "≥", 1.6, WHOLE, "separate AdamW all", ALL),
    Target("AdamW all, measured: time over AdamW", "≤", None, WHOLE, MEASURED, ADAMW),
    Target(
        "AdamW all, measured: speed over separate passes",
        "≥",
        1.6,
        WHOLE,
        "separate AdamW all, measured",
        MEASURED,
    ),
    *SHARDED,
)

TRITON = "wdkernels triton"

ON_GPU = (
    Target(
        "AdamW: bytes per second over a copy's",
        "≥",
        0.92,
        LARGE_ON_GPU,
        "memory limit",
        ADAMW,
        per_byte=True,
    ),
    Target("AdamW: speed over torch fused", "≥", 1, LARGE_ON_GPU, FUSED, ADAMW),
    Target("AdamW: speed over torch fused, wall", "≥", 10, ("10000x64",), FUSED, ADAMW, wall=True),
    Target(
        "Slowest decay without a sum: time per byte over AdamW",
        "≤",
        1.03,
        LARGE_ON_GPU,
        PLAIN_DECAYS,
        ADAMW,
        per_byte=True,
    ),
    Target("AdamSWD: time over AdamW", "≤", 1.17, LARGE_ON_GPU, SWD, ADAMW),
    Target("AdamSPD, rests: time over AdamW", "≤", 1.25, LARGE_ON_GPU, f"{SPD} rests", ADAMW),
    Target("AdamSPD, fires: time over AdamW", "≤", None, LARGE_ON_GPU, f"{SPD} fires", ADAMW),
    Target("AdamSWD: speed over the paper's code", "≥", None, LARGE_ON_GPU, "paper AdamSWD", SWD),
    Target(
        "AdamSPD, rests: speed over the paper's code",
        "≥",
        None,
        LARGE_ON_GPU,
        "paper AdamSPD rests",
        f"{SPD} rests",
    ),
    Target("AdamW: time in Triton over native", "≤", None, LARGE_ON_GPU, f"{TRITON} AdamW", ADAMW),
    Target(
        "AdamW bf16: bytes per second over a copy's",
        "≥",
        0.9,
        WHOLE_ON_GPU,
        "memory limit",
        BF16,
        per_byte=True,
    ),
    Target("AdamW all: time over AdamW", "≤", 1.45, WHOLE_ON_GPU, ALL, ADAMW),
    Target("AdamW all, measured: time over AdamW", "≤", 1.45, WHOLE_ON_GPU, MEASURED, ADAMW),
    Target(
        "AdamW all, measured: speed over separate passes",
        "≥",
        None,
        WHOLE_ON_GPU,
        "separate AdamW all, measured",
        MEASURED,
    ),
    *SHARDED,
)
