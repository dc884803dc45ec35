"""Param groups of a model: which weights decay, which learning rate each layer has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import wdkernels as wd


class RMSNormOfOthers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))


class NormHead(nn.Module):
    """Called a norm, but it has a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))


class PositionalEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(6, 4))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.out = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))


class GPT(nn.Module):
    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.ones(1, 1, 4))
        self.embedding = nn.Embedding(5, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.norm = RMSNormOfOthers()
        self.head = nn.Linear(4, 5)

    def no_weight_decay(self) -> set[str]:
        return {"cls_token"}


class Everything(nn.Module):
    """A module of each kind, as torch and others have them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.conv = nn.Conv2d(4, 4, 3)
        self.lstm = nn.LSTM(4, 4)
        self.batch = nn.BatchNorm2d(4)
        self.sync = nn.SyncBatchNorm(4)
        self.instance = nn.InstanceNorm1d(4, affine=True)
        self.group = nn.GroupNorm(2, 4)
        self.plane = nn.LayerNorm((4, 4))
        self.rms = RMSNormOfOthers()
        self.norm_head = NormHead()
        self.bag = nn.EmbeddingBag(5, 4)
        self.position = PositionalEmbedding()
        self.scale = nn.Parameter(torch.ones(4))
        self.bilinear = nn.Bilinear(4, 4, 4)
        self.spectral = parametrizations.spectral_norm(nn.Linear(4, 4))
        self.spectral_embedding = parametrizations.spectral_norm(nn.Embedding(5, 4))


DECAYING = {
    *("linear.weight", "conv.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0"),
    *("norm_head.weight", "scale", "bilinear.weight"),
    "spectral.parametrizations.weight.original",
}


def names(groups: Any, name: str = "decay") -> set[str]:
    """Of the parameters of one group."""
    return {n for group in groups if group["name"] == name for n, _ in group["params"]}


def test_kinds_are_told_by_the_module() -> None:
    model = Everything()
    groups = wd.param_groups(model, weight_decay=0.2)
    assert [group["name"] for group in groups] == ["decay", "no_decay"]
    assert {group["name"]: group["weight_decay"] for group in groups} == {
        "decay": 0.2,
        "no_decay": 0.0,
    }
    assert names(groups) == DECAYING
    every = {name for name, _ in model.named_parameters()}
    assert names(groups, "no_decay") == every - DECAYING


@pytest.mark.parametrize(
    ("no_decay", "more"),
    [
        (("norm", "embedding"), {"linear.bias", "lstm.bias_hh_l0", "conv.bias"}),
        (("bias", "embedding"), {"batch.weight", "plane.weight", "rms.gain", "group.weight"}),
        (("bias", "norm"), {"bag.weight", "position.table"}),
        ((), {"linear.bias", "batch.weight", "bag.weight"}),
    ],
)
def test_each_kind_is_a_choice(no_decay: tuple[str, ...], more: set[str]) -> None:
    found = names(wd.param_groups(Everything(), 0.2, no_decay))
    assert found >= DECAYING | more


def test_a_type_is_a_kind() -> None:
    groups = wd.param_groups(Everything(), 0.2, ("bias", NormHead, nn.Bilinear))
    assert {"norm_head.weight", "bilinear.weight"} <= names(groups, "no_decay")
    assert "bag.weight" in names(groups)


@pytest.mark.parametrize("lr_given", [False, True])
def test_an_optimizer_takes_them(lr_given: bool) -> None:
    """With gradients of 0, what decays shrinks by its own lr, and nothing else moves."""
    model = GPT()
    layers: dict[str, Any] = {"layer_decay": 0.5, "lr": 0.1} if lr_given else {}
    groups = wd.param_groups(model, 0.2, **layers)
    opt = wd.AdamW(groups, lr=0.1, eps=1e-2)
    assert sum(len(group["params"]) for group in opt.param_groups) == len([*model.parameters()])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()
    shares = {}
    for group in opt.param_groups:
        share = 1 - group["lr"] * group["weight_decay"]
        shares |= dict.fromkeys(group["param_names"], share)
    assert len(set(shares.values())) == (5 if lr_given else 2)
    for name, p in model.named_parameters():
        # One rounding of the share and one of the product, 2^-24 each.
        torch.testing.assert_close(p.detach(), before[name] * shares[name], rtol=2**-22, atol=0)


def test_torch_takes_them_too() -> None:
    groups = wd.param_groups(GPT(), 0.2)
    opt = torch.optim.AdamW(groups, lr=0.1)
    assert [group["name"] for group in opt.param_groups] == ["no_decay", "decay"]


def test_what_the_model_declares_does_not_decay() -> None:
    assert "cls_token" in names(wd.param_groups(GPT(), 0.2), "no_decay")
    assert "cls_token" in names(wd.param_groups(GPT(), 0.2, ("bias",)))
    inside = nn.ModuleDict({"model": GPT()})
    assert "model.cls_token" in names(wd.param_groups(inside, 0.2), "no_decay")


def test_a_tied_weight_is_in_one_group_once() -> None:
    """That of the kind which does not decay, whichever of its modules comes first."""
    for first in ("embedding", "head"):
        model = GPT()
        if first == "embedding":
            model.head.weight = model.embedding.weight
        else:
            tied = nn.Module()
            tied.head, tied.embedding = nn.Linear(4, 5), nn.Embedding(5, 4)
            tied.embedding.weight = tied.head.weight
            model = tied
        groups = wd.param_groups(model, 0.2)
        every = [p for group in groups for _, p in group["params"]]
        assert len(every) == len({*map(id, every)}) == len([*model.parameters()])
        assert f"{first}.weight" in names(groups, "no_decay")
        wd.AdamW(groups)


def test_frozen_parameters_are_left_out_and_named() -> None:
    model = GPT()
    model.blocks[0].requires_grad_(False)
    groups = wd.param_groups(model, 0.2)
    inside = {name for name, _ in model.named_parameters() if name.startswith("blocks.0.")}
    assert set(groups.frozen) == inside
    assert not any(n in inside for group in groups for n, _ in group["params"])


# ---- layers --------------------------------------------------------------------------------------


def rates(model: nn.Module, **options: Any) -> dict[str, float]:
    groups = wd.param_groups(model, 0.2, layer_decay=0.5, lr=1.0, **options)
    return {name: group["lr"] for group in groups for name, _ in group["params"]}


def test_each_layer_has_its_learning_rate() -> None:
    found = rates(GPT(layers=3))
    assert found["cls_token"] == found["embedding.weight"] == 0.5**4
    for layer in range(3):
        inside = {lr for name, lr in found.items() if name.startswith(f"blocks.{layer}.")}
        assert inside == {0.5 ** (3 - layer)}
    assert found["norm.gain"] == found["head.weight"] == 1.0
    groups = wd.param_groups(GPT(layers=3), 0.2, layer_decay=0.5, lr=1.0)
    assert {"layer_0.no_decay", "layer_1.decay", "layer_4.decay"} <= {g["name"] for g in groups}


def test_stages_and_stacks_go_on_from_each_other() -> None:
    """As in a ResNet, or an encoder and a decoder, with a norm between them."""
    model = nn.Module()
    model.stem = nn.Conv2d(3, 4, 3)
    model.layer1 = nn.Sequential(Block(), nn.Identity(), Block())
    model.between = nn.LayerNorm(4)
    model.layer2 = nn.ModuleList([Block(), Block()])
    found = rates(model)
    assert found["stem.weight"] == 0.5**4
    assert found["layer1.0.norm.weight"] == 0.5**3
    assert found["layer1.2.norm.weight"] == found["between.weight"] == 0.5**2
    assert found["layer2.1.norm.weight"] == 1.0  # nothing stands behind it


def test_layers_may_be_named() -> None:
    mlp = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    with pytest.raises(ValueError, match=r"layer_decay found no layers.*layers="):
        rates(mlp)
    found = rates(mlp, layers=["1", "2"])
    assert [found[f"{i}.weight"] for i in range(4)] == [0.125, 0.25, 0.5, 1.0]
    with pytest.raises(ValueError, match="layers holds 'two', which is no module"):
        rates(mlp, layers=["two"])
    with pytest.raises(TypeError, match="layers must be a sequence of names"):
        rates(mlp, layers="1")


def test_a_frozen_head_does_not_speed_up_the_others() -> None:
    model = GPT(layers=3)
    model.head.requires_grad_(False)
    model.norm.requires_grad_(False)
    assert max(rates(model).values()) == 0.5


def test_schedulers_keep_the_proportions() -> None:
    opt = wd.AdamW(wd.param_groups(GPT(), 0.2, layer_decay=0.5, lr=0.1))
    before = [group["lr"] for group in opt.param_groups]
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.5**step)
    opt.step()
    scheduler.step()
    assert [group["lr"] for group in opt.param_groups] == [lr * 0.5 for lr in before]


# ---- the table, and what is refused --------------------------------------------------------------


def test_the_table_says_what_is_where() -> None:
    model = GPT(layers=2)
    model.head.requires_grad_(False)
    groups = wd.param_groups(model, 0.2)
    lines = str(groups).splitlines()
    assert lines[0].split() == ["group", "weight_decay", "lr", "tensors", "numbers", "first"]
    # Of each block: attention in 12x4 and out 4x4, two matrices of 4x8.
    assert lines[2].split() == ["decay", "0.2", "8", "256", "blocks.0.attention.in_proj_weight"]
    assert lines[-1].split() == ["frozen:", "in", "no", "group", "2", "head.weight"]
    wd.AdamW(groups)
    taken = str(groups).splitlines()  # torch has put names elsewhere, and an lr into each group
    assert taken[2].split() == ["decay", "0.2", "0.001", *lines[2].split()[2:]]
    decayed = str(wd.param_groups(model, 0.2, layer_decay=0.5, lr=0.1)).splitlines()
    assert any(line.split()[:3] == ["layer_2.decay", "0.2", "0.05"] for line in decayed)


def frozen() -> nn.Module:
    return nn.Linear(2, 2).requires_grad_(False)


@pytest.mark.parametrize(
    ("model", "options", "error", "match"),
    [
        ([torch.ones(2)], {}, TypeError, "model must be a torch.nn.Module, not list"),
        (frozen(), {}, ValueError, "no parameter that learns"),
        (nn.LazyLinear(2), {}, ValueError, "weight has no shape yet"),
        (GPT(), {"no_decay": "bias"}, TypeError, "no_decay must be a sequence"),
        (GPT(), {"no_decay": ("biases",)}, ValueError, "no_decay holds 'biases': there are 'bias'"),
        (GPT(), {"no_decay": (Tensor,)}, ValueError, "no_decay holds"),
        (GPT(), {"weight_decay": -1.0}, ValueError, "weight_decay must be finite and >= 0"),
        (GPT(), {"layer_decay": 0.5}, ValueError, "pass lr"),
        (GPT(), {"lr": 0.1}, ValueError, "lr and layers belong to layer_decay"),
        (GPT(), {"layer_decay": 1.5, "lr": 0.1}, ValueError, r"layer_decay must be in \(0, 1\]"),
        (GPT(), {"layer_decay": 0.0, "lr": 0.1}, ValueError, r"layer_decay must be in \(0, 1\]"),
    ],
)
def test_errors_say_what_is_wrong(model: Any, options: Any, error: Any, match: str) -> None:
    with pytest.raises(error, match=match):
        wd.param_groups(model, **{"weight_decay": 0.2, **options})
