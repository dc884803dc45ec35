"""Memory for the tables of a plan on a GPU: from torch's allocators, filled without waiting."""

from __future__ import annotations

import torch
from torch import Tensor

_kept: list[tuple[Tensor, ...]] = []


class DeviceMemory:
    """What the native core allocates on one device; always for the device's current stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spare: Tensor | None = None

    def send(self, table: memoryview, capturing: bool) -> Tensor:
        """Returns a copy of the bytes on the device, which is made asynchronously.

        torch does not give the pinned memory in between out again before the copy is done. A graph
        repeats the copy, from pinned memory that is then kept; it has been set aside by `reserve`,
        for none can be had during a capture.
        """
        if capturing:
            staging, self._spare = self._spare, None
            if staging is None or len(staging) < len(table):
                raise RuntimeError(
                    "a CUDA graph is being captured, which a step can only join after steps "
                    "outside of it: run one, with the same parameters, before each capture"
                )
            staging = staging[: len(table)]
            self.keep(staging)
        else:
            staging = self._pinned(len(table))
        staging.copy_(torch.frombuffer(table, dtype=torch.uint8))
        return staging.to(self._device, non_blocking=True)

    def reserve(self, size: int) -> None:
        """Set pinned memory aside for a capture that may follow."""
        if self._spare is None or len(self._spare) < size:
            self._spare = self._pinned(size)

    def empty(self, size: int) -> Tensor:
        """Returns so many bytes of the device, as they are."""
        return torch.empty(size, dtype=torch.uint8, device=self._device)

    def keep(self, *tensors: Tensor) -> None:
        """Keeps them for the life of the process: nobody says when a graph is replayed last."""
        _kept.append(tensors)

    def _pinned(self, size: int) -> Tensor:
        pinned = self._device.type != "cpu"  # the tests run GPU code on the CPU
        return torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
