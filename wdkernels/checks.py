"""What is refused, and in which words: every message names the parameter and says what to do.

A step calls these before it writes anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from wdkernels import layouts, storage
from wdkernels.coefficients import Hyper

State = dict[str, Any]

_ENTRIES = ("step", *storage.ALIKE, "exp_avg_sq_sum")
_COUNTERS = (torch.float32, torch.float64)  # 16 bits would not count beyond 256, or 2048


def name_of(group: Mapping[str, Any], group_index: int, index: int) -> str:
    """A parameter's name in messages: its own, if the optimizer was given named parameters."""
    place = f"parameter {index} of group {group_index}"
    names = group.get("param_names")
    return f"'{names[index]}' ({place})" if names else place


def check_parameter(p: Tensor, name: str) -> None:
    if not (p.is_floating_point() or p.is_complex()):
        raise TypeError(f"{name} has dtype {p.dtype}; only floating and complex tensors can learn")
    if p.layout != torch.strided:
        raise TypeError(f"{name} has layout {p.layout}; only strided tensors are supported")
    _check_not_lazy(p, name)


def check_memory(tensors: Sequence[Tensor], names: Sequence[str]) -> None:
    """No element may belong to two tensors that a step writes, or twice to one."""
    shared = layouts.overlapping(tensors)
    if shared is None:
        return
    first, second = (names[i] for i in shared)
    if first == second:
        raise RuntimeError(
            f"{first} holds several elements at one address (an expanded tensor?), so its update "
            "has no meaning: make it a tensor of its own with .clone()"
        )
    raise RuntimeError(
        f"{first} and {second} share memory and would be updated twice: pass only one of them, "
        "or make one a tensor of its own with .clone()"
    )


def check_gradient(p: Tensor, name: str) -> None:
    g = p.grad
    if g is None:
        return
    if g.layout != torch.strided:
        raise RuntimeError(
            f"the gradient of {name} is sparse ({g.layout}): use a dense one "
            "(for an embedding, sparse=False), or torch.optim.SparseAdam"
        )
    _check_has_memory(p, p, name, RuntimeError)
    _check_has_memory(g, p, f"the gradient of {name}", RuntimeError)
    _check_writable(p, name)
    for what in ("shape", "dtype", "device"):
        has, needs = getattr(g, what), getattr(p, what)
        if has != needs:
            has, needs = (tuple(x) if what == "shape" else x for x in (has, needs))
            raise RuntimeError(
                f"the gradient of {name} has {what} {has} but the parameter has {needs}: "
                "convert it, or clear it with zero_grad() and run backward again"
            )


def check_anchor(p: Tensor, anchor: Any, name: str) -> None:
    if not isinstance(anchor, Tensor):
        raise ValueError(f"the anchor of {name} must be a tensor, not {type(anchor).__name__}")
    _check_alike(anchor, p, storage.anchor_dtypes(p), f"the anchor of {name}", ValueError)


def check_saved_groups(groups: Sequence[Any]) -> None:
    """Which state belongs to which parameter must be beyond doubt."""
    known: set[int | str] = set()
    named = [isinstance(group, dict) and "param_names" in group for group in groups]
    for i, group in enumerate(groups):
        place = f"group {i} of the state_dict"
        if not isinstance(group, dict):
            raise ValueError(f"{place} must be a dict, not {group!r}")
        params = group.get("params")
        if not isinstance(params, list):
            raise ValueError(f"params of {place} must be a list, not {params!r}")
        for key in params:
            if not isinstance(key, (int, str)):
                raise ValueError(f"params of {place} hold {key!r}: it must be a parameter's number")
            if key in known:
                raise ValueError(f"params of {place} hold {key!r} a second time: it is damaged")
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
                f"param_names of {place} must be a list of {len(params)} strings, not {names!r}"
            )
        if not all(named):
            raise ValueError(
                f"{place} has param_names, another has none: name the parameters of all or of none"
            )


