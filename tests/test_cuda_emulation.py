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
CORE = FOLDER.parent.parent / "csrc"
FLAGS = ["-std=c++17", "-O1", "-pthread", "-ffp-contract=off", "-DWDK_EMULATED"]
FLAGS += ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror", f"-I{FOLDER}", f"-I{CORE}"]
Run = Callable[..., subprocess.CompletedProcess[str]]


def compiled(program: Path, sources: list[Path], *flags: str) -> Run:
    """Runs it with a case's name, and a seed for the order of CUDA threads."""
    named = [*map(str, sources), "-o", str(program)]
    subprocess.run([str(COMPILER), *FLAGS, *flags, "-x", "c++", *named], check=True)

    def run(case: str = "", seed: str | None = None) -> subprocess.CompletedProcess[str]:
        environment = {k: v for k, v in os.environ.items() if k != "WDK_EMULATE_SEED"}
        environment["TSAN_OPTIONS"] = "halt_on_error=1"
        if seed:
            environment["WDK_EMULATE_SEED"] = seed
        command = [str(program), case]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)

    return run


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return compiled(tmp_path_factory.mktemp("emulation") / "kernels", [FOLDER / "kernels.cu"])


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


# ---- the order of memory -------------------------------------------------------------------------

THREADS = "-fsanitize=thread"


@pytest.fixture(scope="module")
def races(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Our kernels, each access of which ThreadSanitizer looks at."""
    folder = tmp_path_factory.mktemp("races")
    (folder / "nothing.cpp").write_text("int main() {}")
    try:
        alive = compiled(folder / "nothing", [folder / "nothing.cpp"], THREADS)().returncode == 0
    except subprocess.CalledProcessError:
        alive = False
    if not alive:
        pytest.skip(f"{COMPILER} has no ThreadSanitizer that runs here")
    sources = [CORE / "cuda.cu", CORE / "cuda_device.cu", CORE / "gpu_step.cpp"]
    return compiled(folder / "races", [*sources, FOLDER / "races.cpp"], "-g", THREADS)


@pytest.mark.parametrize("seed", [None, "1"])
def test_blocks_race_for_nothing(races: Run, seed: str | None) -> None:
    """Whatever a thread reads has been handed over to it, by barriers of its block or by atomics in
    the orders that the kernels ask for; and phases have the bits of a step at once."""
    result = races(seed=seed)
    assert result.returncode == 0, result.stdout + result.stderr
