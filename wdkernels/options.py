"""Every option there is, each in one row: its type, default, check and meaning.

The annotations of the TypedDicts below are the table: a row's type is the static one of the
keyword, its `Option` holds what a running optimizer needs. From them come the keywords that an
optimizer takes, the defaults of its param groups, what is refused and why, what a state dict keeps,
and the help text.
"""

from __future__ import annotations

import math
import numbers
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeAlias, TypedDict

import torch
from torch import Tensor
from typing_extensions import get_type_hints

from wdkernels import schedules
from wdkernels.schedules import Schedule

ParamsT: TypeAlias = "Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]"
Number: TypeAlias = "float | Tensor"
Anchor: TypeAlias = "Literal['zero', 'initial', 'ema'] | Sequence[Tensor]"

METHODS = ("l2", "unmixed", "decoupled", "swd", "spd")
DECAY_SCALES = ("lr", "relative_lr", "corrected", "independent")
ROUNDINGS = ("stochastic", "kahan", "nearest")
MOMENT_DTYPES = (None, torch.float32, torch.bfloat16)
ANCHORS = ("zero", "initial", "ema", "given")  # of a group: given tensors are in the state
BACKENDS = ("auto", "native", "triton", "eager")

# A number that is below 0 by no more than this has been rounded there, as by schedulers that come
# to an end, and counts as 0.
ROUNDED_BELOW_ZERO = 1e-12


# ---- checks: each returns the value made plain, or raises a ValueError that names the option -----


def number(value: Any, name: str, below: float = math.inf) -> float:
    """A finite number >= 0 and < `below`; a tensor of one element counts as one, on the CPU."""
    if type(value) is float and 0.0 <= value < below:
        return value
    if isinstance(value, Tensor):
        if not value.is_cpu:
            raise ValueError(
                f"{name} is a tensor on {value.device}, for which the host would have to wait in "
                "every step: pass a number"
            )
        value = value.item() if value.numel() == 1 else value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):  # numpy's are among them
        raise ValueError(f"{name} must be a number, not {value!r}")
    try:
        plain = float(value)
    except OverflowError:  # an int of hundreds of digits
        plain = math.inf
    if -ROUNDED_BELOW_ZERO < plain < 0:
        return 0.0
    if not 0.0 <= plain < below:  # also refuses NaN
        limit = "finite and >= 0" if below == math.inf else f"in [0, {below:g})"
        raise ValueError(f"{name} must be {limit}, not {value!r}")
    return plain


def pair_of_betas(value: Any, name: str) -> tuple[float, float]:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"betas must be a pair of numbers in [0, 1), not {value!r}")
    return number(value[0], "betas[0]", below=1.0), number(value[1], "betas[1]", below=1.0)


