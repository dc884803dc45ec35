"""State dicts of others' fused Adam, built as those libraries write them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import LOUD, assert_same_bits, copies, random, saved, set_gradients, snapshot, train
from torch import Tensor

import wdkernels as wd

SHAPES = [(3, 5), (17,), (2, 2, 3), ()]
OPTIONS: dict[str, Any] = {key: LOUD[key] for key in ("lr", "betas", "eps", "weight_decay")}


def begun(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], dict[str, Any]]:
    """Weights after three steps, and torch's state dict of them."""
    params = [random(*shape, seed=i).to(dtype).requires_grad_() for i, shape in enumerate(SHAPES)]
    opt = torch.optim.AdamW(params, **OPTIONS)
    for t in range(3):
        for p, g in zip(params, gradients(params, t), strict=True):
            p.grad = g
        opt.step()
    return params, opt.state_dict()


def gradients(params: list[Tensor], t: int) -> list[Tensor]:
    """One for each: they count steps in the group."""
    return [random(*p.shape, seed=100 * t + i).to(p.dtype) for i, p in enumerate(params)]


def fused(found: dict[str, Any], **more: Any) -> dict[str, Any]:
    """As apex's and Transformer Engine's FusedAdam write it: steps in the group, none beside the
    moments, which are float32."""
    group = {
        "lr": OPTIONS["lr"],
        "bias_correction": True,
        "betas": OPTIONS["betas"],
        "eps": OPTIONS["eps"],
        "weight_decay": OPTIONS["weight_decay"],
        "step": 3,
        "params": list(range(len(SHAPES))),
        **more,
    }
    states = {
        key: {name: x[name].float() for name in ("exp_avg", "exp_avg_sq")}
        for key, x in found["state"].items()
    }
    return {"state": states, "param_groups": [group]}


def went_on(opt: Any, params: list[Tensor]) -> dict[str, Tensor]:
    for t in range(3, 6):
        for p, g in zip(params, gradients(params, t), strict=True):
            p.grad = g
        opt.step()
    return snapshot(opt, params)


@pytest.mark.parametrize("step", [3, torch.tensor([3], dtype=torch.int32)])
@pytest.mark.parametrize("kind", ["Adam", "AdamW", "AdamSWD", "AdamSPD"])
def test_a_run_of_fused_adam_goes_on(kind: str, step: Any) -> None:
    """As one of torch's, to the bit; `adam_w_mode` is not saved, so that it may be of either."""
    params, theirs = begun()
    ends = []
    for found in (theirs, fused(theirs, step=step)):
        if found is theirs:  # without the word of torch which decay it is
            found = copy.deepcopy(found)
            del found["param_groups"][0]["decoupled_weight_decay"]
        own = copies(params)
        opt = getattr(wd, kind)(own, lr=1.0)
        opt.load_state_dict(saved(found))
        assert opt.param_groups[0]["lr"] == OPTIONS["lr"]
        ends.append(went_on(opt, own))
        again = opt.state_dict()["param_groups"][0]
        assert not {"bias_correction", "step"} & set(again)
    assert_same_bits(*ends)


def test_one_whose_lr_is_a_tensor() -> None:
    """As capturable=True of theirs makes it."""
    params, theirs = begun()
    opt = wd.AdamW(copies(params))
    opt.load_state_dict(fused(theirs, lr=torch.tensor(0.25)))
    assert opt.param_groups[0]["lr"] == 0.25


def test_one_that_has_made_no_step() -> None:
    params, theirs = begun()
    found = fused(theirs)
    found["state"] = {}
    del found["param_groups"][0]["step"]
    opt = wd.AdamW(copies(params))
    opt.load_state_dict(found)
    assert not opt.state


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_deepspeed_counts_beside_the_moments(dtype: torch.dtype) -> None:
    """DeepSpeedCPUAdam's: an int there, amsgrad in the group, and with fp32_optimizer_states=False
    moments of 16 bits, as they are."""
    params, theirs = begun()
    for state in theirs["state"].values():
        state.update({key: state[key].to(dtype) for key in ("exp_avg", "exp_avg_sq")})
    found = fused(theirs, amsgrad=False)
    del found["param_groups"][0]["step"]
    for i, state in found["state"].items():
        state.update(theirs["state"][i], step=3)
    own, other = copies(params), copies(params)
    opt, plain = wd.AdamW(own), wd.AdamW(other)
    opt.load_state_dict(saved(found))
    plain.load_state_dict(theirs)
    assert_same_bits(went_on(opt, own), went_on(plain, other))


