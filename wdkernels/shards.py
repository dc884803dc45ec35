"""Parameters of which each process holds a shard: FSDP2's and tensor parallelism's DTensors.

A step works on the shards that lie in this process. What belongs to whole tensors or to the whole
model (norms, SWD's V, SPD's projections, telemetry) is added up over the processes: all tensors'
sums in one vector, by one all-reduce for each process group that shards some of them. Placements
that replicate are counted once. A step that needs no such number communicates nothing.

    before the update   g^2, and amsgrad's maxima, where the norm or SWD's V is asked for
    after it            the sums of SPD and of telemetry

Where a process cannot begin a step for which others wait, it tells them, and all raise.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from wdkernels import layouts
from wdkernels.layouts import Numbering
from wdkernels.sums import SUMS

if TYPE_CHECKING:
    from wdkernels.plan import Phases

_GRADIENT2, _MAXIMUM = map(SUMS.index, ("gradient2", "maximum"))
_AFTER = range(_MAXIMUM + 1, len(SUMS))  # what the update leaves


def is_shard(p: Tensor) -> bool:
    return not layouts.has_memory(p) and hasattr(p, "_local_tensor")


def numbering_of(p: Tensor) -> Numbering:
    """Which of the whole tensor's elements those in this process are, as they lie in memory."""
    if not is_shard(p) or p.numel() == 0:
        return Numbering()
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    here: Any = p
    local = layouts.local(p)
    sizes, offset = compute_local_shape_and_global_offset(
        here.shape, here.device_mesh, here.placements
    )
    outer = sorted(range(p.dim()), key=local.stride, reverse=True)  # dimensions, outermost first
    first, stride = 0, 1
    for d in reversed(outer):
        first += offset[d] * stride
        stride *= p.shape[d]
    run = 1
    while outer and sizes[outer[-1]] == p.shape[outer[-1]]:
        run *= sizes[outer.pop()]
    if len(outer) <= 1:  # at most the outermost dimension is cut
        return Numbering(first)
    cut = outer.pop()
    if any(sizes[d] != p.shape[d] for d in outer[1:]):
        raise ValueError(
            f"a tensor of shape {tuple(p.shape)} is sharded along more than one dimension beside "
            f"its outermost one ({here.placements}): shard it along fewer"
        )
    return Numbering(first, run * sizes[cut], run * p.shape[cut])


def sharded_like(p: Tensor, x: Tensor) -> Tensor:
    """x in the placements of p: every process has the whole x, or another shard of it."""
    if not is_shard(p) or x.dim() == 0:
        return x
    from torch.distributed.tensor import DTensor, distribute_tensor

    here: Any = p
    if isinstance(x, DTensor):
        alike = x.placements == here.placements and x.device_mesh == here.device_mesh
        return x if alike else x.redistribute(here.device_mesh, here.placements)
    return distribute_tensor(x, here.device_mesh, here.placements, src_data_rank=None)


def alike(x: Tensor, p: Tensor) -> bool:
    """Whether two DTensors, or two plain tensors, are in equal placements on equal meshes."""
    there, here = getattr(x, "_spec", None), getattr(p, "_spec", None)
    if there is here:
        return True
    if there is None or here is None:
        return False
    return bool(there.placements == here.placements and there.mesh == here.mesh)


def gradient_of(p: Tensor, name: str) -> Tensor:
    """What lies in this process of p's gradient, in the placements of p."""
    gradient: Any = p.grad
    if not alike(gradient, p):
        here: Any = p
        if not (is_shard(p) and is_shard(gradient)) or gradient.device_mesh != here.device_mesh:
            raise RuntimeError(
                f"the gradient of {name} is not sharded over the same processes as the parameter: "
                "make it a DTensor of the parameter's mesh"
            )
        warnings.warn(
            f"the gradient of {name} is placed as {gradient.placements} but the parameter as "
            f"{here.placements}: it is redistributed in every step",
            stacklevel=2,
        )
        gradient = sharded_like(p, gradient)
    return layouts.local(gradient)


def reducer_of(parameters: Sequence[tuple[str, Tensor]]) -> Reducer | None:
    """What adds up the sums of all parameters, by name; None where nothing is sharded."""
    if not any(is_shard(p) for _, p in parameters):
        return None
    reducer = Reducer(parameters)
    return reducer if reducer else None


