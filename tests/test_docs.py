"""Every block of Python in README and docs runs.

The blocks of a file run one after the other and see each other's names, beside those that a reader
has (`reader`). One that needs more says so in its first line, `# needs transformers, a GPU`, and is
skipped, with that reason, where it is not there.
"""

from __future__ import annotations

import importlib
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import wdkernels as wd

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# What others' packages warn of when they are imported or built is theirs.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning",
    "ignore:`torch.jit.script:DeprecationWarning",
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits


def reader() -> dict[str, Any]:
    """The names that a reader has."""
    torch.manual_seed(0)
    model = Net()
    return {
        "torch": torch,
        "wd": wd,
        "model": model,
        "params": list(model.parameters()),
        "bf16_params": [torch.ones(3, dtype=torch.bfloat16, requires_grad=True)],
        "batches": [(torch.randn(4, 8), torch.arange(4) % 3) for _ in range(100)],
        "loss_of": nn.functional.cross_entropy,
        "evaluate": lambda model: model(torch.randn(2, 8)),
        "writer": types.SimpleNamespace(add_scalar=lambda *_: None),
    }


def of_transformers(folder: Path) -> dict[str, Any]:
    """A model of theirs, made here, the Trainer's arguments, and texts."""
    transformers = importlib.import_module("transformers")
    config = transformers.LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=1,
    )
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=2, use_cpu=True, report_to=[]
    )
    found = {"model": transformers.LlamaForCausalLM(config), "args": arguments}
    return {**found, "data": [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 8}


def needs_of(block: str) -> list[str]:
    first = block.splitlines()[0]
    return first.removeprefix("# needs ").split(", ") if first.startswith("# needs ") else []


def missing(needs: list[str]) -> list[str]:
    """Those that are not there. A process group is made."""
    found = []
    for need in needs:
        if need == "a process group":
            here = dist.is_available()
        elif need == "a GPU":
            here = torch.cuda.is_available()
        elif need.startswith("a "):
            here = False
        else:
            try:
                importlib.import_module(need)
                here = True
            except ImportError:
                here = False
        if not here:
            found.append(need)
    return found


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    if dist.is_available():
        meeting = (tmp_path / "meeting").as_uri()
        dist.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
    yield
    if dist.is_available():
        dist.destroy_process_group()


def blocks(path: Path) -> list[tuple[int, str]]:
    """Each with the number of its first line."""
    text = path.read_text()
    return [(text[: x.start(1)].count("\n") + 1, x.group(1)) for x in BLOCK.finditer(text)]


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_block_runs(path: Path, tmp_path: Path, subtests: Any) -> None:
    names = reader()
    for line, block in blocks(path):
        with subtests.test(msg=f"{path.name}:{line}"):
            needs = needs_of(block)
            if absent := missing(needs):
                pytest.skip(f"needs {', '.join(absent)}")
            if "transformers" in needs:
                names.update(of_transformers(tmp_path))
            code = compile("\n" * (line - 1) + block, str(path), "exec")
            exec(code, names)


def test_there_are_blocks_and_no_others() -> None:
    """That a block in another spelling is not passed over."""
    assert sum(len(blocks(path)) for path in PAGES) >= 15
    for path in PAGES:
        fences = re.findall(r"^\s*(?:```|~~~) *(?:py|python)\b.*$", path.read_text(), re.MULTILINE)
        assert len(fences) == len(blocks(path)), path
