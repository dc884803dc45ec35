"""The compiled module (csrc/bind.cpp)."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from wdkernels.device_memory import DeviceMemory

class GroupOptions:
    """The fields of csrc/options.h; enumerations are set by name, schedules as two factors."""

    def __setattr__(self, name: str, value: Any, /) -> None: ...

class Request:
    """The fields of csrc/options.h, which are those of wdkernels.plan.Request."""

    def __setattr__(self, name: str, value: Any, /) -> None: ...

class Gathered:
    irregular: list[int]
    def __len__(self) -> int: ...
    def set_gradient(self, position: int, gradient: Tensor) -> None: ...

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
        streams: Mapping[str, Tensor],
        storage: str,
        group: int,
        index: int,
        total: int,
        numbering: Sequence[int],
    ) -> None: ...
    def set_options(self, group: int, options: GroupOptions) -> None: ...
    def set_number(self, group: int, name: str, value: float) -> None: ...
    def gather(self, state: dict[Tensor, Any], groups: list[dict[str, Any]]) -> Gathered | None: ...
    def step(
        self,
        gathered: Gathered,
        request: Request,
        sums: Tensor | None,
        stream: int,
        capturing: bool,
    ) -> list[Tensor]: ...
    def begin(
        self,
        gathered: Gathered,
        request: Request,
        sums: Tensor | None,
        stream: int,
        capturing: bool,
    ) -> int: ...
    def reduce(self, round: int) -> None: ...
    def decide(self, round: int) -> bool: ...
    def update(self) -> list[Tensor]: ...
    def finish(self) -> None: ...
    def end(self) -> None: ...

def instruction_sets() -> list[str]: ...
def instruction_set() -> str: ...
def use_instruction_set(name: str) -> None: ...
def cuda() -> tuple[int, list[int]] | None: ...
def cuda_refusal(device: int) -> str: ...
