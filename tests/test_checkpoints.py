"""Checkpoints: through torch.save and torch.distributed.checkpoint, of earlier releases, of others,
and of runs that were killed. In one process; tests/test_checkpoints_of_shards.py has several."""

from __future__ import annotations

import copy
import gzip
import io
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from data import make_checkpoints as recorded
from support import BACKENDS, assert_same_bits, every_backend, saved, snapshot
from support.checkpoints import RUNS, Net, Run, set_gradients, train
from torch import Tensor, nn

import wdkernels as wd

needs_distributed = pytest.mark.skipif(not dist.is_available(), reason="no torch.distributed")
every_run = pytest.mark.parametrize("run", RUNS.values(), ids=list(RUNS))
HERE = Path(__file__).parent


# ---- earlier releases ----------------------------------------------------------------------------


def _recorded() -> dict[str, dict[str, Any]]:
    found = {}
    for path in sorted((HERE / "data").glob("checkpoints_*.pt.gz")):
        file = io.BytesIO(gzip.decompress(path.read_bytes()))
        release = path.name.removeprefix("checkpoints_").removesuffix(".pt.gz")
        for name, each in torch.load(file, weights_only=True).items():
            found[f"{release}: {name}"] = each
    return found


RECORDED = _recorded()


@every_backend
@pytest.mark.parametrize("one", RECORDED.values(), ids=list(RECORDED))
def test_a_checkpoint_of_an_earlier_release(one: dict[str, Any], backend: str) -> None:
    """It goes on as it did there: to the bit by the same backend."""
    params = [p.clone() for p in one["weights"]]
    optimizer = recorded.build(one["kind"], params, one["options"], backend)
    optimizer.load_state_dict(one["saved"])
    before = one["options"].get("before", recorded.BEFORE)
    for t in range(before, before + recorded.AFTER):
        recorded.set_gradients(params, t)
        optimizer.step()
    if backend in one["ends"]:
        assert_same_bits(dict(enumerate(params)), dict(enumerate(one["ends"][backend])))
    else:
        torch.testing.assert_close(params, one["ends"]["eager"], rtol=1e-6, atol=1e-6)


# ---- every way to save and to load ---------------------------------------------------------------


def _through_a_file(net: nn.Module, optimizer: Any) -> Any:
    found = saved({"model": net.state_dict(), "optimizer": optimizer.state_dict()})

    def load(other: nn.Module, into: Any) -> None:
        other.load_state_dict(found["model"])
        into.load_state_dict(found["optimizer"])

    return load


def _through_dcp(disk: Path | None = None, **options: bool) -> Any:
    def way(net: nn.Module, optimizer: Any) -> Any:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint import state_dict as sd

        chosen = sd.StateDictOptions(**options)
        found = copy.deepcopy(sd.get_state_dict(net, optimizer, options=chosen))
        if disk is not None:
            dcp.save(dict(zip("mo", found, strict=True)), checkpoint_id=disk, no_dist=True)

        def load(other: nn.Module, into: Any) -> None:
            parts = found
            if disk is not None:
                target = dict(
                    zip("mo", sd.get_state_dict(other, into, options=chosen), strict=True)
                )
                dcp.load(target, checkpoint_id=disk, no_dist=True)
                parts = target["m"], target["o"]
            sd.set_state_dict(
                *(other, into),
                model_state_dict=parts[0],
                optim_state_dict=parts[1],
                options=chosen,
            )

        return load

    return way


WAYS: dict[str, dict[str, bool] | None] = {
    "torch.save": None,
    "dcp": {},
    "full": {"full_state_dict": True, "cpu_offload": True},
    "offloaded": {"cpu_offload": True},
    "flat": {"flatten_optimizer_state_dict": True},
}


@needs_distributed
@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("way", WAYS)
@every_run
def test_a_run_goes_on(run: Run, way: str, on_disk: bool, tmp_path: Path) -> None:
    """To the bit, after it was loaded into a model and an optimizer that began otherwise."""
    options = WAYS[way]
    if on_disk and options is None:
        pytest.skip("it is in any case")
    net = Net(run.dtype)
    optimizer = run.build(net)
    train(net, optimizer, range(3))
    optimizer.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there are no other processes
        through = _through_dcp(tmp_path if on_disk else None, **(options or {}))
        load = (_through_a_file if options is None else through)(net, optimizer)
        train(net, optimizer, range(3, 6))
        other = Net(run.dtype, seed=7)
        resumed = run.build(other)
        load(other, resumed)
    train(other, resumed, range(3, 6))
    params = list(net.parameters()), list(other.parameters())
    assert_same_bits(snapshot(resumed, params[1]), snapshot(optimizer, params[0]))


