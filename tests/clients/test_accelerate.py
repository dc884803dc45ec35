"""Accelerate's loop: accumulation, clipping, a scheduler, and its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from loops import OPTIONS, STEPS, Net, assert_as_torch, batches, loss_of, needs

import wdkernels as wd


def prepared(cls: Any, **options: Any) -> Any:
    needs("accelerate")
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = Net()
    optimizer = cls(model.parameters(), **{**OPTIONS, **options})
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=STEPS)
    return accelerator, *accelerator.prepare(model, optimizer, scheduler)


def trained(accelerator: Any, model: Any, optimizer: Any, scheduler: Any, part: Any) -> list[float]:
    losses = []
    for x, y in part:
        with accelerator.accumulate(model):
            loss = loss_of(model, x, y)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_accelerate() -> None:
    data = batches(2 * STEPS)
    ours, torchs = (trained(*prepared(cls), data) for cls in (wd.AdamW, torch.optim.AdamW))
    assert_as_torch(ours, torchs)


def test_its_checkpoints(tmp_path: Path) -> None:
    data = batches(2 * STEPS)
    accelerator, *first = prepared(wd.AdamSWD, ema_decay=0.9)
    trained(accelerator, *first, data[:STEPS])
    accelerator.save_state(str(tmp_path))
    went_on = trained(accelerator, *first, data[STEPS:])
    accelerator, *second = prepared(wd.AdamSWD, ema_decay=0.9)
    accelerator.load_state(str(tmp_path))
    assert trained(accelerator, *second, data[STEPS:]) == went_on


def test_the_wrapper_has_the_optimizer() -> None:
    """What torch.optim has not, such as averages, is asked of `optimizer.optimizer`."""
    accelerator, model, optimizer, scheduler = prepared(wd.AdamW, ema_decay=0.5)
    trained(accelerator, model, optimizer, scheduler, batches(4))
    before = model.head.weight.detach().clone()
    with optimizer.optimizer.ema_weights():
        assert not torch.equal(model.head.weight, before)
    assert torch.equal(model.head.weight, before)
