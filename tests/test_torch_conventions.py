"""What code written for torch.optim relies on: groups, hooks, schedulers, checkpoints, autograd."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import (
    METHODS,
    REFERENCE,
    TORCH,
    USUAL,
    Variant,
    Wrapper,
    anchors_of,
    assert_close,
    assert_same_bits,
    copies,
    every_backend,
    every_method,
    every_variant,
    random,
    saved,
    snapshot,
    train,
    weights,
)
from support.internals import options_unknown_to
from torch import Tensor, nn
from torch.optim import lr_scheduler

import wdkernels as wd
from wdkernels import schedules

# Whether the decay is L2; SPD's is neither, and takes the state of both.
L2 = {"l2": True, "unmixed": True, "decoupled": False, "swd": False, "spd": None}


# ---- closure, groups, hooks, names ---------------------------------------------------------------


@every_backend
@every_method
def test_closure(variant: Variant, backend: str) -> None:
    w = torch.ones(3, requires_grad=True)
    optimizer = variant.build([w], backend)
    seen = []

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        seen.append(w.detach().clone())
        optimizer.zero_grad()
        loss = (w * w).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure) == 3.0
    assert len(seen) == 1
    assert not torch.equal(seen[0], w)
    assert optimizer.step() is None


@every_backend
@pytest.mark.parametrize("method", METHODS)
def test_add_param_group_in_the_middle(method: str, backend: str) -> None:
    runs = []
    late = Variant(method, {"lr": 0.3, "amsgrad": True}, anchored=True)
    for solver in (backend, REFERENCE):
        first, second = weights()[:2]
        optimizer = Variant(method).build([first], solver)
        train(optimizer, [first], range(2))
        if solver == REFERENCE:
            optimizer.adopt(late.reference([second]))
        else:
            group = {"params": second, "anchor": anchors_of([second]), **late.options}
            optimizer.add_param_group(group)
        train(optimizer, [first, second], range(2, 5))
        runs.append(snapshot(optimizer, [first, second]))
    assert_close(*runs)


@every_backend
def test_groups_take_what_they_lack_from_the_constructor(backend: str) -> None:
    p, q = torch.ones(2), torch.ones(2)
    groups = [{"params": iter([p])}, {"params": q, "weight_decay": 0.0, "betas": (0.5, 0.9)}]
    scaled = {"decay_scale": "relative_lr", "cautious": True}
    optimizer = wd.AdamW(iter(groups), lr=0.25, weight_decay=0.1, backend=backend, **scaled)
    first, second = optimizer.param_groups
    assert first["weight_decay"] == 0.1
    assert second["weight_decay"] == 0.0
    assert second["betas"] == (0.5, 0.9)
    assert first["lr"] == second["lr"] == first["lr_max"] == second["lr_max"] == 0.25
    assert first["cautious"]
    assert optimizer.defaults["weight_decay"] == 0.1
    assert "weight_decay: 0.1" in repr(optimizer)


def test_defaults_and_positions_are_those_of_torch() -> None:
    p = torch.ones(1)
    for mine, theirs in ((wd.Adam, torch.optim.Adam), (wd.AdamW, torch.optim.AdamW)):
        group = mine([p]).param_groups[0]
        expected = theirs([p]).param_groups[0]
        for key in ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "capturable"):
            assert group[key] == expected[key], key
        positional = mine([p], 0.1, (0.5, 0.6), 0.3, 0.4, True).param_groups[0]
        for key, value in zip(
            ("lr", "betas", "eps", "weight_decay", "amsgrad"),
            (0.1, (0.5, 0.6), 0.3, 0.4, True),
            strict=True,
        ):
            assert positional[key] == value
    assert wd.AdamSWD([p]).param_groups[0]["weight_decay"] == 5e-4
    assert wd.AdamSPD([p]).param_groups[0]["weight_decay"] == 1.0
    assert wd.AdamSPD([p]).param_groups[0]["anchor"] == "initial"


@every_backend
def test_step_hooks(backend: str) -> None:
    w = torch.ones(2)
    w.grad = torch.ones(2)
    optimizer = wd.AdamW([w], backend=backend)
    seen: list[Any] = []
    before = optimizer.register_step_pre_hook(lambda o, *_: seen.append((o, w[0].item())))
    after = optimizer.register_step_post_hook(lambda o, *_: seen.append((o, w[0].item())))
    optimizer.step()
    assert [o for o, _ in seen] == [optimizer, optimizer]
    assert seen[0][1] == 1.0
    assert seen[1][1] == w[0].item() != 1.0
    before.remove()
    after.remove()
    optimizer.step()
    assert len(seen) == 2


@every_backend
def test_a_pre_hook_may_change_the_gradients(backend: str) -> None:
    def clip(optimizer: Any, *_: Any) -> None:
        optimizer.param_groups[0]["params"][0].grad.clamp_(max=1.0)

    runs = []
    for largest in (1.0, 5.0):
        w = torch.ones(2, dtype=torch.float64)
        optimizer = wd.AdamW([w], backend=backend, **USUAL)
        optimizer.register_step_pre_hook(clip)
        w.grad = torch.tensor([largest, 0.5], dtype=torch.float64)
        optimizer.step()
        runs.append(w)
    assert torch.equal(*runs)


@every_backend
@pytest.mark.parametrize("key", ["lr", "weight_decay", "betas"])
def test_a_pre_hook_may_change_the_numbers(key: str, backend: str) -> None:
    """In the step that it precedes, the first one and later."""
    runs = []
    for kind, more in ((torch.optim.AdamW, {}), (wd.AdamW, {"backend": backend})):
        values = iter([(0.1 * t, 0.5) if key == "betas" else 0.1 * t for t in range(1, 4)])

        def turn(optimizer: Any, *_: Any, values: Any = values) -> None:
            optimizer.param_groups[0][key] = next(values)

        params = weights()
        optimizer = kind(params, **more, **USUAL)
        optimizer.register_step_pre_hook(turn)
        train(optimizer, params, range(3))
        runs.append(params)
    assert_close(*runs)


@every_backend
def test_state_dict_hooks(backend: str) -> None:
    w = torch.ones(2)
    optimizer = wd.AdamW([w], backend=backend)
    seen = []
    optimizer.register_state_dict_pre_hook(lambda _: seen.append("save"))
    optimizer.register_state_dict_post_hook(lambda _, found: {**found, "extra": 7})
    optimizer.register_load_state_dict_pre_hook(
        lambda _, found: {key: value for key, value in found.items() if key != "extra"}
    )
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("loaded"))
    found = optimizer.state_dict()
    assert found["extra"] == 7
    optimizer.load_state_dict(found)
    assert seen == ["save", "loaded"]


@every_backend
@every_method
def test_named_parameters(variant: Variant, backend: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    twin = copy.deepcopy(model)
    optimizer = variant.build(list(model.named_parameters()), backend)
    plain = variant.build(list(twin.parameters()), backend)
    train(optimizer, list(model.parameters()), range(3))
    train(plain, list(twin.parameters()), range(3))
    names = ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert optimizer.param_groups[0]["param_names"] == names
    assert_same_bits(
        snapshot(optimizer, list(model.parameters())), snapshot(plain, list(twin.parameters()))
    )
    optimizer.load_state_dict(saved(optimizer.state_dict()))
    assert optimizer.param_groups[0]["param_names"] == names


@pytest.mark.parametrize(("before", "after"), [("ab", "cd"), ("ab", None), (None, "cd")])
def test_names_in_a_state_dict_replace_those_of_the_optimizer(before: Any, after: Any) -> None:
    """As in torch.optim; they decide nothing."""
    found = []
    for kind in (torch.optim.AdamW, wd.AdamW):
        p, q = torch.ones(2), torch.ones(3)
        other = kind([p, q] if after is None else [*zip(after, [p, q], strict=True)])
        optimizer = kind([p, q] if before is None else [*zip(before, [p, q], strict=True)])
        optimizer.load_state_dict(other.state_dict())
        found.append(optimizer.param_groups[0].get("param_names"))
    assert found[0] == found[1] == list(after or before)


# ---- learning rates ------------------------------------------------------------------------------

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 0.9**t),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda _: 0.8),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.7),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 6, power=2),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.2, step_size_up=2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.3, total_steps=10),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=3), lr_scheduler.ExponentialLR(o, 0.5)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, total_iters=3), lr_scheduler.ExponentialLR(o, 0.5)]
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.02, anneal_epochs=4),
}


@every_backend
@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS.keys())
def test_every_lr_scheduler(scheduler: Callable[[Any], Any], backend: str) -> None:
    """Two groups; the betas that OneCycleLR and CyclicLR turn are followed as well."""
    runs = []
    for kind, more in ((torch.optim.AdamW, {}), (wd.AdamW, {"backend": backend})):
        params = weights()
        groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.05}]
        optimizer = kind(groups, **more, **USUAL)
        schedule = scheduler(optimizer)
        rates = []
        for t in range(8):
            train(optimizer, params, range(t, t + 1))
            schedule.step(*[1.0] * isinstance(schedule, lr_scheduler.ReduceLROnPlateau))
            rates.append([(group["lr"], group["betas"]) for group in optimizer.param_groups])
        runs.append((rates, params))
    assert len({str(rate) for rate in runs[0][0]}) > 1
    assert runs[0][0] == runs[1][0]
    assert_close(runs[1][1], runs[0][1])


@every_backend
def test_a_schedule_of_the_decay_and_one_of_the_lr_together(backend: str) -> None:
    """relative_lr follows the schedule of lr from the group's own lr_max, decay its own."""
    w = torch.ones(1, dtype=torch.float64)
    optimizer = wd.AdamW(
        [w],
        backend=backend,
        decay_scale="relative_lr",
        decay_schedule=schedules.linear(1.0, 0.0, steps=4),
        **USUAL,
    )
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    expected = 1.0
    for t in range(5):
        w.grad = torch.zeros(1, dtype=torch.float64)
        optimizer.step()
        scheduler.step()
        expected *= 1 - 0.2 * 0.5**t * (1 - t / 4)
    assert_close(w, torch.full_like(w, expected))


