"""What a plan that is kept in Python watches: plain tensors, and the local shards of DTensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from wdkernels import layouts
from wdkernels.plan import Parameter, Watch


class Watched:
    """Parameters with a moment each, as an optimizer keeps them."""

    def __init__(self, params: list[Tensor]) -> None:
        self.state = {p: {"exp_avg": torch.zeros_like(p)} for p in params}
        self.groups = [{"params": params}]
        self.watch = Watch(
            [
                Parameter(
                    *(p, own, {"exp_avg": layouts.local(own["exp_avg"])}, "direct", 0, f"p{i}", i),
                    total=p.numel(),
                )
                for i, (p, own) in enumerate(self.state.items())
            ],
            *self.arguments,
        )

    @property
    def arguments(self) -> tuple[Any, Any]:
        return self.state, self.groups

    def active(self) -> list[int] | None:
        return self.watch.active(*self.arguments)


def with_gradients(*params: Tensor) -> list[Tensor]:
    for p in params:
        p.grad = torch.ones_like(p)
    return [*params]


def test_parameters_without_a_gradient_take_no_part() -> None:
    params = with_gradients(torch.ones(3), torch.ones(2), torch.ones(2, 3))
    params[1].grad = None
    watched = Watched(params)
    assert watched.active() == [0, 2]
    found = watched.watch.gradients()
    assert all(g is p.grad for g, p in zip(found, (params[0], params[2]), strict=True))


def test_a_gradient_in_another_order_is_copied() -> None:
    (p,) = with_gradients(torch.ones(2, 3))
    watched = Watched([p])
    p.grad = torch.arange(6.0).view(3, 2).T
    assert watched.active() == [0]
    (found,) = watched.watch.gradients()
    assert found.is_contiguous()
    assert found.equal(p.grad)


def replace_a_moment(p: Tensor, watched: Watched) -> None:
    watched.state[p]["exp_avg"] = torch.zeros_like(p)


def move_a_weight(p: Tensor, watched: Watched) -> None:
    p.data = p.data.clone()


def add_a_parameter(p: Tensor, watched: Watched) -> None:
    watched.groups[0]["params"].append(torch.ones(1))


def add_a_state(p: Tensor, watched: Watched) -> None:
    watched.state[torch.ones(1)] = {}


@pytest.mark.parametrize("change", [replace_a_moment, move_a_weight, add_a_parameter, add_a_state])
def test_what_makes_a_plan_out_of_date(change: Any) -> None:
    params = with_gradients(torch.ones(2, 3), torch.ones(3))
    watched = Watched(params)
    assert watched.active() == [0, 1]
    change(params[0], watched)
    assert watched.active() is None


def test_a_parameter_without_a_state_needs_another_plan() -> None:
    params = with_gradients(torch.ones(3), torch.ones(3))
    params[1].grad = None
    state = {params[0]: {"exp_avg": torch.zeros(3)}}
    parameters = [
        Parameter(params[0], state[params[0]], state[params[0]], "direct", 0, "a", 0, 3),
        Parameter(params[1], None, {}, "direct", 0, "b", 1, 3),
    ]
    groups = [{"params": params}]
    watch = Watch(parameters, state, groups)
    assert watch.active(state, groups) == [0]
    params[1].grad = torch.ones(3)
    assert watch.active(state, groups) is None


# ---- shards --------------------------------------------------------------------------------------


@pytest.fixture
def mesh() -> Iterator[Any]:
    """A mesh of this process alone."""
    if not dist.is_available():
        pytest.skip("torch was built without torch.distributed")
    from torch.distributed.tensor import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def sharded(mesh: Any) -> list[Any]:
    """A DTensor beside a plain tensor."""
    from torch.distributed.tensor import Shard, distribute_tensor

    return with_gradients(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]), torch.ones(2))


def test_local_shards_are_what_a_backend_sees(mesh: Any) -> None:
    params = sharded(mesh)
    watched = Watched(params)
    assert watched.watch.weights[0] is params[0]._local_tensor
    assert watched.active() == [0, 1]
    found = watched.watch.gradients()
    assert found[0] is params[0].grad._local_tensor
    assert found[1] is params[1].grad


def test_a_local_shard_that_moves_makes_a_plan_out_of_date(mesh: Any) -> None:
    params = sharded(mesh)
    watched = Watched(params)
    assert watched.active() == [0, 1]
    moment = watched.state[params[0]]["exp_avg"]
    moment._local_tensor = moment._local_tensor.clone()
    assert watched.active() is None


def test_a_gradient_that_is_sharded_in_another_way_is_redistributed(mesh: Any) -> None:
    from torch.distributed.tensor import Replicate

    params = sharded(mesh)
    watched = Watched(params)
    expected = params[0].grad.to_local()
    params[0].grad = params[0].grad.redistribute(mesh, [Replicate()])
    assert watched.active() == [0, 1]
    with pytest.warns(UserWarning, match="gradient of p0 is placed as .*redistributed"):
        assert torch.equal(watched.watch.gradients()[0], expected)
