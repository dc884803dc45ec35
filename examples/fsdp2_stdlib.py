"""A small GPT, trained by FSDP2 on the source of Python's standard library, stopped and resumed.

    python examples/fsdp2_stdlib.py         two processes on a CPU, a quarter of a minute

It shows what a sharded run needs of an optimizer, all of it in one call of `step`: decay for
matrices only, clipping by the norm over all shards, and an average of the weights. After 20 of 40
steps everything is saved by torch.distributed.checkpoint. A second run starts from there, in new
processes and with other initial weights; its losses and its weights must be those of the first, to
the last bit.
"""

from __future__ import annotations

import os
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the processes share the cores

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn
from torch.nn.functional import cross_entropy

import wdkernels as wd

RANKS = 2
STEPS, SAVED_AFTER, EVALUATED_EVERY = 40, 20, 10
WIDTH, LAYERS, HEADS, LENGTH, BATCH = 128, 2, 4, 64, 16  # of each process
CHARACTERS = 128  # ASCII; whatever else there is becomes a 0


# ---- text ----------------------------------------------------------------------------------------


def corpus() -> Tensor:
    """The standard library, file by file, as numbers of characters."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    codes = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    return codes.where(codes < CHARACTERS, 0)


def batch(text: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Pieces of text, and the character that follows each of theirs; the seed says which."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - LENGTH, (BATCH, 1), generator=generator)
    pieces = text[starts + torch.arange(LENGTH + 1)]
    return pieces[:, :-1], pieces[:, 1:]


# ---- model ---------------------------------------------------------------------------------------


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CHARACTERS, WIDTH)
        self.position = nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                WIDTH, HEADS, 4 * WIDTH, dropout=0, batch_first=True, norm_first=True
            )
            for _ in range(LAYERS)
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CHARACTERS, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x) + self.position.weight
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        for block in self.blocks:
            h = block(h, src_mask=mask, is_causal=True)
        logits: Tensor = self.head(self.norm(h))
        return logits


def sharded_model(seed: int) -> GPT:
    torch.manual_seed(seed)
    model = GPT()
    mesh = init_device_mesh("cpu", (RANKS,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def optimizer_of(model: nn.Module) -> wd.AdamW:
    """Matrices decay; biases, gains and embeddings do not."""
    groups: list[dict[str, Any]] = [
        {"params": []},
        {"params": [], "weight_decay": 0.0},
    ]
    for name, p in model.named_parameters():
        decays = p.dim() == 2 and not name.startswith(("embedding", "position"))
        groups[0 if decays else 1]["params"].append((name, p))
    return wd.AdamW(groups, lr=3e-3, weight_decay=0.1, max_grad_norm=1.0, ema_decay=0.9)


# ---- training ------------------------------------------------------------------------------------


def mean(x: Tensor) -> float:
    """Over the processes."""
    x = x.detach().clone()
    dist.all_reduce(x)
    return x.item() / RANKS


@torch.no_grad()
def evaluated(model: nn.Module, text: Tensor) -> float:
    x, y = batch(text, seed=1_000_000 + dist.get_rank())
    return mean(cross_entropy(model(x).flatten(0, 1), y.flatten()))


def say(line: str) -> None:
    if dist.get_rank() == 0:
        print(line, flush=True)


def trained(
    model: nn.Module, optimizer: wd.AdamW, text: Tensor, steps: range, folder: Path | None
) -> Iterator[float]:
    """The losses, step by step."""
    train, held_out = text[: -len(text) // 10], text[-len(text) // 10 :]
    for step in steps:
        x, y = batch(train, seed=step * RANKS + dist.get_rank())
        optimizer.zero_grad()
        loss = cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        optimizer.step()
        total, norm = mean(loss), optimizer.grad_norm
        assert norm is not None
        line = f"step {step + 1:3}   loss {total:.4f}   gradient's norm {norm.item():6.3f}"
        if (step + 1) % EVALUATED_EVERY == 0:
            now = evaluated(model, held_out)
            with optimizer.ema_weights():
                averaged = evaluated(model, held_out)
            line += f"   held out {now:.4f}, averaged weights {averaged:.4f}"
        say(line)
        yield total
        if folder is not None and step + 1 == SAVED_AFTER:
            weights, states = get_state_dict(model, optimizer)
            save({"weights": weights, "states": states}, checkpoint_id=folder)
            say(f"saved after step {step + 1}")


def shards(model: nn.Module) -> list[Tensor]:
    return [p.to_local().clone() for p in model.parameters() if isinstance(p, DTensor)]


def first_run(folder: Path) -> tuple[list[float], list[Tensor]]:
    model = sharded_model(seed=0)
    losses = [*trained(model, optimizer_of(model), corpus(), range(STEPS), folder)]
    return losses[SAVED_AFTER:], shards(model)


def resumed_run(folder: Path) -> tuple[list[float], list[Tensor]]:
    model = sharded_model(seed=1)  # other weights than the first run began with
    optimizer = optimizer_of(model)
    weights, states = get_state_dict(model, optimizer)
    found: dict[str, Any] = {"weights": weights, "states": states}
    load(found, checkpoint_id=folder)
    set_state_dict(
        model, optimizer, model_state_dict=found["weights"], optim_state_dict=found["states"]
    )
    say(f"resumed after step {SAVED_AFTER}")
    return [*trained(model, optimizer, corpus(), range(SAVED_AFTER, STEPS), None)], shards(model)


def work(rank: int, folder: str, run: str) -> None:
    torch.set_num_threads(1)
    here = Path(folder)
    meeting = (here / f"meeting-{run}").as_uri()
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=RANKS)
    result = (first_run if run == "first" else resumed_run)(here / "checkpoint")
    torch.save(result, here / f"{run}-{rank}")
    dist.destroy_process_group()


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        for run in ("first", "resumed"):
            spawn(work, args=(folder, run), nprocs=RANKS)
        same = True
        for rank in range(RANKS):
            first, second = (
                torch.load(Path(folder, f"{run}-{rank}")) for run in ("first", "resumed")
            )
            same &= first[0] == second[0]
            same &= all(map(torch.equal, first[1], second[1]))
    print("the resumed run is bit-equal" if same else "the resumed run went another way")
    return int(not same)


if __name__ == "__main__":
    sys.exit(main())