@every_backend
@every_method
def test_tensors_as_hyper_parameters(variant: Variant, backend: str) -> None:
    """A tensor may be changed in place, as graph-captured loops do."""
    runs = []
    for tensors in (False, True):
        w = random(5, seed=1)
        lr: Any = torch.tensor(0.1, dtype=torch.float64) if tensors else 0.1
        decay: Any = torch.tensor(0.2, dtype=torch.float64) if tensors else 0.2
        optimizer = variant.build([w], backend, lr=lr, weight_decay=decay)
        for t in range(4):
            for key, value in (("lr", 0.1 + 0.1 * t), ("weight_decay", 0.2 - 0.05 * t)):
                if tensors:
                    optimizer.param_groups[0][key].fill_(value)
                else:
                    optimizer.param_groups[0][key] = value
            train(optimizer, [w], range(t, t + 1))
        runs.append(snapshot(optimizer, [w]))
    assert_same_bits(*runs)


@every_backend
def test_numbers_of_numpy(backend: str) -> None:
    w = torch.ones(2, dtype=torch.float64)
    optimizer = wd.AdamW([w], lr=np.float32(0.5), weight_decay=np.float64(0.25), backend=backend)
    w.grad = torch.zeros(2, dtype=torch.float64)
    optimizer.step()
    assert_close(w, torch.full_like(w, 1 - 0.5 * 0.25))