@needs_distributed
@every_run
def test_looking_changes_nothing(run: Run) -> None:
    """dcp's template of an optimizer that has not stepped; then weights are loaded."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    ends = []
    for looks in (False, True):
        net = Net(run.dtype)
        optimizer = run.build(net)
        if looks:
            get_optimizer_state_dict(net, optimizer)
        net.load_state_dict(Net(run.dtype, seed=3).state_dict())
        train(net, optimizer, range(3))
        ends.append(snapshot(optimizer, list(net.parameters())))
    assert_same_bits(*ends)


# ---- what torch.optim saved, flat and by name ----------------------------------------------------


def flat_state_dict(net: nn.Module, optimizer: Any) -> dict[str, Any]:
    names = {p: name for name, p in net.named_parameters()}
    found = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            for key, x in group.items():
                if key != "params":
                    found[f"param_groups.{names[p]}.{key}"] = x
            for key, x in optimizer.state.get(p, {}).items():
                found[f"state.{names[p]}.{key}"] = x
    return found


def load_flat(net: nn.Module, optimizer: Any, flat: dict[str, Any]) -> None:
    """As torchtitan does: every key of a live group is looked up, and must be there."""
    names = {p: name for name, p in net.named_parameters()}
    state: dict[str, Any] = {}
    groups = []
    for group in optimizer.param_groups:
        own = [names[p] for p in group["params"]]
        looked_up = {key: flat[f"param_groups.{own[0]}.{key}"] for key in group if key != "params"}
        groups.append({**looked_up, "params": own})
        for name in own:
            prefix = f"state.{name}."
            state[name] = {k.removeprefix(prefix): x for k, x in flat.items() if prefix in k}
    optimizer.load_state_dict({"state": state, "param_groups": groups})


@needs_distributed
@pytest.mark.parametrize("loader", ["by hand", "set_optimizer_state_dict", "dcp.load"])
@pytest.mark.parametrize("name", ["Adam", "AdamW", "AdamSWD", "AdamSPD"])
def test_a_flat_state_dict_of_torch(name: str, loader: str, tmp_path: Path) -> None:
    """Ours finds in it whatever it asks for; SWD's sum and SPD's anchor are no part of it."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as sd

    if loader == "dcp.load" and name in ("AdamSWD", "AdamSPD"):
        pytest.skip("they hold more")
    options = sd.StateDictOptions(flatten_optimizer_state_dict=True)
    net = Net()
    make = torch.optim.Adam if name == "Adam" else torch.optim.AdamW
    theirs = make(net.parameters(), lr=0.1, weight_decay=0.2, eps=1e-2)
    train(net, theirs, range(3))
    theirs.zero_grad()
    other = Net()
    other.load_state_dict(net.state_dict())
    optimizer = getattr(wd, name)(other.parameters(), lr=0.7)
    if loader == "by hand":
        load_flat(other, optimizer, flat_state_dict(net, theirs))
    else:
        flat = copy.deepcopy(sd.get_optimizer_state_dict(net, theirs, options=options))
        if loader == "dcp.load":
            if "param_groups.a.weight.decoupled_weight_decay" not in flat:
                pytest.skip("this torch does not say which decay it is")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                dcp.save(flat, checkpoint_id=tmp_path, no_dist=True)
                flat = sd.get_optimizer_state_dict(other, optimizer, options=options)
                dcp.load(flat, checkpoint_id=tmp_path, no_dist=True)
        sd.set_optimizer_state_dict(other, optimizer, flat, options=options)
    for p, q in zip(other.parameters(), net.parameters(), strict=True):
        assert torch.equal(optimizer.state[p]["exp_avg_sq"], theirs.state[q]["exp_avg_sq"])
        assert optimizer.state[p]["step"] == 3
    if name in ("Adam", "AdamW"):
        train(net, theirs, range(3, 5))
        train(other, optimizer, range(3, 5))
        torch.testing.assert_close([*other.parameters()], [*net.parameters()])


