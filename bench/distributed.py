"""Processes that share a workload by FSDP2: gloo on CPUs, NCCL where each has a GPU."""

from __future__ import annotations

import os
import tempfile
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor, distributed

import wdkernels as wd
from bench.clock import Clock
from wdkernels import layouts

RANKS = 2
_TIMEOUT = timedelta(minutes=5)  # for the others, if one of them fails

T = TypeVar("T")


def is_possible(device: torch.device) -> bool:
    """Whether this torch has processes, and each of them has a GPU, where GPUs are measured."""
    return distributed.is_available() and (
        device.type == "cpu" or torch.cuda.device_count() >= RANKS
    )


def on_all_ranks(
    what: Callable[[Any, torch.device, int], T], argument: Any, device: torch.device
) -> list[T]:
    """what(argument, the process's device, rank) in each of the processes, which share the cores:
    each has as many threads as it has cores to itself."""
    threads = str(max(1, len(os.sched_getaffinity(0)) // RANKS))
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, OMP_NUM_THREADS=threads),
        ProcessPoolExecutor(RANKS, get_context("spawn")) as pool,
    ):
        meeting = Path(folder, "meeting").as_uri()
        runs = [
            pool.submit(_run, meeting, rank, what, argument, device.type) for rank in range(RANKS)
        ]
        return [run.result() for run in runs]


def _run(meeting: str, rank: int, what: Callable[..., T], argument: Any, device_type: str) -> T:
    device = torch.device(device_type) if device_type == "cpu" else torch.device(device_type, rank)
    backend = "gloo" if device_type == "cpu" else "nccl"
    distributed.init_process_group(
        backend, init_method=meeting, rank=rank, world_size=RANKS, timeout=_TIMEOUT
    )
    try:
        return what(argument, device, rank)
    finally:
        distributed.destroy_process_group()


def shard(tensors: list[Tensor]) -> list[Tensor]:
    """The parameters of a module that holds these, once FSDP2 has sharded it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    module = torch.nn.Module()
    for i, x in enumerate(tensors):
        module.register_parameter(str(i), torch.nn.Parameter(x))
    fully_shard(module, mesh=init_device_mesh(tensors[0].device.type, (RANKS,)))
    return [p.detach() for p in module.parameters()]


def collectives(step: Callable[[], object]) -> int:
    """How many a step takes, in this process."""
    from torch.distributed.tensor.debug import CommDebugMode

    with CommDebugMode() as seen:
        step()
    return int(seen.get_total_counts())


class Together(Clock):
    """Another clock, for steps that all processes begin at the same time."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def wait(self) -> None:
        self._clock.wait()

    def wall(self, step: Callable[[], object]) -> float:
        self._meet()
        return self._clock.wall(step)

    def kernel(self, step: Callable[[], object], lead: float) -> float | None:
        self._meet()
        return self._clock.kernel(step, lead)

    def _meet(self) -> None:
        self._clock.wait()
        distributed.barrier()
        self._clock.wait()


class PlainAdamW:
    """AdamW on the shards as tensors of their own: what it costs that they are DTensors shows."""

    def __init__(self, groups: list[dict[str, Any]], **options: Any) -> None:
        self._whole = [p for group in groups for p in group["params"]]
        self._shards = [layouts.local(p.detach()) for p in self._whole]
        self._optimizer = wd.AdamW(self._shards, **options)
        self.param_groups = self._optimizer.param_groups
        self.state: dict[Tensor, Any] = defaultdict(dict)

    def prepare(self) -> None:
        for shard, p in zip(self._shards, self._whole, strict=True):
            shard.grad = layouts.local(p.grad)

    def step(self) -> None:
        self._optimizer.step()
