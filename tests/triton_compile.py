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
from multiprocessing import get_context
from typing import Any, NamedTuple

TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]


class Variant(NamedTuple):
    """A kernel as it is launched: its name, the type of the elements, its constants."""

    kernel: str
    dtype: str
    constants: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        chosen = [str(v) if isinstance(v, str) else k for k, v in self.constants if v]
        return "-".join([self.kernel, self.dtype, *chosen])

    def __getitem__(self, name: Any) -> Any:
        return dict(self.constants).get(name, False)


def _variants() -> Iterator[Variant]:
    flags = [False, True]
    for dtype in ("fp32", "fp64"):
        for decay in ("l2", "unmixed", "decoupled", "projection"):
            yield Variant("coefficients_kernel", dtype, (("decay", decay),))
            cautiously = flags if decay == "decoupled" else [False]
            for values in itertools.product(flags, flags, cautiously):
                names = ("ANCHORED", "AMSGRAD", "CAUTIOUSLY")
                constants = (("decay", decay), *zip(names, values, strict=True))
                yield Variant("update_kernel", dtype, constants)
        for flag in flags:
            yield Variant("reduce_kernel", dtype, (("AMSGRAD", flag),))
            yield Variant("pull_kernel", dtype, (("ANCHORED", flag),))
        yield Variant("stabilise_kernel", dtype)
        yield Variant("select_kernel", dtype)
    yield Variant("fold_kernel", "fp64")


VARIANTS = list(_variants())

_TYPES = {
    **dict.fromkeys(("tensors", "dynamic", "kept", "counters"), "*i64"),
    **dict.fromkeys(("chunks", "spans", "firsts"), "*i32"),
    **dict.fromkeys(("exact", "partials", "means", "hypers"), "*fp64"),
    **dict.fromkeys(("count", "rows"), "i32"),
    "elements": "i64",
}


@contextmanager
def compilers(cache: str) -> Iterator[dict[tuple[Variant, str], Future[dict[str, str]]]]:
    """Every variant for every target, being compiled."""
    with ProcessPoolExecutor(2, get_context("spawn"), _start, (cache,)) as pool:
        yield {
            (variant, target): pool.submit(_compiled, variant, target)
            for target in TARGETS
            for variant in VARIANTS
        }
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
    if variant.kernel == "update_kernel" and variant["decay"] != "projection":
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
