"""Options of `pytest bench/`, and the machine in the files that pytest-benchmark writes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import machine
from bench.contenders import contenders
from bench.runner import cases_of, workloads_of
from bench.workloads import FULL, ONE_THREAD, QUICK, SHARDED, on_gpu

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
    device = _device(metafunc.config)
    if "case" in metafunc.fixturenames:
        option = metafunc.config.getoption
        workloads = workloads_of(device, option("--quick"), option("--workload"))
        elsewhere = {ONE_THREAD, SHARDED}  # in processes of their own
        here = (w for w in workloads if not elsewhere & set(w.parts))
        metafunc.parametrize("case", [x for w in here for x in cases_of(w, device)], ids=str)
    if "contender" in metafunc.fixturenames:
        steps = [c for c in contenders(device) if c.method != "limit" and c.parts != (SHARDED,)]
        metafunc.parametrize("contender", steps, ids=lambda contender: contender.name)


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    return machine.describe(_device(config))


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    return _device(pytestconfig)


def _device(config: pytest.Config) -> torch.device:
    return torch.device(config.getoption("--device"))
