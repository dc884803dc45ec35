"""Compiles the Triton kernels for GPUs that are not there, in worker processes.

A process in which Triton interprets its kernels cannot compile them.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any


@dataclass(frozen=True)
class Variant:
    """A kernel as it is launched: its name, the type of the elements, its constants."""

    kernel: str
    dtype: str
    constants: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        chosen = [str(v) if isinstance(v, str) else k for k, v in self.constants if v]
        return "-".join([self.kernel, self.dtype, *chosen])

    def has(self, name: str) -> bool:
        return bool(dict(self.constants).get(name))


def _variants() -> Iterator[Variant]:
    flags = [False, True]
    for dtype in ("fp32", "fp64"):
        for decay in ("l2", "unmixed", "decoupled", "projection"):
            yield Variant("coefficients_kernel", dtype, (("decay", decay),))
            options = ["ANCHORED", "AMSGRAD", *(["CAUTIOUSLY"] if decay == "decoupled" else [])]
            for values in itertools.product(flags, repeat=len(options)):
                constants = (("decay", decay), *zip(options, values, strict=True))
                yield Variant("update_kernel", dtype, constants)
        for flag in flags:
            yield Variant("reduce_kernel", dtype, (("AMSGRAD", flag),))
            yield Variant("pull_kernel", dtype, (("ANCHORED", flag),))
        yield Variant("stabilise_kernel", dtype)
        yield Variant("select_kernel", dtype)
    yield Variant("fold_kernel", "fp64")


VARIANTS = list(_variants())
# With all options or none: PTX hardly depends on the GPU, so one of each make has the rest.
EXTREME = [v for v in VARIANTS if len({x for _, x in v.constants if isinstance(x, bool)}) < 2]
CHOSEN = {"sm_80": EXTREME, "sm_90": VARIANTS, "sm_100": EXTREME, "gfx942": VARIANTS}
CASES = [(variant, target) for target, variants in CHOSEN.items() for variant in variants]

_TYPES = {
    **dict.fromkeys(("tensors", "gradients", "kept", "counters"), "*i64"),
    **dict.fromkeys(("rows", "chunks", "spans", "firsts"), "*i32"),
    **dict.fromkeys(("exact", "partials", "means", "hypers"), "*fp64"),
    **dict.fromkeys(("count", "length"), "i32"),
    "elements": "i64",
}


@contextmanager
def compilers(cache: str) -> Iterator[dict[tuple[Variant, str], Future[dict[str, str]]]]:
    """Every variant for every target, being compiled."""
    with ProcessPoolExecutor(2, get_context("spawn"), _start, (cache,)) as pool:
        yield {case: pool.submit(_compiled, *case) for case in CASES}
        pool.shutdown(cancel_futures=True)


def _start(cache: str) -> None:
    os.environ["TRITON_INTERPRET"] = "0"
    os.environ["TRITON_CACHE_DIR"] = cache


def _compiled(variant: Variant, target: str) -> dict[str, str]:
    """Its assembly and its LLVM code."""
    import triton
    from triton.backends.compiler import GPUTarget

    from wdkernels import triton_backend, triton_kernels

    kernel = getattr(triton_kernels, variant.kernel)
    constants = dict(variant.constants)
    if variant.kernel == "update_kernel":
        constants.setdefault("CAUTIOUSLY", False)
        if constants["decay"] != "projection":
            constants["partials"] = None
    signature = {
        name: "constexpr" if name in constants else _TYPES.get(name, f"*{variant.dtype}")
        for name in kernel.arg_names
    }
    number = re.sub(r"\D", "", target)
    compiled = triton.compile(
        triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants),
        target=GPUTarget("hip", target, 64)
        if target == "gfx942"
        else GPUTarget("cuda", int(number), 32),
        options=triton_backend._LAUNCH,
    )
    return {
        "asm": compiled.asm["amdgcn" if target == "gfx942" else "ptx"],
        "llvm": compiled.asm["llir"],
    }