def check_state(p: Tensor, state: Any, hyper: Hyper, name: str) -> None:
    """A state that holds moments must be a whole one; missing optional entries are made later."""
    if not isinstance(state, dict):
        raise ValueError(f"the state of {name} must be a dict, not {type(state).__name__}")
    if hyper.anchored and "anchor" not in state:
        raise ValueError(
            f"{name} has no anchor: choose one at construction or in add_param_group; "
            "it cannot be switched on later"
        )
    if state.keys() - {"anchor"}:
        missing = [key for key in ("step", "exp_avg", "exp_avg_sq") if key not in state]
        if missing:
            raise ValueError(
                f"the state of {name} lacks {', '.join(missing)} (it has "
                f"{', '.join(map(str, state))}): it belongs to another kind of optimizer or is "
                "damaged"
            )
    for key in _ENTRIES:
        if isinstance(state.get(key), Tensor):
            _check_has_memory(state[key], p, f"{key} of {name}", ValueError)
    if "exp_avg_sq_sum" in state and not _is_number(state["exp_avg_sq_sum"]):
        raise ValueError(
            f"exp_avg_sq_sum of {name} must be a tensor of one number, not "
            f"{state['exp_avg_sq_sum']!r}"
        )
    for key in storage.ALIKE:
        if key not in state:
            continue
        if not isinstance(state[key], Tensor):
            raise ValueError(f"{key} of {name} must be a tensor, not {type(state[key]).__name__}")
        if not _is_dense(state[key]):
            kind = "nested" if state[key].is_nested else state[key].layout
            raise ValueError(f"{key} of {name} must be a dense tensor, not {kind}")
        if state[key].shape != p.shape:
            raise ValueError(
                f"{key} of {name} has shape {tuple(state[key].shape)} but the parameter has "
                f"{tuple(p.shape)}: this state belongs to another model"
            )
        if state[key].is_complex() != p.is_complex():
            raise ValueError(
                f"{key} of {name} is {state[key].dtype} but the parameter is {p.dtype}: this state "
                "belongs to another model"
            )


def check_saved_state(p: Tensor, state: Any, hyper: Hyper, name: str) -> None:
    """Of a state to be loaded, every number counts, and nothing may be left over."""
    check_state(p, state, hyper, name)
    if unknown := [str(key) for key in state if key not in _ENTRIES]:
        raise ValueError(
            f"the state of {name} has {', '.join(unknown)}, which neither Adam nor AdamW knows: it "
            "belongs to another kind of optimizer"
        )
    for key in _ENTRIES:
        x = state.get(key)
        if not isinstance(x, Tensor):
            continue
        if x.is_meta and not p.is_meta:
            raise ValueError(
                f"{key} of {name} is on the meta device, where there are no numbers: save the "
                "state of an optimizer that has them"
            )
        if key in storage.ALIKE and not (x.is_floating_point() or x.is_complex()):
            raise ValueError(
                f"{key} of {name} is {x.dtype}, which moments and weights never are: it belongs to "
                "another kind of optimizer or is damaged"
            )
    if "step" in state:
        _check_step(state["step"], name)
    if "exp_avg_sq_sum" in state and not state["exp_avg_sq_sum"].item() >= 0:
        raise ValueError(
            f"exp_avg_sq_sum of {name} is {state['exp_avg_sq_sum'].item()}: a sum of squares is "
            ">= 0; delete it, and it is taken anew"
        )


def check_live_state(p: Tensor, state: Mapping[str, Any], hyper: Hyper, name: str) -> None:
    """Of a state in use, the dtypes and devices count as well."""
    check_state(p, state, hyper, name)
    check_kept(p, state, hyper, name)
    for key in ("master", "compensation"):
        if key in state and p.dtype not in storage.NARROW:
            raise ValueError(
                f"the state of {name} has {key}, which only weights of 16 bits have, and these are "
                f"{p.dtype}: add what it holds to them if it still counts, and delete "
                f"state[parameter][{key!r}]"
            )
    if "step" in state:
        step = state["step"]
        if not isinstance(step, Tensor) or step.is_cpu:
            _check_step(step, name)
        elif step.device.type != p.device.type:  # to read it there is to wait for the device
            raise RuntimeError(f"step of {name} is on {step.device}: move it to the CPU")
        if not (_is_number(step) and step.dtype in _COUNTERS):
            raise RuntimeError(
                f"step of {name} must be a floating-point tensor of one number, float32 or "
                f"float64, not {step!r}"
            )
    if "exp_avg_sq_sum" in state:
        kept = state["exp_avg_sq_sum"]
        wanted = {"dtype": torch.float64, "device": p.device, "ndim": 0}
        for attribute, needs in wanted.items():
            if getattr(kept, attribute) != needs:
                raise RuntimeError(
                    f"exp_avg_sq_sum of {name} has {attribute} {getattr(kept, attribute)} but it "
                    f"must be {needs}: delete it, and it is taken anew"
                )
    for key in storage.ALIKE:
        if key in state:
            dtypes = storage.dtypes_of(key, p, hyper)
            remedy = "convert it first"
            if key in storage.MOMENTS:
                remedy += f"; moment_dtype, on which that depends, is {hyper.moment_dtype}"
            _check_alike(state[key], p, dtypes, f"{key} of {name}", RuntimeError, remedy)
    for what, x in written(state, name):
        _check_not_lazy(x, what)
        _check_writable(x, what)


