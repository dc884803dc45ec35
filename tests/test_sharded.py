"""Parameters in shards (DTensor, as FSDP2 makes them): the eager formulas over all processes."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import METHODS, Variant, random
from torch import Tensor

SHAPES = [(5, 3), (4,), (2, 3, 2), (1, 2)]  # not all of which two processes can share evenly
STEPS = 3
OPTIONS: list[dict[str, Any]] = [
    {},
    {"moment_dtype": torch.bfloat16, "amsgrad": True},
    {"rounding": "kahan", "max_grad_norm": 0.5},
    {"master_weights": True, "ema_decay": 0.5, "skip_nonfinite": True},
]


def run(variant: Variant, options: dict[str, Any], shard: Any) -> dict[str, Tensor]:
    params = [shard(random(*shape, seed=i, dtype=torch.bfloat16)) for i, shape in enumerate(SHAPES)]
    anchors = [shard(random(*shape, seed=10 + i)) for i, shape in enumerate(SHAPES)]
    optimizer = variant.build(
        params, "eager", [a.bfloat16() for a in anchors], telemetry_every=1, **options
    )
    for t in range(STEPS):
        for i, p in enumerate(params):
            p.grad = shard(random(*p.shape, seed=100 * t + i, dtype=torch.bfloat16))
        optimizer.step()

    def whole(x: Any) -> Tensor:
        return x.full_tensor() if hasattr(x, "full_tensor") else x

    found = {"norm": optimizer.grad_norm} if "max_grad_norm" in options else {}
    for i, p in enumerate(params):
        found[f"weight {i}"] = whole(p)
        found |= {f"{key} {i}": whole(x) for key, x in optimizer.state[p].items()}
    told = optimizer.telemetry()
    found |= {f"{name} {key}": x for name in told for key, x in told[name].items()}
    return found


def check(rank: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    for method in METHODS:
        for options in OPTIONS:
            variant = Variant(method, anchored=True)
            sharded = run(variant, options, lambda x: distribute_tensor(x, mesh, [Shard(0)]))
            expected = run(variant, options, lambda x: x)
            assert sharded.keys() == expected.keys()
            for name, x in sharded.items():
                # Sums in float64 over 30 terms are all that may differ, and nothing hangs on it.
                place = f"{method} {options} {name}"
                torch.testing.assert_close(x, expected[name], rtol=1e-13, atol=0, msg=place)
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
def test_shards_have_the_bits_of_the_whole() -> None:
    torch.multiprocessing.spawn(check, args=(_free_port(),), nprocs=2)


def _free_port() -> int:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return store.port
