"""Param groups: what is taken into one, and what a step finds in all of them."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from wdkernels import checks, layouts, shards, state
from wdkernels.layouts import Numbering
from wdkernels.options import NUMBERS, Group, GroupOptions, from_group
from wdkernels.plan import Parameter, Plan

Groups: TypeAlias = "Sequence[dict[str, Any]]"


# ---- parameters ----------------------------------------------------------------------------------


def parameters(groups: Groups) -> Iterator[tuple[int, int, dict[str, Any], Tensor]]:
    """Every parameter, with its group and its index there."""
    for i, group in enumerate(groups):
        for k, p in enumerate(group["params"]):
            yield i, k, group, p


def first_device(groups: Groups) -> torch.device:
    """Where the numbers of a whole step are: on the first parameter's device."""
    return next((p.device for *_, p in parameters(groups)), torch.device("cpu"))


def elements(p: Tensor) -> int:
    """How many real numbers p has."""
    return p.numel() * (2 if p.is_complex() else 1)


def learns(p: Tensor) -> bool:
    """Whether p may come to have a gradient. A frozen parameter, of whatever type, is left alone,
    and a lazy module's as long as it has no shape."""
    if isinstance(p, torch.nn.parameter.UninitializedParameter):
        return False
    frozen = isinstance(p, torch.nn.Parameter) and not p.requires_grad
    return not frozen or p.grad is not None


def active(groups: Groups) -> list[tuple[str, Tensor]]:
    """The parameters that have a gradient, with their names. No two have the same name."""
    given = Counter(x for group in groups for x in group.get("param_names", ()))
    found = []
    for i, k, group, p in parameters(groups):
        name = group["param_names"][k] if "param_names" in group else str(k)
        if p.grad is not None:
            found.append((name if given[name] == 1 else f"{i}.{name}", p))
    return found


# ---- a new group ---------------------------------------------------------------------------------


def refuse_duplicates(groups: Groups, params: Sequence[Any]) -> None:
    """Raise for a parameter that a group, or the new one, already has."""
    seen = {id(p): checks.name_of(group, i, k) for i, k, group, p in parameters(groups)}
    for k, item in enumerate(params):
        named = isinstance(item, tuple)
        name = checks.name_of({"param_names": {k: item[0]}} if named else {}, len(groups), k)
        p = item[1] if named else item
        if id(p) in seen:
            raise ValueError(f"{name} is {seen[id(p)]} once more: pass each parameter once")
        seen[id(p)] = name


def given_anchors(group: Group, index: int) -> dict[Tensor, Tensor]:
    """Copies of a group's anchors, if they are tensors; other choices are names in the group."""
    params, anchor = group["params"], group["anchor"]
    if isinstance(anchor, str) and anchor in ("zero", "initial", "ema"):
        return {}
    if isinstance(anchor, (str, Tensor)) or not isinstance(anchor, Iterable):
        raise ValueError(
            f"group {index}: anchor must be 'zero', 'initial', 'ema' or a list of tensors, one "
            f"for each parameter of the group, not {anchor!r}"
        )
    anchors = list(anchor)
    if len(anchors) != len(params):
        raise ValueError(
            f"group {index}: anchor holds {len(anchors)} tensors for {len(params)} "
            "parameters: give one for each, in the same order"
        )
    group["anchor"] = "given"
    copies = {}
    for k, (p, a) in enumerate(zip(params, anchors, strict=True)):
        state.check_anchor(p, a, checks.name_of(group, index, k))
        dtype = state.fitting(a, state.anchor_dtypes(p))
        copies[p] = torch.empty_like(p.detach(), dtype=dtype)
        copies[p].copy_(shards.sharded_like(p, a.detach()))
    return copies


def read(method: str, group: Mapping[str, Any], index: int, on_device: bool) -> GroupOptions:
    """A group's options; `on_device`: steps of parameters on a GPU are counted there."""
    on_gpu = [p.is_cuda for p in group["params"]]
    try:
        options = from_group(method, group, on_device and any(on_gpu))
    except ValueError as error:
        raise ValueError(f"group {index}: {error}") from None
    for k, p in enumerate(group["params"]):
        if learns(p):
            name = checks.name_of(group, index, k)
            checks.check_parameter(p, name)
            state.check_options(p, options, name)
    if options.capturable and not all(on_gpu):
        raise ValueError(
            f"group {index}: capturable=True is for parameters on a GPU, in CUDA graphs"
        )
    return options


# ---- options, before each step -------------------------------------------------------------------


