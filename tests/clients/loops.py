"""What the tests of others' tools share: text, a tiny model, the plain loop, and what is compared.

A tool's own loop runs twice, once with torch.optim.AdamW and once with ours, and must come to the
same losses. Both compute the same rule in float32; what differs is the last bit of some operations,
2^-24 a step, and training on text enlarges it: measured differences of the losses of these runs are
below 1e-4, and what a decay left out does to them is above 1e-2 (test_plain_loop.py).
"""

from __future__ import annotations

import importlib
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

CHARACTERS, WIDTH, LENGTH, BATCH, STEPS = 128, 32, 32, 8, 30
OPTIONS: dict[str, Any] = {"lr": 2e-2, "betas": (0.9, 0.99), "eps": 1e-3, "weight_decay": 0.5}
TOLERANCE = 1e-3


def needs(*packages: str) -> Any:
    """The first of these packages; the test is skipped, with the reason, where one is missing."""
    found = []
    for name in packages:
        try:
            found.append(importlib.import_module(name))
        except ImportError as error:
            pytest.skip(f"{name} is not installed: {error}")
    return found[0]


# ---- text ----------------------------------------------------------------------------------------


def batches(count: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    """Pieces of a module of Python's standard library, and the character after each of theirs."""
    text = Path(sysconfig.get_paths()["stdlib"], "argparse.py").read_bytes()
    codes = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().clamp(max=CHARACTERS - 1)
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(len(codes) - LENGTH, (count, BATCH, 1), generator=generator)
    pieces = codes[starts + torch.arange(LENGTH + 1)]
    return [(x[:, :-1], x[:, 1:]) for x in pieces]


class Texts(torch.utils.data.Dataset[Any]):
    """The same, piece by piece, as transformers wants them: labels are shifted by the model."""

    def __init__(self, count: int = STEPS) -> None:
        self.pieces = [piece for x, _ in batches(count) for piece in x]

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.pieces[i], "labels": self.pieces[i]}


# ---- models --------------------------------------------------------------------------------------


class Net(nn.Module):
    """Predicts a character from those before it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(CHARACTERS, WIDTH)
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CHARACTERS)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.lstm(self.embedding(x))[0]))
        return logits


def loss_of(model: Any, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(model(x).flatten(0, 1), y.flatten())


def llama() -> Any:
    """A tiny one of transformers, made here."""
    transformers = needs("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=CHARACTERS,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=0,
        eos_token_id=1,
    )
    return transformers.LlamaForCausalLM(config)


# ---- comparisons ---------------------------------------------------------------------------------


def assert_as_torch(ours: Sequence[float], torchs: Sequence[float]) -> None:
    """They have learnt, and to the same losses."""
    assert len(ours) == len(torchs) >= 10
    assert torchs[-1] < torchs[0] - 1.0
    torch.testing.assert_close(list(ours), list(torchs), rtol=TOLERANCE, atol=0)


def plain(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    """The loop that everyone writes."""
    losses = []
    for x, y in batches():
        optimizer.zero_grad()
        loss = loss_of(model, x, y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