def written(state: Mapping[str, Any], name: str) -> Iterator[tuple[str, Tensor]]:
    """What a step writes of a state: all but the anchor, each with its name in messages."""
    for key in _ENTRIES:
        if key in state and key != "anchor":
            yield f"{key} of {name}", state[key]


def _check_step(step: Any, name: str) -> None:
    readable = isinstance(step, Tensor) and _is_dense(step) and step.numel() == 1
    number = step.item() if readable else step
    if not (type(number) in (int, float) and number >= 0 and number % 1 == 0):
        raise ValueError(f"the state of {name} has step {step!r}: it must be a whole number >= 0")


def _check_alike(
    x: Tensor,
    p: Tensor,
    dtypes: Sequence[torch.dtype],
    what: str,
    error: type[Exception],
    remedy: str = "convert it first",
) -> None:
    """Of the dtypes any will do."""
    wanted = {
        "shape": p.shape,
        "dtype": x.dtype if x.dtype in dtypes else dtypes[0],
        "device": p.device,
    }
    for attribute, needs in wanted.items():
        has = getattr(x, attribute)
        if has != needs:
            whose = "the parameter has" if needs == getattr(p, attribute) else "it must be"
            if attribute == "shape":
                has, needs = tuple(x.shape), tuple(p.shape)
            raise error(f"{what} has {attribute} {has} but {whose} {needs}: {remedy}")


def check_kept(p: Tensor, state: Mapping[str, Any], hyper: Hyper, name: str) -> None:
    """What 16-bit weights keep beside them belongs to how they are rounded."""
    if p.dtype not in storage.NARROW or "exp_avg" not in state:
        return
    options = {
        "master": (hyper.master_weights, "master_weights=True"),
        "compensation": (hyper.rounding == "kahan", "rounding='kahan'"),
    }
    for key, (needed, option) in options.items():
        if needed and key not in state:
            raise ValueError(
                f"the state of {name} has no {key}, which {option} needs from the first step on: "
                "it cannot be switched on later. Set the option back, or start with a new state"
            )
        if key in state and not needed:
            raise ValueError(
                f"the state of {name} has {key}, without which the weight is not whole: keep "
                f"{option}; or, to give up what it holds, delete state[parameter][{key!r}]"
            )


def check_saved_rounding(saved: Mapping[str, Any], group: Mapping[str, Any], index: int) -> None:
    """How 16-bit weights are kept is chosen at construction, not by what happens to be loaded."""
    for key in ("rounding", "master_weights", "moment_dtype"):
        if key in saved and saved[key] != group[key]:
            raise ValueError(
                f"group {index} of the state_dict has {key}={saved[key]!r}, this optimizer has "
                f"{group[key]!r}: construct it with the {key} that was saved, and the run goes on; "
                "to change it, start with a new optimizer"
            )


def _check_has_memory(x: Tensor, p: Tensor, what: str, error: type[Exception]) -> None:
    """What goes with a parameter that has memory of its own must have some too."""
    if not layouts.has_memory(p) or x.is_meta:
        return
    if not layouts.has_memory(x):
        raise error(
            f"{what} is a {type(x).__name__}, which has no memory of its own: make it a plain "
            "tensor, as the parameter is"
        )
    if _is_dense(x) and x.numel() > 0 and x.data_ptr() == 0:
        raise error(f"the memory of {what} has been given back: allocate it again first")


def _check_not_lazy(x: Tensor, what: str) -> None:
    if x.is_conj() or x.is_neg():
        raise ValueError(
            f"{what} is a lazily conjugated or negated view, whose memory holds other numbers: "
            "make it a tensor of its own with .resolve_conj().resolve_neg()"
        )


def _check_writable(x: Tensor, what: str) -> None:
    if x.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{what} was made in torch.inference_mode(), outside of which torch does not write it: "
            "make it a tensor of its own with .clone()"
        )


def _is_dense(x: Tensor) -> bool:
    return x.layout == torch.strided and not x.is_nested


def _is_number(x: Any) -> bool:
    return isinstance(x, Tensor) and _is_dense(x) and x.numel() == 1 and x.is_floating_point()
