"""Checkpoints of sharded runs: they go on with another number of processes, and after a kill; and
what FSDP2 keeps gathered while averages stand in the place of weights."""

from __future__ import annotations

import copy
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import Variant, assert_same_bits, random
from support.checkpoints import RUNS, Net, Run, train, whole
from support.processes import run_processes
from torch import Tensor, nn

import wdkernels as wd

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="no torch.distributed")
HERE = Path(__file__).parent


def sharded(net: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    fully_shard(next(net.children()))
    return fully_shard(net)  # the other layers are its own, which it keeps gathered


def shard(p: Any, g: Tensor) -> Tensor:
    """A gradient that every process has, in the placements of its parameter."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(g, p.device_mesh, p.placements) if hasattr(p, "placements") else g


def begin(run: Run, seed: int = 0, shards: bool = True) -> tuple[Any, Any]:
    net = Net(run.dtype, seed)
    net = sharded(net) if shards else net
    return net, run.build(net)


# ---- two processes, one, four --------------------------------------------------------------------


def save(folder: str, net: nn.Module, optimizer: Any) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    optimizer.zero_grad()
    model, state = get_state_dict(net, optimizer)
    dcp.save({"m": model, "o": state}, checkpoint_id=folder)


def load(folder: str, net: nn.Module, optimizer: Any) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model, state = get_state_dict(net, optimizer)
    target = {"m": model, "o": state}
    dcp.load(target, checkpoint_id=folder)
    set_state_dict(net, optimizer, model_state_dict=target["m"], optim_state_dict=target["o"])


def gathered(net: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    found = {f"weight {i}": whole(p) for i, p in enumerate(net.parameters())}
    for i, p in enumerate(net.parameters()):
        found |= {f"{key} {i}": whole(x) for key, x in optimizer.state[p].items()}
    return found


def compare(found: dict[str, Tensor], expected: dict[str, Tensor], exactly: bool) -> None:
    assert found.keys() == expected.keys()
    for name, x in found.items():
        # Else sums in another order, which 16 bits may round the other way.
        tolerance = {torch.bfloat16: 1e-2, torch.float64: 1e-6}.get(x.dtype, 1e-6)
        tolerance = 0.0 if exactly else tolerance
        torch.testing.assert_close(x, expected[name], rtol=tolerance, atol=tolerance, msg=name)


def unsharded(run: Run, steps: int) -> dict[str, Tensor]:
    net, optimizer = begin(run, shards=False)
    train(net, optimizer, range(steps))
    return gathered(net, optimizer)


def of_two(folder: str) -> None:
    for name, run in RUNS.items():
        net, optimizer = begin(run)
        train(net, optimizer, range(2), shard)
        compare(gathered(net, optimizer), unsharded(run, 2), exactly=not run.sums)
        save(f"{folder}/{name}-2", net, optimizer)
        full_and_offloaded(run, net, optimizer)
    averages_are_evaluated()
    odd_state_dicts()


def of_four(folder: str) -> None:
    for name, run in RUNS.items():
        net, optimizer = begin(run, seed=5)
        load(f"{folder}/{name}-1", net, optimizer)
        train(net, optimizer, range(4, 6), shard)
        compare(gathered(net, optimizer), unsharded(run, 6), exactly=not run.sums)


def test_from_two_processes_to_one_to_four(tmp_path: Path) -> None:
    run_processes(2, tmp_path, of_two, str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there are no other processes
        for name, run in RUNS.items():
            net, optimizer = begin(run, seed=3, shards=False)
            load(f"{tmp_path}/{name}-2", net, optimizer)
            train(net, optimizer, range(2, 4))
            compare(gathered(net, optimizer), unsharded(run, 4), exactly=not run.sums)
            save(f"{tmp_path}/{name}-1", net, optimizer)
    run_processes(4, tmp_path, of_four, str(tmp_path))


def full_and_offloaded(run: Run, net: nn.Module, optimizer: Any) -> None:
    """Every other way that torch has, through which the same run goes on to the bit."""
    from torch.distributed.checkpoint import state_dict as sd

    weights = copy.deepcopy(sd.get_model_state_dict(net))
    ways = [
        {"full_state_dict": True, "cpu_offload": True},
        {"cpu_offload": True},
        {"flatten_optimizer_state_dict": True},
    ]
    saved = [
        copy.deepcopy(sd.get_optimizer_state_dict(net, optimizer, options=sd.StateDictOptions(**x)))
        for x in ways
    ]
    own = copy.deepcopy(optimizer.state_dict())
    train(net, optimizer, range(2, 4), shard)
    expected = gathered(net, optimizer)
    for way, each in [*zip(ways, saved, strict=True), ({}, own)]:
        other, resumed = begin(run, seed=8)
        sd.set_model_state_dict(other, weights)
        if way:
            if way.get("full_state_dict"):  # which process 0 alone has
                way = {"full_state_dict": True, "broadcast_from_rank0": True}
            options = sd.StateDictOptions(**way)
            sd.set_optimizer_state_dict(other, resumed, each, options=options)
        else:
            resumed.load_state_dict(each)
        train(other, resumed, range(2, 4), shard)
        compare(gathered(other, resumed), expected, exactly=True)


# ---- runs that are killed ------------------------------------------------------------------------

STEPS = 8


def killable(folder: str) -> None:
    """Goes on from the last checkpoint that is whole, and saves each second step. Where the file
    `kill` says so it waits to be killed: between two steps, or while one process saves already."""
    net, optimizer = begin(RUNS["AdamSWD, averaged"], seed=4)
    done = [int(path.name) for path in Path(folder).glob("[0-9]*")]
    if done:
        load(f"{folder}/{max(done)}", net, optimizer)
    else:
        begun = Net()  # the run's weights
        for p, q in zip(net.parameters(), begun.parameters(), strict=True):
            p.detach().copy_(shard(p, q.detach()))
    kill = Path(folder, "kill").read_text()
    for t in range(max(done, default=0), STEPS):
        train(net, optimizer, range(t, t + 1), shard)
        if kill == f"after {t + 1}":
            wait(folder)
        if (t + 1) % 2 == 0:
            if kill == f"saving {t + 1}" and dist.get_rank() == 1:
                wait(folder)
            # Under another name first, so that what has a number is whole.
            save(f"{folder}/new", net, optimizer)
            if dist.get_rank() == 0:
                Path(folder, "new").rename(f"{folder}/{t + 1}")
            dist.barrier()
    compare(gathered(net, optimizer), unsharded(RUNS["AdamSWD, averaged"], STEPS), exactly=False)
    torch.save(gathered(net, optimizer), f"{folder}/end-{dist.get_rank()}")


def wait(folder: str) -> None:
    Path(folder, "waits").touch()
    time.sleep(60)


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    ends = []
    for kills in ([], ["after 3", "saving 6"]):
        folder = tmp_path / str(len(kills))
        folder.mkdir()
        for kill in [*kills, "never"]:
            (folder / "kill").write_text(kill)
            (folder / "waits").unlink(missing_ok=True)
            running = run_processes(2, folder, killable, str(folder), join=kill == "never")
            while kill != "never" and not (folder / "waits").exists():
                assert all(each.is_alive() for each in running.processes)
                time.sleep(0.05)
            for each in running.processes if kill != "never" else []:
                each.kill()
                each.join()
        ends.append(torch.load(folder / "end-1", weights_only=True))
    assert_same_bits(*ends)


# ---- averages under FSDP2 ------------------------------------------------------------------------


def averages_are_evaluated() -> None:
    """An evaluation changes no later loss, and computes with the averages."""

    def losses(shards: bool, evaluates: bool) -> tuple[list[float], list[float]]:
        net = Net()
        net = sharded(net) if shards else net
        optimizer = wd.AdamW(net.parameters(), lr=0.1, ema_decay=0.5, weight_decay=0.2)
        trained, evaluated = [], []
        for t in range(4):
            loss = net(random(6, 4, seed=t, dtype=torch.float32)).square().mean()
            loss.backward()
            trained.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
            if evaluates:
                with torch.no_grad():
                    x = random(6, 4, seed=9, dtype=torch.float32)
                    evaluated.append(net(x).square().mean().item())
                    with optimizer.ema_weights():
                        evaluated.append(net(x).square().mean().item())
                    evaluated.append(net(x).square().mean().item())
        return trained, evaluated

    plain = losses(False, True)
    assert len({round(x, 4) for x in plain[1]}) > 4, "averages are not told from weights"
    assert losses(True, False)[0] == losses(True, True)[0]
    for found, expected in zip(losses(True, True), plain, strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


# ---- what does not fit ---------------------------------------------------------------------------


def odd_state_dicts() -> None:
    """Right, or refused by every process with the parameter's name."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    rank = dist.get_rank()
    w, m = random(4, 6, seed=1), random(4, 6, seed=2)

    def new(placement: Any) -> tuple[Any, Any]:
        p = distribute_tensor(w, mesh, [placement])
        return p, Variant("swd").build([p], "eager", ema_decay=0.5)

    def stepped(p: Any, optimizer: Any, t: int) -> Any:
        p.grad = distribute_tensor(random(4, 6, seed=10 + t), mesh, p.placements)
        optimizer.step()
        return optimizer

    p, optimizer = new(Shard(0))
    stepped(p, optimizer, 0)
    found = optimizer.state_dict()
    state = {key: whole(x) for key, x in found["state"][0].items()}
    full = {**found, "state": {0: state}}
    column = {
        key: distribute_tensor(x, mesh, [Shard(1)]) if x.dim() else x for key, x in state.items()
    }
    copies = {
        key: distribute_tensor(x, mesh, [Replicate()]) if x.dim() else x for key, x in state.items()
    }
    now = whole(p)
    stepped(p, optimizer, 1)
    for each in (full, {**found, "state": {0: column}}, {**found, "state": {0: copies}}):
        q, other = new(Shard(0))
        q.copy_(distribute_tensor(now, mesh, [Shard(0)]))
        other.load_state_dict(each)
        assert other.state[q]["exp_avg"].placements == (Shard(0),)
        stepped(q, other, 1)
        assert torch.equal(whole(q), whole(p))

    local = {
        key: x.to_local() if hasattr(x, "to_local") else x for key, x in found["state"][0].items()
    }
    torn = {**full, "state": {0: {**state, "exp_avg": m[:1]}}}
    only_here = full if rank else torn
    for each in ({**found, "state": {0: local}}, torn, only_here):
        q, other = new(Shard(0))
        with pytest.raises((ValueError, RuntimeError), match="parameter 0 of group 0"):
            other.load_state_dict(each)
        assert not other.state[q]
    # A shard of another world's: this process's part of a tensor that three would hold.
    from torch.distributed.tensor import DTensor

    uneven = DTensor.from_local(m[: 1 + 2 * rank], mesh, [Shard(0)], shape=(4, 6), stride=(6, 1))
    with pytest.raises((ValueError, RuntimeError), match="exp_avg of parameter 0 of group 0"):
        new(Shard(0))[1].load_state_dict({**full, "state": {0: {**state, "exp_avg": uneven}}})