@every_run
def test_a_flat_state_dict_of_ours(run: Run) -> None:
    net = Net(run.dtype)
    optimizer = run.build(net)
    train(net, optimizer, range(3))
    other = Net(run.dtype)
    other.load_state_dict(net.state_dict())
    resumed = run.build(other)
    load_flat(other, resumed, copy.deepcopy(flat_state_dict(net, optimizer)))
    for each in ((net, optimizer), (other, resumed)):
        train(*each, range(3, 5))
    ends = (snapshot(o, list(n.parameters())) for n, o in ((other, resumed), (net, optimizer)))
    assert_same_bits(*ends)


# ---- groups that come later ----------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("how", ["load_state_dict", "deepcopy"])
@pytest.mark.parametrize("options", [{"master_weights": True}, {"rounding": "kahan"}], ids=str)
def test_a_group_added_after_a_load(options: dict[str, Any], how: str, backend: str) -> None:
    """torch puts `differentiable` into the defaults then; the checkpoint is ours all the same."""

    def build(*groups: list[Tensor]) -> Any:
        kept = {"ema_decay": 0.5, "backend": backend, **options}
        return wd.AdamSWD([{"params": each} for each in groups], lr=0.1, weight_decay=0.2, **kept)

    first, second = (recorded.numbers((5,), i, torch.bfloat16) for i in range(2))
    optimizer = build([first])
    if how == "deepcopy":
        optimizer = copy.deepcopy(optimizer)
        first = optimizer.param_groups[0]["params"][0]
    else:
        optimizer.load_state_dict(optimizer.state_dict())
    optimizer.add_param_group({"params": [second]})
    ends = []
    for t in range(3):
        recorded.set_gradients([first, second], t + 1)
        optimizer.step()
    again = first.clone(), second.clone()
    resumed = build([again[0]], [again[1]])
    resumed.load_state_dict(saved(optimizer.state_dict()))
    assert_same_bits(snapshot(resumed, again), snapshot(optimizer, [first, second]))
    for params, each in (([first, second], optimizer), (again, resumed)):
        recorded.set_gradients(list(params), 4)
        each.step()
        ends.append(snapshot(each, params))
    assert_same_bits(*ends)


# ---- entries of others ---------------------------------------------------------------------------

KINDS = ["Adam", "AdamW", "AdamSWD", "AdamSPD"]
FOREIGN: dict[str, Any] = {
    "slow": torch.full((2, 2), 7.0, dtype=torch.float64),
    "count": torch.tensor(5),
    "nested": {"list": [torch.ones(3), 2, "x"], "none": None},
    "ema": torch.full((3,), 3.0),
    "anchor": "mine",
    "max_exp_avg_sq": 5,
}


