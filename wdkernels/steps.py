"""How a step is taken: by a plan that still holds or by a new one, alone or together with the
processes that hold the other shards or the other tensors of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor

from wdkernels import backends, checks, groups, layouts, reference, shards, state
from wdkernels.options import OPTIMIZER_OPTIONS, GroupOptions
from wdkernels.plan import Phases, Plan, Request

_CHANGED = "tensors changed while the step was being prepared"


@dataclass
class Run:
    """What the steps so far have left behind. Wrappers that copy an optimizer's attributes, such as
    Lightning's, share it."""

    calls: int = 0
    begun: bool = False  # a step that was not only looked at, whether it went on or not
    scaled: bool = False  # a GradScaler has been seen
    checked: tuple[Any, ...] = (None, False, None)  # options of the optimizer, when looked at
    skipped: Tensor | None = None
    grad_norm: Tensor | None = None
    # How many-th call it was, its table, and the parameters with their names.
    measured: tuple[int, Tensor, list[tuple[str, Tensor]]] | None = None
    swapped: bool = False  # weights and averages
    given: dict[Tensor, Tensor] = field(default_factory=dict)  # anchors that are in no state yet
    copies: state.Copies = field(default_factory=state.Copies)
    completed: list[GroupOptions] = field(default_factory=list)  # with which states were, by group

    # Derived from the groups and the state; the next step finds it again.
    plan: Plan | None = None
    reducer: shards.Reducer | None = None  # where parameters are sharded
    known: list[groups.Known] = field(default_factory=list)  # by group
    checked_memory: list[Any] = field(default_factory=list)

    def forget(self) -> None:
        self.plan, self.known, self.checked_memory = None, [], []


class Subject(NamedTuple):
    """The optimizer that takes a step."""

    method: str
    backend: str
    process_group: Any
    groups: list[dict[str, Any]]
    states: dict[Tensor, Any]
    run: Run

    def parameters(self) -> list[tuple[int, int, dict[str, Any], Tensor]]:
        return list(groups.parameters(self.groups))

    def options(self) -> list[GroupOptions]:
        """Those of each group, as they were last read."""
        return [known.options for known in self.run.known]


def take(subject: Subject, request: Request) -> bool:
    """A step; False if it was only looked at. The groups have been read."""
    run = subject.run
    if run.plan is None:
        run.reducer = reducer_of(subject)
    if not run.begun and _is_only_looked_at(subject):
        complete(subject, subject.options(), groups.learns)
        return False
    run.begun = True
    run.copies.renew(subject.states)
    if run.reducer is not None:
        _step_of_shards(subject, run.reducer, request)
    elif subject.process_group is not None and (before := _exchanges(subject, request)):
        others = _others(subject)
        request = request._replace(whole=others.whole)
        others.step(lambda: _begin(subject, request), before, after=False)
    elif not (
        (run.plan is not None and run.plan.step(subject.states, subject.groups, request))
        or _prepared(subject).step(subject.states, subject.groups, request)
    ):
        raise RuntimeError(_CHANGED)
    run.copies.clear()
    return True


def _is_only_looked_at(subject: Subject) -> bool:
    """Whether a first step has lr = 0 and gradients that are 0: so torch.distributed.checkpoint
    makes the states of a new optimizer, which is to change nothing."""
    if any(state.begun(subject.states.get(p)) for *_, p in subject.parameters()):
        return False
    if any(each.lr or each.device_numbers for each in subject.options()):
        return False
    every = (p.grad for *_, p in subject.parameters())
    gradients = [each for each in every if each is not None]
    nothing = bool(gradients) and not any(layouts.local(g).any() for g in gradients)
    if subject.run.reducer is not None:
        return subject.run.reducer.agree(nothing)
    return nothing if subject.process_group is None else _others(subject).agree(nothing)


# ---- a plan --------------------------------------------------------------------------------------


def _begin(subject: Subject, request: Request) -> Phases:
    """A step in phases."""
    plan = subject.run.plan
    phases = None if plan is None else plan.begin(subject.states, subject.groups, request)
    if phases is None:
        phases = _prepared(subject).begin(subject.states, subject.groups, request)
    if phases is None:
        raise RuntimeError(_CHANGED)
    return phases