@every_backend
@pytest.mark.parametrize("method", METHODS)
def test_every_number_of_a_group_may_change_at_any_step(method: str, backend: str) -> None:
    edits: list[dict[str, Any]] = [
        {},
        {"lr": 0.3},
        {"weight_decay": 0.05, "eps": 0.1},
        {"betas": (0.5, 0.9)},
        {"maximize": True},
        {"decay_schedule": schedules.early(7)},
        {"amsgrad": True},
        {"lr": 0.02},
        {"amsgrad": False, "decay_schedule": None},
        {"maximize": False},
    ]
    if method in ("decoupled", "swd"):
        edits += [{"decay_scale": "relative_lr", "lr_max": 0.4}, {"cautious": True}]
    runs = []
    for kind in (backend, "eager"):
        params = weights()
        optimizer = Variant(method).build(params, kind)
        for t, edit in enumerate(edits):
            optimizer.param_groups[0].update(edit)
            train(optimizer, params, range(t, t + 1))
        runs.append(snapshot(optimizer, params))
    assert_close(*runs)


@every_backend
def test_a_schedule_edited_in_place_is_seen(backend: str) -> None:
    w = torch.ones(1, dtype=torch.float64)
    optimizer = wd.AdamW([w], backend=backend, decay_schedule=schedules.late(100), **USUAL)
    for t in range(2):
        w.grad = torch.zeros(1, dtype=torch.float64)
        optimizer.param_groups[0]["decay_schedule"]["start"] = 100 if t == 0 else 0
        optimizer.step()
    assert_close(w, torch.full_like(w, 0.98))


