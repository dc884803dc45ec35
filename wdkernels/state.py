"""What an optimizer keeps of each parameter: every entry of a state, in one row.

A step computes in float32, or in float64 for weights of twice that width. Weights of 16 bits lose
what a step adds if it is less than half of their last bit, unless it is rounded stochastically or
kept elsewhere: hence `rounding` and `master_weights` (docs/methods.md).

From the table follow the streams that a backend is handed, what a new state is made of, what a
state dict may hold, and what is refused in which words. Entries that a step does not need, of
whatever name, belong to others, such as hooks and wrappers, and are carried along.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from wdkernels import layouts, shards
from wdkernels.checks import (
    check_alike,
    check_has_memory,
    check_not_lazy,
    check_writable,
    is_dense,
    is_number,
)
from wdkernels.options import GroupOptions

State = dict[str, Any]

NARROW = (torch.bfloat16, torch.float16)
WIDE = (torch.float64, torch.complex128)


def computed_in(p: Tensor) -> torch.dtype:
    """The type of the arithmetic, or its complex counterpart."""
    return torch.float32 if p.dtype in NARROW else p.dtype


def anchor_dtypes(p: Tensor) -> tuple[torch.dtype, ...]:
    """The types an anchor may have: it is only read, in any no wider than the arithmetic."""
    if p.is_complex() or p.dtype not in (torch.float32, torch.float64, *NARROW):
        return (p.dtype,)
    return (p.dtype, *(x for x in (torch.float32, *NARROW) if x != p.dtype))


def storage_of(p: Tensor, options: GroupOptions) -> str:
    """How p is stored: a name of csrc/dtype.h's Storage."""
    if p.dtype not in NARROW:
        return "direct"
    return "master" if options.master_weights else str(options.rounding)


# ---- the table -----------------------------------------------------------------------------------


def _moments(p: Tensor, options: GroupOptions) -> tuple[torch.dtype, ...]:
    return (computed_in(p) if options.moment_dtype is None else options.moment_dtype,)


def _computed(p: Tensor, options: GroupOptions) -> tuple[torch.dtype, ...]:
    return (computed_in(p),)


class Entry(NamedTuple):
    """A row of the table."""

    name: str
    # Which types it may have, that of a new one first.
    dtypes: Callable[[Tensor, GroupOptions], tuple[torch.dtype, ...]]
    needed: Callable[[Tensor, GroupOptions], bool]  # by a step
    start: Literal["zeros", "weight", "sum of v"] = "zeros"
    shape: Literal["elements", "number"] = "elements"  # as many as the parameter has, or one
    stream: str = ""  # its name among a backend's streams, if another
    kept_up: bool = False  # by each step of ours; torch.optim carries it along as it is
    written: bool = True


ENTRIES = (
    # A number on the CPU, where the host reads it, unless steps are counted on the device; 16 bits
    # would not count beyond 256, or 2048.
    Entry(
        *("step", lambda p, o: (torch.float32, torch.float64), lambda p, o: True), shape="number"
    ),
    Entry("exp_avg", _moments, lambda p, o: True),  # m
    Entry("exp_avg_sq", _moments, lambda p, o: True),  # v
    Entry("max_exp_avg_sq", _moments, lambda p, o: bool(o.amsgrad)),  # the largest v so far
    # What weights decay to; the running average is another's entry.
    Entry(
        *("anchor", lambda p, o: anchor_dtypes(p), lambda p, o: o.anchor in ("initial", "given")),
        start="weight",
        written=False,
    ),
    # The weight, of which a 16-bit one is a rounded copy.
    Entry(
        *("master", _computed, lambda p, o: storage_of(p, o) == "master"),
        start="weight",
        stream="companion",
        kept_up=True,
    ),
    # What a 16-bit weight has lost by rounding.
    Entry(
        *("compensation", lambda p, o: (p.dtype,), lambda p, o: storage_of(p, o) == "kahan"),
        stream="companion",
        kept_up=True,
    ),
    # The average of the weights.
    Entry("ema", _computed, lambda p, o: o.averaged, start="weight", kept_up=True),
    # SWD: the sum of v over the whole tensor.
    Entry(
        *("exp_avg_sq_sum", lambda p, o: (torch.float64,)),
        lambda p, o: o.method == "swd" and not o.amsgrad,
        start="sum of v",
        shape="number",
        kept_up=True,
    ),
)
_ROW = 1 << 14  # elements that torch sums in one thread
BY_NAME = {entry.name: entry for entry in ENTRIES}
ELEMENTS = tuple(entry.name for entry in ENTRIES if entry.shape == "elements")
MOMENTS = tuple(entry.name for entry in ENTRIES if entry.dtypes is _moments)
KEPT_UP = tuple(entry.name for entry in ENTRIES if entry.kept_up)


