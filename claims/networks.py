"""The networks, each as small as shows the effect: ResNet with BatchNorm, ViT, GPT, and helpers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Residual(nn.Module):
    """Two convolutions with BatchNorm beside a shortcut."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(outside), nn.BatchNorm2d(outside)])
        self.shortcut = nn.Sequential()
        if inside != outside:
            wider = nn.Conv2d(inside, outside, 1, stride, bias=False)
            self.shortcut = nn.Sequential(wider, nn.BatchNorm2d(outside))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.norms[0](self.first(x)))
        return F.relu(self.norms[1](self.second(hidden)) + self.shortcut(x))


def resnet(seed: int, width: int = 8) -> nn.Sequential:
    """A ResNet for 8 x 8 digits; 20 thousand weights at width 8.

    BatchNorm follows every convolution, so that the scale of its kernel changes nothing.
    """
    torch.manual_seed(seed)
    stem = nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
    body = (
        Residual(width, width, 1),
        Residual(width, 2 * width, 2),
        Residual(2 * width, 4 * width, 2),
    )
    return nn.Sequential(
        *stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10)
    )


class Block(nn.Module):
    """A transformer's layer: attention and a feed-forward net, each behind a LayerNorm."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        shape = batch, length, 3, self.heads, width // self.heads
        q, k, v = self.qkv(self.norms[0](x)).view(shape).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).reshape(x.shape))
        x = x + self.down(F.gelu(self.up(self.norms[1](x))))
        return x


class GPT(nn.Module):
    """Predicts the next character of a text; 115 thousand weights at the default width."""

    def __init__(
        self, seed: int, vocabulary: int, context: int, width: int = 64, layers: int = 2
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.characters = nn.Embedding(vocabulary, width)
        self.places = nn.Parameter(torch.randn(context, width))
        self.blocks = nn.Sequential(*(Block(width, 4, causal=True) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, vocabulary, bias=False)
        with torch.no_grad():
            for p in self.parameters():
                if p.ndim > 1:
                    p.normal_(std=0.02)

    def forward(self, text: Tensor) -> Tensor:
        x: Tensor = self.characters(text) + self.places[: text.shape[1]]
        x = self.out(self.norm(self.blocks(x)))
        return x


class ViT(nn.Module):
    """Reads a digit as 16 patches of 2 x 2 pixels; 59 thousand weights at the default width."""

    def __init__(self, seed: int, width: int = 48, layers: int = 2) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.patches = nn.Linear(4, width)
        self.places = nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.Sequential(*(Block(width, 4, causal=False) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        x: Tensor = self.patches(F.unfold(images, 2, stride=2).transpose(1, 2)) + self.places
        x = self.out(self.norm(self.blocks(x)).mean(1))
        return x


class LoRA(nn.Module):
    """A frozen linear layer and a trained addition of low rank, which is 0 at first."""

    def __init__(self, frozen: nn.Linear, rank: int) -> None:
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, frozen.in_features) / frozen.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(frozen.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        frozen: Tensor = self.frozen(x)
        return frozen + x @ self.down.T @ self.up.T


def with_lora(model: ViT, rank: int) -> ViT:
    """The same network with LoRA in every layer of its blocks, and nothing else to be trained."""
    model.requires_grad_(False)
    for block in model.blocks:
        for name in ("qkv", "out", "up", "down"):
            setattr(block, name, LoRA(getattr(block, name), rank))
    return model


def grouped(model: nn.Module) -> list[dict[str, object]]:
    """Param groups: matrices and kernels decay, norms' gains and biases do not."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [pair for pair in named if pair[1].ndim > 1]},
        {"params": [pair for pair in named if pair[1].ndim < 2], "weight_decay": 0.0},
    ]


def next_character_loss(model: nn.Module, blocks: Tensor) -> Tensor:
    """Mean cross-entropy of each block's next characters, in nats a character."""
    logits = model(blocks[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten())


def norm(tensors: Iterable[Tensor]) -> float:
    """The Euclidean norm of all of them together."""
    return math.sqrt(sum(float(t.detach().double().pow(2).sum()) for t in tensors))


def decayed(model: nn.Module) -> list[Tensor]:
    """The weights that decay: those with more than one dimension."""
    return [p for p in model.parameters() if p.ndim > 1]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """BatchNorm uses its running statistics inside, and no gradient is taken."""
    model.eval()
    with torch.no_grad():
        yield
    model.train()


def error_and_loss(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """The percentage of images that are misread, and their mean cross-entropy in nats."""
    with evaluating(model):
        logits = model(images)
    wrong = (logits.argmax(1) != labels).float().mean()
    return 100 * float(wrong), float(F.cross_entropy(logits, labels))