# ---- copies and checkpoints ----------------------------------------------------------------------


@every_backend
@every_variant
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copied_optimizers_go_their_own_way(
    variant: Variant, backend: str, copier: Callable[[Any], Any]
) -> None:
    params = weights()
    optimizer = variant.build(params, backend)
    train(optimizer, params, range(2))
    other, theirs = copier((optimizer, params))
    before = snapshot(optimizer, params)
    assert_same_bits(snapshot(other, theirs), before)
    train(other, theirs, range(2, 4))
    assert_same_bits(snapshot(optimizer, params), before)
    train(optimizer, params, range(2, 4))
    assert_same_bits(snapshot(optimizer, params), snapshot(other, theirs))


@every_backend
@every_variant
@pytest.mark.parametrize("through_a_file", [False, True])
def test_resume_is_exact(variant: Variant, backend: str, through_a_file: bool) -> None:
    """Into an optimizer built with other numbers: everything comes from the checkpoint.

    The steps before and after include parameters that skip some, one of them its first ones.
    """
    for middle in (1, 3):
        params = weights(torch.float32)
        optimizer = variant.build(params, backend)
        train(optimizer, params, range(middle))
        checkpoint = optimizer.state_dict()
        if through_a_file:
            checkpoint = saved(checkpoint)
        resumed = copies(params)
        # The anchor of a fine-tuning run is not in the weights of its checkpoint.
        other = variant.build(resumed, backend, lr=0.7, weight_decay=0.9, betas=(0.1, 0.2), eps=0.3)
        other.load_state_dict(checkpoint)
        assert_same_bits(snapshot(other, resumed), snapshot(optimizer, params))
        train(optimizer, params, range(middle, 6))
        train(other, resumed, range(middle, 6))
        assert_same_bits(snapshot(other, resumed), snapshot(optimizer, params))


@every_backend
@every_method
def test_resume_over_a_run_already_under_way(variant: Variant, backend: str) -> None:
    params = weights()
    optimizer = variant.build(params, backend)
    train(optimizer, params, range(3))
    checkpoint, then = copy.deepcopy(optimizer.state_dict()), copies(params)
    train(optimizer, params, range(3, 5))
    expected = snapshot(optimizer, params)
    with torch.no_grad():
        for p, w in zip(params, then, strict=True):
            p.copy_(w)
    optimizer.load_state_dict(checkpoint)
    train(optimizer, params, range(3, 5))
    assert_same_bits(snapshot(optimizer, params), expected)


def test_initial_anchors_come_from_the_checkpoint() -> None:
    w = torch.zeros(2, requires_grad=True)
    optimizer = wd.AdamSPD([w], lr=0.1)
    train(optimizer, [w], range(2))
    other = wd.AdamSPD([w], lr=0.1)
    other.load_state_dict(optimizer.state_dict())
    assert torch.equal(other.state[w]["anchor"], torch.zeros(2))


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_parameters_replaced_before_the_first_step(
    method: str, dtype: torch.dtype, backend: str
) -> None:
    """DeepSpeed's ZeRO puts float32 copies of all parameters, or of a part of them, end to end into
    the groups. An initial anchor is the weights before the first step, whoever holds them."""
    variant = Variant(method, {"anchor": "initial"})
    runs = []
    for replaced in (True, False):
        original = [random(5, 3, seed=1, dtype=dtype), random(4, seed=2, dtype=dtype)]
        flat = torch.cat([w.detach().flatten() for w in original]).float()
        optimizer = variant.build(original if replaced else [flat], backend)
        optimizer.param_groups[0]["params"] = [flat]
        flat += 0.5  # as if a checkpoint were loaded into it
        before = flat.clone()
        train(optimizer, [flat], range(1))
        assert torch.equal(optimizer.state[flat]["anchor"], before)
        runs.append(snapshot(optimizer, [flat]))
        train(optimizer, [flat], range(1, 4))
        assert list(optimizer.state) == [flat]
        runs.append(snapshot(optimizer, [flat]))
    assert_same_bits(runs[0], runs[2])
    assert_same_bits(runs[1], runs[3])