# ---- what follows from it ------------------------------------------------------------------------


def begun(state: Any) -> bool:
    """Whether there is a state; what others keep in it makes none."""
    return isinstance(state, dict) and "exp_avg" in state


def own_part(p: Tensor, state: Mapping[str, Any], options: GroupOptions) -> State:
    """The entries that a step needs."""
    return {
        entry.name: state[entry.name]
        for entry in ENTRIES
        if entry.name in state and entry.needed(p, options)
    }


def streams(p: Tensor, state: Mapping[str, Any], options: GroupOptions) -> dict[str, Tensor]:
    """What a step reads and writes of a complete state, by the names of a backend's streams."""
    found = {
        entry.stream or entry.name: layouts.local(state[entry.name])
        for entry in ENTRIES
        if entry.needed(p, options)
    }
    if options.anchor == "ema":
        found["anchor"] = found["ema"]
    return found


def complete(p: Tensor, state: State, options: GroupOptions, given: Tensor | None) -> list[str]:
    """Adds what a step of p needs and the state lacks, and brings all of it into the order of p.

    `given`: p's anchor, if the user gave one. Returns what has been made.
    """
    made = []
    for entry in ENTRIES:
        if not entry.needed(p, options):
            continue
        if entry.name not in state:
            state[entry.name] = _new(entry, p, state, options, given)
            made.append(entry.name)
        elif entry.name == "step" and state["step"].device != _device_of_step(p, options):
            state["step"] = state["step"].to(_device_of_step(p, options))  # capturable was switched
        elif entry.shape == "elements":
            state[entry.name] = layouts.in_order_of(p, state[entry.name])
    return made


class Copies:
    """Entries that began as copies of weights which have not moved since. They follow them, as a
    model may be loaded meanwhile; but what a hook has written in their place stays."""

    def __init__(self) -> None:
        self._entries: list[tuple[Tensor, str, Tensor, int | None]] = []

    def take_note(self, p: Tensor, state: State, names: Sequence[str], o: GroupOptions) -> None:
        """Of those entries of a state that are copies. Given anchors are none."""
        for name in names:
            if BY_NAME[name].start == "weight" and not (name == "anchor" and o.anchor == "given"):
                self._entries.append((p, name, state[name], _version(state[name])))

    def renew(self, states: Mapping[Tensor, State]) -> None:
        entries, self._entries = self._entries, []
        for p, name, x, version in entries:
            if states.get(p, {}).get(name) is x and _version(x) == version:
                x.copy_(p.detach())
                self._entries.append((p, name, x, _version(x)))

    def of(self, name: str) -> set[Tensor]:
        """The parameters whose entries of that name are copies."""
        return {p for p, each, *_ in self._entries if each == name}

    def clear(self) -> None:
        self._entries.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {"entries": [each[:3] for each in self._entries if _version(each[2]) == each[3]]}

    def __setstate__(self, copied: dict[str, Any]) -> None:
        self._entries = [(p, name, x, _version(x)) for p, name, x in copied["entries"]]


def _version(x: Tensor) -> int | None:
    """How often it has been written."""
    here = layouts.local(x)
    return None if here.is_inference() else here._version


def retire(p: Tensor, state: State, before: GroupOptions, options: GroupOptions) -> None:
    """Drops what steps kept up and will not any more: were it needed again, it would be stale."""
    for entry in ENTRIES:
        if entry.kept_up and entry.needed(p, before) and not entry.needed(p, options):
            state.pop(entry.name, None)