class Reducer:
    """Adds up the sums of all processes that hold shards of an optimizer's parameters."""

    def __init__(self, parameters: Sequence[tuple[str, Tensor]]) -> None:
        """All parameters with their names, in the same order in every process."""
        self._names = [name for name, _ in parameters]
        self._parameters = [p for _, p in parameters]
        self._copies = [1] * len(parameters)  # processes whose rows are added up
        members: dict[Any, list[int]] = {}
        for row, (name, p) in enumerate(parameters):
            shard: Any = p
            for dim, placement in enumerate(shard.placements if is_shard(p) else ()):
                if placement.is_partial():
                    raise ValueError(
                        f"{name} is placed as {shard.placements}: a partial parameter has no value "
                        "to update; redistribute it"
                    )
                size = shard.device_mesh.size(dim)
                if not placement.is_replicate() and size > 1:
                    members.setdefault(shard.device_mesh.get_group(dim), []).append(row)
                    self._copies[row] *= size
        self._members = {group: torch.tensor(rows) for group, rows in members.items()}

    def __bool__(self) -> bool:
        """Whether anything is sharded."""
        return bool(self._members)

    def step(self, begin: Callable[[], Phases], before: bool, after: bool) -> None:
        """A step in phases.

        `before`, `after`: whether it needs sums before the update, and sums that the update takes.
        """
        try:
            phases = begin()
        except Exception as error:
            self._fail(error, before, after)
            raise
        active = [row for row, p in enumerate(self._parameters) if p.grad is not None]
        for each in range(max(1, phases.reductions)):
            if each < phases.reductions:
                phases.reduce(each)
            if before:
                self._add_up(phases.sums, active, [_MAXIMUM] if each else [_GRADIENT2, _MAXIMUM])
            if not phases.decide(each):
                return
        phases.update()
        if after:
            self._add_up(phases.sums, active, [*_AFTER] if before else [*_AFTER, _GRADIENT2])
        phases.finish()

    def _fail(self, error: Exception, before: bool, after: bool) -> None:
        """Tells the other processes, which wait for this one's sums, that it cannot go on."""
        if not (before or after):
            return  # nobody waits
        mesh = next(p for p in self._parameters if is_shard(p)).device.type
        table = self._table(2 if before else len(_AFTER) + 1, torch.device(mesh))
        table[-1, 0] = 1
        self._all_reduce(table)
        if table.is_cpu:
            self._messages(str(error))

    def add_up_numbers(self, numbers: Mapping[Tensor, Tensor]) -> None:
        """In place, numbers that each process has for its shard of a parameter, by parameter."""
        for group, rows in self._members.items():
            found = [numbers[p] for p in map(self._parameters.__getitem__, rows) if p in numbers]
            if found:
                total = torch.stack(found)
                torch.distributed.all_reduce(total, group=group)
                for number, whole in zip(found, total, strict=True):
                    number.copy_(whole)

    def agree(self, yes: bool) -> bool:
        """Whether all processes say yes."""
        no = torch.tensor([0 if yes else 1])
        for group in self._members:
            torch.distributed.all_reduce(no, group=group)
        return not no.item()

    def _add_up(self, sums: Tensor, active: list[int], columns: list[int]) -> None:
        """In place, the rows of the active parameters. Raises where another process cannot take the
        step, or where some have a gradient and others have none."""
        table = self._table(len(columns), sums.device)
        rows: Any = slice(0, len(active))
        if len(active) < len(self._parameters):
            rows = torch.tensor(active, dtype=torch.int64).to(sums.device, non_blocking=True)
        table[rows, :-1] = sums[:, columns]
        table[rows, -1] = 1
        self._all_reduce(table)
        sums[:, columns] = table[rows, :-1]
        if table.is_cpu:  # a GPU's numbers are not waited for
            self._check(table)

    def _table(self, columns: int, device: torch.device) -> Tensor:
        """A row for each parameter, whose last number counts gradients, and one for failures."""
        size = len(self._parameters) + 1, columns + 1
        return torch.zeros(size, dtype=torch.float64, device=device)

    def _all_reduce(self, table: Tensor) -> None:
        for group, rows in self._members.items():
            if len(rows) == len(self._parameters):
                torch.distributed.all_reduce(table, group=group)
                continue
            own = torch.cat([rows, torch.tensor([len(table) - 1])]).to(table.device)
            part = table[own]
            torch.distributed.all_reduce(part, group=group)
            table[own] = part

    def _check(self, table: Tensor) -> None:
        if table[-1, 0].item():
            message = self._messages(None)
            raise RuntimeError(f"another process could not take this step: {message}")
        gradients = table[:-1, -1].tolist()
        for name, has, copies in zip(self._names, gradients, self._copies, strict=True):
            if has not in (0, copies):
                raise RuntimeError(
                    f"{name} has a gradient in {has:g} of the {copies} processes that hold shards "
                    "of it: all must have one, or none"
                )

    def _messages(self, own: str | None) -> str | None:
        """What some process says that has failed; every one calls this, or none does."""
        for group in self._members:
            found: list[Any] = [None] * torch.distributed.get_world_size(group)
            torch.distributed.all_gather_object(found, own, group=group)
            own = next((each for each in found if each is not None), None)
        return own
