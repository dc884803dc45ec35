"""Parameters of which each process holds a shard: FSDP2's and tensor parallelism's DTensors.

A step works on the shards that lie in this process. What belongs to whole tensors or to the whole
model (norms, SWD's V, SPD's projections, telemetry) is added up over the processes: all tensors'
sums in one vector, by one all-reduce for each process group that shards some of them. Placements
that replicate are counted once. A step that needs no such number communicates nothing.

    before the update   g^2, and amsgrad's maxima, where the norm or SWD's V is asked for
    after it            the sums of SPD and of telemetry

Where a process cannot begin a step for which others wait, it tells them, and all raise: before they
write, if they exchange numbers before. Those of another replica (HSDP), with which a step exchanges
nothing, are not told, nor is the host of a GPU, which does not wait for the numbers.

Processes whose tensors do not know that others hold the rest of the model (FSDP1, ZeRO) add up
what `Others` says, over the `process_group` that the user names.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from wdkernels import layouts
from wdkernels.layouts import Numbering
from wdkernels.sums import SUMS

if TYPE_CHECKING:
    from wdkernels.plan import Phases

_GRADIENT2, _MAXIMUM = map(SUMS.index, ("gradient2", "maximum"))
_BEFORE = (_GRADIENT2, _MAXIMUM), (_MAXIMUM,)  # what each round of `reduce` leaves
_AFTER = tuple(range(_MAXIMUM + 1, len(SUMS)))  # what the update leaves


def is_shard(p: Tensor) -> bool:
    return not layouts.has_memory(p) and hasattr(p, "_local_tensor")


def _part_here(x: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes of what this process holds of a DTensor by its placements, and where it begins."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sizes, offset = compute_local_shape_and_global_offset(x.shape, x.device_mesh, x.placements)
    return tuple(sizes), tuple(offset)


def numbering_of(p: Tensor) -> Numbering:
    """Which of the whole tensor's elements those in this process are, as they lie in memory."""
    if not is_shard(p) or p.numel() == 0:
        return Numbering()
    here: Any = p
    local = layouts.local(p)
    sizes, offset = _part_here(here)
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
    if not is_shard(p):
        return x
    from torch.distributed.tensor import DTensor, distribute_tensor

    here: Any = p
    if isinstance(x, DTensor):
        if alike(x, p):
            return x
        if x.device_mesh == here.device_mesh:
            return x.redistribute(here.device_mesh, here.placements)
        x = x.full_tensor()
    return distribute_tensor(x, here.device_mesh, here.placements, src_data_rank=None)


def check_loadable(p: Tensor, saved: Mapping[str, Any], name: str) -> None:
    """Raise a ValueError for entries whose numbers are those of shards of other processes."""
    for key, x in saved.items():
        if not (is_shard(p) and isinstance(x, Tensor) and is_shard(x)):
            continue
        there: Any = x
        here: Any = p
        same = sorted(there.device_mesh.mesh.flatten()) == sorted(here.device_mesh.mesh.flatten())
        if same and layouts.local(x).shape == _part_here(there)[0]:
            continue
        raise ValueError(
            f"{key} of {name} is {there.placements} on {there.device_mesh} and has here "
            f"{tuple(layouts.local(x).shape)} of {tuple(x.shape)}, which is not what processes "
            f"of {here.device_mesh} hold: each must load what it has saved. To go on with another "
            "number of processes save by torch.distributed.checkpoint, or full tensors"
        )


def alike(x: Tensor, p: Tensor) -> bool:
    """Whether two DTensors, or two plain tensors, are in equal placements on equal meshes."""
    there, here = getattr(x, "_spec", None), getattr(p, "_spec", None)
    if there is here:
        return True
    if there is None or here is None:
        return False
    return bool(there.placements == here.placements and there.mesh == here.mesh)


def check_gradient(p: Tensor, name: str) -> None:
    """Raise unless p's gradient is sharded over the same processes as p."""
    gradient: Any = p.grad
    if gradient is None or alike(gradient, p):
        own = p if gradient is None else gradient
    else:
        here: Any = p
        if not (is_shard(p) and is_shard(gradient)) or gradient.device_mesh != here.device_mesh:
            raise RuntimeError(
                f"the gradient of {name} is not sharded over the same processes as the parameter: "
                "make it a DTensor of the parameter's mesh"
            )
        own = p  # once it has been redistributed
    shard, weight = layouts.local(own), layouts.local(p)
    if shard.shape != weight.shape or shard.dtype != weight.dtype:
        raise RuntimeError(
            f"the shard of the gradient of {name} is {tuple(shard.shape)}, {shard.dtype}, but the "
            f"parameter's is {tuple(weight.shape)}, {weight.dtype}: make it with the parameter's "
            "shape, placements and dtype"
        )


