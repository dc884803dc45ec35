"""The rounds: contenders on one workload take turns, one step each, on the same memory."""

from __future__ import annotations

import gc
import os
import random
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from multiprocessing import get_context
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor

from bench import distributed, machine
from bench.clock import Clock, clock_of
from bench.contenders import Contender, contenders
from bench.results import Absence, Results, Row
from bench.workloads import FULL, ONE_THREAD, QUICK, SHARDED, Workload, on_gpu
from wdkernels import layouts

WARM_UP = 2  # steps: the first makes the state, the second meets it where it will stay
MOST_ROUNDS = 100
LONGEST_LEAD = 0.05  # seconds that a GPU is kept waiting for the host at most
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Case:
    workload: Workload
    contender: Contender
    groups: int

    @property
    def bytes(self) -> int:
        return self.contender.total_bytes or self.contender.bytes * self.workload.numel

    def __str__(self) -> str:
        groups = f" ({self.groups} groups)" if self.groups > 1 else ""
        return f"{self.workload.name}: {self.contender.name}{groups}"


def workloads_of(device: torch.device, quick: bool, names: Sequence[str]) -> list[Workload]:
    full = FULL if device.type == "cpu" else on_gpu(machine.gpu_memory(device))
    found = QUICK if quick else full
    if names:
        found = tuple(w for w in (*full, *QUICK) if w.name in names)
    return [w for w in found if SHARDED not in w.parts or distributed.is_possible(device)]


def cases_of(workload: Workload, device: torch.device) -> list[Case]:
    return [
        Case(workload, contender, groups)
        for groups in workload.groups
        for contender in contenders(device)
        if set(workload.parts) & set(contender.parts) and contender.maker not in workload.without
        if groups == 1 or contender.method != "limit"  # memory knows no groups
    ]


@dataclass
class Record:
    """Seconds by round, or why there are none."""

    seconds: dict[int, float] = field(default_factory=dict)
    kernel_seconds: dict[int, float] = field(default_factory=dict)  # none on a CPU
    collectives: int | None = None  # of a step, where processes share the workload
    problem: str = ""
    trace: str = ""  # as text: a traceback would hold on to the memory that was too little

    def fail(self, error: Exception) -> None:
        self.seconds, self.kernel_seconds = {}, {}
        self.problem = OUT_OF_MEMORY
        if not isinstance(error, torch.OutOfMemoryError):
            self.problem = " ".join(f"{type(error).__name__}: {error}".split())
            self.trace = traceback.format_exc()


@dataclass
class Entrant:
    """A contender that has warmed up."""

    optimizer: Any
    lead: float  # seconds that the host needs to queue a step on a GPU, at most


def run(workloads: Iterable[Workload], device: torch.device, console: Console) -> Results:
    rows, absent = [], []
    for workload in workloads:
        cases = cases_of(workload, device)
        if ONE_THREAD in workload.parts:
            records = _on_one_thread(workload, device)
        elif SHARDED in workload.parts:
            records = _on_all_ranks(workload, device)
        else:
            records = list(measure(cases, device, console).values())
        for case, record in zip(cases, records, strict=True):
            if record.problem:
                absent.append(Absence(workload.title, case.contender.name, record.problem))
                if record.trace:
                    console.print(record.trace, highlight=False, markup=False)
            else:
                rows.append(row_of(case, record))
    return Results(
        *(machine.describe(device), date.today().isoformat(), machine.commit()),
        *(tuple(rows), tuple(absent)),
    )


def row_of(case: Case, record: Record) -> Row:
    workload, contender = case.workload, case.contender
    return Row(
        *(workload.name, workload.title, contender.maker, contender.method),
        *(case.groups, case.bytes, record.seconds, record.kernel_seconds),
        *(len(workload.shapes), record.collectives),
    )


def _on_one_thread(workload: Workload, device: torch.device) -> list[Record]:
    """OpenMP's threads are counted when a process first needs them: it takes one of its own."""
    with (
        mock.patch.dict(os.environ, OMP_NUM_THREADS="1"),
        ProcessPoolExecutor(1, get_context("spawn")) as pool,
    ):
        return pool.submit(_records_of, workload, device).result()


