"""A tiny Llama, trained on Python's standard library by transformers' Trainer, adapted by PEFT.

    .venv-clients/bin/python examples/lora_stdlib.py     under a minute on a CPU, after make clients

First AdamW trains it on a module of the library, in the Trainer's own loop. Then adapters tune it
to another text, the library's manual of the language, once with torch.optim.AdamW and once with
AdamSPD, whose anchor for adapters is zero. The table says what they have learnt of the new text,
what they have forgotten of the old one, and how far the adapters have gone.
"""

from __future__ import annotations

import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import wdkernels as wd

CHARACTERS, LENGTH, BATCH = 128, 64, 16
TRAINED, TUNED, RATE = 300, 100, 5e-3


def pieces(path: Path, count: int, seed: int) -> Tensor:
    codes = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).long()
    codes = codes.clamp(max=CHARACTERS - 1)
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(codes) - LENGTH, (count, 1), generator=generator)
    return codes[starts + torch.arange(LENGTH)]


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=CHARACTERS,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=LENGTH,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


def pretrained(text: Path) -> dict[str, Tensor]:
    model = llama()
    texts = [{"input_ids": x, "labels": x} for x in pieces(text, TRAINED * BATCH, seed=0)]
    groups = wd.param_groups(model, weight_decay=0.1)
    print(groups)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=TRAINED,
            per_device_train_batch_size=BATCH,
            logging_steps=100,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        optimizer = wd.AdamW(groups, lr=RATE)
        Trainer(model, arguments, train_dataset=texts, optimizers=(optimizer, None)).train()
    return {name: x.clone() for name, x in model.state_dict().items()}


def adapted(weights: dict[str, Tensor]) -> Any:
    model = llama()
    model.load_state_dict(weights)
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))


@torch.no_grad()
def loss_on(model: Any, text: Path) -> float:
    x = pieces(text, 64, seed=1)
    loss: float = model(input_ids=x, labels=x).loss.item()
    return loss


def tuned(model: Any, optimizer: torch.optim.Optimizer, text: Path) -> None:
    for x in pieces(text, TUNED * BATCH, seed=2).split(BATCH):
        optimizer.zero_grad()
        model(input_ids=x, labels=x).loss.backward()
        optimizer.step()


def main() -> int:
    library = Path(sysconfig.get_paths()["stdlib"])
    old, new = library / "argparse.py", library / "pydoc_data" / "topics.py"
    weights = pretrained(old)
    optimizers: dict[str, Any] = {
        "torch.optim.AdamW": lambda p: torch.optim.AdamW(p, lr=RATE, weight_decay=0.1),
        "wd.AdamSPD": lambda p: wd.AdamSPD(p, lr=RATE, weight_decay=1.0, anchor="zero"),
    }
    model = adapted(weights)
    print(f"{'':20}{'new text':>10}{'old text':>10}{'adapters':>10}")
    print(f"{'before':20}{loss_on(model, new):10.3f}{loss_on(model, old):10.3f}{'':>10}")
    for name, make in optimizers.items():
        model = adapted(weights)
        tuned(model, make(model.parameters()), new)
        learnt = [p for p in model.parameters() if p.requires_grad]
        norm = torch.stack([p.detach().norm() for p in learnt]).norm()
        print(f"{name:20}{loss_on(model, new):10.3f}{loss_on(model, old):10.3f}{norm:10.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
