"""Lightning's Trainer: its loop, its clipping and its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from loops import OPTIONS, STEPS, TOLERANCE, Net, assert_as_torch, batches, loss_of, needs

import wdkernels as wd

# Lightning advises more workers and asks for a logger's folder; neither is about an optimizer.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*",
    "ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning",
)


def module(cls: Any, **options: Any) -> Any:
    lightning = needs("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.losses = Net(), []

        def configure_optimizers(self) -> Any:
            optimizer = cls(self.parameters(), **{**OPTIONS, **options})
            scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
            }

        def training_step(self, batch: Any, _: int) -> Any:
            loss = loss_of(self.net, *batch)
            self.losses.append(loss.item())
            return loss

    return Module()


def trainer(**options: Any) -> Any:
    return needs("lightning").Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def data(count: int = STEPS) -> Any:
    return torch.utils.data.DataLoader(batches(count), batch_size=None)  # they are batches


def test_lightning() -> None:
    found = []
    for cls in (wd.AdamW, torch.optim.AdamW):
        model = module(cls)
        trainer(gradient_clip_val=1.0).fit(model, data())
        found.append(model.losses)
    assert_as_torch(*found)


def test_clipping_in_the_step() -> None:
    """max_grad_norm in place of gradient_clip_val, which the 16-mixed precision of a GPU refuses
    for whatever unscales by itself, as torch's fused AdamW does."""
    found = []
    for options, clip in (({"max_grad_norm": 0.25}, None), ({}, 0.25)):
        model = module(wd.AdamW, **options)
        trainer(gradient_clip_val=clip).fit(model, data())
        found.append(model.losses)
    assert_as_torch(*found)


def test_its_checkpoints(tmp_path: Path) -> None:
    """Of the end of the first of two epochs. They hold the optimizer's state to the bit, averages
    included, and a resumed run goes where it goes with torch.optim. (That is not quite where the
    uninterrupted one went: Lightning takes the first batch of the epoch twice.)"""
    epoch, resumed = data(STEPS // 2), []
    for cls, options in ((wd.AdamW, {"ema_decay": 0.9}), (torch.optim.AdamW, {})):
        file = str(tmp_path / f"{cls.__module__}.ckpt")
        states: list[Any] = []

        class Save(needs("lightning").Callback):
            def on_train_epoch_end(
                self, trainer: Any, module: Any, file: str = file, states: Any = states
            ) -> None:
                if trainer.current_epoch == 0:
                    trainer.save_checkpoint(file)
                    states.append([x.clone() for x in optimizer_state(module)])

        class Look(needs("lightning").Callback):
            def on_train_start(self, _: Any, module: Any, states: Any = states) -> None:
                states.append([x.clone() for x in optimizer_state(module)])

        trainer(callbacks=[Save()]).fit(module(cls, **options), epoch)
        model = module(cls, **options)
        trainer(callbacks=[Look()]).fit(model, epoch, ckpt_path=file)
        saved, loaded = states
        assert len(saved) == len(loaded) == (4 if options else 3) * len([*model.parameters()])
        assert all(map(torch.equal, saved, loaded))
        resumed.append(model.losses)
    torch.testing.assert_close(*resumed, rtol=TOLERANCE, atol=0)


def optimizer_state(model: Any) -> list[torch.Tensor]:
    optimizer = model.optimizers(use_pl_optimizer=False)
    return [x for state in optimizer.state.values() for x in state.values()]