def _records_of(workload: Workload, device: torch.device) -> list[Record]:
    assert torch.get_num_threads() == 1
    cases = cases_of(workload, device)
    return list(measure(cases, device, Console(stderr=True)).values())


def _on_all_ranks(workload: Workload, device: torch.device) -> list[Record]:
    """A process for each; a step takes as long as in the slowest."""
    by_rank = distributed.on_all_ranks(_records_of_rank, workload, device)
    return [_slowest(records) for records in zip(*by_rank, strict=True)]


def _records_of_rank(workload: Workload, device: torch.device, rank: int) -> list[Record]:
    console = Console(stderr=True, quiet=rank > 0)
    clock = distributed.Together(clock_of(device))
    cases = cases_of(workload, device)
    return list(measure(cases, device, console, clock, distributed.shard).values())


def _slowest(records: Sequence[Record]) -> Record:
    if failed := next((record for record in records if record.problem), None):
        return failed
    slowest = Record(collectives=records[0].collectives)
    for name in ("seconds", "kernel_seconds"):
        times = [getattr(record, name) for record in records]
        setattr(slowest, name, {k: max(each[k] for each in times) for k in times[0]})
    return slowest


def measure(
    cases: Sequence[Case],
    device: torch.device,
    console: Console,
    clock: Clock | None = None,
    shard: Callable[[list[Tensor]], list[Tensor]] | None = None,
) -> dict[Case, Record]:
    """Measure cases of one workload against each other. What fails does not keep the others."""
    records = {case: Record() for case in cases}
    try:
        _measure(records, device, console, clock or clock_of(device), shard)
    except Exception as error:
        for record in records.values():
            record.fail(error)
    _release_memory()
    return records


def _measure(
    records: dict[Case, Record],
    device: torch.device,
    console: Console,
    clock: Clock,
    shard: Callable[[list[Tensor]], list[Tensor]] | None,
) -> None:
    workload = next(iter(records)).workload
    arena = Arena(workload, device, clock, shard)
    with ProgressBar(workload.title, console) as bar:
        entrants: dict[Case, Entrant] = {}
        for case, record in records.items():
            bar.show(f"warming up {case.contender.name}")
            try:
                entrants[case] = arena.warm_up(case)
                if shard is not None:
                    record.collectives = distributed.collectives(entrants[case].optimizer.step)
            except Exception as error:
                record.fail(error)
            if record.problem:
                _release_memory()

        start, number, done = time.monotonic(), 0, 0.0
        with _no_garbage_collection():
            while entrants and done < 1:
                turns = [case for case in entrants if number % case.contender.every == 0]
                random.Random(number).shuffle(turns)
                arena.set_out()
                for case in turns:
                    bar.show(f"round {number + 1}", done)
                    try:
                        arena.turn(case, entrants[case], number, records[case])
                    except torch.OutOfMemoryError as error:
                        records[case].fail(error)
                        del entrants[case]
                number += 1
                spent = (time.monotonic() - start) / max(workload.seconds, 1e-9)
                done = max(min(number / workload.rounds, spent), number / MOST_ROUNDS)
        bar.show(f"{number} rounds", 1)
    arena.check()


class Weights:
    """The weights in one type, and the gradients they get."""

    def __init__(self, start: list[Tensor], dtype: torch.dtype) -> None:
        self.params = [w.to(dtype, copy=True).requires_grad_() for w in start]
        # The weights are driven away from zero and from where they started. There SPD rests.
        # Where a faint gradient points back, the step, which follows the momentum, still goes
        # outward: away from the anchor and up the gradient, and SPD fires.
        self.outward = [-p.detach() for p in self.params]
        self.back = [-1e-6 * g for g in self.outward]