# ---- Transformer Engine's master weights ---------------------------------------------------------


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 weight as Transformer Engine's kernel stores it: the bfloat16 that is nearest, and
    the lower 16 bits."""
    bits = master.view(torch.int32)
    lower = bits.to(torch.int16)  # cut off
    upper = (bits >> 16).to(torch.int16) + (lower < 0).to(torch.int16)
    return upper.view(torch.bfloat16), lower


MASTERS = torch.tensor(
    # Halfway, next to it on both sides, a carry into the exponent, zeros, denormals, the largest.
    [
        *(0x3F808000, 0x3F807FFF, 0x3F808001, 0x3FFFFFFF, -0x7FFF8000, 0x00000000, 0x00000001),
        *(0x7F7F7FFF, 0x3F800000, -0x40008000, 0x3DCCCCCD),
    ],
    dtype=torch.int32,
).view(torch.float32)


@pytest.mark.parametrize("halves", [True, False], ids=["remainders", "float32"])
def test_master_weights(halves: bool) -> None:
    more = torch.randn(500, generator=torch.Generator().manual_seed(0))
    masters = [MASTERS, more, random(3, 5, seed=1).float(), random(seed=2).float()]
    params = [split(x)[0].clone().requires_grad_() for x in masters]
    assert not all(torch.equal(p.float(), x) for p, x in zip(params, masters, strict=True))
    states = {
        i: {
            "exp_avg": torch.full_like(x, 0.5),
            "exp_avg_sq": torch.full_like(x, 0.25),
            "master_param": split(x)[1] if halves else x.clone(),
        }
        for i, x in enumerate(masters)
    }
    found = fused({"state": {}})
    found["state"] = states
    opt = wd.AdamW(params, master_weights=True)
    opt.load_state_dict(saved(found))
    loaded = [opt.state[p]["master"] for p in params]
    assert_same_bits(dict(enumerate(loaded)), dict(enumerate(masters)))
    # And the next step begins from them.
    for p in params:
        p.grad = torch.zeros_like(p)
    opt.step()
    reference = [x.clone().requires_grad_() for x in masters]
    plain = wd.AdamW(reference)
    states32 = {i: {k: x for k, x in s.items() if k != "master_param"} for i, s in states.items()}
    plain.load_state_dict({**found, "state": states32})
    for p in reference:
        p.grad = torch.zeros_like(p)
    plain.step()
    stepped = [opt.state[p]["master"] for p in params]
    assert_same_bits(dict(enumerate(stepped)), dict(enumerate(map(Tensor.detach, reference))))


def test_copies_of_float32_weights_are_never_read() -> None:
    """Transformer Engine makes a master_param of every weight and moves only those of 16 bits."""
    params, theirs = begun()
    found = fused(theirs)
    for state in found["state"].values():
        state["master_param"] = torch.zeros_like(state["exp_avg"])
    own, other = copies(params), copies(params)
    opt, plain = wd.AdamW(own), wd.AdamW(other)
    opt.load_state_dict(found)
    plain.load_state_dict(theirs)
    assert_same_bits(went_on(opt, own), went_on(plain, other))


def test_masters_ask_for_master_weights() -> None:
    params, theirs = begun(torch.bfloat16)
    found = fused(theirs)
    for state in found["state"].values():
        state["master_param"] = state["exp_avg"].clone()
    opt = wd.AdamW(copies(params))
    with pytest.raises(ValueError, match=r"has master_weights=True.*construct it with"):
        opt.load_state_dict(found)


# ---- what is refused -----------------------------------------------------------------------------


def _no_correction(found: dict[str, Any]) -> None:
    found["param_groups"][0]["bias_correction"] = False


def _no_step(found: dict[str, Any]) -> None:
    del found["param_groups"][0]["step"]


def _scaled(dtype: torch.dtype) -> Any:
    def change(found: dict[str, Any]) -> None:
        found["state"][1]["exp_avg"] = found["state"][1]["exp_avg"].to(dtype)

    return change


def _halves(found: dict[str, Any]) -> None:
    for state in found["state"].values():
        state["master_param"] = torch.zeros_like(state["exp_avg"], dtype=torch.int16)


def _short_halves(found: dict[str, Any]) -> None:
    _halves(found)
    found["state"][1]["master_param"] = torch.zeros(3, dtype=torch.int16)


@pytest.mark.parametrize(
    ("change", "dtype", "match"),
    [
        (_no_correction, torch.float32, "group 0 of the state_dict has bias_correction=False"),
        (_no_step, torch.float32, "moments of parameter 0.* but no step"),
        (_scaled(torch.float16), torch.float32, r"exp_avg of parameter 1.* is torch.float16, scal"),
        (_scaled(torch.uint8), torch.float32, r"exp_avg of parameter 1.* is torch.uint8, scaled"),
        (_halves, torch.float16, r"int16, the lower half .* but the parameter is torch.float16"),
        (_short_halves, torch.bfloat16, r"master_param of parameter 1.* has shape \(3,\)"),
    ],
)
def test_what_has_no_counterpart_is_refused(change: Any, dtype: torch.dtype, match: str) -> None:
    params, theirs = begun(dtype)
    found = fused(theirs)
    change(found)
    own = copies(params)
    opt = wd.AdamW(own, master_weights=dtype != torch.float32)
    train(opt, own, range(1))
    before = snapshot(opt, own)
    with pytest.raises(ValueError, match=match):
        opt.load_state_dict(found)
    assert_same_bits(before, snapshot(opt, own))  # nothing has changed
    set_gradients(own, 1)
    opt.step()


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    if not dist.is_available():
        pytest.skip("no torch.distributed")
    meeting = (tmp_path / "meeting").as_uri()
    dist.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_halves_of_shards_are_refused() -> None:
    """The lower halves belong to the upper ones, which are spread over other processes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    params, theirs = begun(torch.bfloat16)
    found = fused(theirs)
    _halves(found)
    shards = [distribute_tensor(p.detach(), mesh).requires_grad_() for p in params]
    opt = wd.AdamW(shards, master_weights=True)
    with pytest.raises(ValueError, match=r"master_param of parameter 0.*store_param_remainders=Fa"):
        opt.load_state_dict(found)
    assert not opt.state
