"""State dicts: what one holds of an optimizer, and how one is merged, checked and copied into it.

A state dict is torch.optim's, both ways. A group holds plain data: the options of torch.optim.Adam,
those of ours that differ from their defaults, and of which optimizer it is: whether its decay is
decoupled, as torch's says it, and where that is not all, the `method`. So a loader that asks for
what one of Adam or AdamW holds, as torch.distributed.checkpoint does, finds all of it in what
torch.optim wrote. That also says how torch does it (`foreach`, `fused`); it may carry entries of
ours along, but has not kept them up. Those of apex and Transformer Engine are put into torch's
words first (foreign.py).

Entries that are not ours are copied as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from wdkernels import checks, foreign, shards, state
from wdkernels.options import (
    GROUP_OPTIONS,
    NUMBERS,
    OF_NARROW_WEIGHTS,
    TORCH_CHOICES,
    Group,
    GroupOptions,
)

_METHOD = "method"  # of the optimizer that saved a group
_KIND = "decoupled_weight_decay"  # of one of torch.optim
_DECOUPLED = {"l2": False, "decoupled": True}  # methods of which that is all there is to say
_FOREIGN = (*TORCH_CHOICES, _METHOD, _KIND)  # which a group in use has not
_NO_STATE_DICT = (
    "this is not the state_dict of an optimizer, which holds 'state' and 'param_groups'"
)


def saved_group(group: Mapping[str, Any], method: str) -> dict[str, Any]:
    """What a state dict holds of a group of an optimizer of this method."""
    kept = {key: value for key, value in group.items() if key not in _FOREIGN}
    for key, value in kept.items():
        if isinstance(value, torch.dtype):  # which not every tool can save
            kept[key] = str(value).removeprefix("torch.")
    if method in _DECOUPLED:
        return {**kept, _KIND: _DECOUPLED[method]}
    return {**kept, _METHOD: method}


class Loaded(NamedTuple):
    """What an optimizer becomes: made whole before the optimizer is changed."""

    groups: list[Group]
    options: list[GroupOptions]
    states: dict[Any, Any]  # by parameter, and what others keep by keys of their own
    made: list[tuple[Tensor, list[str], GroupOptions]]  # entries that were not saved, or not in use


# A parameter, the entries of its state that are needed and those of others, and its options.
_Work: TypeAlias = "tuple[Tensor, state.State, state.State, GroupOptions]"


class Target(NamedTuple):
    """The optimizer that a state dict is loaded into."""

    name: str
    method: str
    groups: Sequence[dict[str, Any]]
    states: Mapping[Tensor, state.State]
    given: Mapping[Tensor, Tensor]  # anchors that are not in a state yet
    read: Callable[[Mapping[str, Any], int], GroupOptions]
    reducer: shards.Reducer | None  # where parameters are sharded


def check_form(state_dict: Any) -> None:
    if not isinstance(state_dict, dict):
        raise ValueError(f"{_NO_STATE_DICT}; it is a {type(state_dict).__name__}")


def merged(target: Target, state_dict: dict[str, Any]) -> Loaded:
    """What the target becomes; ValueError, with nothing changed, if the state dict does not fit.

    Where parameters are sharded, it fits in all processes or is refused in all: to bring a tensor
    into other placements each of them is needed.
    """
    error: Exception | None = None
    try:
        loaded, work = _checked(target, foreign.translated(state_dict, target.groups))
    except Exception as raised:
        error = raised
    if target.reducer is not None:
        error = target.reducer.heard(error, "load its state dict")
    if error is not None:
        raise error
    for p, own, others, options in work:
        if own:
            loaded.states[p] = _copied(p, own, options)
            made = state.complete(p, loaded.states[p], options, target.given.get(p))
            loaded.made.append((p, made, options))
            if own.get("step", 1) == 0:  # what it has are copies, too
                made += [name for name in loaded.states[p] if name not in made]
        if others:
            loaded.states.setdefault(p, {}).update(_carried(p, others))
    return loaded


def _checked(target: Target, state_dict: dict[str, Any]) -> tuple[Loaded, list[_Work]]:
    """The groups, and what is to be copied."""
    groups, states = _parts(state_dict, target)
    loaded = Loaded([], [], {}, [])
    work: list[_Work] = []
    for i, (saved, group) in enumerate(zip(groups, target.groups, strict=True)):
        new = _merged_group(saved, group, target.method)
        options = target.read(new, i)
        if new["lr_max"] is not None:
            new["lr_max"] = options.lr_max
        _check_group(saved, group, options, target, i)
        loaded.groups.append(new)
        loaded.options.append(options)
        for k, (p, key) in enumerate(zip(group["params"], saved["params"], strict=True)):
            name = checks.name_of(group, i, k)
            found = states.pop(key, {})
            state.check_is_state(found, name)
            own, others = _parted(p, found, saved, options)
            if state.BY_NAME["anchor"].needed(p, options) and "anchor" in target.states.get(p, {}):
                own.setdefault("anchor", target.states[p]["anchor"])
            state.check_saved(p, own, name)
            shards.check_loadable(p, own, name)
            if _of_ours(saved):
                state.check_companions(p, found, options, name)
            if options.anchor == "given" and "anchor" not in own and p not in target.given:
                raise ValueError(state.no_anchor(name))
            work.append((p, own, others, options))
    loaded.states.update(states)  # what others keep by keys of their own, as it is
    return loaded, work


def _parts(state_dict: dict[str, Any], target: Target) -> tuple[list[Any], dict[Any, Any]]:
    groups, states = state_dict.get("param_groups"), state_dict.get("state")
    if not isinstance(groups, list) or not isinstance(states, dict):
        raise ValueError(
            f"{_NO_STATE_DICT}; it holds {', '.join(map(str, state_dict)) or 'nothing'}"
        )
    if len(groups) != len(target.groups):
        raise ValueError(
            f"the state_dict has {len(groups)} param groups, this optimizer "
            f"{len(target.groups)}: build it with the groups that were saved"
        )
    check_saved_groups(groups)
    for i, (saved, group) in enumerate(zip(groups, target.groups, strict=True)):
        if len(saved["params"]) != len(group["params"]):
            raise ValueError(
                f"group {i} of the state_dict has {len(saved['params'])} parameters, "
                f"this optimizer's has {len(group['params'])}: it belongs to another model"
            )
        if missing := [key for key in NUMBERS if key not in saved]:
            raise ValueError(
                f"group {i} of the state_dict lacks {', '.join(missing)}: it belongs to "
                "another kind of optimizer or is damaged"
            )
    known = {key for saved in groups for key in saved["params"]}
    strays = [
        repr(key)
        for key, x in states.items()
        if key not in known and (type(key) is int or state.begun(x))
    ]
    if strays:
        raise ValueError(
            f"the state_dict holds a state for {', '.join(strays)}, which is in no group's "
            "params: it is damaged"
        )
    return groups, dict(states)


def _by_torch(saved: Mapping[str, Any]) -> bool:
    """Whether a group was saved by torch.optim, which may have carried our options along.

    `differentiable` says nothing: torch puts it into the defaults of every optimizer it loads, so
    that groups of earlier releases of ours may hold it.
    """
    return "foreach" in saved or "fused" in saved


def _of_ours(saved: Mapping[str, Any]) -> bool:
    """Whether it was saved by a release of ours that knew how 16-bit weights are kept."""
    return not _by_torch(saved) and (_method_of(saved) is not None or "rounding" in saved)


def _method_of(saved: Mapping[str, Any]) -> str | None:
    """The method of the optimizer of ours that saved a group; None of torch.optim's, or of an
    earlier release, which saved every option instead."""
    if _by_torch(saved) or not (_METHOD in saved or _KIND in saved):
        return None
    return saved.get(_METHOD) or ("decoupled" if saved[_KIND] else "l2")


def _merged_group(saved: Mapping[str, Any], group: Mapping[str, Any], method: str) -> Group:
    """The options that are saved. One that is not has its default; or stays as it is, where who
    saved the others did not know it."""
    saver = _method_of(saved)
    narrow = any(p.dtype in state.NARROW for p in group["params"])
    new = Group((), method)
    for name, row in GROUP_OPTIONS.items():
        if method in row.senseless:
            continue
        of_others = name in OF_NARROW_WEIGHTS and not narrow
        if name in saved and not of_others:
            value = saved[name]
        elif of_others or saver is None or saver in row.senseless:
            value = group[name]
        else:
            value = row.default_of(saver)
        new[name] = copy.deepcopy(value)
    if new.get("moment_dtype") is not None:
        new["moment_dtype"] = GROUP_OPTIONS["moment_dtype"].check(
            new["moment_dtype"], "moment_dtype"
        )
    # What is nobody's option, such as a scheduler's initial_lr or a name, is saved as it is.
    others = {**group, **saved}
    new.update(
        (key, copy.deepcopy(value))
        for key, value in others.items()
        if key not in GROUP_OPTIONS and key not in (*_FOREIGN, "params")
    )
    new["params"] = group["params"]
    return Group.of(new, method)


def _check_group(
    saved: Mapping[str, Any],
    group: Mapping[str, Any],
    options: GroupOptions,
    target: Target,
    index: int,
) -> None:
    if options.weight_decay != 0:
        _check_kind_of_decay(saved, target, index)
    if not any(p.dtype in state.NARROW for p in group["params"]):
        return
    # How 16-bit weights are kept is chosen at construction, not by what happens to be loaded.
    for key in (*OF_NARROW_WEIGHTS, "moment_dtype"):
        if key not in saved and not _of_ours(saved):
            continue
        row = GROUP_OPTIONS[key]
        has, needs = (row.check(x.get(key, row.default), key) for x in (saved, group))
        if has != needs:
            raise ValueError(
                f"group {index} of the state_dict has {key}={has!r}, this optimizer has "
                f"{needs!r}: construct it with the {key} that was saved, and the run goes on; "
                "to change it, start with a new optimizer"
            )


def _check_kind_of_decay(saved: Mapping[str, Any], target: Target, index: int) -> None:
    """The same number is much for one kind and little for another. SPD takes any."""
    decoupled: bool | None = None  # nobody says
    if _by_torch(saved):
        decoupled = saved.get(_KIND)  # older torch does not say
    elif method := _method_of(saved):
        decoupled = {**_DECOUPLED, "swd": True}.get(method)
    elif "decay_scale" in saved or "unmixed" in saved:  # earlier releases saved every option
        decoupled = "decay_scale" in saved
    where = f"weight_decay of group {index} of the state_dict"
    if decoupled is True and target.method == "l2":
        raise ValueError(
            f"{where} is decoupled, Adam's is L2: load it into AdamW, or set it to 0 there"
        )
    if decoupled is False and target.method in ("decoupled", "swd"):
        raise ValueError(
            f"{where} is L2, {target.name}'s is decoupled: load it into Adam, or set it to 0 there"
        )


def _parted(
    p: Tensor, found: state.State, saved: Mapping[str, Any], options: GroupOptions
) -> tuple[state.State, state.State]:
    """Of a parameter's saved state, what is needed, and what others keep there.

    Neither has what its saver kept up where that is of no more use; nor what should have been kept
    up and was not, as by torch.optim, which carries everything along.
    """
    # torch's loader of flat state dicts puts {} where there is nothing.
    found = {key: x for key, x in found.items() if key not in state.BY_NAME or x != {}}
    own = state.own_part(p, found, options)
    others = {key: x for key, x in found.items() if key not in own}
    for key in state.KEPT_UP:
        kept = _kept_up(key, saved)
        if kept is not True:
            own.pop(key, None)
        if kept is not False:
            others.pop(key, None)
    return own, others


def _kept_up(key: str, saved: Mapping[str, Any]) -> bool | None:
    """Whether the entry is its saver's and as it should be; None if it is, but out of date."""
    of_sum = not saved.get("amsgrad") and _method_of(saved) in (None, "swd")
    chosen = {
        "ema": saved.get("ema_decay") is not None,
        "master": bool(saved.get("master_weights")),
        "compensation": saved.get("rounding") == "kahan",
        "exp_avg_sq_sum": of_sum,
    }[key]
    return None if chosen and _by_torch(saved) else chosen