class Arena:
    """The memory that all contenders work on.

    Weights, gradients and state of a type are shared: nobody has the better pages, and a large
    workload needs no more memory for thirty contenders than for one.
    """

    def __init__(
        self,
        workload: Workload,
        device: torch.device,
        clock: Clock,
        shard: Callable[[list[Tensor]], list[Tensor]] | None = None,
    ) -> None:
        """`shard`: what of some tensors this process has, where several share the workload."""
        generator = torch.Generator(device).manual_seed(0)
        self.clock = clock
        start = [
            torch.randn(shape, generator=generator, device=device) for shape in workload.shapes
        ]
        if shard is not None:
            start = shard(start)
        self._weights = {torch.float32: Weights(start, torch.float32)}
        self._state: dict[tuple[int, str, torch.dtype], Tensor] = {}

    def warm_up(self, case: Case) -> Entrant:
        """The optimizer, on the shared state."""
        weights = self._of_type(case.contender.dtype)
        groups = [{"params": weights.params[k :: case.groups]} for k in range(case.groups)]
        optimizer = case.contender.build(groups)
        for _ in range(WARM_UP):
            self._prepare(case.contender, optimizer, weights.outward)
            self.clock.wait()
            start = time.perf_counter()
            optimizer.step()
            host = time.perf_counter() - start
            self._share_state(optimizer, weights.params)
        return Entrant(optimizer, _lead(host))

    def set_out(self) -> None:
        """Momentum outward, whoever's turn came before."""
        outward = self._weights[torch.float32].outward
        for (index, name, _), value in self._state.items():
            if name == "exp_avg":
                value.copy_(outward[index])

    def prepare(self, case: Case, entrant: Entrant, untimed: int) -> None:
        """Fresh gradients, after so many steps that nobody times."""
        weights = self._of_type(case.contender.dtype)
        gradients = weights.back if case.contender.fires else weights.outward
        for left in range(untimed, -1, -1):
            self._prepare(case.contender, entrant.optimizer, gradients)
            if left:
                entrant.optimizer.step()

    def turn(self, case: Case, entrant: Entrant, number: int, record: Record) -> None:
        """On a GPU, two steps: one for its clock and one for the host's."""
        step = entrant.optimizer.step
        self.prepare(case, entrant, case.workload.untimed)
        kernel = self.clock.kernel(step, entrant.lead)
        if kernel is not None:
            record.kernel_seconds[number] = kernel
            self.prepare(case, entrant, untimed=0)
        wall = record.seconds[number] = self.clock.wall(step)
        entrant.lead = min(entrant.lead, _lead(wall))

    def check(self) -> None:
        for weights in self._weights.values():
            if not all(layouts.local(p).isfinite().all() for p in weights.params):
                raise RuntimeError("the weights are no longer finite: these timings mean nothing")

    def _of_type(self, dtype: torch.dtype) -> Weights:
        if dtype not in self._weights:
            start = [-outward for outward in self._weights[torch.float32].outward]
            self._weights[dtype] = Weights(start, dtype)
        return self._weights[dtype]

    def _prepare(self, contender: Contender, optimizer: Any, gradients: list[Tensor]) -> None:
        # Gradients as training makes them: in fresh memory, and not yet known to Python.
        for weights in self._weights.values():
            for p in weights.params:
                p.grad = None
        torch.autograd.backward(self._weights[contender.dtype].params, gradients)
        contender.prepare(optimizer)

    def _share_state(self, optimizer: Any, params: list[Tensor]) -> None:
        for index, p in enumerate(params):
            state = optimizer.state[p]
            for name, value in state.items():
                if isinstance(value, Tensor) and value.shape == p.shape:
                    state[name] = self._state.setdefault((index, name, value.dtype), value)


class ProgressBar:
    """A progress bar that is drawn between steps only: a thread that drew it would be timed too."""

    def __init__(self, title: str, console: Console) -> None:
        columns = (BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        note = TextColumn("{task.fields[note]}")
        self._progress = Progress(
            TextColumn(f"{title:<18}"), *columns, note, console=console, auto_refresh=False
        )
        self._task = self._progress.add_task("", total=1, note="")
        self._drawn = 0.0

    def show(self, note: str, done: float = 0) -> None:
        self._progress.update(self._task, completed=done, note=note)
        if done == 1 or time.monotonic() - self._drawn > 0.1:
            self._progress.refresh()
            self._drawn = time.monotonic()

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()


def _lead(host: float) -> float:
    """Enough for what the host took once."""
    return min(2 * host + 1e-4, LONGEST_LEAD)


def _release_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()  # does nothing where there is no GPU


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """As in timeit."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
