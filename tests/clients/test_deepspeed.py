"""DeepSpeed's engine with ours as client optimizer: ZeRO 0, 1 and 2, on one process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from loops import OPTIONS, Net, assert_as_torch, batches, loss_of, needs

import wdkernels as wd

# DeepSpeed compiles small functions by what torch will not have for ever.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")


@pytest.fixture(scope="module")  # DeepSpeed keeps the groups that it has once made
def one_process() -> Iterator[None]:
    deepspeed = needs("deepspeed")
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_SIZE": 1}.items():
        os.environ[name] = str(value)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29571", DS_ACCELERATOR="cpu")
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    yield
    torch.distributed.destroy_process_group()


def losses(cls: Any, stage: int) -> list[float]:
    import deepspeed

    model = Net()
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = cls(model.parameters(), **OPTIONS)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    found = []
    for x, y in batches():
        loss = loss_of(engine, x, y)
        engine.backward(loss)
        engine.step()
        found.append(loss.item())
    return found


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_deepspeed(stage: int) -> None:
    assert_as_torch(losses(wd.AdamW, stage), losses(torch.optim.AdamW, stage))
