"""What a figure depends on: the machine and the versions."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import wdkernels
from bench import limit

INSTRUCTION_SETS = ("sse4_2", "avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve")


def describe(device: torch.device) -> dict[str, str | int]:
    return {
        "device": _processor() if device.type == "cpu" else torch.cuda.get_device_name(device),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "caches": _caches(),
        "instruction sets": " ".join(name for name in INSTRUCTION_SETS if name in _flags()),
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "wdkernels": wdkernels.__version__,
        "deepspeed": _version("deepspeed"),
        "compiler": _compiler(),
    }


def slug(description: dict[str, str | int]) -> str:
    """The machine's name in file names."""
    name = f"{description['device']} {description['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _cpuinfo(*keys: str) -> str:
    lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() in keys), "")


def _processor() -> str:
    return _cpuinfo("model name", "Model") or platform.machine()


def _flags() -> list[str]:
    return _cpuinfo("flags", "Features").split()


def _caches() -> str:
    """Of the first core, smallest first; instruction caches left out."""
    folders = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"))
    caches = (
        {name: (folder / name).read_text().strip() for name in ("level", "type", "size")}
        for folder in folders
    )
    return ", ".join(f"L{c['level']} {c['size']}" for c in caches if c["type"] != "Instruction")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _compiler() -> str:
    if (command := limit.compiler()) is None:
        return "none"
    run = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    return run.stdout.splitlines()[0]
