"""A step phase by phase, as a driver of shards takes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from wdkernels.sums import SUMS


def step_in_phases(plan: Any, *arguments: Any) -> bool:
    """What `Plan.step` does and returns."""
    phases = plan.begin(*arguments)
    if phases is not None:
        take([phases])
    return phases is not None


def take(shards: Sequence[Any]) -> None:
    """One step of plans that have shards of the same tensors."""
    reductions = shards[0].reductions
    for turn in range(max(reductions, 1)):
        if turn < reductions:
            for each in shards:
                each.reduce(turn)
            squares = ["gradient2"] if turn == 0 else []
            add_up(shards, [*squares, *(["maximum"] if turn + 1 == reductions else [])])
        proceed = [each.decide(turn) for each in shards]
        assert len(set(proceed)) == 1
        if not proceed[0]:
            return
    for each in shards:
        each.update()
    add_up(shards, SUMS[SUMS.index("weight2") :])
    for each in shards:
        each.finish()


def add_up(shards: Sequence[Any], names: Sequence[str]) -> None:
    """As torch.distributed.all_reduce does."""
    if len(shards) == 1:
        return
    columns = [SUMS.index(name) for name in names]
    sums = torch.stack([each.sums[:, columns] for each in shards]).sum(0)
    for each in shards:
        each.sums[:, columns] = sums