def gradient_of(p: Tensor, name: str) -> Tensor:
    """What lies in this process of p's gradient, in the placements of p."""
    check_gradient(p, name)
    gradient: Any = p.grad
    if not alike(gradient, p):
        here: Any = p
        warnings.warn(
            f"the gradient of {name} is placed as {gradient.placements} but the parameter as "
            f"{here.placements}: it is redistributed in every step",
            stacklevel=2,
        )
        gradient = sharded_like(p, gradient)
    return layouts.local(gradient)


def reshard(parameters: Collection[Tensor]) -> None:
    """Has FSDP2 give up the gathered parameters that it keeps of these.

    A forward pass leaves the outermost module's parameters gathered, for the backward pass that
    it expects. After an evaluation there is none, and the next forward pass would compute with
    what they were before the weights changed.
    """
    if not any(map(is_shard, parameters)):
        return
    for module in _fsdp_modules():
        if _gathers(module, parameters):
            module.reshard()


def _fsdp_modules() -> list[Any]:
    """All of them: nothing leads from a parameter to its module but torch's own table."""
    try:
        from torch.distributed._composable_state import _module_state_mapping
        from torch.distributed.fsdp import FSDPModule
    except ImportError:  # a torch without FSDP2, or one that keeps the table elsewhere
        return []
    return [module for module in list(_module_state_mapping) if isinstance(module, FSDPModule)]


def _gathers(module: Any, parameters: Collection[Tensor]) -> bool:
    """Whether some of these are those that an FSDPModule gathers. While it has them gathered they
    are not among its parameters: hence by way of its state, whose names are torch's own business.
    Where they are others, every module is taken for one: to gather once more is only slow."""
    try:
        state = module._get_fsdp_state()
        if hasattr(state, "_fsdp_param_groups"):
            found = state._fsdp_param_groups
        else:  # in older torch a module has one, or none
            found = [group for group in [state._fsdp_param_group] if group is not None]
        return any(
            each.sharded_param in parameters for group in found for each in group.fsdp_params
        )
    except AttributeError:
        return True


class Processes:
    """Processes that take their steps together, each in phases."""

    def step(self, begin: Callable[[], Phases], before: int, after: bool) -> None:
        """A step.

        `before`, `after`: how often numbers are exchanged before the update, and whether what it
        leaves is. All processes know both, and take part in every exchange, whatever happens: so
        nobody waits for one that has failed, and all hear of it.
        """
        phases: Phases | None = None
        error: Exception | None = None
        try:
            try:
                phases = begin()
            except Exception as failed:
                error = failed
            rounds = 0 if phases is None else phases.reductions
            proceed = True
            for each in range(max(1, rounds, before)):
                if phases is not None and proceed and each < rounds:
                    phases.reduce(each)
                if each < before:
                    error = self._exchange(phases, _BEFORE[each], error)
                if phases is None or error is not None:
                    proceed = False
                elif proceed and each < max(1, rounds):
                    proceed = phases.decide(each)
            if phases is not None and proceed:
                phases.update()
            if after:
                error = self._exchange(phases, _AFTER if before else (*_AFTER, _GRADIENT2), error)
            if error is not None:
                raise error
            if phases is not None and proceed:
                phases.finish()
        finally:
            del phases, error  # a traceback would keep them, and the step at work

    def agree(self, yes: bool) -> bool:
        """Whether all processes say yes."""
        raise NotImplementedError

    def _exchange(
        self, phases: Phases | None, columns: Sequence[int], error: Exception | None
    ) -> Exception | None:
        """Makes these columns of the sums those of all processes. `error`: why this one cannot go
        on; returns that, or why another one cannot. A GPU's numbers are not waited for."""
        raise NotImplementedError


