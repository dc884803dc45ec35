"""The compiled module (csrc/bind.cpp)."""

from typing import Any

from torch import Tensor

from wdkernels.device_memory import DeviceMemory

class Decay:
    l2: Decay
    unmixed: Decay
    decoupled: Decay
    projection: Decay

class DecayScale:
    lr: DecayScale
    relative_lr: DecayScale
    corrected: DecayScale

class ScheduleKind:
    constant: ScheduleKind
    window: ScheduleKind
    linear: ScheduleKind
    cosine: ScheduleKind

class Schedule:
    def __init__(self, *, kind: ScheduleKind, start: float, end: float, steps: float) -> None: ...

class Rounding:
    nearest: Rounding
    stochastic: Rounding
    kahan: Rounding

class Hyper:
    def __init__(
        self,
        *,
        decay: Decay,
        stable: bool,
        anchored: bool,
        amsgrad: bool,
        cautious: bool,
        maximize: bool,
        lr: float,
        lr_max: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        decay_scale: DecayScale,
        schedule: list[Schedule],
        rounding: Rounding,
        master: bool,
        seed: int,
        averaged: bool,
        ema_decay: float,
        ema_schedule: list[Schedule],
        counted: bool,
        live_lr: Tensor | None,
        live_weight_decay: Tensor | None,
    ) -> None: ...

class Request:
    def __init__(
        self,
        *,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        max_norm: float,
        skip_nonfinite: bool,
        grad_norm: Tensor | None,
        skipped: Tensor | None,
        telemetry: Tensor | None,
    ) -> None: ...

class Plan:
    def __init__(
        self,
        *,
        state: dict[Tensor, Any],
        groups: list[dict[str, Any]],
        device: int,
        memory: DeviceMemory | None,
    ) -> None: ...
    def add_parameter(
        self,
        *,
        parameter: Tensor,
        weight: Tensor,
        state: dict[str, Any] | None,
        group: int,
        index: int,
    ) -> None: ...
    def set_hyper(self, group: int, hyper: Hyper) -> None: ...
    def gather(
        self, state: dict[Tensor, Any], groups: list[dict[str, Any]]
    ) -> list[int] | None: ...
    def set_gradient(self, position: int, gradient: Tensor) -> None: ...
    def step(self, *, request: Request, stream: int, capturing: bool) -> list[Tensor]: ...

def instruction_sets() -> list[str]: ...
def instruction_set() -> str: ...
def use_instruction_set(name: str) -> None: ...
def cuda() -> tuple[int, list[int]] | None: ...
def cuda_refusal(device: int) -> str: ...
