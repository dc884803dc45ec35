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
    """A kernel as it is launched: its name, the type that is computed in, its constants.

    Arguments that it is launched without are None among the constants.
    """

    kernel: str
    dtype: str
    constants: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        chosen = [str(v) if isinstance(v, str) else k for k, v in self.constants if v]
        return "-".join([self.kernel, self.dtype, *chosen])

    def has(self, name: str) -> bool:
        return bool(dict(self.constants).get(name))

    def get(self, name: str) -> Any:
        return dict(self.constants).get(name)


# Types of weights, moments and anchors that are not the computed one, and how 16 bits are kept.
_STORED = [
    *(("bf16", "fp32", None, "stochastic"), ("fp16", "fp32", "fp16", "stochastic")),
    *(("bf16", "bf16", "bf16", "kahan"), ("fp16", "bf16", "fp16", "stochastic")),
    *(("bf16", "fp32", "fp32", "master"), ("fp32", "bf16", "bf16", "direct")),
    *(("fp16", "bf16", None, "kahan"), ("bf16", "bf16", None, "nearest")),
]


def _variants() -> Iterator[Variant]:
    flags = [False, True]
    for dtype in ("fp32", "fp64"):
        for decay in ("l2", "unmixed", "decoupled", "projection"):
            yield _variant("coefficients_kernel", dtype, decay=decay, decision=None)
            options = ["anchored", "AMSGRAD", *(["CAUTIOUSLY"] if decay == "decoupled" else [])]
            for values in itertools.product(flags, repeat=len(options)):
                given = dict(zip(options, values, strict=True))
                yield _update(
                    dtype, decay, anchors=dtype if given.pop("anchored") else None, **given
                )
            every = {"AMSGRAD": True, "AVERAGED": True, "MEASURE": True, "decided": True}
            yield _update(dtype, decay, anchors=dtype, CAUTIOUSLY=decay == "decoupled", **every)
        for flag in flags:
            yield _reduce(dtype, dtype, MAXIMA=flag)
            yield _pull(dtype, anchors=dtype if flag else None)
            yield _variant("select_kernel", dtype, **_folded(flag))
        yield _variant("mean_v_kernel", dtype)
        yield _variant("coefficients_kernel", dtype, decay="decoupled")
    for weights, moments, anchors, storage in _STORED:
        types = {"weights": weights, "moments": moments, "storage": storage, "anchors": anchors}
        yield _update("fp32", "decoupled", **types)
        yield _update("fp32", "decoupled", RUNS=True, **types)
        yield _update("fp32", "projection", AMSGRAD=True, AVERAGED=True, decided=True, **types)
        del types["moments"]
        yield _pull("fp32", **types)
        yield _pull("fp32", AVERAGED=True, RUNS=True, decided=True, **types)
        yield _reduce(weights, moments, MAXIMA=storage == "kahan")
    for flag in flags:
        yield _variant("share_of_v_kernel", "fp64", decision=None, **_folded(flag))
        yield _variant("share_of_v_kernel", "fp64", **_folded(flag))
        yield _variant("fold_kernel", "fp64", MEASURE=flag, PROJECT=not flag)
        yield _variant("fold_spans_kernel", "fp64", SQUARES=flag, MAXIMA=True)
    yield _variant("fold_kernel", "fp64", MEASURE=True, PROJECT=True)
    yield _variant("fold_spans_kernel", "fp64", SQUARES=True, MAXIMA=False)
    for asked in ((), ("grad_scale", "found_inf"), ("squares", "limit", "grad_norm")):
        absent = {"grad_scale", "found_inf", "squares", "limit", "grad_norm"} - {*asked}
        yield _variant("decide_kernel", "fp64", SKIP_NONFINITE=False, **dict.fromkeys(absent))
    yield _variant("decide_kernel", "fp64", SKIP_NONFINITE=True)
    for decay in ("unmixed", "decoupled", "projection"):
        without = {} if decay == "decoupled" else {"mean_v": None}
        yield _variant("tell_kernel", "fp64", decay=decay, **without, **_folded(False))
        yield _variant("tell_kernel", "fp64", decay=decay, **without, **_folded(True))
    absent_too = {"mean_v": None, "decision": None, **_folded(False)}
    yield _variant("tell_kernel", "fp64", decay="l2", **absent_too)


