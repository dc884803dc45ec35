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
from typing import NamedTuple

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "csrc" / "cuda.cu"
NVCC = shutil.which("nvcc", path=os.pathsep.join([os.environ["PATH"], "/usr/local/cuda/bin"]))
# What setup.py has it compiled with.
FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-Xptxas", "-v"]
ARCHITECTURES = ["sm_80", "sm_90", "sm_100", "sm_120"]
# Vectors of float and of double that a kernel reads and writes, in its two touches if it is SPD's.
STREAMS = {
    "update_kernelIf": (8, 6),  # w or master, compensation, g, m, v, vmax, a, ema; and both weights
    "update_kernelId": (7, 5),
    "project_kernelIf": (7 + 5, 5 + 3),
    "project_kernelId": (6 + 3, 4 + 2),
}
FIRST_TOUCH = {
    "update_kernelIf": 8,
    "update_kernelId": 7,
    "project_kernelIf": 7,
    "project_kernelId": 6,
}
LARGEST = 10 << 20  # bytes of all architectures


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


class Code(NamedTuple):
    """The machine code for one architecture."""

    said: str  # by the assembler, of each kernel
    functions: dict[str, str]  # their disassembly, by mangled name
    size: int

    def kernels(self, name: str) -> list[str]:
        return [code for function, code in self.functions.items() if name in function]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Code]]]:
    """By architecture."""
    folder = tmp_path_factory.mktemp("cuda")

    def compile_for(architecture: str) -> Code:
        target = folder / f"{architecture}.o"
        number = architecture.removeprefix("sm_")
        code = f"-gencode=arch=compute_{number},code={architecture}"
        said = run([str(NVCC), *FLAGS, code, "-c", str(SOURCE), "-o", str(target)]).stderr
        listing = run([str(disassembler()), "--dump-sass", str(target)]).stdout
        functions = [each.split("\n", 1) for each in re.split(r"Function : ", listing)[1:]]
        return Code(said, dict(functions), target.stat().st_size)

    with ThreadPoolExecutor(2) as pool:
        yield {each: pool.submit(compile_for, each) for each in ARCHITECTURES}


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_spills(architecture: str, compiled: dict[str, Future[Code]]) -> None:
    spills = re.findall(r"(\d+) bytes spill stores, (\d+)", compiled[architecture].result().said)
    assert len(spills) >= 11  # kernels
    assert set(spills) == {("0", "0")}


@pytest.mark.parametrize("kernel", STREAMS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_accesses_are_16_bytes_wide(
    kernel: str, architecture: str, compiled: dict[str, Future[Code]]
) -> None:
    """Those of every stream, in global memory."""
    found = compiled[architecture].result().kernels(kernel)
    assert len(found) == 2  # one that measures
    for code in found:
        wide = [len(re.findall(rf"{op}\.E\.128", code)) for op in ("LDG", "STG")]
        assert wide[0] >= STREAMS[kernel][0]  # or more: a loop may be unrolled
        assert wide[1] == STREAMS[kernel][1]


@pytest.mark.parametrize("kernel", STREAMS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loads_are_not_waited_for_one_by_one(
    kernel: str, architecture: str, compiled: dict[str, Future[Code]]
) -> None:
    """All streams of a step are on their way, in whatever types, before anything is computed."""
    for code in compiled[architecture].result().kernels(kernel):
        stretches = re.split(r"\b(?:[DF]ADD|[DF]MUL|F2F|MUFU|SHFL|BAR|STG)\b", code)
        loads = max(len(re.findall(r"LDG\.E\.128", each)) for each in stretches)
        of_16_bits = max(len(re.findall(r"LDG\.E\.64", each)) for each in stretches)
        assert loads >= FIRST_TOUCH[kernel]
        if "If" in kernel:
            assert of_16_bits >= 7  # in 8 bytes; averages are never so narrow


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sums_over_gradients_are_read_ahead(
    architecture: str, compiled: dict[str, Future[Code]]
) -> None:
    """They load each of four types in 16 bytes, and the three streams of the maxima of two."""
    (code,) = compiled[architecture].result().kernels("reduce_kernel")
    assert len(re.findall(r"LDG\.E\.128", code)) >= 4 * 4 + 2 * 3
    assert not re.findall(r"\bLD\.E\.128|STG\.E\.128", code)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_products_and_sums_are_not_fused(
    architecture: str, compiled: dict[str, Future[Code]]
) -> None:
    """Square roots and divisions, which are rounded as a whole, are made of fused operations. The
    loops of the sums over gradients have neither."""
    (code,) = compiled[architecture].result().kernels("reduce_kernel")
    loops = code[code.index("LDG.E.128") : code.index("BAR.SYNC")]
    assert re.search(r"\bDMUL\b", loops)
    assert not re.search(r"\b(FFMA|DFMA)\b", loops)


@pytest.mark.parametrize("kernel", ["reduce_kernel", "project_kernel"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_orders_are_kept(kernel: str, architecture: str, compiled: dict[str, Future[Code]]) -> None:
    """Who releases something waits until what it has written can be seen; who acquires it forgets
    what its L1 cache holds."""
    for code in compiled[architecture].result().kernels(kernel):
        parts = r"MEMBAR|CCTL\.IVALL|ATOMG\.E\.ADD\.S32\.STRONG\.GPU|(?:ST|LD)G\.E\.STRONG\.GPU"
        order = re.findall(rf"\b({parts})\b", code)
        adds = [i for i, part in enumerate(order) if part.startswith("ATOMG")]
        assert adds
        for i in adds:
            assert (order[i - 1], order[i + 1]) == ("MEMBAR", "CCTL.IVALL")
        if kernel == "project_kernel":
            assert order[order.index("STG.E.STRONG.GPU") - 1] == "MEMBAR"
            # The flag is read until it is there, and once more.
            spinning, acquired = (i for i, part in enumerate(order) if part.startswith("LDG"))
            assert order[spinning + 1 : acquired + 2] == ["LDG.E.STRONG.GPU", "CCTL.IVALL"]


def test_the_module_is_small(compiled: dict[str, Future[Code]]) -> None:
    assert sum(each.result().size for each in compiled.values()) < LARGEST