@every_backend
def test_anchors_of_parameters_that_have_been_replaced(backend: str) -> None:
    w, flat = torch.ones(2, 2), torch.ones(4)
    optimizer = wd.AdamW([w], lr=0.1, anchor=[torch.zeros(2, 2)], backend=backend)
    optimizer.param_groups[0]["params"] = [flat]
    flat.grad = torch.ones(4)
    with pytest.raises(ValueError, match=r"^parameter 0 of group 0 has no anchor"):
        optimizer.step()
    assert torch.equal(flat, torch.ones(4))
    assert not optimizer.state


@every_backend
@every_method
def test_a_loaded_state_shares_no_memory(variant: Variant, backend: str) -> None:
    params = weights()
    optimizer = variant.build(params, backend)
    train(optimizer, params, range(3))
    checkpoint = optimizer.state_dict()
    before = copy.deepcopy(checkpoint)
    other = variant.build(copies(params), backend)
    other.load_state_dict(checkpoint)
    train(other, other.param_groups[0]["params"], range(3, 5))
    for key, state in before["state"].items():
        for name, value in state.items():
            assert torch.equal(checkpoint["state"][key][name], value)


@every_backend
@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_before_the_first_step(method: str, backend: str) -> None:
    runs = []
    for resume in (False, True):
        params = weights()
        optimizer = Variant(method, anchored=True).build(params, backend)
        if resume:
            checkpoint = saved(optimizer.state_dict())
            optimizer = Variant(method, anchored=True).build(params, backend, copies(params))
            optimizer.load_state_dict(checkpoint)
        train(optimizer, params, range(3))
        runs.append(snapshot(optimizer, params))
    assert_same_bits(*runs)


def test_a_checkpoint_in_a_file_with_the_model(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    optimizer = wd.AdamSWD(model.parameters(), decay_schedule=schedules.early(5), lr=0.1)
    model(torch.ones(4, 3)).square().mean().backward()
    optimizer.step()
    path = tmp_path / "checkpoint.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    loaded = torch.load(path, weights_only=True)
    assert loaded["optimizer"]["param_groups"][0]["decay_schedule"] == schedules.early(5)
    assert loaded["optimizer"]["state"][0]["exp_avg_sq_sum"].dtype == torch.float64
    optimizer.load_state_dict(loaded["optimizer"])


# ---- checkpoints of torch.optim ------------------------------------------------------------------

TORCH_KINDS = {
    "single": {"foreach": False, "fused": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


@every_backend
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("kind", TORCH_KINDS.values(), ids=TORCH_KINDS.keys())
@pytest.mark.parametrize("method", TORCH)
@pytest.mark.parametrize("direction", ["from torch", "to torch"])
def test_training_continues_across_torch(
    direction: str, method: str, kind: dict[str, Any], amsgrad: bool, backend: str
) -> None:
    """Halfway the state moves; one parameter has no gradient before it, one none at all."""

    def theirs(params: list[Tensor], **options: Any) -> Any:
        groups = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.5}]
        return TORCH[method](groups, **kind, **options)

    def mine(params: list[Tensor], **options: Any) -> Any:
        groups = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.5}]
        return Variant(method).build(groups, backend, **options)

    def steps(optimizer: Any, params: list[Tensor], which: range) -> None:
        train(optimizer, params[:-1], which)  # params[3] begins at step 2, params[-1] never

    expected = weights()
    steps(theirs(expected, **USUAL, amsgrad=amsgrad), expected, range(6))

    first, second = (theirs, mine) if direction == "from torch" else (mine, theirs)
    params = weights()
    optimizer = first(params, **USUAL, amsgrad=amsgrad)
    steps(optimizer, params, range(2))
    resumed = copies(params)
    other = second(resumed, lr=0.7)
    other.load_state_dict(saved(optimizer.state_dict()))
    steps(other, resumed, range(2, 6))
    assert_close(resumed, expected)

    # And back again, with what the other one added.
    back = copies(resumed)
    again = first(back, lr=0.7)
    again.load_state_dict(saved(other.state_dict()))
    steps(again, back, range(6, 8))
    steps(other, resumed, range(6, 8))
    assert_close(back, resumed)


