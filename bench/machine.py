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
from wdkernels import native

INSTRUCTION_SETS = ("sse4_2", "avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve")


def describe(device: torch.device) -> dict[str, str | int]:
    return {
        **({"device": _processor()} if device.type == "cpu" else _gpu(device)),
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
        "triton": _version("triton"),
        "deepspeed": _version("deepspeed"),
        "compiler": _compiler(),
    }


def slug(description: dict[str, str | int]) -> str:
    """The machine's name in file names."""
    return re.sub(r"[^a-z0-9]+", "-", title(description).lower()).strip("-")


def title(description: dict[str, str | int]) -> str:
    """A GPU, or a processor with so many cores."""
    name = str(description["device"])
    return name if "driver" in description else f"{name}, {description['cores']} cores"


def commit() -> str:
    """The commit of this source tree; unknown where git cannot say it."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        found = git("rev-parse", "--short=12", "HEAD")
        return found + (" and uncommitted changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def gpu_memory(device: torch.device) -> int:
    """Bytes that a GPU has for us: what others and the driver take is a guess."""
    return torch.cuda.get_device_properties(device).total_memory * 9 // 10


def _gpu(device: torch.device) -> dict[str, str | int]:
    chip = torch.cuda.get_device_properties(device)
    return {
        "device": chip.name,
        "multiprocessors": chip.multi_processor_count,
        "compute capability": f"{chip.major}.{chip.minor}",
        "L2 cache": f"{chip.L2_cache_size / 2**20:.0f} MiB",
        "device memory": f"{chip.total_memory / 2**30:.0f} GiB",
        "driver": _driver(),
        "CUDA of torch": torch.version.cuda or "none",
        "CUDA of wdkernels": _cuda_of_wdkernels(),
    }


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return (run.stdout.split() or ["unknown"])[0]


def _cuda_of_wdkernels() -> str:
    made_with = native._C.cuda() if hasattr(native, "_C") else None
    if made_with is None:
        return "none"
    toolkit, chips = made_with
    return f"{toolkit // 1000}.{toolkit % 1000 // 10}, compiled for {', '.join(map(str, chips))}"


def _cpuinfo(*keys: str) -> str:
    lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() in keys), "")


def _processor() -> str:
    return _cpuinfo("model name", "Model") or platform.machine()


def _flags() -> list[str]:
    return _cpuinfo("flags", "Features").split()


def _caches() -> str:
    """The first core's caches, smallest first; instruction caches left out."""
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
