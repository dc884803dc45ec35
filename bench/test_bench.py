"""The measurement as pytest-benchmark sees it, and a check that contenders are comparable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from rich.console import Console

from bench.contenders import Contender, contenders
from bench.results import Absence
from bench.runner import OUT_OF_MEMORY, Case, Record, measure

pytestmark = pytest.mark.filterwarnings("default")  # the contenders' own are not ours to fix


class Tape:
    """Recorded durations, played back to pytest-benchmark: a clock, and a function that takes the
    recorded time by this clock.

    pytest-benchmark finishes with one test before it starts the next, so it cannot interleave them.
    The runner can, and hands its durations over in this way.
    """

    __name__ = "interleaved rounds"

    def __init__(self) -> None:
        self._now = 0.0

    def __call__(self) -> float:
        return self._now

    def play(self, seconds: float) -> None:
        self._now += seconds


@pytest.fixture
def case(name: str, cases: dict[str, Case]) -> Case:
    return cases[name]


@pytest.fixture
def tape(request: pytest.FixtureRequest, case: Case) -> Tape:
    """To stand before `benchmark` in a test's arguments, which then keeps time by this tape."""
    tape = Tape()
    request.node.add_marker(pytest.mark.benchmark(group=case.workload.title, timer=tape))
    return tape


@pytest.fixture(scope="session")
def record_of(
    request: pytest.FixtureRequest, cases: dict[str, Case], device: torch.device
) -> Callable[[Case], Record]:
    """What the rounds said of a case. Asking for a workload's first runs those of all selected."""
    tests = [test for test in request.session.items if isinstance(test, pytest.Function)]
    params = [test.callspec.params for test in tests if hasattr(test, "callspec")]
    selected = [cases[str(each["name"])] for each in params if "name" in each]
    capture: Any = request.config.pluginmanager.getplugin("capturemanager")
    records: dict[Case, Record] = {}

    def record_of(case: Case) -> Record:
        if case not in records:
            rivals = [each for each in selected if each.workload is case.workload]
            with capture.global_and_fixture_disabled():
                records.update(measure(rivals, device, Console(stderr=True)))
        return records[case]

    return record_of


def test_step(
    case: Case,
    record_of: Callable[[Case], Record],
    record_property: Callable[[str, object], None],
    tape: Tape,
    benchmark: Any,
) -> None:
    record = record_of(case)
    if record.problem:
        absence = Absence(case.workload.title, case.contender.name, record.problem)
        record_property(Absence.__name__, absence)
        if record.problem == OUT_OF_MEMORY:
            pytest.skip(OUT_OF_MEMORY)
        pytest.fail(record.trace, pytrace=False)
    benchmark.extra_info |= {
        "workload": case.workload.name,
        "title": case.workload.title,
        "maker": case.contender.maker,
        "method": case.contender.method,
        "groups": case.groups,
        "bytes": case.bytes,
        "rounds": list(record.seconds),
        "kernel_seconds": list(record.kernel_seconds.values()),
    }
    seconds = iter(record.seconds.values())
    benchmark.pedantic(tape.play, setup=lambda: ((next(seconds),), {}), rounds=len(record.seconds))


def test_contenders_of_a_method_compute_the_same(
    contender: Contender, device: torch.device
) -> None:
    original = next(c for c in contenders(device) if c.method == contender.method)
    torch.testing.assert_close(_train(contender, device), _train(original, device))


def _train(contender: Contender, device: torch.device) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def randn(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device)

    params = [randn(shape).requires_grad_() for shape in ((40, 30), (7,))]
    optimizer = contender.build([{"params": [p]} for p in params])
    for _ in range(20):
        for p in params:
            p.grad = randn(tuple(p.shape))
        optimizer.step()
    return [p.detach() for p in params]