@every_backend
@pytest.mark.parametrize("method", ["swd", "spd"])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_swd_and_spd_continue_from_a_state_of_adamw(
    method: str, amsgrad: bool, backend: str
) -> None:
    variant = Variant(method, {"amsgrad": amsgrad})
    params = weights()
    theirs = torch.optim.AdamW(params, amsgrad=amsgrad, **USUAL)
    train(theirs, params, range(3))
    mine, expected = copies(params), copies(params)
    optimizer, reference = variant.build(mine, backend), variant.reference(expected)
    optimizer.load_state_dict(theirs.state_dict())
    for p, w in zip(params, expected, strict=True):
        reference.state[w] |= copy.deepcopy(theirs.state.get(p, {}))
    train(optimizer, mine, range(3, 6))
    train(reference, expected, range(3, 6))
    assert_close(mine, expected)


@every_backend
@pytest.mark.parametrize("via", [torch.optim.AdamW, wd.AdamW, wd.AdamSPD], ids=str)
def test_swd_does_not_trust_a_sum_that_others_carried_along(via: Any, backend: str) -> None:
    """The running sum of v went through an optimizer that does not keep it up."""
    params = weights()
    optimizer = Variant("swd").build(params, backend)
    train(optimizer, params, range(2))
    other = via(params, lr=0.1)
    other.load_state_dict(optimizer.state_dict())
    train(other, params, range(2, 5))
    optimizer.load_state_dict(other.state_dict())
    for p in params:
        if "exp_avg_sq" in optimizer.state.get(p, {}):
            state = optimizer.state[p]
            assert_close(state["exp_avg_sq_sum"], state["exp_avg_sq"].sum())


@every_backend
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("before", METHODS)
def test_one_of_our_optimizers_continues_from_another(
    before: str, method: str, backend: str
) -> None:
    """Options that only the other one has are left behind, as of torch.optim."""
    params = weights()
    crossing = {L2[method], L2[before]} == {True, False}
    decay = {"weight_decay": 0.0} if crossing else {}  # else it is refused
    optimizer = Variant(before).build(params, backend, **decay)
    train(optimizer, params, range(2))
    other = Variant(method).build(params, backend, lr=0.7)
    other.load_state_dict(saved(optimizer.state_dict()))
    assert other.param_groups[0]["lr"] == 0.1
    assert not options_unknown_to(method) & other.param_groups[0].keys()
    assert torch.equal(other.state[params[0]]["exp_avg"], optimizer.state[params[0]]["exp_avg"])
    train(other, params, range(2, 4))


@pytest.mark.parametrize(
    "saves", [torch.optim.Adam, torch.optim.AdamW, wd.Adam, wd.AdamW, wd.AdamSWD]
)
@pytest.mark.parametrize("loads", METHODS)
def test_weight_decay_is_not_taken_for_one_of_another_kind(loads: str, saves: Any) -> None:
    """0.1 is much for one and little for the other. Older torch does not say which it is."""
    params = weights()
    checkpoint = saves(params, lr=0.1, weight_decay=0.1).state_dict()
    l2 = saves in (torch.optim.Adam, wd.Adam)
    optimizer = Variant(loads).build(params, "eager", weight_decay=0.3)
    if L2[loads] in (None, l2) or (
        saves.__module__.startswith("torch")
        and "decoupled_weight_decay" not in checkpoint["param_groups"][0]
    ):
        optimizer.load_state_dict(checkpoint)
        assert optimizer.param_groups[0]["weight_decay"] == 0.1
        return
    before = copy.deepcopy(optimizer.state_dict())
    which = "decoupled, .*: load it into AdamW," if L2[loads] else "L2, .*: load it into Adam,"
    with pytest.raises(ValueError, match=f"weight_decay of group 0 of the state_dict is {which}"):
        optimizer.load_state_dict(checkpoint)
    assert optimizer.state_dict() == before

    checkpoint["param_groups"][0]["weight_decay"] = 0.0
    optimizer.load_state_dict(checkpoint)


def test_a_state_dict_of_older_torch_does_not_say_which_decay_it_has() -> None:
    params = weights()
    checkpoint = torch.optim.AdamW(params, weight_decay=0.1).state_dict()
    checkpoint["param_groups"][0].pop("decoupled_weight_decay", None)
    wd.Adam(params).load_state_dict(checkpoint)


