"""The module's GPU half without a GPU: csrc/cuda.cu compiled for the CPU, on CPU tensors.

What it cannot show is what only the device knows: its speed, its compiler.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch

from wdkernels import groups, native
from wdkernels.options import GroupOptions, from_group

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [*(ROOT / "csrc").glob("*.cpp"), *(ROOT / "csrc").glob("*.cu")]
# A GPU takes no vector that is not aligned: here such an access ends the process.
ALIGNMENT = ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


def missing() -> str | None:
    """Why it can't be had here."""
    if not COMPILER:
        return "no C++ compiler"
    if not importlib.util.find_spec("pybind11"):
        return "pybind11 is not installed"
    return None


@cache
def module() -> ModuleType:
    """`wdkernels._C` as if there were a GPU; its namespace is its own, to keep types apart."""
    import pybind11

    assert COMPILER
    headers = [*(ROOT / "csrc").glob("*.h"), *(ROOT / "tests" / "cuda").glob("*.h")]
    flags = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-pthread"]
    flags += ["-Dwdk=wdk_emulated", "-DWDK_CUDA", "-DWDK_EMULATED", "-Wno-unknown-pragmas"]
    folders = [pybind11.get_include(), sysconfig.get_path("include")]
    flags += [f"-I{folder}" for folder in [ROOT / "tests" / "cuda", *folders]]
    suffix = sysconfig.get_config_var("EXT_SUFFIX")

    key = hashlib.sha256(" ".join([COMPILER, suffix, *flags, *ALIGNMENT]).encode())
    for path in sorted([*SOURCES, *headers]):
        key.update(path.read_bytes())
    build = ROOT / "build" / "emulated" / key.hexdigest()[:16]
    library = build / f"_C{suffix}"
    if not library.exists():
        build.mkdir(parents=True, exist_ok=True)

        def compiled(source: Path) -> Path:
            target = build / f"{source.name}.o"
            checks = ALIGNMENT if source.suffix == ".cu" else []
            run([COMPILER, *flags, *checks, "-x", "c++", "-c", str(source), "-o", str(target)])
            return target

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compiled, SOURCES))
        draft = build / f"draft-{os.getpid()}"
        run([COMPILER, "-shared", "-pthread", *map(str, objects), "-o", str(draft)])
        draft.rename(library)

    spec = importlib.util.spec_from_file_location("emulated._C", library)
    assert spec
    assert spec.loader
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


class Machine:
    """What a step asks of torch about a device."""

    def __init__(self) -> None:
        self.stream = 1
        self.capturing = False

    def stream_of(self, device: torch.device) -> tuple[int, bool]:
        return self.stream, self.capturing


_read = groups.read


def read(method: str, group: dict[str, Any], index: int, on_device: bool) -> GroupOptions:
    """Steps that may be skipped are counted where that is known: for tensors of a GPU, there."""
    found = _read(method, group, index, on_device)
    return from_group(method, group, on_device=True) if on_device else found


def calls(name: str) -> int:
    """How often a function of CUDA's runtime has been called so far."""
    return int(ctypes.CDLL(module().__file__).wdk_emulated_calls(name.encode()))


@contextmanager
def gpu() -> Iterator[Machine]:
    """In here the native backend takes CPU tensors for tensors of a GPU."""
    machine = Machine()
    with (
        mock.patch.object(groups, "read", read),
        mock.patch.object(native, "_C", module()),
        mock.patch.object(native, "_is_gpu", return_value=True),
        mock.patch.object(native, "_stream_of", machine.stream_of),
    ):
        yield machine