@dataclass
class Known:
    """A group as it was when its options were read."""

    values: dict[str, Any]  # copied, as lists and schedules may be edited in place
    options: GroupOptions
    tensors: bool  # some number is one, whose value may have changed


def read_again(
    groups: Groups,
    known: list[Known],
    read: Callable[[Mapping[str, Any], int], GroupOptions],
    plan: Plan | None,
) -> Plan | None:
    """Reads the groups where something has changed, which costs little where nothing has.

    `known` is brought up to date. Returns the plan, told of what has changed; None if that is more
    than numbers.
    """
    if len(known) != len(groups):
        plan = None
        known.clear()
    for index, group in enumerate(groups):
        before = known[index] if index < len(known) else None
        if before is not None and _same_but_for_numbers(group, index, before, plan):
            continue
        options = read(group, index)
        if before is None:
            known.append(_known(group, options))
            continue
        known[index] = _known(group, options)
        if options.streams != before.options.streams:
            plan = None
        elif plan is not None:
            plan.set_options(index, options)
    return plan


def _known(group: Mapping[str, Any], options: GroupOptions) -> Known:
    values = {
        key: copy.deepcopy(value) if isinstance(value, (list, dict)) and key != "params" else value
        for key, value in group.items()
    }
    return Known(values, options, any(isinstance(values[name], Tensor) for name in NUMBERS))


def _same_but_for_numbers(
    group: Mapping[str, Any], index: int, known: Known, plan: Plan | None
) -> bool:
    """Takes over numbers, which schedulers change in every step. False if more has changed."""
    values = known.values
    for name in NUMBERS:
        value = group[name]
        same = value is values[name]
        if same and not known.tensors:
            continue
        if known.options.device_numbers and name in known.options.device_numbers:
            if not same:
                return False
            continue
        if isinstance(value, Tensor) and not value.is_cpu:
            return False
        try:
            changed = known.options.set_number(name, value)
        except ValueError as error:
            raise ValueError(f"group {index}: {error}") from None
        if plan is not None:
            for attribute, number in changed.items():
                plan.set_number(index, attribute, number)
        known.tensors = known.tensors or isinstance(value, Tensor)
        values[name] = list(value) if isinstance(value, list) else value
    try:
        return bool(group == values)
    except (RuntimeError, ValueError):  # an array of several numbers, which is refused then
        return False


# ---- tensors, before a step that has no plan -----------------------------------------------------


def check(
    groups: Groups,
    states: Mapping[Tensor, Any],
    options: Sequence[GroupOptions],
    given: Mapping[Tensor, Tensor],
    known: list[Any],
) -> list[Any]:
    """Looks at everything that a step relies on; an exception names what is wrong, and of what.

    `given`: anchors that are in no state yet; `known`: what an earlier call returned, which is the
    memory that a step writes. That no two tensors share it is only looked for where it has changed.
    """
    tensors, names = [], []
    for i, k, group, p in parameters(groups):
        own = states.get(p, {})
        if not (learns(p) or state.begun(own)):
            continue
        name = checks.name_of(group, i, k)
        checks.check_parameter(p, name)
        checks.check_gradient(p, name)
        shards.check_gradient(p, name)
        state.check_in_use(p, own, options[i], name, p.grad is not None, p in given)
        own = state.own_part(p, own, options[i])
        for what, x in ((name, p), *state.written(own, name)):
            if layouts.has_memory(here := layouts.local(x)):
                tensors.append(here)
                names.append(what)
    memory = [(x.data_ptr(), x.shape, x.stride()) for x in tensors]
    if memory != known:
        checks.check_memory(tensors, names)
    return memory


def _rounds_randomly(p: Tensor, options: GroupOptions) -> bool:
    return state.storage_of(p, options) == "stochastic" or options.moment_dtype is not None


def as_parameters(
    groups: Groups, states: Mapping[Tensor, Any], options: Sequence[GroupOptions]
) -> list[Parameter]:
    """All parameters as a backend sees them; their states are complete or not there."""
    found = []
    for position, (i, k, group, p) in enumerate(parameters(groups)):
        own = states.get(p, {})
        own = own if state.begun(own) else None
        random = _rounds_randomly(p, options[i])
        found.append(
            Parameter(
                tensor=p,
                state=own,
                streams={} if own is None else state.streams(p, own, options[i]),
                storage=state.storage_of(p, options[i]),
                group=i,
                name=checks.name_of(group, i, k),
                position=position,
                total=0 if own is None else elements(p),
                numbering=shards.numbering_of(p) if random else Numbering(),
            )
        )
    return found
