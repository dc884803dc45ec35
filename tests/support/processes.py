"""Processes that share shards over torch.distributed, for the tests that need more than one."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

WITHIN = timedelta(seconds=60)  # nobody waits for longer


def run_processes(
    count: int, folder: Path, check: Callable[..., None], *args: Any, join: bool = True
) -> Any:
    """Runs `check(*args)` in each of `count` processes, which meet in a file of `folder`."""
    meeting = folder / f"meeting-of-{count}"
    meeting.unlink(missing_ok=True)
    return torch.multiprocessing.spawn(
        _run, args=(str(meeting), count, check, args), nprocs=count, join=join
    )


def _run(
    rank: int, meeting: str, count: int, check: Callable[..., None], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(meeting, count)
    dist.init_process_group("gloo", rank=rank, world_size=count, store=store, timeout=WITHIN)
    try:
        check(*args)
    except BaseException:
        traceback.print_exc()
        raise
    dist.barrier()
    dist.destroy_process_group()
    # The interpreter's own end aborts such a process now and then ("terminate called without an
    # active exception"): a mesh keeps gloo's threads after the group has been destroyed, and one
    # that lets go of a Python object then is unwound where C++ forbids it (pytorch#190489).
    os._exit(0)