def _carried(p: Tensor, x: Any) -> Any:
    """A copy on p's device."""
    if isinstance(x, Tensor):
        return x.detach().clone() if x.is_meta else x.detach().to(p.device, copy=True)
    if isinstance(x, dict):
        return {key: _carried(p, value) for key, value in x.items()}
    if type(x) in (list, tuple):
        return type(x)(_carried(p, value) for value in x)
    return copy.deepcopy(x)


def _copied(p: Tensor, own: Mapping[str, Any], options: GroupOptions) -> state.State:
    """Copies of the entries that count; torch would cast, and keep the caller's tensors."""
    copied: state.State = {}
    for entry in state.ENTRIES:
        if entry.name not in own:
            continue
        x = own[entry.name]
        if entry.name == "step":
            step = torch.as_tensor(x, dtype=torch.float32).detach().cpu()
            copied["step"] = step.reshape(()).clone()
            continue
        dtype = state.fitting(x, entry.dtypes(p, options))
        if entry.shape == "elements":
            x = shards.sharded_like(p, x)
        new = x.detach().to(p.device, dtype, copy=True)
        copied[entry.name] = new.reshape(()) if entry.shape == "number" else new
    return copied


def check_saved_groups(groups: Sequence[Any]) -> None:
    """Which state belongs to which parameter must be beyond doubt."""
    known: set[int | str] = set()
    named = [isinstance(group, dict) and "param_names" in group for group in groups]
    for i, group in enumerate(groups):
        where = f"group {i} of the state_dict"
        if not isinstance(group, dict):
            raise ValueError(f"{where} must be a dict, not {group!r}")
        params = group.get("params")
        if not isinstance(params, list):
            raise ValueError(f"params of {where} must be a list, not {params!r}")
        for key in params:
            if not isinstance(key, (int, str)):
                raise ValueError(f"params of {where} hold {key!r}: it must be a parameter's number")
            if key in known:
                raise ValueError(f"params of {where} hold {key!r} a second time: it is damaged")
            known.add(key)
        if not named[i]:
            continue
        names = group["param_names"]
        if not (
            isinstance(names, list)
            and len(names) == len(params)
            and all(isinstance(name, str) for name in names)
        ):
            raise ValueError(
                f"param_names of {where} must be a list of {len(params)} strings, not {names!r}"
            )
        if not all(named):
            raise ValueError(
                f"{where} has param_names, another has none: name the parameters of all or of none"
            )
