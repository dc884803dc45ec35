"""`python -m wdkernels`: what is installed, what runs where and why, and a self-check.

The exit status is 1 if a self-check fails. Nothing is timed here (see bench/).
"""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

import wdkernels
from wdkernels import native
from wdkernels.backends import MODULES, chosen
from wdkernels.tables import aligned

_C: Any = getattr(native, "_C", None)  # the compiled module, where there is one
OPTIMIZERS = (wdkernels.Adam, wdkernels.AdamW, wdkernels.AdamSWD, wdkernels.AdamSPD)
STEPS = 5
SHAPES = ((40000,), (65, 33), (7,), ())  # several chunks, none of them full, and single numbers
LOUD = {"lr": 0.1, "weight_decay": 0.2, "eps": 1e-2}
# What float32 may lose in these steps. A decay out of place is off by thousands of times as much.
TOLERANCE = 1e-5


def main() -> int:
    print(aligned(environment()), aligned(backends()), sep="\n\n", end="\n\n", flush=True)
    checks = [(x, each, self_check(each, x)) for x in devices() for each in OPTIMIZERS]
    print(aligned(results(checks)))
    if any(problem for _, _, problem in checks):
        print("\nThe self-check FAILED: do not train with what failed above.")
        return 1
    return 0


# ---- what there is -----------------------------------------------------------------------------


def environment() -> Iterator[tuple[str, str]]:
    yield "wdkernels", wdkernels.__version__
    yield "Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    runtime = torch.version.cuda or torch.version.hip
    kind = "CUDA" if torch.version.cuda else "ROCm"
    yield "torch", f"{torch.__version__} ({f'{kind} {runtime}' if runtime else 'no GPU runtime'})"
    yield "triton", _version_of("triton")
    if _C is None:
        yield "compiled", f"no: {native._missing}"
        return
    yield "compiled", f"for {', '.join(_C.instruction_sets())}"
    if made_with := _C.cuda():
        toolkit, chips = made_with
        version = f"{toolkit // 1000}.{toolkit % 1000 // 10}"
        yield "CUDA", f"{version}, for compute capability {', '.join(map(_capability, chips))}"
    else:
        yield "CUDA", "not part of this build"


def devices() -> list[torch.device]:
    found = [torch.device("cpu")]
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None and torch.accelerator.is_available():
        found += [
            torch.device(accelerator.type, i) for i in range(torch.accelerator.device_count())
        ]
    return found


def backends() -> Iterator[tuple[str, ...]]:
    """For each device every backend: whether it is the one that is picked, or else why not."""
    yield "device", "backend", "why"
    for device in devices():
        x = torch.zeros(1, device=device)
        best = picked(x)
        label = f"{device}: {description(device)}"
        for name, module in MODULES.items():
            note = "picked by auto" if name == best else module.refuses([x])
            if name == "eager" and not note:
                note = "runs everywhere, slowly"
            yield label, name, note or f"would run, but {best} comes first"
            label = ""


def description(device: torch.device) -> str:
    if device.type == "cpu":
        return f"{platform.machine()}, {_C.instruction_set()}" if _C else platform.machine()
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}"
    name = getattr(torch.get_device_module(device), "get_device_name", None)
    return str(name(device)) if name else device.type


def picked(x: Tensor) -> str:
    """The backend that `auto` picks."""
    module = chosen("auto", [x])
    return next(name for name, each in MODULES.items() if each is module)


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _capability(chip: int) -> str:
    return f"{chip // 10}.{chip % 10}"


# ---- whether it is right -----------------------------------------------------------------------


def results(checks: Iterable[tuple[torch.device, Any, str]]) -> Iterator[tuple[str, ...]]:
    yield "device", "optimizer", "backend", f"{STEPS} steps beside the papers' formulas in float64"
    for device, optimizer, problem in checks:
        backend = picked(torch.zeros(1, device=device))
        yield str(device), optimizer.__name__, backend, problem or "agree"


def self_check(optimizer: Any, device: torch.device) -> str:
    """Some steps with the backend that auto picks, against the eager one; empty if they agree."""
    try:
        found = train(optimizer, device, torch.float32, "auto")
    except Exception as error:  # whatever it is, it belongs into the table
        return f"FAILED: {type(error).__name__}: {' '.join(str(error).split())}"
    exact = train(optimizer, torch.device("cpu"), torch.float64, "eager")
    off = float((found - exact).abs().max())
    return "" if off <= TOLERANCE else f"FAILED: off by {off:.1e}"


def train(optimizer: Any, device: torch.device, dtype: torch.dtype, backend: str) -> Tensor:
    """All weights in float64 on the CPU, after a few steps along the same gradients everywhere."""
    random = torch.Generator().manual_seed(0)

    def noise(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=random).to(device, dtype)

    weights = [noise(shape) for shape in SHAPES]
    opt = optimizer(weights, backend=backend, **LOUD)
    for _ in range(STEPS):
        for w in weights:
            w.grad = noise(tuple(w.shape))
        opt.step()
    return torch.cat([w.detach().to("cpu", torch.float64).flatten() for w in weights])


if __name__ == "__main__":
    sys.exit(main())