def test_what_torch_trained_with_last_says_which_decay_it_is() -> None:
    """Our own options are carried along by torch, and no longer mean anything. What does is
    torch's own word, by which its Adam goes on with the decay of the state dict that it loads."""
    params = weights()
    other = torch.optim.AdamW(params)
    ours = wd.AdamSWD(params, weight_decay=0.1, decay_scale="relative_lr")
    other.load_state_dict(ours.state_dict())
    assert "decay_scale" in other.param_groups[0]
    wd.AdamW(params).load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match=r"is decoupled, Adam's is L2"):
        wd.Adam(params).load_state_dict(other.state_dict())


@every_backend
def test_a_torch_checkpoint_keeps_our_own_options(backend: str) -> None:
    """Anchor, schedule, scale are not in it: they stay as constructed. Its numbers count."""
    params = weights()
    theirs = torch.optim.AdamW(params, lr=0.3, weight_decay=0.7)
    train(theirs, params, range(2))
    early, anchors = schedules.early(4), anchors_of(params)
    optimizer = wd.AdamW(
        params,
        anchor=anchors,
        decay_schedule=early,
        cautious=True,
        lr=0.1,
        lr_max=0.2,
        backend=backend,
    )
    optimizer.load_state_dict(theirs.state_dict())
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (0.3, 0.7)
    assert group["decay_schedule"] == early
    assert group["cautious"]
    assert group["lr_max"] == 0.2
    train(optimizer, params, range(2, 3))
    for p, a in zip(params, anchors, strict=True):
        assert torch.equal(optimizer.state[p]["anchor"], a)
    for key in ("foreach", "fused", "differentiable", "decoupled_weight_decay"):
        assert key not in group
    train(optimizer, params, range(2, 3))


@every_backend
def test_the_state_of_a_torch_run_in_another_precision(backend: str) -> None:
    """As torch.optim: moments take the dtype of the parameter they are loaded for."""
    params = weights()
    theirs = torch.optim.AdamW(params, **USUAL)
    train(theirs, params, range(3))
    singles = [p.detach().float() for p in params]
    optimizer = wd.AdamW(singles, backend=backend, **USUAL)
    optimizer.load_state_dict(theirs.state_dict())
    assert optimizer.state[singles[0]]["exp_avg"].dtype == torch.float32
    train(optimizer, singles, range(3, 4))
    train(theirs, params, range(3, 4))
    torch.testing.assert_close(singles, [p.detach().float() for p in params])