def _new(
    entry: Entry, p: Tensor, state: State, options: GroupOptions, given: Tensor | None
) -> Tensor:
    if entry.name == "step":
        wide = torch.get_default_dtype() == torch.float64
        dtype = torch.float64 if wide else torch.float32
        return torch.zeros((), dtype=dtype, device=_device_of_step(p, options))
    if entry.start == "sum of v":
        return sum_of(layouts.local(state["exp_avg_sq"]))
    dtypes = entry.dtypes(p, options)
    weight = p.detach()
    if entry.name == "anchor" and given is not None:
        anchor = torch.empty_like(weight, dtype=fitting(given, dtypes))
        return anchor.copy_(shards.sharded_like(p, given))
    new = torch.zeros_like(weight, memory_format=torch.preserve_format, dtype=dtypes[0])
    return new.copy_(weight) if entry.start == "weight" else new


def _device_of_step(p: Tensor, options: GroupOptions) -> torch.device:
    """As torch.optim: the CPU, where the host reads it in each step, unless that is not to wait."""
    return torch.device("cpu") if options.device_numbers is None else p.device


def sum_of(v: Tensor) -> Tensor:
    """The sum in float64. Rows are summed, then their sums: torch splits the sum of one long row
    between threads, whose number would show in the last digit."""
    v = (torch.view_as_real(v) if v.is_complex() else v).flatten()
    if v.numel() <= _ROW:
        return v.sum(dtype=torch.float64)
    whole = v.numel() // _ROW * _ROW
    return sum_of(v[:whole].view(-1, _ROW).sum(1, dtype=torch.float64)) + sum_of(v[whole:])


