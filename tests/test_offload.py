"""Training that keeps weights, gradients and states on the host: FSDP2's CPUOffloadPolicy.

Where there is no accelerator its parts are tested: the policy without pinned memory, whose compute
copies lie on the CPU too; and shards on the CPU whose mesh is said to be of GPUs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from support import USUAL
from support.processes import run_processes
from torch import Tensor, nn

import wdkernels as wd

pytestmark = pytest.mark.skipif(
    not dist.is_available(), reason="this torch has no torch.distributed"
)
SPD: dict[str, Any] = {**USUAL, "weight_decay": 1.0}
RUNS: list[tuple[Any, dict[str, Any]]] = [
    (wd.Adam, USUAL),
    (wd.AdamW, {**USUAL, "max_grad_norm": 0.05, "ema_decay": 0.5, "telemetry_every": 1}),
    (wd.AdamW, {**USUAL, "anchor": "initial", "moment_dtype": torch.bfloat16}),
    (wd.AdamSWD, {**USUAL, "skip_nonfinite": True}),
    (wd.AdamSPD, SPD),
]


def model(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(5, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 3)
    return nn.Sequential(*layers).to(dtype)


def train(net: nn.Module, optimizer: Any, dtype: torch.dtype) -> None:
    for seed in range(3):
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(seed)).to(dtype)
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()


def check() -> None:
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
    from torch.distributed.tensor import DTensor, init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    policy = CPUOffloadPolicy(pin_memory=False)
    for kind, options in RUNS:
        net = model(torch.float32)
        for layer in (net[0], net):
            fully_shard(layer, mesh=mesh, offload_policy=policy)
        optimizer = kind(net.parameters(), **options)
        train(net, optimizer, torch.float32)
        twin = model(torch.float32)
        train(twin, kind(twin.parameters(), **options), torch.float32)
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            assert isinstance(p, DTensor)
            place = f"{kind.__name__} {options}"
            assert_close(p.full_tensor(), q, place)

        # The mesh is one of GPUs and the shards are not: no step looks at what the mesh says.
        shards = [p.to_local().detach().clone() for p in net.parameters()]
        with mock.patch.object(mesh, "_device_type", "cuda"):
            for p in net.parameters():
                p.grad = torch.ones_like(p.detach())
            optimizer.step()
        assert all(p.to_local().is_cpu for p in net.parameters())
        moved = zip(shards, net.parameters(), strict=True)
        assert all(p.numel() == 0 or not torch.equal(p, q.to_local()) for p, q in moved)


def assert_close(x: Tensor, y: Tensor, place: str) -> None:
    """What a sum of all shards in another order may leave."""
    torch.testing.assert_close(x.detach(), y.detach(), rtol=1e-6, atol=1e-7, msg=place)


def test_shards_on_the_host(tmp_path: Path) -> None:
    run_processes(2, tmp_path, check)


def test_compute_copies_of_16_bits_follow_masters_of_32() -> None:
    """One step does what offloading elsewhere has a float32 optimizer and two copies for."""
    for kind, options in RUNS:
        options = {k: v for k, v in options.items() if k != "moment_dtype"}
        weights = [torch.randn(6, 4).bfloat16(), torch.randn(3).bfloat16()]
        masters = [w.float() for w in weights]
        ours = kind(weights, master_weights=True, **options)
        theirs = kind(masters, **options)
        for _ in range(4):
            for w, master in zip(weights, masters, strict=True):
                w.grad = torch.randn_like(w)
                master.grad = w.grad.float()
            ours.step()
            theirs.step()
            for w, master in zip(weights, masters, strict=True):
                assert torch.equal(ours.state[w]["master"], master), kind.__name__
                assert torch.equal(w, master.bfloat16()), kind.__name__