class Reducer(Processes):
    """Adds up the sums of all processes that hold shards of an optimizer's parameters."""

    def __init__(self, parameters: Sequence[tuple[str, Tensor]], sums_of_v: bool) -> None:
        """All parameters with their names, in the same order in every process.

        `sums_of_v`: whether their states hold these.
        """
        self._names = [name for name, _ in parameters]
        self._parameters = [p for _, p in parameters]
        self._sums_of_v = sums_of_v
        self._device = next((p.device for _, p in parameters if is_shard(p)), torch.device("cpu"))
        # Sums of v that this process has taken of its shards. The next step adds them up.
        self.new_sums: dict[Tensor, Tensor] = {}
        rows: dict[Any, list[int]] = {}
        copies: dict[Any, list[int]] = {}
        so_far = [1] * len(parameters)  # processes whose rows have been added up
        for row, (name, p) in enumerate(parameters):
            for group, size in _groups_that_shard(p, name):
                so_far[row] *= size
                rows.setdefault(group, []).append(row)
                copies.setdefault(group, []).append(so_far[row])
        self._groups = [
            _Group(group, torch.tensor(rows[group]), torch.tensor(copies[group]).double())
            for group in rows
        ]

    def __bool__(self) -> bool:
        """Whether anything is sharded."""
        return bool(self._groups)

    def heard(self, error: Exception | None, what: str) -> Exception | None:
        """The error of this process, or one that says why another could not do that either."""
        if not self.agree(error is None):
            for group in self._groups:
                error = _told(group.processes, error, what)
        return error

    def agree(self, yes: bool) -> bool:
        no = torch.tensor([0 if yes else 1], device=self._device)
        for group in self._groups:
            torch.distributed.all_reduce(no, group=group.processes)
        return not no.item()

    def _exchange(
        self, phases: Phases | None, columns: Sequence[int], error: Exception | None
    ) -> Exception | None:
        # A row for each parameter, behind whose sums stand how many gradients there are, new sums
        # of v and how many; and a row that counts failures.
        with_v = self._sums_of_v and columns is _BEFORE[0]
        width = len(columns) + (3 if with_v else 1)
        size = len(self._parameters) + 1, width
        table = torch.zeros(size, dtype=torch.float64, device=self._device)
        gradients = len(columns)
        active = [row for row, p in enumerate(self._parameters) if p.grad is not None]
        rows: Any = slice(0, len(active))
        if len(active) < len(self._parameters):
            rows = torch.tensor(active, dtype=torch.int64).to(table.device, non_blocking=True)
        new = []
        if phases is not None and error is None:
            table[rows, :gradients] = phases.sums[:, columns]
            table[rows, gradients] = 1
            if with_v and self.new_sums:
                new = [row for row, p in enumerate(self._parameters) if p in self.new_sums]
                sums = torch.stack([self.new_sums[self._parameters[row]] for row in new])
                table[new, -2], table[new, -1] = sums, torch.ones_like(sums)
        for group in self._groups:
            error = self._add_up(group, table, gradients, error)
        if phases is not None and error is None:
            phases.sums[:, columns] = table[rows, :gradients]
            for row in new:
                self.new_sums[self._parameters[row]].copy_(table[row, -2])
        return error

    def _add_up(
        self, group: _Group, table: Tensor, gradients: int, error: Exception | None
    ) -> Exception | None:
        """The rows of one group's processes. All of these find the same in them."""
        if error is not None:
            table[-1, 0] = 1
        if len(group.rows) == len(self._parameters):
            torch.distributed.all_reduce(table, group=group.processes)
            part = table
        else:
            own = torch.cat([group.rows, torch.tensor([len(table) - 1])]).to(table.device)
            part = table[own]
            torch.distributed.all_reduce(part, group=group.processes)
            table[own] = part
        if not table.is_cpu:
            return error
        if part[-1, 0].item():
            return _told(group.processes, error)
        for column, what in ((gradients, "a gradient"), (-1, "no sum of v, as it should,")):
            counts = part[:-1, column]
            odd = (counts != 0) & (counts != group.copies)
            if (column == gradients or gradients < table.shape[1] - 1) and odd.any():
                k = int(odd.nonzero()[0])
                error = error or RuntimeError(
                    f"{self._names[int(group.rows[k])]} has {what} in {counts[k]:g} of the "
                    f"{group.copies[k]:g} processes that hold shards of it: all must, or none"
                )
        return error


# What processes that hold other tensors add up. SWD's V is the mean of v / (1 - b2^t), and sums of
# v obey the recurrence of v itself, so that both its parts can be added up before the scale of the
# gradients is known: V = (kept_v + scale^2 new_v) / elements.
WHOLE = (
    "gradient2",  # g^2, as the gradients are
    "kept_v",  # b2 sum(v) / (1 - b2^t), or max(v) / (1 - b2^t) with amsgrad
    "new_v",  # (1 - b2) g^2 / (1 - b2^t)
    "elements",
)


