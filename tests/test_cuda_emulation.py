"""The emulation that csrc/cuda.cu is tested on (tests/cuda/) runs kernels as CUDA would."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
pytestmark = pytest.mark.skipif(not COMPILER, reason="no C++ compiler")

FOLDER = Path(__file__).parent / "cuda"
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Run:
    program = tmp_path_factory.mktemp("emulation") / "kernels"
    flags = ["-std=c++17", "-O1", "-pthread", f"-I{FOLDER}"]
    source = ["-x", "c++", str(FOLDER / "kernels.cu"), "-o", str(program)]
    subprocess.run([str(COMPILER), *flags, *source], check=True)

    def run(case: str, seed: str | None = None) -> subprocess.CompletedProcess[str]:
        environment = {k: v for k, v in os.environ.items() if k != "WDK_EMULATE_SEED"}
        if seed:
            environment["WDK_EMULATE_SEED"] = seed
        command = [str(program), case]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)

    return run


@pytest.mark.parametrize("seed", [None, "1", "2"])
@pytest.mark.parametrize("case", ["sums", "waiting", "threads", "failures"])
def test_as_on_a_gpu(kernels: Run, case: str, seed: str | None) -> None:
    result = kernels(case, seed)
    assert result.returncode == 0, result.stdout + result.stderr


def test_divergent_barrier(kernels: Run) -> None:
    result = kernels("deadlock")
    assert result.returncode == -signal.SIGABRT
    assert "56 at __syncthreads, thread 8 the first" in result.stderr
    assert "8 at __shfl_sync, thread 0 the first" in result.stderr


def test_seed_shows_races(kernels: Run) -> None:
    assert kernels("racing").returncode == 0
    assert kernels("racing", "1").returncode == 1
