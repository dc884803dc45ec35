"""State dicts of apex's and Transformer Engine's FusedAdam, told apart and put into torch.optim's
words; and what DeepSpeed's share with them.

Both count steps in the group and not in the states, and have `bias_correction` there. Transformer
Engine's also keeps `master_param`: the float32 weights; or for bfloat16, with
store_param_remainders, their lower 16 bits as int16, which together with the weight, their
nearest, give them. Its state_dict() takes the scales of 8-bit and float16 states back into them.
Neither says whether its decay is decoupled (adam_w_mode), nor has apex's the master weights in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from wdkernels import checks, layouts, shards
from wdkernels.state import NARROW

_CORRECTION = "bias_correction"
_MASTER = "master_param"


def translated(state_dict: dict[str, Any], groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The state dict in torch.optim's words, if it is one of theirs; else itself.

    `groups`: those it is loaded into. ValueError for what has no counterpart here.
    """
    saved: Any = state_dict.get("param_groups")
    states = state_dict.get("state")
    if not isinstance(states, dict) or not _are_groups_like(saved, groups):
        return state_dict  # another's, or refused by whoever checks it
    new_groups, new_states = [], dict(states)
    for i, (group, target) in enumerate(zip(saved, groups, strict=True)):
        if not group.get(_CORRECTION, True):
            raise ValueError(
                f"group {i} of the state_dict has {_CORRECTION}=False: its moments are not divided "
                "by 1 - beta^t, as every step here does; a run of it cannot be continued"
            )
        new = {key: value for key, value in group.items() if key not in (_CORRECTION, "step")}
        if isinstance(new.get("lr"), Tensor) and not target["capturable"]:
            new["lr"] = new["lr"].item()
        for k, (key, p) in enumerate(zip(group["params"], target["params"], strict=True)):
            found = states.get(key)
            if not isinstance(found, dict) or "exp_avg" not in found:
                continue
            name = checks.name_of(target, i, k)
            new_states[key] = own = _state(found, group, p, name)
            if "master" in own:
                new["master_weights"] = True
        new_groups.append(new)
    return {**state_dict, "param_groups": new_groups, "state": new_states}


def _are_groups_like(saved: Any, groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether these are groups of theirs, for as many parameters."""
    if not isinstance(saved, list) or len(saved) != len(groups):
        return False
    return any(isinstance(x, dict) and _CORRECTION in x for x in saved) and all(
        isinstance(x, dict)
        and isinstance(x.get("params"), list)
        and len(x["params"]) == len(group["params"])
        for x, group in zip(saved, groups, strict=True)
    )


def _state(found: dict[str, Any], group: Mapping[str, Any], p: Tensor, name: str) -> dict[str, Any]:
    own = {key: x for key, x in found.items() if key != _MASTER}
    counts = "step" in own  # as DeepSpeed's, whose states have no scales, whatever their type
    for key in () if counts else ("exp_avg", "exp_avg_sq"):
        x = own.get(key)
        if isinstance(x, Tensor) and (x.dtype == torch.float16 or not x.is_floating_point()):
            raise ValueError(
                f"{key} of {name} is {x.dtype}, scaled by a number that is not with it: save what "
                "FusedAdam.state_dict() returns, in which every state is float32"
            )
    if not counts:
        if "step" not in group:
            raise ValueError(
                f"the state_dict has moments of {name} but no step, neither beside them nor in its "
                "group, where FusedAdam counts: it is damaged"
            )
        step = group["step"]
        own["step"] = float(step.item() if isinstance(step, Tensor) else step)
    if found.get(_MASTER) is not None and p.dtype in NARROW:  # others' copies are never read
        own["master"] = _master(found[_MASTER], p, name)
    return own


def _master(x: Tensor, p: Tensor, name: str) -> Tensor:
    if x.dtype != torch.int16:
        return x.float()
    if p.dtype != torch.bfloat16:
        raise ValueError(
            f"{_MASTER} of {name} is int16, the lower half of a float32 whose upper half is a "
            f"bfloat16 weight, but the parameter is {p.dtype}"
        )
    if shards.is_shard(p):
        raise ValueError(
            f"{_MASTER} of {name} is int16, to which its own shard of the weights belongs: save it "
            "with store_param_remainders=False, or load it before the model is sharded"
        )
    if x.shape != p.shape:
        raise ValueError(
            f"{_MASTER} of {name} has shape {tuple(x.shape)} but the parameter has "
            f"{tuple(p.shape)}: this state belongs to another model"
        )
    lower = x.detach().to(p.device).int()
    # The weight is the nearest: one more than the upper half where the lower begins with a 1.
    upper = layouts.local(p.detach()).view(torch.int16).int() - (lower < 0).int()
    return ((upper << 16) | (lower & 0xFFFF)).view(torch.float32)