def _prepared(subject: Subject) -> Plan:
    """A plan for a new set of tensors; eager formulas have none that lasts."""
    run, options = subject.run, subject.options()
    run.checked_memory = groups.check(
        *(subject.groups, subject.states, options, run.given, run.checked_memory)
    )
    backend = _chosen(subject)
    for i, _, _, p in subject.parameters():  # the first thing written, so after all checks
        if i < len(run.completed) and p in subject.states:
            state.retire(p, subject.states[p], run.completed[i], options[i])

    def takes_part(p: Tensor) -> bool:
        return p.grad is not None or state.begun(subject.states.get(p))

    made = complete(subject, options, takes_part)
    run.completed = options
    if run.reducer is not None:  # which this step adds up
        run.reducer.new_sums.update((p, subject.states[p]["exp_avg_sq_sum"]) for p in made)
    parameters = groups.as_parameters(subject.groups, subject.states, options)
    plan: Plan = backend.Plan(parameters, options, subject.states, subject.groups)
    run.plan = None if backend is reference else plan
    return plan


def _chosen(subject: Subject) -> ModuleType:
    """The backend."""
    learning = [layouts.local(p) for *_, p in subject.parameters() if groups.learns(p)]
    return backends.chosen(subject.backend, learning)


# ---- states --------------------------------------------------------------------------------------


def complete(
    subject: Subject, options: Sequence[GroupOptions], wanted: Callable[[Tensor], bool]
) -> list[Tensor]:
    """Completes states. Returns the parameters whose sum of v has been taken of what they have."""
    made = []
    for i, _, _, p in subject.parameters():
        if wanted(p):
            given = subject.run.given.pop(p, None)
            names = state.complete(p, subject.states[p], options[i], given)
            made.append((p, names, options[i]))
    return take_note(subject.run, subject.states, made)


def take_note(
    run: Run,
    states: Mapping[Tensor, Any],
    made: Iterable[tuple[Tensor, list[str], GroupOptions]],
) -> list[Tensor]:
    """Copies of weights follow them until they move. Returns whose sum of v is new, and not 0."""
    summed = []
    for p, names, options in made:
        run.copies.take_note(p, states[p], names, options)
        if "exp_avg_sq_sum" in names and "exp_avg_sq" not in names:
            summed.append(p)
    return summed


# ---- together with other processes ---------------------------------------------------------------


def _step_of_shards(subject: Subject, reducer: shards.Reducer, request: Request) -> None:
    after = subject.method == "spd" or request.telemetry is not None
    try:
        reducer.step(lambda: _begin(subject, request), _exchanges(subject, request), after)
    except BaseException:
        for p in reducer.new_sums:  # not added up
            subject.states[p].pop("exp_avg_sq_sum", None)
        raise
    finally:
        reducer.new_sums.clear()


def _exchanges(subject: Subject, request: Request) -> int:
    """How often processes exchange numbers before the update: the same in all of them."""
    if subject.method != "swd":
        return int(request.needs_norm)
    amsgrad = any(each.amsgrad for each in subject.options())
    if subject.run.plan is None and _chosen(subject) is reference:  # it sums v itself, separately
        squares = request.needs_norm or request.telemetry is not None
        return 1 + (squares if subject.process_group is None else amsgrad)
    return 1 + (amsgrad and request.needs_norm)


def reducer_of(subject: Subject) -> shards.Reducer | None:
    every = subject.parameters()
    if not any(shards.is_shard(p) for *_, p in every):
        return None
    if subject.process_group is not None:
        raise ValueError(
            "process_group is for tensors that do not know that others hold the rest of them, "
            "and some of these parameters are DTensors, which do: leave it out"
        )
    named = [(checks.name_of(group, i, k), p) for i, k, group, p in every]
    reducer = shards.Reducer(named, sums_of_v=subject.method == "swd")
    return reducer if reducer else None


def _others(subject: Subject) -> shards.Others:
    """The processes that hold the other tensors of the model."""
    check = OPTIMIZER_OPTIONS["process_group"].check

    def parts() -> list[shards.Part]:
        if subject.method != "swd":
            return []
        options, states = subject.options(), subject.states
        return [
            shards.Part(groups.elements(p), options[i].beta2, options[i].amsgrad, states[p])
            for i, _, _, p in subject.parameters()
            if p.grad is not None
        ]

    device = groups.first_device(subject.groups)
    return shards.Others(check(subject.process_group, "process_group"), device, parts)
