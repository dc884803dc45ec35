"""Without a GPU, Triton's kernels run in its interpreter, on CPU tensors."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is first imported


@pytest.fixture
def restored() -> Iterator[None]:
    """The process's threads and instruction set, as they were."""
    from support import internals  # may import Triton, so not above

    threads, instruction_set = torch.get_num_threads(), internals.instruction_set()
    yield
    torch.set_num_threads(threads)
    internals.use_instruction_set(instruction_set)
