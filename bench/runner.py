"""The rounds: contenders on one workload take turns, one step each, on the same memory."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor

from bench.contenders import Contender
from bench.workloads import Workload

WARM_UP = 2  # steps: the first makes the state, the second meets it where it will stay
MOST_ROUNDS = 100


@dataclass(frozen=True)
class Case:
    workload: Workload
    contender: Contender
    groups: int

    def __str__(self) -> str:
        groups = f" ({self.groups} groups)" if self.groups > 1 else ""
        return f"{self.workload.name}: {self.contender.name}{groups}"


@dataclass
class Record:
    """Seconds by round, or why there are none."""

    seconds: dict[int, float] = field(default_factory=dict)
    error: Exception | None = None


def measure(cases: Sequence[Case], device: torch.device, console: Console) -> dict[Case, Record]:
    """Measure cases of one workload against each other."""
    records = {case: Record() for case in cases}
    workload = cases[0].workload
    arena = Arena(workload, device)
    with ProgressBar(workload.title, console) as bar:
        optimizers: dict[Case, Any] = {}
        round_cost = 0.0
        for case in cases:
            bar.show(f"warming up {case.contender.name}")
            try:
                optimizers[case], cost = arena.warm_up(case)
                round_cost += cost / case.contender.every
            except Exception as error:  # its test will raise it; the others go on
                records[case].error = error

        rounds = int(workload.seconds / max(round_cost, 1e-9))
        rounds = min(max(rounds, workload.rounds), MOST_ROUNDS)
        with _no_garbage_collection():
            for number in range(rounds):
                turns = [case for case in optimizers if number % case.contender.every == 0]
                random.Random(number).shuffle(turns)
                arena.set_out()
                for case in turns:
                    bar.show(f"round {number + 1} of {rounds}", number / rounds)
                    records[case].seconds[number] = arena.turn(case, optimizers[case])
        bar.show(f"{rounds} rounds", 1)
    arena.check()
    return records


class Arena:
    """The memory that all contenders work on.

    Weights, gradients and state are shared: nobody has the better pages, and a large workload needs
    no more memory for thirty contenders than for one.
    """

    def __init__(self, workload: Workload, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)
        self._device = device
        self._params = [
            torch.randn(shape, generator=generator, device=device).requires_grad_()
            for shape in workload.shapes
        ]
        # The weights are driven away from zero and from where they started. There SPD rests.
        # Where a faint gradient points back, the step, which follows the momentum, still goes
        # outward: away from the anchor and up the gradient, and SPD fires.
        self._outward = [-p.detach() for p in self._params]
        self._back = [-1e-6 * g for g in self._outward]
        self._state: dict[tuple[int, str], Tensor] = {}

    def warm_up(self, case: Case) -> tuple[Any, float]:
        """The optimizer, on the shared state, and the seconds that a turn of it costs."""
        groups = [{"params": self._params[k :: case.groups]} for k in range(case.groups)]
        optimizer = case.contender.build(groups)
        for _ in range(WARM_UP):
            start = time.perf_counter()
            self._step(case.contender, optimizer, self._outward)
            cost = time.perf_counter() - start
            self._share_state(optimizer)
        return optimizer, cost * (1 + case.workload.untimed)

    def set_out(self) -> None:
        """Momentum outward, whoever's turn came before."""
        for (index, name), value in self._state.items():
            if name == "exp_avg":
                value.copy_(self._outward[index])

    def turn(self, case: Case, optimizer: Any) -> float:
        """Seconds of one step."""
        gradients = self._back if case.contender.fires else self._outward
        for _ in range(case.workload.untimed):
            self._step(case.contender, optimizer, gradients)
        return self._step(case.contender, optimizer, gradients)

    def check(self) -> None:
        if not all(p.isfinite().all() for p in self._params):
            raise RuntimeError("the weights are no longer finite: these timings mean nothing")

    def _step(self, contender: Contender, optimizer: Any, gradients: list[Tensor]) -> float:
        # Gradients as training makes them: in fresh memory, and not yet known to Python.
        for p in self._params:
            p.grad = None
        torch.autograd.backward(self._params, gradients)
        contender.look_up(optimizer)
        self._synchronize()
        start = time.perf_counter()
        optimizer.step()
        self._synchronize()
        return time.perf_counter() - start

    def _synchronize(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)

    def _share_state(self, optimizer: Any) -> None:
        for index, p in enumerate(self._params):
            state = optimizer.state[p]
            for name, value in state.items():
                if isinstance(value, Tensor) and value.shape == p.shape:
                    state[name] = self._state.setdefault((index, name), value)


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
