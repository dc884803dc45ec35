"""How fast this machine moves memory: the limit that a step is held against.

On a CPU a plain loop reads the four streams of AdamW (weights, gradient, two moments) and writes
three of them, with one addition each, in the same memory and with the same number of threads as the
contenders. It is compiled on the spot for this very processor. Non-temporal stores, blocks dealt
out in turn, and one stream after the other in blocks that fit the first cache were tried as well:
the first took 1.3 times as long (what is written was just read, so there is nothing to bypass), the
others the same, which makes the plain loop the limit.

On a GPU it is a copy within the device's memory, of two gigabytes whatever the workload, so that
the cache counts for little.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCE = """
#include <stdint.h>
#include <omp.h>

static inline int64_t between(int64_t low, int64_t x, int64_t high) {
  return x < low ? low : x > high ? high : x;
}

/* Each thread takes an equal share of all elements, through however many tensors it goes.
   `zero` is a zero that the compiler does not know of: the data is left as it was. */
void stream(int64_t count, const int64_t *numel, float *const *w, float *const *g,
            float *const *m, float *const *v, float zero, int threads) {
  int64_t total = 0;
  for (int64_t k = 0; k < count; ++k) total += numel[k];
#pragma omp parallel num_threads(threads)
  {
    const int64_t thread = omp_get_thread_num(), first = total * thread / threads,
                  last = total * (thread + 1) / threads;
    int64_t start = 0;
    for (int64_t k = 0; k < count && start < last; start += numel[k++]) {
      const int64_t low = between(0, first - start, numel[k]),
                    high = between(0, last - start, numel[k]);
      float *const wk = w[k], *const gk = g[k], *const mk = m[k], *const vk = v[k];
#pragma omp simd
      for (int64_t i = low; i < high; ++i) {
        const float x = gk[i] * zero;
        wk[i] += x;
        mk[i] += x;
        vk[i] += x;
      }
    }
  }
}
"""


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


@cache
def _library() -> Any:
    command = compiler()
    assert command is not None
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "stream.c"), Path(folder, "stream.so")
        source.write_text(SOURCE)
        options = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
        subprocess.run([command, *options, "-x", "c", source, "-o", library], check=True)
        return ctypes.CDLL(str(library))


class Copy(torch.optim.Optimizer):
    """A copy within a GPU's memory, in the clothes of an optimizer."""

    BYTES = 4 << 30  # read and written

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})
        device = self.param_groups[0]["params"][0].device
        self._from, self._to = torch.ones(2, self.BYTES // 2, dtype=torch.uint8, device=device)

    def step(self, closure: Any = None) -> Any:
        self._to.copy_(self._from)


class Stream(torch.optim.Optimizer):
    """The loop, in the clothes of an optimizer."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})
        self._library = _library()
        self._params = [p for group in self.param_groups for p in group["params"]]
        for p in self._params:
            self.state[p] = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}

    def look_up(self) -> None:
        """Note where everything is; not part of what is timed."""
        states = [self.state[p] for p in self._params]
        streams = (
            self._params,
            [p.grad for p in self._params],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
        )
        count = len(self._params)
        self._arguments = (
            ctypes.c_int64(count),
            (ctypes.c_int64 * count)(*(p.numel() for p in self._params)),
            *(_pointers(tensors) for tensors in streams),
            ctypes.c_float(0),
            ctypes.c_int(torch.get_num_threads()),
        )

    def step(self, closure: Any = None) -> Any:
        self._library.stream(*self._arguments)


def _pointers(tensors: list[Tensor]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*(x.data_ptr() for x in tensors))
