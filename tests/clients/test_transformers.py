"""transformers' Trainer, and PEFT's adapters in the plain loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from loops import OPTIONS, STEPS, Texts, assert_as_torch, batches, llama, needs

import wdkernels as wd

# PEFT asks transformers by the old name of an attribute.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def trainer(folder: Path, model: Any = None, **how: Any) -> Any:
    """`how`: by which the Trainer gets its optimizer."""
    needs("accelerate")
    transformers = needs("transformers")
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=8,
        learning_rate=OPTIONS["lr"],
        weight_decay=OPTIONS["weight_decay"],
        lr_scheduler_type="cosine",
        logging_steps=1,
        save_steps=STEPS // 2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    model = llama() if model is None else model
    return transformers.Trainer(model, arguments, train_dataset=Texts(), **how)


def losses(trained: Any) -> list[float]:
    return [line["loss"] for line in trained.state.log_history if "loss" in line]


def by_instance(cls: Any, folder: Path) -> Any:
    model = llama()
    groups = wd.param_groups(model, OPTIONS["weight_decay"])
    options = {key: x for key, x in OPTIONS.items() if key != "weight_decay"}
    return trainer(folder, model, optimizers=(cls(groups, **options), None))


def by_class(cls: Any, folder: Path) -> Any:
    return trainer(folder, optimizer_cls_and_kwargs=(cls, OPTIONS))


@pytest.mark.parametrize("way", [by_instance, by_class])
def test_trainer(way: Any, tmp_path: Path) -> None:
    found = {}
    for cls in (wd.AdamW, torch.optim.AdamW):
        run = way(cls, tmp_path / cls.__module__)
        run.train()
        found[cls] = losses(run)
        assert isinstance(run.optimizer.optimizer, cls)  # accelerate's wrapper has it
    assert_as_torch(found[wd.AdamW], found[torch.optim.AdamW])


def test_trainer_resumes(tmp_path: Path) -> None:
    """From its own checkpoint, in the middle, to the same weights."""
    first = by_instance(wd.AdamW, tmp_path)
    first.train()
    second = by_instance(wd.AdamW, tmp_path / "second")
    second.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS // 2}"))
    a, b = first.model.state_dict(), second.model.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


# ---- PEFT ----------------------------------------------------------------------------------------


def adapted() -> Any:
    peft = needs("peft", "transformers")
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.0
    )
    return peft.get_peft_model(llama(), config)


def tuned(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
    found = []
    for x, _ in batches():
        loss = model(input_ids=x, labels=x).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def test_lora() -> None:
    """AdamSPD with its anchor at zero, over all of the model's parameters, frozen ones too."""
    model, other = adapted(), adapted()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    options = {**OPTIONS, "weight_decay": 0.0}
    torchs = tuned(other, torch.optim.AdamW(other.parameters(), **options))
    opt = wd.AdamSPD(model.parameters(), **{**OPTIONS, "weight_decay": 1.0}, anchor="zero")
    ours = tuned(model, opt)
    assert torchs[-1] < torchs[0] - 0.1
    assert ours[-1] < torchs[-1] * 1.05  # another rule: it may not learn less
    for name, p in model.named_parameters():
        assert (p in opt.state) is p.requires_grad
        assert torch.equal(p.detach(), before[name]) is not p.requires_grad, name


def test_lora_as_torch() -> None:
    found = []
    for cls in (wd.AdamW, torch.optim.AdamW):
        model = adapted()
        found.append(tuned(model, cls(wd.param_groups(model, 0.5), lr=2e-2, eps=1e-3)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=0)