def mean_v(whole: Tensor, scale: float | Tensor) -> Tensor:
    """SWD's V."""
    _, kept, new, elements = whole
    return torch.where(elements == 0, 0.0, (kept + scale * scale * new) / elements)


class Part(NamedTuple):
    """A parameter that has a gradient, and what V is made of."""

    elements: int
    beta2: float
    amsgrad: bool
    state: Mapping[str, Tensor]


class Others(Processes):
    """Adds up numbers of the whole model with processes that hold its other tensors."""

    def __init__(
        self, processes: Any, device: torch.device, parts: Callable[[], list[Part]]
    ) -> None:
        """`parts`: those of this process, in the order of their sums; none but for SWD."""
        self.whole = torch.empty(len(WHOLE), dtype=torch.float64, device=device)
        self._processes = processes
        self._parts = parts

    def agree(self, yes: bool) -> bool:
        no = torch.tensor([0 if yes else 1], device=self.whole.device)
        torch.distributed.all_reduce(no, group=self._processes)
        return not no.item()

    def _exchange(
        self, phases: Phases | None, columns: Sequence[int], error: Exception | None
    ) -> Exception | None:
        first = columns is _BEFORE[0]
        own = torch.zeros(len(WHOLE) + 1, dtype=torch.float64, device=self.whole.device)
        if phases is None or error is not None:
            own[-1] = 1
        else:
            own[:-1] = self._numbers(phases, first)
        torch.distributed.all_reduce(own, group=self._processes)
        if own.is_cpu and own[-1].item():
            return _told(self._processes, error)
        if first:
            self.whole.copy_(own[:-1])
        else:
            self.whole[1] += own[1]
        return error

    def _numbers(self, phases: Phases, first: bool) -> Tensor:
        sums, parts = phases.sums, self._parts()
        found = torch.zeros(len(WHOLE), dtype=torch.float64, device=sums.device)
        if first:
            found[0] = sums[:, _GRADIENT2].sum()
            found[3] = sum(each.elements for each in parts)
        if not parts:
            return found
        last = phases.reductions == 1 or not first  # when there are maxima
        beta2 = torch.tensor([each.beta2 for each in parts], dtype=torch.float64)
        beta2 = beta2.to(sums.device, non_blocking=True)
        t = torch.stack([each.state["step"].double() for each in parts]).to(sums.device) + 1
        corrections = 1 - beta2**t
        maxima = [k for k, each in enumerate(parts) if each.amsgrad]
        kept = [k for k, each in enumerate(parts) if not each.amsgrad]
        if maxima and last:
            found[1] += (sums[maxima, _MAXIMUM] / corrections[maxima]).sum()
        if kept and first:
            v = torch.stack([parts[k].state["exp_avg_sq_sum"] for k in kept]).to(sums.device)
            found[1] += (beta2[kept] * v / corrections[kept]).sum()
            new = (1 - beta2[kept]) * sums[kept, _GRADIENT2]
            found[2] += (new / corrections[kept]).sum()
        return found


class _Group(NamedTuple):
    """A process group over which parameters are sharded."""

    processes: Any
    rows: Tensor  # of these parameters
    copies: Tensor  # of each row there are so many once this group's and earlier ones are added up


def _groups_that_shard(p: Tensor, name: str) -> Iterator[tuple[Any, int]]:
    """The process groups over which p is sharded, and how many processes these have."""
    if not is_shard(p):
        return
    shard: Any = p
    mesh = shard.device_mesh
    for dim, placement in enumerate(shard.placements):
        if placement.is_partial():
            raise ValueError(
                f"{name} is placed as {shard.placements}: a partial parameter has no value "
                "to update; redistribute it"
            )
        if placement.is_replicate() or mesh.size(dim) == 1:
            continue
        try:
            group = mesh.get_group(dim)
        except (RuntimeError, ValueError, KeyError) as failed:
            raise RuntimeError(
                f"{name} is sharded over {mesh}, which has no process group ({failed}): call "
                "torch.distributed.init_process_group before the mesh is made"
            ) from failed
        yield group, mesh.size(dim)


def _told(processes: Any, error: Exception | None, what: str = "take this step") -> Exception:
    """An error that some process has, in all that call this; a process keeps its own."""
    found: list[Any] = [None] * torch.distributed.get_world_size(processes)
    own = None if error is None else f"process {torch.distributed.get_rank()}: {error}"
    torch.distributed.all_gather_object(found, own, group=processes)
    message = next((each for each in found if each is not None), "it said nothing")
    return error or RuntimeError(f"another process could not {what}: {message}")