@every_backend
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_entries_of_others_are_carried_along(kind: str, early: bool, backend: str) -> None:
    """Whatever a step does not need, also by names that are ours, and beside frozen weights."""
    params = [nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    params[1].requires_grad_(False)
    more = {"anchor": "zero"} if kind == "AdamSPD" else {}
    build = getattr(wd, kind)
    optimizer, plain = (build(each, backend=backend, **more) for each in (params, params[:1]))
    optimizer.state["wrapper"] = True
    for step in range(3):
        if step == (0 if early else 1):
            for p in params:
                optimizer.state[p].update(copy.deepcopy(FOREIGN))
        params[0].grad = torch.ones(2, 2)
        optimizer.step()
    other = build(params, backend=backend, **more)
    other.load_state_dict(saved(optimizer.state_dict()))
    other.step()
    other = copy.deepcopy(other)
    for each in (optimizer, other):
        assert each.state["wrapper"] is True
        for p in each.param_groups[0]["params"]:
            state = each.state[p]
            assert str({key: state[key] for key in FOREIGN}) == str(FOREIGN)
            assert state["slow"].dtype == torch.float64
            assert ("exp_avg" in state) is p.requires_grad
    assert optimizer.state_dict()["state"].keys() == {0, 1, "wrapper"}
    del plain


def test_what_is_carried_is_copied() -> None:
    w = torch.ones(3)
    optimizer = wd.AdamW([w])
    w.grad = torch.ones(3)
    optimizer.step()
    optimizer.state[w]["slow"] = torch.ones(3)
    checkpoint = optimizer.state_dict()
    other = wd.AdamW([w])
    other.load_state_dict(checkpoint)
    other.state[w]["slow"].zero_()
    assert checkpoint["state"][0]["slow"].sum() == 3


def test_only_another_state_before_the_first_step_is_none() -> None:
    """dcp's first step with lr 0 still changes nothing, and averages begin with the weights."""
    w = torch.ones(3)
    optimizer = wd.AdamW([w], lr=0.0, ema_decay=0.5)
    optimizer.state["x"] = True
    optimizer.state[w]["slow"] = torch.ones(3)
    w.grad = torch.zeros(3)
    optimizer.step()
    assert optimizer.state[w]["step"] == 0
    assert torch.equal(optimizer.state[w]["slow"], torch.ones(3))


@pytest.mark.parametrize("replaces", [False, True])
@pytest.mark.parametrize("copies", [False, True])
def test_what_a_hook_writes_after_a_load_stays(copies: bool, replaces: bool) -> None:
    """An average that is not in the checkpoint begins with the weights, unless a hook says."""
    w = torch.ones(3)
    theirs = torch.optim.AdamW([w], lr=0.1)
    w.grad = torch.ones(3)
    theirs.step()
    optimizer = wd.AdamW([w], ema_decay=1.0)

    def hook(loaded: Any) -> None:
        ema = torch.full((3,), 9.0)
        if replaces:
            loaded.state[w]["ema"] = ema
        else:
            loaded.state[w]["ema"].copy_(ema)
        loaded.state[w]["exp_avg"].fill_(4.0)

    optimizer.register_load_state_dict_post_hook(hook)
    optimizer.load_state_dict(theirs.state_dict())
    if copies:
        optimizer = copy.deepcopy(optimizer)
        w = optimizer.param_groups[0]["params"][0]
        w.grad = torch.ones(3)
    optimizer.state_dict()
    assert torch.equal(optimizer.state[w]["exp_avg"], torch.full((3,), 4.0))
    optimizer.step()
    assert torch.equal(optimizer.state[w]["ema"], torch.full((3,), 9.0))


def test_a_copied_optimizer_follows_its_own_weights() -> None:
    w = torch.ones(3)
    optimizer = wd.AdamW([w], lr=0.0, ema_decay=1.0)
    w.grad = torch.zeros(3)
    optimizer.step()  # it is only looked at
    other = copy.deepcopy(optimizer)
    q = other.param_groups[0]["params"][0]
    q.fill_(5.0)
    q.grad = torch.ones(3)
    other.step()
    assert torch.equal(other.state[q]["ema"], torch.full((3,), 5.0))


def test_moments_of_another_name_are_still_no_state() -> None:
    w = torch.ones(3)
    optimizer = wd.AdamW([w])
    checkpoint = optimizer.state_dict()
    checkpoint["state"][0] = {"step": torch.tensor(1.0), "exp_avg": torch.ones(3), "sum": 1}
    with pytest.raises(ValueError, match=r"lacks exp_avg_sq .*another kind of optimizer"):
        optimizer.load_state_dict(checkpoint)


# ---- runs that are killed ------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_killed_run_goes_on(backend: str, tmp_path: Path) -> None:
    """Killed in the middle of training, then in the middle of saving, then left to itself."""
    path = tmp_path / "run.pt"
    for kill_at in ("step 7", "saving 12", None):
        command = [sys.executable, "-m", "support.killed", str(path), backend]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, sys.path)])}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.strip() == kill_at:
                    process.kill()
                    break
            code = process.wait(60)
        assert code == (0 if kill_at is None else -signal.SIGKILL)
    run = RUNS["AdamSWD, averaged"]
    net = Net(run.dtype)
    optimizer = run.build(net, backend=backend)
    train(net, optimizer, range(16))
    end = torch.load(path, weights_only=True)
    assert_same_bits(end["model"], net.state_dict())
    assert end["step"] == 16


def test_gradients_are_what_the_runs_expect() -> None:
    """They must move every weight: else a lost state is not seen."""
    net = Net()
    set_gradients(net, 0)
    assert all(p.grad is not None and (p.grad != 0).any() for p in net.parameters())
