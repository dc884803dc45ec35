"""Options of `pytest bench/`, and the machine in the files that pytest-benchmark writes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import machine
from bench.contenders import contenders
from bench.runner import Case
from bench.workloads import FULL, QUICK, on_gpu

OPTIONS: dict[str, dict[str, Any]] = {
    "--quick": {
        "action": "store_true",
        "help": f"small tensors only: {', '.join(w.name for w in QUICK)}",
    },
    "--workload": {
        "action": "append",
        "choices": list(dict.fromkeys(w.name for w in (*FULL, *on_gpu(1 << 50), *QUICK))),
        "default": [],
        "help": "only this one; may be given several times",
    },
    "--device": {"default": "cpu", "help": "cpu, the default, or cuda: where the tensors are"},
}


def pytest_addoption(parser: pytest.Parser) -> None:
    for name, settings in OPTIONS.items():
        parser.getgroup("bench").addoption(name, **settings)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", list(_cases(metafunc.config)))
    if "contender" in metafunc.fixturenames:
        steps = [c for c in contenders(_device(metafunc.config)) if c.method != "limit"]
        metafunc.parametrize("contender", steps, ids=lambda contender: contender.name)


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    return machine.describe(_device(config))


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    return _device(pytestconfig)


@pytest.fixture(scope="session")
def cases(pytestconfig: pytest.Config) -> dict[str, Case]:
    return _cases(pytestconfig)


def _device(config: pytest.Config) -> torch.device:
    return torch.device(config.getoption("--device"))


def _cases(config: pytest.Config) -> dict[str, Case]:
    device = _device(config)
    full = FULL if device.type == "cpu" else on_gpu(machine.gpu_memory(device))
    workloads = QUICK if config.getoption("--quick") else full
    if names := config.getoption("--workload"):
        workloads = tuple(w for w in (*full, *QUICK) if w.name in names)
    cases = (
        Case(workload, contender, groups)
        for workload in workloads
        for groups in workload.groups
        for contender in contenders(device)
        if workload.part in contender.parts and contender.maker not in workload.without
        if groups == 1 or contender.method != "limit"  # memory knows no groups
    )
    return {str(case): case for case in cases}
