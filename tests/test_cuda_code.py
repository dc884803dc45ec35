"""The machine code that nvcc makes of csrc/cuda.cu, looked at without a GPU."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "csrc" / "cuda.cu"
NVCC = shutil.which("nvcc", path=os.pathsep.join([os.environ["PATH"], "/usr/local/cuda/bin"]))
# What setup.py has it compiled with.
FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-Xptxas", "-v"]
ARCHITECTURES = ["sm_80", "sm_90", "sm_100", "sm_120"]
STREAMS = {"update": (6, 4), "reduce": (3, 0), "project": (8, 5)}  # vectors read, written


def disassembler() -> str | None:
    """Triton brings one along."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return shutil.which("cuobjdump")
    return str(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


pytestmark = [
    pytest.mark.skipif(NVCC is None, reason="nvcc was not found"),
    pytest.mark.skipif(disassembler() is None, reason="cuobjdump was not found"),
]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[str]]]:
    """By architecture: what the assembler says of each kernel, and its disassembly."""
    folder = tmp_path_factory.mktemp("cuda")

    def compile_for(architecture: str) -> str:
        target = folder / f"{architecture}.o"
        number = architecture.removeprefix("sm_")
        code = f"-gencode=arch=compute_{number},code={architecture}"
        said = run([str(NVCC), *FLAGS, code, "-c", str(SOURCE), "-o", str(target)]).stderr
        return said + "\n" + run([str(disassembler()), "--dump-sass", str(target)]).stdout

    with ThreadPoolExecutor(2) as pool:
        yield {each: pool.submit(compile_for, each) for each in ARCHITECTURES}


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_spills(architecture: str, compiled: dict[str, Future[str]]) -> None:
    spills = re.findall(r"(\d+) bytes spill stores, (\d+)", compiled[architecture].result())
    assert len(spills) >= 7  # kernels
    assert set(spills) == {("0", "0")}


@pytest.mark.parametrize("kernel", STREAMS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_accesses_are_16_bytes_wide(
    kernel: str, architecture: str, compiled: dict[str, Future[str]]
) -> None:
    """Of every stream, in global memory."""
    functions = re.split(r"Function : ", compiled[architecture].result())[1:]
    found = [f for f in functions if f"{kernel}_kernel" in f.split("\n", 1)[0]]
    assert len(found) == 2  # float and double
    for code in found:
        wide = [len(re.findall(rf"{op}\.E\.128", code)) for op in ("LDG", "STG")]
        assert wide[0] >= STREAMS[kernel][0]  # or more: a loop may be unrolled
        assert wide[1] == STREAMS[kernel][1]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_products_and_sums_are_not_fused(
    architecture: str, compiled: dict[str, Future[str]]
) -> None:
    """Square roots and divisions, which are rounded as a whole, are made of fused operations. The
    loop of the sums over gradients has neither."""
    functions = re.split(r"Function : ", compiled[architecture].result())[1:]
    found = [f for f in functions if "reduce_kernel" in f.split("\n", 1)[0]]
    assert len(found) == 2
    for code in found:
        loop = code.split("BAR.SYNC", 1)[0]
        assert re.search(r"\b[DF]MUL\b", loop)
        assert not re.search(r"\b(FFMA|DFMA)\b", loop)
