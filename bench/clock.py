"""The clocks: the host's, and a GPU's own."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


class Clock:
    """The host's, where the host does the work."""

    def wait(self) -> None:
        """Until everything that was asked for has been done."""

    def wall(self, step: Callable[[], object]) -> float:
        """Seconds of a step, from nothing under way to nothing under way."""
        self.wait()
        start = time.perf_counter()
        step()
        self.wait()
        return time.perf_counter() - start

    def kernel(self, step: Callable[[], object], lead: float) -> float | None:
        """Seconds of a GPU; None, and nothing done, where there is none."""
        return None


class GpuClock(Clock):
    def __init__(self, device: torch.device) -> None:
        torch.cuda.set_device(device.index or 0)
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        cycles = 20_000_000
        for _ in range(2):  # the first loads the kernel too
            self._cycles_per_second = cycles / self._between(lambda: torch.cuda._sleep(cycles))

    def wait(self) -> None:
        torch.cuda.synchronize()

    def kernel(self, step: Callable[[], object], lead: float) -> float | None:
        """Seconds that the step keeps the device from other work.

        The device sleeps for `lead` seconds first. Meanwhile the host queues the step, so that the
        time is the kernels' own: what the host takes is the wall clock's to tell. A step that makes
        the host wait, or queues too much for that, is taken as long as it keeps the queue.
        """
        self.wait()
        torch.cuda._sleep(int(lead * self._cycles_per_second))
        return self._between(step)

    def _between(self, step: Callable[[], object]) -> float:
        first, last = self._events
        first.record()
        step()
        last.record()
        self.wait()
        return float(first.elapsed_time(last)) / 1e3


def clock_of(device: torch.device) -> Clock:
    return Clock() if device.type == "cpu" else GpuClock(device)
