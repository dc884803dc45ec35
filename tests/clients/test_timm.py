"""timm: its registry of optimizers, its groups, its scheduler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loops import needs
from torch import Tensor

import wdkernels as wd


def vit() -> Any:
    timm = needs("timm")
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=4,
        embed_dim=32,
        depth=3,
        num_heads=4,
        num_classes=10,
    )


def trained(model: Any, optimizer: Any) -> list[float]:
    """On pictures of which each has its class drawn in one corner."""
    scheduler = needs("timm.scheduler").CosineLRScheduler(optimizer, t_initial=20, warmup_t=3)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 3, 16, 16, generator=generator)
    y = torch.arange(32) % 10
    x[torch.arange(32), 0, 0, y] += 6.0
    found = []
    for step in range(20):
        scheduler.step(step)
        loss: Tensor = torch.nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    assert found[-1] < found[0] - 0.5
    return found


def test_timm_makes_it_by_name() -> None:
    optim = needs("timm.optim")
    registry = optim.optimizer_registry if hasattr(optim, "optimizer_registry") else None
    from timm.optim._optim_factory import OptimInfo, default_registry

    assert registry is None or registry is default_registry
    default_registry.register(OptimInfo("wdadamw", wd.AdamW, has_eps=True, has_betas=True))
    found = []
    for name in ("wdadamw", "adamw"):
        model = vit()
        found.append(
            trained(
                model,
                optim.create_optimizer_v2(
                    model, opt=name, lr=3e-3, weight_decay=0.5, eps=1e-3, layer_decay=0.75
                ),
            )
        )
    torch.testing.assert_close(*found, rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18", "convnext_atto"])
def test_groups_are_those_of_timm(name: str) -> None:
    """Where timm's rule, by the number of dimensions, and ours, by the module, speak of the same
    thing: matrices decay, biases, norms and what the model declares do not."""
    timm, optim = needs("timm"), needs("timm.optim")
    model = timm.create_model(name)
    theirs = optim.param_groups_weight_decay(
        model, 0.5, no_weight_decay_list=getattr(model, "no_weight_decay", lambda: ())()
    )
    decaying = {id(p) for group in theirs if group["weight_decay"] for p in group["params"]}
    names = {id(p): n for n, p in model.named_parameters()}
    ours = wd.param_groups(model, 0.5)
    found = {id(p) for group in ours if group["weight_decay"] for _, p in group["params"]}
    assert {names[i] for i in decaying - found} == set()
    assert all(names[i].endswith("gamma") for i in found - decaying)  # layer scale: no norm


def test_layer_decay_is_that_of_timm() -> None:
    """But for the last norm, which timm counts to the last block, and here, as in BEiT, stands
    with the head."""
    optim = needs("timm.optim")
    model = vit()
    theirs = optim.param_groups_layer_decay(model, 0.5, layer_decay=0.5)
    scales = {id(p): group["lr_scale"] for group in theirs for p in group["params"]}
    found = 0
    for group in wd.param_groups(model, 0.5, layer_decay=0.5, lr=1.0):
        for name, p in group["params"]:
            last_norm = name.startswith("norm.")
            assert group["lr"] == scales[id(p)] * (2 if last_norm else 1), name
            found += 1
    assert found == len(scales)