def fitting(x: Tensor, dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """x's type if it will do."""
    return x.dtype if x.dtype in dtypes else dtypes[0]


# ---- checks --------------------------------------------------------------------------------------


def check_options(p: Tensor, options: GroupOptions, name: str) -> None:
    """Raise a ValueError for options that p's dtype does not go with."""
    if options.moment_dtype is not None and (p.dtype in WIDE or p.is_complex()):
        raise ValueError(
            f"moment_dtype={options.moment_dtype} is for float32 and 16-bit weights, not for "
            f"{name}, which is {p.dtype}: put it into a group with moment_dtype=None"
        )


def check_group(params: Sequence[Tensor], options: GroupOptions, where: str) -> None:
    if options.master_weights and params and not any(p.dtype in NARROW for p in params):
        raise ValueError(
            f"{where}: master_weights=True keeps float32 copies of 16-bit weights, and none of "
            f"these is one ({params[0].dtype}): leave it out, or set it to False in this group"
        )


def check_anchor(p: Tensor, anchor: Any, name: str) -> None:
    if not isinstance(anchor, Tensor):
        raise ValueError(f"the anchor of {name} must be a tensor, not {type(anchor).__name__}")
    check_alike(anchor, p, anchor_dtypes(p), f"the anchor of {name}", ValueError)


def check_is_state(state: Any, name: str) -> None:
    if not isinstance(state, dict):
        raise ValueError(f"the state of {name} must be a dict, not {type(state).__name__}")


def check_own_part(p: Tensor, state: State, name: str) -> None:
    """A state that holds moments must be a whole one; missing optional entries are made later."""
    if state.keys() & set(BY_NAME) - {"anchor"}:
        missing = [key for key in ("step", "exp_avg", "exp_avg_sq") if key not in state]
        if missing:
            raise ValueError(
                f"the state of {name} lacks {', '.join(missing)} (it has "
                f"{', '.join(map(str, state))}): it belongs to another kind of optimizer or is "
                "damaged"
            )
    for key in BY_NAME:
        if isinstance(state.get(key), Tensor):
            check_has_memory(state[key], p, f"{key} of {name}", ValueError)
    if "exp_avg_sq_sum" in state and not is_number(state["exp_avg_sq_sum"]):
        raise ValueError(
            f"exp_avg_sq_sum of {name} must be a tensor of one number, not "
            f"{state['exp_avg_sq_sum']!r}"
        )
    for key in ELEMENTS:
        if key not in state:
            continue
        x = state[key]
        if not isinstance(x, Tensor):
            raise ValueError(f"{key} of {name} must be a tensor, not {type(x).__name__}")
        if not is_dense(x):
            kind = "nested" if x.is_nested else x.layout
            raise ValueError(f"{key} of {name} must be a dense tensor, not {kind}")
        if x.shape != p.shape:
            raise ValueError(
                f"{key} of {name} has shape {tuple(x.shape)} but the parameter has "
                f"{tuple(p.shape)}: this state belongs to another model"
            )
        if x.is_complex() != p.is_complex():
            raise ValueError(
                f"{key} of {name} is {x.dtype} but the parameter is {p.dtype}: this state "
                "belongs to another model"
            )


def check_saved(p: Tensor, state: State, name: str) -> None:
    """In what is to be loaded every number counts."""
    check_own_part(p, state, name)
    for key in BY_NAME:
        x = state.get(key)
        if not isinstance(x, Tensor):
            continue
        if x.is_meta and not p.is_meta:
            raise ValueError(
                f"{key} of {name} is on the meta device, where there are no numbers: save the "
                "state of an optimizer that has them"
            )
        if key in ELEMENTS and not (x.is_floating_point() or x.is_complex()):
            raise ValueError(
                f"{key} of {name} is {x.dtype}, which moments and weights never are: it belongs to "
                "another kind of optimizer or is damaged"
            )
    if "step" in state:
        check_step(state["step"], name)
    if "exp_avg_sq_sum" in state and not state["exp_avg_sq_sum"].item() >= 0:
        raise ValueError(
            f"exp_avg_sq_sum of {name} is {state['exp_avg_sq_sum'].item()}: a sum of squares is "
            ">= 0; delete it, and it is taken anew"
        )


def check_in_use(
    p: Tensor,
    state: Mapping[str, Any],
    options: GroupOptions,
    name: str,
    active: bool,
    given: bool,
) -> None:
    """In a state in use, the dtypes and devices count as well.

    `active`: the step is to update p; `given`: the user gave an anchor that is not in it yet.
    """
    check_is_state(state, name)
    check_companions(p, state, options, name)
    for key in ("master", "compensation"):
        if key in state and p.dtype not in NARROW:
            raise ValueError(
                f"the state of {name} has {key}, which only weights of 16 bits have, and these are "
                f"{p.dtype}: add what it holds to them if it still counts, and delete "
                f"state[parameter][{key!r}]"
            )
    state = own_part(p, state, options)
    check_own_part(p, state, name)
    if BY_NAME["anchor"].needed(p, options) and "anchor" not in state and not given:
        if begun(state):
            raise ValueError(no_anchor(name))
        if active and options.anchor == "given":
            raise ValueError(
                f"{name} has no anchor: those that were given belong to other parameters, in whose "
                "place it stands; give them for the parameters that are trained, or choose "
                "anchor='initial'"
            )
    if "step" in state:
        step = state["step"]
        if not isinstance(step, Tensor) or step.is_cpu:
            check_step(step, name)
        elif step.device.type != p.device.type:  # to read it there is to wait for the device
            raise RuntimeError(f"step of {name} is on {step.device}: move it to the CPU")
        if not (is_number(step) and step.dtype in BY_NAME["step"].dtypes(p, options)):
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
    for key in ELEMENTS:
        if key in state:
            remedy = "convert it first"
            if key in MOMENTS:
                remedy += f"; moment_dtype, on which that depends, is {options.moment_dtype}"
            dtypes = BY_NAME[key].dtypes(p, options)
            check_alike(state[key], p, dtypes, f"{key} of {name}", RuntimeError, remedy)
    for what, x in written(state, name):
        check_not_lazy(x, what)
        check_writable(x, what)


def no_anchor(name: str) -> str:
    return (
        f"{name} has no anchor: choose one at construction or in add_param_group; it cannot be "
        "switched on later"
    )


def written(state: State, name: str) -> Iterator[tuple[str, Tensor]]:
    """What a step writes of a state, each with its name in messages."""
    for entry in ENTRIES:
        if entry.written and entry.name in state:
            yield f"{entry.name} of {name}", state[entry.name]


def check_step(step: Any, name: str) -> None:
    readable = isinstance(step, Tensor) and is_dense(step) and step.numel() == 1
    number = step.item() if readable else step
    if not (type(number) in (int, float) and number >= 0 and number % 1 == 0):
        raise ValueError(f"the state of {name} has step {step!r}: it must be a whole number >= 0")


def check_companions(p: Tensor, state: Mapping[str, Any], options: GroupOptions, name: str) -> None:
    """What 16-bit weights keep beside them belongs to how they are rounded."""
    if p.dtype not in NARROW or not begun(state):
        return
    for key, option in (("master", "master_weights=True"), ("compensation", "rounding='kahan'")):
        needed = BY_NAME[key].needed(p, options)
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