def flag(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, not {value!r}")
    return value


def one_of(known: Sequence[str]) -> Callable[[Any, str], str]:
    def check(value: Any, name: str) -> str:
        if value not in known:
            listed = ", ".join(map(repr, known))
            raise ValueError(f"unknown {name} {value!r}; there are {listed}")
        return str(value)

    return check


def anchor_of_group(value: Any, name: str) -> str:
    if not isinstance(value, str) or value not in ANCHORS:
        raise ValueError(
            "anchor tensors are taken at construction and in add_param_group; in a group it must "
            f"be one of {', '.join(map(repr, ANCHORS))}, not {value!r}"
        )
    return value


def schedule(value: Any, name: str) -> Schedule | None:
    schedules.validate(value)
    found: Schedule | None = value
    return found


def share_that_stays(value: Any, name: str) -> float | Schedule | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        plain = number(value, name)
        if plain > 1:
            raise ValueError(f"{name} must be in [0, 1], not {value!r}")
        return plain
    schedules.validate(value)
    for each in value["factors"] if value["kind"] == "product" else [value]:
        if schedules.largest(each) > 1:
            raise ValueError(f"{name} must stay in [0, 1], which the schedule {each!r} does not")
    return value


def dtype_of_moments(value: Any, name: str) -> torch.dtype | None:
    for dtype in MOMENT_DTYPES:  # state dicts hold its name, which every tool can save
        if value == dtype or (dtype and value == str(dtype).removeprefix("torch.")):
            return dtype
    known = ", ".join(map(str, MOMENT_DTYPES))
    raise ValueError(f"{name} must be one of {known}, not {value!r}")


def seed_of_32_bits(value: Any, name: str) -> int:
    if type(value) is not int or not 0 <= value < 2**32:
        raise ValueError(f"{name} must be an int in [0, 2**32), not {value!r}")
    return value


def bound_of_norm(value: Any, name: str) -> float:
    """A bound of the gradients' norm; none is infinite."""
    if isinstance(value, float) and value == math.inf:
        return value
    return math.inf if value is None else number(value, name)


def interval(value: Any, name: str) -> int | None:
    if value is not None and (type(value) is not int or value < 1):
        raise ValueError(f"{name} must be None or an int >= 1, not {value!r}")
    found: int | None = value
    return found


def group_of_processes(value: Any, name: str) -> Any:
    if value is not None:
        distributed = torch.distributed.is_available()
        if not (distributed and isinstance(value, torch.distributed.ProcessGroup)):
            raise ValueError(
                f"{name} must be None or a torch.distributed.ProcessGroup, such as "
                f"torch.distributed.group.WORLD, not {value!r}"
            )
    return value


# ---- the table -----------------------------------------------------------------------------------


class Option(NamedTuple):
    """What a running optimizer needs to know of an option."""

    default: Any
    check: Callable[[Any, str], Any]
    text: str  # of help(); it begins after the option's name
    streams: bool = False  # whether it decides over the tensors that a step reads and writes
    senseless: Mapping[str, str] = {}
    defaults: Mapping[str, Any] = {}  # of methods that have another

    def default_of(self, method: str) -> Any:
        return self.defaults.get(method, self.default)


_IN_THE_STEP = "with L2 the decay is a part of the step, which lr multiplies as a whole"
_NO_LR = "SPD's pull has no learning rate in front of it"
_NOT_UNMIXED = "it is a variant of L2, which Adam has; this decay is never in m or v"


class Adams(TypedDict):
    """Options of torch.optim.Adam, which may be given by position; each optimizer has defaults."""

    lr: Annotated[Number, Option(1e-3, number, "the learning rate eta")]
    betas: Annotated[
        tuple[float, float], Option((0.9, 0.999), pair_of_betas, "(b1, b2) of m and v")
    ]
    eps: Annotated[float, Option(1e-8, number, "keeps the quotient finite")]
    weight_decay: Annotated[Number, Option(0.0, number, "lambda, before its schedule")]
    amsgrad: Annotated[
        bool,
        Option(
            *(False, flag, "max(v) over the steps so far takes v's place in u (Reddi et al. 2018)"),
            streams=True,
        ),
    ]


class InGroups(TypedDict, total=False):
    """Options that every optimizer has and that may differ between param groups."""

    maximize: Annotated[bool, Option(False, flag, "ascent: g is negated first")]
    capturable: Annotated[
        bool,
        Option(
            *(False, flag),
            "for CUDA graphs: steps are counted on the GPU, and lr and weight_decay, if they are "
            "tensors there, are read by each replay",
            streams=True,
        ),
    ]
    decay_schedule: Annotated[
        Schedule | None,
        Option(None, schedule, "plain data from wdkernels.schedules; multiplies weight_decay"),
    ]
    rounding: Annotated[
        str,
        Option(
            *("stochastic", one_of(ROUNDINGS)),
            'how weights of 16 bits are stored: "stochastic", unbiased, by random bits that depend '
            'on seed, step, parameter and element alone; "kahan", what is lost is kept in a second '
            'tensor, `compensation`; "nearest", which loses small steps and most of the decay',
            streams=True,
        ),
    ]
    master_weights: Annotated[
        bool,
        Option(
            *(False, flag, "a float32 copy of 16-bit weights in the state is what is updated"),
            streams=True,
        ),
    ]
    moment_dtype: Annotated[
        torch.dtype | None,
        Option(
            *(None, dtype_of_moments),
            "None: moments are float32, or of the weights' type if that is wider; torch.bfloat16: "
            "they are rounded stochastically to it",
            streams=True,
        ),
    ]
    seed: Annotated[int, Option(0, seed_of_32_bits, "an int in [0, 2^32) for all that is random")]
    ema_decay: Annotated[
        float | Schedule | None,
        Option(
            *(None, share_that_stays),
            "k in [0, 1], or a schedule of it: the state holds an average of the weights, "
            "ema <- k ema + (1 - k) w after each step, which `ema_weights` swaps in",
            streams=True,
        ),
    ]


class InAnchoredGroups(InGroups, total=False):
    """And of every optimizer but AdamSPD, whose default anchor is another."""

    anchor: Annotated[
        Anchor,
        Option(
            *("zero", anchor_of_group),
            'what weights decay to: "zero"; "initial", the weights before their first step; "ema", '
            "their running average, for which ema_decay must be set; or a list of tensors, one for "
            "each parameter of the group, copied (L2-SP, arXiv 1802.01483)",
            streams=True,
            defaults={"spd": "initial"},
        ),
    ]


class Decoupled(TypedDict, total=False):
    """Options of the decays that act on the weights directly."""

    decay_scale: Annotated[
        str,
        Option(
            *("lr", one_of(DECAY_SCALES)),
            'what multiplies lambda_t in d_t: "lr", eta; "relative_lr", eta/lr_max, so only the '
            'schedule of lr does (the original decoupling); "corrected", eta^2/lr_max (AdamC, '
            'arXiv 2506.02285); "independent", 1',
            senseless={"l2": _IN_THE_STEP, "spd": _NO_LR},
        ),
    ]
    lr_max: Annotated[
        float | None,
        Option(
            *(None, lambda value, name: None if value is None else number(value, name)),
            "the largest lr of the group's schedule; None: the lr with which it was made",
            senseless={"l2": _IN_THE_STEP, "spd": _NO_LR},
        ),
    ]
    cautious: Annotated[
        bool,
        Option(
            *(False, flag, "decay only the elements where u (w - a) >= 0 (arXiv 2510.12402)"),
            senseless={
                "l2": "with L2 the decay is a part of the step it would be compared with",
                "spd": "SPD selects whole tensors by a condition of its own",
            },
        ),
    ]


class Unmixed(TypedDict, total=False):
    """The option of L2 alone."""

    unmixed: Annotated[
        bool,
        Option(
            *(False, flag),
            "the moments do not see the penalty: lambda_t (w - a) is added to the bias-corrected m "
            "in u's numerator instead, still adaptive (the ablation of arXiv 2012.13841). Where a "
            "gradient stays 0 only eps divides the decay, so keep lr * weight_decay below 2 * eps",
            streams=True,
            senseless=dict.fromkeys(("decoupled", "swd", "spd"), _NOT_UNMIXED),
        ),
    ]


class OfTheOptimizer(TypedDict, total=False):
    """Options that hold for all groups together: attributes of the optimizer."""

    max_grad_norm: Annotated[
        float | None,
        Option(
            *(None, bound_of_norm),
            "the gradients' global norm is clipped to it, as by torch.nn.utils.clip_grad_norm_, "
            "but they are not written",
        ),
    ]
    skip_nonfinite: Annotated[
        bool,
        Option(
            *(False, flag),
            "a step whose gradients have no finite norm changes nothing, but is counted in "
            "`skipped_steps`",
        ),
    ]
    process_group: Annotated[
        Any,
        Option(
            *(None, group_of_processes),
            "a torch.distributed.ProcessGroup whose processes each hold other parameters, or parts "
            "of them, as plain tensors (ZeroRedundancyOptimizer, FSDP1): the gradients' norm and "
            "SWD's V are those of all of them. SPD's decisions, telemetry and the numbering of "
            "elements for random bits are of each process's tensors. DTensors need no group",
        ),
    ]
    telemetry_every: Annotated[
        int | None,
        Option(
            *(None, interval),
            "n: each n-th call of `step` is measured, for `telemetry`, counted from construction "
            "or load_state_dict",
        ),
    ]
    backend: Annotated[
        str,
        Option(
            *("auto", one_of(BACKENDS)),
            '"auto", "native", "triton" or "eager"; what can\'t be had is a ValueError',
        ),
    ]
    foreach: Annotated[bool | None, Option(None, lambda value, name: None, "taken and ignored")]
    fused: Annotated[
        bool | None, Option(None, lambda value, name: None, "taken: every step is fused")
    ]
    differentiable: Annotated[
        Literal[False], Option(False, flag, "taken if False: a fused step has no derivative")
    ]


class AdamOptions(InAnchoredGroups, Unmixed, OfTheOptimizer, total=False):
    """Keywords of Adam."""


class AdamWOptions(InAnchoredGroups, Decoupled, OfTheOptimizer, total=False):
    """Keywords of AdamW and AdamSWD."""


class AdamSPDOptions(InGroups, OfTheOptimizer, total=False):
    """Keywords of AdamSPD, beside `anchor`."""


def _rows(*tables: Any) -> dict[str, Option]:
    return {
        name: next(x for x in hint.__metadata__ if isinstance(x, Option))
        for table in tables
        for name, hint in get_type_hints(table, include_extras=True).items()
    }


GROUP_OPTIONS = _rows(Adams, InAnchoredGroups, Decoupled, Unmixed)
OPTIMIZER_OPTIONS = _rows(OfTheOptimizer)
OPTIONS = {**GROUP_OPTIONS, **OPTIMIZER_OPTIONS}

BY_POSITION = tuple(_rows(Adams))
ALWAYS_IN_GROUPS = (*BY_POSITION, "maximize", "capturable")  # as in torch.optim
NUMBERS = ("lr", "betas", "eps", "weight_decay")
OF_NARROW_WEIGHTS = ("rounding", "master_weights")  # say nothing to other weights
ON_A_DEVICE = ("lr", "weight_decay")  # may be tensors that a GPU reads in every step
TORCH_CHOICES = ("foreach", "fused", "differentiable")  # how torch.optim does it, which we know


def described(method: str) -> str:
    """The help text of the options that an optimizer of this method has."""
    wrapped = []
    for name, row in OPTIONS.items():
        if method not in row.senseless:
            text = textwrap.fill(row.text, 78, subsequent_indent=" " * 4, initial_indent=" " * 4)
            wrapped.append(f"    {name}\n{textwrap.indent(text, '    ')}")
    return "\n".join(wrapped)


def refuse_unknown(method: str, given: Iterable[str], optimizer: str) -> None:
    """Raise for a keyword that an optimizer has not."""
    for name in given:
        row = OPTIONS.get(name)
        if row is None:
            raise TypeError(f"{optimizer} has no option {name!r}")
        if reason := row.senseless.get(method):
            raise ValueError(f"{name} makes no sense for {optimizer}: {reason}")


def refuse_differentiable(value: Any) -> None:
    if value:
        raise ValueError(
            "differentiable=True asks for the derivative of a step, which a fused one, in place, "
            "does not have: use torch.optim's"
        )


# ---- a param group -------------------------------------------------------------------------------


class Group(dict[str, Any]):
    """A param group: it holds the options of torch.optim and those that differ from their defaults,
    which it knows for all others. So a loader that looks for each of its keys in a state dict, as
    torch.distributed.checkpoint does, finds them in one of torch.optim or of an earlier release."""

    def __init__(self, options: Iterable[tuple[str, Any]], method: str) -> None:
        super().__init__(options)
        self.method = method  # of the optimizer

    def __missing__(self, name: str) -> Any:
        return GROUP_OPTIONS[name].default_of(self.method)

    def get(self, name: str, default: Any = None) -> Any:
        return super().get(name, default) if name not in GROUP_OPTIONS else self[name]

    def __reduce__(self) -> tuple[Any, ...]:
        return Group, (list(self.items()), self.method)

    @classmethod
    def of(cls, group: Mapping[str, Any], method: str) -> Group:
        """A group without the options that say what is the default anyway."""
        kept = ((k, x) for k, x in group.items() if k in ALWAYS_IN_GROUPS or _says(k, x, method))
        return cls(kept, method)


def _says(name: str, value: Any, method: str) -> bool:
    row = GROUP_OPTIONS.get(name)
    if row is None:
        return True
    default = row.default_of(method)
    return bool(value != default) if type(value) is type(default) else value is not default


class GroupOptions:
    """A group's options, checked and made plain: an attribute for each row of the table.

    And `beta1`, `beta2`; `method`, one of METHODS; `device_numbers`: None where the host counts the
    steps. Else they are counted on the device (for CUDA graphs, and where only it knows whether a
    step is skipped), and those of lr and weight_decay that are tensors there are in this dict.
    """

    method: str
    device_numbers: dict[str, Tensor] | None

    def __init__(self, **values: Any) -> None:
        vars(self).update(values)
        self.beta1, self.beta2 = self.betas

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    @property
    def anchored(self) -> bool:
        return bool(self.anchor != "zero")

    @property
    def averaged(self) -> bool:
        return self.ema_decay is not None

    @property
    def streams(self) -> tuple[object, ...]:
        """What decides over the tensors that a step reads and writes; all else is numbers."""
        values = [getattr(self, name) for name in _STREAMS]
        return (self.method, self.device_numbers is not None, self.averaged, *values)

    def set_number(self, name: str, value: Any) -> dict[str, float]:
        """Takes another value of one of NUMBERS. Returns what has changed, by attribute."""
        plain = GROUP_OPTIONS[name].check(value, name)
        if name == "betas":
            vars(self).update(betas=plain, beta1=plain[0], beta2=plain[1])
            return {"beta1": plain[0], "beta2": plain[1]}
        setattr(self, name, plain)
        return {name: plain}

    def read(self) -> GroupOptions:
        """With the numbers that lie on a device, for which the host waits."""
        waited_for = {name: x.item() for name, x in (self.device_numbers or {}).items()}
        return GroupOptions(**{**self._rows(), **waited_for})

    def replace(self, **changes: Any) -> GroupOptions:
        return GroupOptions(**{**self._rows(), **changes})

    def _rows(self) -> dict[str, Any]:
        return {name: x for name, x in vars(self).items() if name not in ("beta1", "beta2")}


_STREAMS = tuple(n for n, row in GROUP_OPTIONS.items() if row.streams and n != "ema_decay")


def from_group(method: str, group: Mapping[str, Any], on_device: bool = False) -> GroupOptions:
    """A group's options; ValueError names the one that is wrong.

    `on_device`: steps are counted there, whether `capturable` or not.
    """
    for name in group:
        row = GROUP_OPTIONS.get(name)
        if row is not None and (reason := row.senseless.get(method)):
            raise ValueError(f"{name} makes no sense here: {reason}")
    given = {name: group.get(name, row.default_of(method)) for name, row in _GROUP_ROWS}
    # Those of a device are read there, and never waited for.
    tensors = {
        name: x for name in ON_A_DEVICE if isinstance(x := given[name], Tensor) and x.is_cuda
    }
    capturable = flag(given["capturable"], "capturable")
    if tensors and not capturable:
        name, x = next(iter(tensors.items()))
        raise ValueError(
            f"{name} is a tensor on {x.device}, for which the host would have to wait in every "
            "step: pass a number, or capturable=True, and the device reads it"
        )
    plain = {
        name: 0.0 if name in tensors else row.check(given[name], name) for name, row in _GROUP_ROWS
    }
    if plain["master_weights"] and plain["rounding"] == "kahan":
        raise ValueError(
            "master_weights=True and rounding='kahan' each keep what 16-bit weights lose: take one"
        )
    if plain["anchor"] == "ema" and plain["ema_decay"] is None:
        raise ValueError(
            "anchor='ema' decays to the running average of the weights: set ema_decay, which keeps "
            "it"
        )
    if (
        plain["lr_max"] is None
    ):  # only in a group that is being made: so this waits for a device once
        plain["lr_max"] = tensors["lr"].item() if "lr" in tensors else plain["lr"]
    if plain["lr_max"] == 0 and plain["decay_scale"] in ("relative_lr", "corrected"):
        raise ValueError(
            f"decay_scale {plain['decay_scale']!r} divides by lr_max, the largest learning rate of "
            "the group's schedule, which is 0: pass lr_max, or a positive lr at construction"
        )
    return GroupOptions(
        method="unmixed" if plain["unmixed"] else method,
        device_numbers=tensors if capturable or on_device else None,
        **plain,
    )


_GROUP_ROWS = tuple(GROUP_OPTIONS.items())