def _variant(kernel: str, dtype: str, **constants: Any) -> Variant:
    return Variant(kernel, dtype, tuple(constants.items()))


def _folded(folded: bool) -> dict[str, Any]:
    """Where a kernel finds the sums over a tensor: in its row, or in what its chunks have left."""
    return {"partials" if folded else "sums": None}


def _update(dtype: str, decay: str, decided: bool = False, **given: Any) -> Variant:
    flags = dict.fromkeys(("AMSGRAD", "CAUTIOUSLY", "AVERAGED", "RUNS", "MEASURE"), False)
    types = {"weights": dtype, "moments": dtype, "anchors": None, "storage": "direct"}
    constants: dict[str, Any] = {"decay": decay, **types, **flags, **given}
    if not decided:
        constants["decision"] = None
    if decay != "projection" and not constants["MEASURE"]:
        constants["partials"] = None
    return _variant("update_kernel", dtype, **constants)


def _pull(dtype: str, decided: bool = False, **given: Any) -> Variant:
    types = {"weights": dtype, "anchors": None, "storage": "direct"}
    constants = {**types, "AVERAGED": False, "RUNS": False, **given}
    if not decided:
        constants["decision"] = None
    return _variant("pull_kernel", dtype, **constants)


def _reduce(weights: str, moments: str, MAXIMA: bool) -> Variant:
    computed = "fp64" if weights == "fp64" else "fp32"
    absent = {} if MAXIMA else {"numbers": None, "decision": None}
    return _variant(
        "reduce_kernel", computed, weights=weights, moments=moments, MAXIMA=MAXIMA, **absent
    )


VARIANTS = list(dict.fromkeys(_variants()))
# Machine code hardly depends on the GPU: one has all variants, one of another make the steps with
# all options or none and every other kernel, the rest those steps.
_FLAGS = ("anchors", "AMSGRAD", "CAUTIOUSLY", "AVERAGED")
STEPS = [v for v in VARIANTS if v.kernel == "update_kernel"]
EXTREME = [v for v in STEPS if v.has("MEASURE") or not any(map(v.has, _FLAGS))]
STORED = [v for v in STEPS if v.get("weights") in ("bf16", "fp16") and v.has("AVERAGED")]
OTHERS = [v for v in VARIANTS if v.kernel != "update_kernel"]
CHOSEN = {
    "sm_80": EXTREME,
    "sm_90": VARIANTS,
    "sm_100": EXTREME,
    "gfx942": [*EXTREME, *STORED, *OTHERS],
}
CASES = [(variant, target) for target, variants in CHOSEN.items() for variant in variants]

_NAMES = {"fp32": "float32", "fp64": "float64", "fp16": "float16", "bf16": "bfloat16"}
_TYPES = {
    **dict.fromkeys(("tensors", "gradients", "counters", "skipped"), "*i64"),
    **dict.fromkeys(("rows", "chunks", "spans", "firsts"), "*i32"),
    **dict.fromkeys(("unrounded", "partials", "sums", "squares", "shares", "decision"), "*fp64"),
    **dict.fromkeys(("options", "mean_v", "telemetry", "limit", "grad_norm"), "*fp64"),
    **dict.fromkeys(("grad_scale", "found_inf"), "*fp32"),
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
    import triton.language as language
    from triton.backends.compiler import GPUTarget

    from wdkernels import triton_kernels, triton_lists, triton_numbers

    module = triton_numbers if variant.kernel == "coefficients_kernel" else triton_kernels
    kernel = getattr(module, variant.kernel)
    constants = {
        name: getattr(language, _NAMES[x]) if name in ("weights", "moments", "anchors") and x else x
        for name, x in variant.constants
    }
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
        options=triton_lists.LAUNCH,
    )
    return {
        "asm": compiled.asm["amdgcn" if target == "gfx942" else "ptx"],
        "llvm": compiled.asm["llir"],
    }
