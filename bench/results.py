"""What was measured, and ratios taken within rounds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple

import numpy as np


@dataclass(frozen=True)
class Row:
    workload: str
    title: str  # of the workload
    maker: str
    method: str
    groups: int
    bytes: int
    seconds: dict[int, float]  # by round
    kernel_seconds: dict[int, float] = field(default_factory=dict)  # likewise, by a GPU's own clock
    parameters: int = 1
    collectives: int | None = None  # of a step, where processes share the workload

    @property
    def name(self) -> str:
        return f"{self.maker} {self.method}{self.in_groups}"

    @property
    def in_groups(self) -> str:
        return f" ({self.groups} groups)" if self.groups > 1 else ""

    def times(self, wall: bool = False) -> dict[int, float]:
        """By the clock that counts: a GPU's, where there is one, unless the wall's is asked for."""
        return self.seconds if wall else self.kernel_seconds or self.seconds

    def ms(self, wall: bool = False) -> float:
        return 1e3 * median(self.times(wall).values())

    def quartiles_ms(self, wall: bool = False) -> tuple[float, float]:
        first, last = np.quantile(list(self.times(wall).values()), (0.25, 0.75))
        return 1e3 * first, 1e3 * last

    @property
    def us_each(self) -> float:
        """Microseconds of the host for each parameter."""
        return 1e3 * self.ms(wall=True) / self.parameters

    @property
    def gbs(self) -> float:
        return self.bytes / self.ms() / 1e6

    def time_over(self, other: Row, wall: bool = False) -> float:
        """This one's time over the other's: the median of the ratios within rounds."""
        mine, theirs = self.times(wall), other.times(wall)
        return median(mine[k] / theirs[k] for k in mine.keys() & theirs.keys())

    def rate_over(self, other: Row) -> float:
        """This one's bytes per second over the other's."""
        return self.bytes / other.bytes / self.time_over(other)


class Absence(NamedTuple):
    """A contender that could not be measured."""

    workload: str
    name: str
    reason: str


@dataclass(frozen=True)
class Results:
    machine: dict[str, Any]
    date: str
    commit: str
    rows: tuple[Row, ...]
    absent: tuple[Absence, ...] = ()

    @property
    def on_gpu(self) -> bool:
        return any(row.kernel_seconds for row in self.rows)

    def find(self, workload: str, name: str) -> Row | None:
        found = (row for row in self.rows if row.workload == workload and row.name == name)
        return next(found, None)

    def workloads(self) -> Iterable[str]:
        return dict.fromkeys(row.workload for row in self.rows)

    def of_limit(self, row: Row) -> float | None:
        """Its share of the bytes per second that the memory allows."""
        limit = self.find(row.workload, "memory limit")
        return row.rate_over(limit) if limit else None

    def of_fused(self, row: Row, wall: bool = False) -> float | None:
        """How many of its steps torch's fused AdamW takes the time of."""
        fused = self.find(row.workload, f"torch fused AdamW{row.in_groups}")
        return fused.time_over(row, wall) if fused else None