# ---- autograd and memory -------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("method", TORCH)
def test_a_model_trains_as_with_torch(method: str, backend: str) -> None:
    """Convolution, normalisation, a tied weight, a frozen one and one that gets no gradient."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3).to(memory_format=torch.channels_last)
            self.norm = nn.BatchNorm2d(4)
            self.inner, self.outer = nn.Linear(64, 64, bias=False), nn.Linear(64, 64)
            self.outer.weight = self.inner.weight
            self.head = nn.Linear(64, 10)
            self.head.bias.requires_grad_(False)
            self.unused = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.conv(x)).relu().flatten(1)
            return self.head(self.outer(self.inner(x).relu()))

    torch.manual_seed(0)
    model = Model().double()
    twin = copy.deepcopy(model)
    runs = []
    options: dict[str, Any] = {"lr": 0.01, "eps": 1e-8, "weight_decay": 0.1}
    theirs = TORCH[method](model.parameters(), **options)
    mine = Variant(method).build(list(twin.parameters()), backend, **options)
    for network, optimizer in ((model, theirs), (twin, mine)):
        losses = []
        for t in range(10):
            x = random(16, 1, 6, 6, seed=t)
            target = (x.flatten(1)[:, :10].argmax(1)).long()
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(network(x), target)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        runs.append(losses)
    assert runs[0][-1] < runs[0][0]
    # Steps of u = m/sqrt(v) amplify the last digits of small gradients; 1e-12 becomes 1e-9.
    assert runs[1] == pytest.approx(runs[0], rel=1e-8)


@every_backend
@every_method
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "sliced"])
def test_autograd_notices_the_update(variant: Variant, backend: str, dense: bool) -> None:
    whole = torch.ones(3, 2)
    w = (torch.ones(3) if dense else whole[:, 0]).requires_grad_()
    idle = (torch.ones(3) if dense else whole[:, 1]).requires_grad_()
    optimizer = variant.build([w, idle], backend)
    for _ in range(2):  # the first step plans, the second follows the plan
        product, other = (w * w).sum(), (idle * idle).sum()
        w.grad = torch.ones(3)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()
        version = idle._version
        if dense:  # slices share one version counter
            other.backward()
            assert idle._version == version
            idle.grad = None


@every_backend
@every_method
def test_weights_stay_leaves_that_require_gradients(variant: Variant, backend: str) -> None:
    params = weights()
    optimizer = variant.build(params, backend)
    train(optimizer, params, range(2))
    assert all(p.requires_grad and p.is_leaf for p in params)
    assert not any(x.requires_grad for state in optimizer.state.values() for x in state.values())


@every_backend
@every_method
def test_gradients_are_released(variant: Variant, backend: str) -> None:
    """Neither the step nor a plan holds on to them, whatever their strides."""
    params = [torch.ones(4, 3), torch.ones(4, 3), torch.ones(4, 6)[:, ::2]]
    optimizer = variant.build(params, backend)
    for _ in range(3):
        grads = [torch.ones(4, 3), torch.ones(3, 4).t(), torch.ones(4, 3)]
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        alive = [weakref.ref(g) for g in grads]
        del grads, g
        optimizer.step()
        optimizer.zero_grad()
        p.grad = None
        assert [ref() for ref in alive] == [None] * 3


@every_backend
@pytest.mark.parametrize("set_to_none", [False, True])
def test_zero_grad(set_to_none: bool, backend: str) -> None:
    """A gradient that is None skips the step; one of zeros takes it."""
    w = torch.ones(2, dtype=torch.float64, requires_grad=True)
    optimizer = wd.AdamW([w], betas=(0.0, 0.0), backend=backend, lr=0.1, weight_decay=0.2)
    w.sum().backward()
    optimizer.step()
    before = w.detach().clone()
    optimizer.zero_grad(set_to_none=set_to_none)
    optimizer.step()
    assert_close(w.detach(), before if set_to_none else before * 0.98)
    assert optimizer.state[w]["step"] == (1 if set_to_none else 2)


@every_backend
@every_method
def test_steps_leave_nothing_behind(variant: Variant, backend: str) -> None:
    params = [torch.ones(5), torch.ones(2, 6)[:, ::2]]
    optimizer = variant.build(params, backend)

    def run() -> tuple[int, list[int]]:
        train(optimizer, params, range(20))
        optimizer.zero_grad()
        gc.collect()
        kept = [*params, *(x for state in optimizer.state.values() for x in state.values())]
        return len(gc.get_objects()), [sys.getrefcount(x) for x in kept]

    run()
    first, second = run(), run()
    assert second[1] == first[1]
    assert abs(second[0] - first[0]) < 10


@every_backend
@every_method
def test_a_forgotten_optimizer_is_freed(variant: Variant, backend: str) -> None:
    w = torch.ones(3)
    optimizer = variant.build([w], backend)
    train(optimizer, [w], range(2))
    alive = [weakref.ref(optimizer), weakref.ref(w), weakref.ref(optimizer.state[w]["exp_avg"])]
    del optimizer, w
    gc.collect()
    assert [ref() for ref in alive] == [None] * 3


def test_an_optimizer_that_its_parameter_reaches_is_freed() -> None:
    p = torch.ones(3, requires_grad=True)
    p.grad = torch.ones(3)
    p.optimizer = wd.AdamW([p])
    p.optimizer.step()
    freed = weakref.ref(p.optimizer)
    del p
    gc.collect()
    assert freed() is None


def test_tensors_without_memory_take_the_eager_formulas() -> None:
    p = Wrapper(torch.ones(3)).requires_grad_()
    p.grad = Wrapper(torch.ones(3))
    wd.AdamW([p], lr=0.1, weight_decay=0.0).step()
    torch.testing.assert_close(p.inner, torch.full((3,), 0.9))
    with pytest.raises(ValueError, match="a Wrapper has no memory of its own"):
        wd.AdamW([p], backend="native").step()
