"""The optimizers: `torch.optim` conventions around one fused step.

    w weights   g gradient   a anchor, or 0   t the parameter's own step count = 1, 2, 3, ...
    eta = lr    (b1, b2) = betas    lambda_t = weight_decay * decay_schedule at t

    m <- m + (1 - b1)(g - m)         v <- v + (1 - b2)(g^2 - v)
    u  = eta/(1 - b1^t) * m / (sqrt(v)/sqrt(1 - b2^t) + eps)

Each class below says where its decay enters. All of them take, like torch.optim.Adam:

    lr, betas, eps, weight_decay
                 numbers >= 0, betas below 1; 0-d tensors on the CPU count as such, and are read
                 at each step
    amsgrad      max(v) over the steps so far takes v's place in u (Reddi et al. 2018)
    maximize     ascent: g is negated first
    capturable   for CUDA graphs: steps are counted on the GPU, and lr and weight_decay, if they are
                 tensors there, are read by each replay
    anchor       what weights decay to: "zero"; "initial", their values at construction; or a list
                 of tensors, one for each parameter of the group, copied (L2-SP, arXiv 1802.01483)
    decay_schedule   plain data from wdkernels.schedules, or None

and of weights of 16 bits, which a step computes in float32 (docs/methods.md):

    rounding     how they are stored: "stochastic", unbiased, by random bits that depend on seed,
                 step, parameter and element alone; "kahan", what is lost is kept in a second
                 tensor, `compensation`; "nearest", which loses small steps and most of the decay
    master_weights   a float32 copy of them in the state is what is updated
    moment_dtype     None: moments are float32, or of the weights' type if that is wider; or
                 torch.bfloat16, always rounded stochastically
    seed         an int in [0, 2^32) for all that is stochastic

    ema_decay    k in [0, 1], or a schedule of it: the state holds an average of the weights,
                 ema <- k ema + (1 - k) w after each step, which `ema_weights` swaps in

All of these may differ between param groups. These are the whole optimizer's:

    max_grad_norm    the gradients' global norm is clipped to it, as by
                 torch.nn.utils.clip_grad_norm_, but they are not written; "global" is what this
                 optimizer sees: all shards of DTensors, but of other shardings its own only
    skip_nonfinite   a step whose gradients have no finite norm changes nothing, but is counted in
                 `skipped_steps`
    telemetry_every  n: each n-th call of `step` is measured, for `telemetry`, counted from
                 construction or load_state_dict
    backend      "auto", "native", "triton" or "eager"; what can't be had is a ValueError

Parameters may be float32, float64, bfloat16, float16 or complex (as pairs of reals), of any shape
and strides. States are named as in torch.optim, and state dicts move both ways between
torch.optim.Adam / AdamW and these classes. torch.amp.GradScaler hands its scale to the step, which
unscales the gradients as it reads them.

A step checks everything before it writes anything: on an exception nothing has changed.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from operator import is_, itemgetter
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias, TypedDict

import torch
from torch import Tensor

from wdkernels import checks, layouts, native, reference, storage, triton_backend
from wdkernels.coefficients import SENSELESS, Hyper, from_group, max_norm
from wdkernels.plan import Parameter, Plan, Request
from wdkernels.schedules import Schedule
from wdkernels.telemetry import COLUMNS, Telemetry

if TYPE_CHECKING:
    from typing_extensions import Unpack

ParamsT: TypeAlias = "Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]"
Number: TypeAlias = "float | Tensor"
Anchor: TypeAlias = "Literal['zero', 'initial'] | Sequence[Tensor]"


class Common(TypedDict, total=False):
    """Keyword options of every optimizer; the module's docstring explains them."""

    maximize: bool
    capturable: bool
    decay_schedule: Schedule | None
    rounding: str
    master_weights: bool
    moment_dtype: torch.dtype | None
    seed: int
    ema_decay: float | Schedule | None
    max_grad_norm: float | None
    skip_nonfinite: bool
    telemetry_every: int | None
    backend: str


class Anchored(Common, total=False):
    """And those of every optimizer but AdamSPD, whose default anchor is another."""

    anchor: Anchor


class Decoupled(Anchored, total=False):
    """Keyword options of AdamW and AdamSWD; AdamW's docstring explains them."""

    decay_scale: str
    lr_max: float | None
    cautious: bool


_MODULES: dict[str, ModuleType] = {"native": native, "triton": triton_backend}  # the best one first
_BACKENDS = ("auto", *_MODULES, "eager")
_COMMON = (
    *("lr", "betas", "eps", "weight_decay", "amsgrad"),
    *("maximize", "capturable", "anchor", "decay_schedule"),
    *("rounding", "master_weights", "moment_dtype", "seed", "ema_decay"),
)
_OF_THE_WHOLE = ("max_grad_norm", "skip_nonfinite", "telemetry_every")
_NUMBERS = ("lr", "betas", "eps", "weight_decay")
_NO_STATE_DICT = (
    "this is not the state_dict of an optimizer, which holds 'state' and 'param_groups'"
)
_NOTHING = Request()
_TORCH_CHOICES = ("foreach", "fused", "differentiable", "decoupled_weight_decay")
_OURS = (*storage.COPIES, "exp_avg_sq_sum")  # entries that each step brings up to date


class _Adam(torch.optim.Optimizer):
    """What the optimizers share: groups, state, state dicts and the choice of a backend."""

    _step_supports_amp_scaling: ClassVar[bool] = True  # torch.amp.GradScaler asks
    _method: ClassVar[str]
    _own: ClassVar[tuple[str, ...]] = ()  # options that not all optimizers have

    max_grad_norm: float | None
    skip_nonfinite: bool
    telemetry_every: int | None

    _plan: Plan | None
    _hypers: dict[int, Hyper]  # by group, in order
    _seen: dict[int, Any]  # the values they were made from
    _checked_memory: list[Any]
    _calls: int
    _scaled: bool  # a GradScaler has been seen
    _checked: tuple[Any, Any, Any]  # the whole optimizer's options, when they were looked at
    _skipped: Tensor | None
    _provisional: list[tuple[Tensor, str]]  # copies of weights that may not have arrived yet
    _grad_norm: Tensor | None
    # How many-th call it was, its table, and the parameters' names, tensors and methods.
    _measured: tuple[int, Tensor, list[tuple[str, Tensor, str]]] | None
    _swapped: bool  # weights and averages
    _values: Callable[[dict[str, Any]], tuple[Any, ...]]

    def __init__(
        self,
        params: ParamsT,
        lr: Number,
        betas: tuple[float, float],
        eps: float,
        weight_decay: Number,
        amsgrad: bool,
        *,
        maximize: bool = False,
        capturable: bool = False,
        anchor: Anchor = "zero",
        decay_schedule: Schedule | None = None,
        rounding: str = "stochastic",
        master_weights: bool = False,
        moment_dtype: torch.dtype | None = None,
        seed: int = 0,
        ema_decay: float | Schedule | None = None,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        telemetry_every: int | None = None,
        backend: str = "auto",
        own: Mapping[str, Any] = MappingProxyType({}),
        **unknown: Any,
    ) -> None:
        for option in unknown:
            if reason := SENSELESS.get((self._method, option)):
                raise ValueError(f"{option} makes no sense for {type(self).__name__}: {reason}")
            if option in _TORCH_CHOICES:
                raise TypeError(f"leave {option} out: every step is fused, `backend` says by what")
            raise TypeError(f"{type(self).__name__} has no option {option!r}")
        if backend not in _BACKENDS:
            known = ", ".join(map(repr, _BACKENDS))
            raise ValueError(f"unknown backend {backend!r}; there are {known}")
        self._backend = backend
        self.max_grad_norm = max_grad_norm
        self.skip_nonfinite = skip_nonfinite
        self.telemetry_every = telemetry_every
        self._start()
        self._check_whole()
        if not isinstance(params, (Tensor, dict)):
            entries: list[Any] = list(params)
            params = entries
            heirs = [each for each in entries if isinstance(each, dict) and "anchor" not in each]
            if len(heirs) > 1 and not isinstance(anchor, str):
                raise ValueError("a list of anchors belongs to one group: give each group its own")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "capturable": capturable,
            "anchor": anchor,
            "decay_schedule": decay_schedule,
            "rounding": rounding,
            "master_weights": master_weights,
            "moment_dtype": moment_dtype,
            "seed": seed,
            "ema_decay": ema_decay,
        }
        super().__init__(params, {**defaults, **own})
        if not isinstance(anchor, str):
            self.defaults["anchor"] = "given"  # those tensors were for the first group

    # ---- groups and hyper-parameters -----------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch.optim does; it may hold its own `anchor`."""
        index = len(self.param_groups)
        if not isinstance(param_group["params"], (Tensor, set)):
            param_group["params"] = list(param_group["params"])
            self._refuse_duplicates(param_group["params"], index)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._adopt(group, index)
        except Exception:
            self.param_groups.pop()
            raise
        self._forget()

    def _refuse_duplicates(self, params: Sequence[Any], index: int) -> None:
        seen = {
            id(p): checks.name_of(group, i, k)
            for i, group in enumerate(self.param_groups)
            for k, p in enumerate(group["params"])
        }
        for k, item in enumerate(params):
            named = isinstance(item, tuple)
            name = checks.name_of({"param_names": {k: item[0]}} if named else {}, index, k)
            p = item[1] if named else item
            if id(p) in seen:
                raise ValueError(f"{name} is {seen[id(p)]} once more: pass each parameter once")
            seen[id(p)] = name

    def _adopt(self, group: dict[str, Any], index: int) -> None:
        """Check a new group and record its anchors."""
        params = group["params"]
        names = [checks.name_of(group, index, k) for k in range(len(params))]
        for p, name in zip(params, names, strict=True):
            checks.check_parameter(p, name)

        anchors: Iterable[Any] | None = None
        anchor = group["anchor"]
        if anchor == "initial":
            anchors = params
        elif isinstance(anchor, Iterable) and not isinstance(anchor, (str, Tensor)):
            anchors = list(anchor)
            if len(anchors) != len(params):
                raise ValueError(
                    f"group {index}: anchor holds {len(anchors)} tensors for {len(params)} "
                    "parameters: give one for each, in the same order"
                )
            for p, a, name in zip(params, anchors, names, strict=True):
                checks.check_anchor(p, a, name)
            group["anchor"] = "given"
        elif anchor != "zero":
            raise ValueError(
                f"group {index}: anchor must be 'zero', 'initial' or a list of tensors, one for "
                f"each parameter of the group, not {anchor!r}"
            )
        hyper = self._hyper(group, index)
        storage.check_group(params, hyper, f"group {index}")
        if "lr_max" in group:
            group["lr_max"] = hyper.lr_max
        if anchors is not None:
            for p, anchor in zip(params, anchors, strict=True):
                # A copy: the tensors may be live parameters.
                dtype = _fitting(anchor, storage.anchor_dtypes(p))
                self.state[p]["anchor"] = torch.empty_like(p, dtype=dtype).copy_(anchor.detach())
                self._complete_state(p, hyper, provisional=True)

    def _hyper(self, group: dict[str, Any], index: int) -> Hyper:
        # A host that is not to wait cannot count steps of which only the device knows.
        counted = (self.skip_nonfinite or self._scaled) and any(p.is_cuda for p in group["params"])
        try:
            hyper = from_group(self._method, group, counted)
        except ValueError as error:
            raise ValueError(f"group {index}: {error}") from None
        for k, p in enumerate(group["params"]):
            storage.check(p, hyper, checks.name_of(group, index, k))
        if group["capturable"] and any(not p.is_cuda for p in group["params"]):
            raise ValueError(
                f"group {index}: capturable=True is for parameters on a GPU, in CUDA graphs"
            )
        return hyper

    def _refresh_hypers(self) -> None:
        """Read the groups again; costs little where nothing has changed."""
        if len(self._hypers) not in (0, len(self.param_groups)):
            self._forget()
        hypers: dict[int, Hyper] = {}
        seen: dict[int, Any] = {}
        for index, group in enumerate(self.param_groups):
            values = self._values(group)
            try:
                if values == self._seen.get(index):
                    continue
            except (RuntimeError, ValueError):
                pass  # an array of several numbers, which the next line refuses
            hypers[index] = self._hyper(group, index)
            # Copied, as lists and schedules may be edited in place. A tensor is read each time.
            tensors = any(isinstance(value, Tensor) for value in values)
            seen[index] = None if tensors else copy.deepcopy(values)

        if self._plan is not None:
            if any(new.streams != self._hypers[index].streams for index, new in hypers.items()):
                self._plan = None
            else:
                for index, new in hypers.items():
                    self._plan.set_hyper(index, new)
        self._hypers.update(hypers)
        self._seen.update(seen)

    # ---- the step ------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step for every parameter that has a gradient.

        Returns what `closure` returned, which is called first, with gradients enabled.
        """
        try:
            return self._step(closure)
        except BaseException:
            # A GradScaler takes back what it has set for this step only if the step returns. What
            # it left would unscale steps without it, and those with it a second time.
            if "found_inf" in vars(self):
                for name in ("grad_scale", "found_inf"):
                    vars(self).pop(name, None)
            raise

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        self._refuse_swapped("step()")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        request = self._request()
        self._refresh_hypers()
        if self._plan is None or not self._plan.step(self.state, self.param_groups, request):
            self._step_anew(request)
        self._calls += 1
        self._grad_norm = request.grad_norm
        if request.telemetry is not None:
            self._measured = self._calls, request.telemetry, self._active_parameters()
        return loss

    def _request(self) -> Request:
        """What is asked of this step. Its tensors are new: nobody waits for those of the last."""
        options = self.max_grad_norm, self.skip_nonfinite, self.telemetry_every
        if not all(map(is_, options, self._checked)):  # == may wait for a device, or have no answer
            self._check_whole()
        # GradScaler sets both for this step, found_inf to the number 0 if there are no gradients.
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if found_inf is not None and not self._scaled:
            self._scaled = True
            self._forget()
        if options == (None, False, None) and grad_scale is None and found_inf is None:
            return _NOTHING
        device = self._device()
        norm = options[:2] != (None, False)
        if self.skip_nonfinite or found_inf is not None:
            before = self._skipped
            if before is None or before.device != device:  # or the weights have moved
                now = torch.zeros((), dtype=torch.int64, device=device)
                self._skipped = now if before is None else before.to(device)
        table = None
        if self.telemetry_every is not None and (self._calls + 1) % self.telemetry_every == 0:
            size = len(self._active_parameters()), len(COLUMNS)
            table = torch.full(size, math.nan, dtype=torch.float64, device=device)
        return Request(
            grad_scale=_number_on(device, grad_scale),
            found_inf=_number_on(device, found_inf),
            max_grad_norm=max_norm(self.max_grad_norm),
            skip_nonfinite=self.skip_nonfinite,
            grad_norm=torch.empty((), dtype=torch.float64, device=device) if norm else None,
            skipped=self._skipped,
            telemetry=table,
        )

    def _check_whole(self) -> None:
        """The options of the whole optimizer; ValueError names the one that is wrong."""
        max_norm(self.max_grad_norm)
        if not isinstance(self.skip_nonfinite, bool):
            raise ValueError(f"skip_nonfinite must be True or False, not {self.skip_nonfinite!r}")
        every = self.telemetry_every
        if every is not None and (type(every) is not int or every < 1):
            raise ValueError(f"telemetry_every must be None or an int >= 1, not {every!r}")
        if self.skip_nonfinite is not self._checked[1]:
            self._forget()  # it decides where steps are counted
        self._checked = self.max_grad_norm, self.skip_nonfinite, self.telemetry_every

    def _active_parameters(self) -> list[tuple[str, Tensor, str]]:
        """Name, parameter and method of those that have a gradient. No two have the same name."""
        given = Counter(x for group in self.param_groups for x in group.get("param_names", ()))
        parameters = []
        for i, k, group, p in self._places():
            name = group["param_names"][k] if "param_names" in group else str(k)
            if p.grad is not None:
                parameters.append((name if given[name] == 1 else f"{i}.{name}", p, self._method))
        return parameters

    def _step_anew(self, request: Request) -> None:
        """The step of a new set of tensors, or of a backend that keeps no plan."""
        groups = self._checked_groups()
        backend = self._choose([p for group in self.param_groups for p in group["params"]])
        self._renew()  # the first thing written, so after all checks
        self._provisional = []
        for i, _, _, p in self._places():
            if self.state.get(p):
                self._complete_state(p, self._hypers[i])
        for group in groups:
            group.states.extend(self._complete_state(p, group.hyper) for p in group.params)
        if backend is None:
            groups = [group._replace(hyper=group.hyper.read()) for group in groups]
            reference.step(groups, request)
            return
        plan: Plan = backend.Plan(
            [
                Parameter(p, self.state.get(p) or None, i, checks.name_of(group, i, k), index)
                for index, (i, k, group, p) in enumerate(self._places())
            ],
            list(self._hypers.values()),
            self.state,
            self.param_groups,
        )
        if not plan.step(self.state, self.param_groups, request):
            raise RuntimeError("tensors changed while the step was being prepared")
        self._plan = plan

    def _device(self) -> torch.device:
        """Where the numbers of the whole step stand: that of the first parameter."""
        return next((p.device for *_, p in self._places()), torch.device("cpu"))

    def _places(self) -> Iterator[tuple[int, int, dict[str, Any], Tensor]]:
        """Every parameter, with its group and its place there."""
        for i, group in enumerate(self.param_groups):
            for k, p in enumerate(group["params"]):
                yield i, k, group, p

    def _choose(self, params: Sequence[Tensor]) -> ModuleType | None:
        """The backend that updates these parameters; None for the eager formulas."""
        for name, module in _MODULES.items():
            if self._backend not in (name, "auto"):
                continue
            refusal = module.refuses(params)
            if refusal is None:
                return module
            if self._backend == name:
                raise ValueError(f"backend {name!r} can't be had: {refusal}; try backend='auto'")
        return None

    def _checked_groups(self) -> list[reference.Group]:
        """The parameters that have a gradient, after a look at everything a step relies on."""
        tensors, names = [], []
        groups = [reference.Group(hyper, [], [], [], []) for hyper in self._hypers.values()]
        for index, (i, k, group, p) in enumerate(self._places()):
            name = checks.name_of(group, i, k)
            state = self.state.get(p, {})
            checks.check_parameter(p, name)
            checks.check_gradient(p, name)
            checks.check_live_state(p, state, self._hypers[i], name)
            if layouts.has_memory(p):
                for what, x in ((name, p), *checks.written(state, name)):
                    tensors.append(x)
                    names.append(what)
            if p.grad is None:
                continue
            groups[i].params.append(p)
            groups[i].grads.append(p.grad)
            groups[i].indices.append(index)
        memory = [(x.data_ptr(), x.shape, x.stride()) for x in tensors]
        if memory != self._checked_memory:
            checks.check_memory(tensors, names)
            self._checked_memory = memory
        return groups

    def _complete_state(self, p: Tensor, hyper: Hyper, provisional: bool = False) -> dict[str, Any]:
        """A parameter's state, made what a step needs.

        `provisional`: before a step; a model's own checkpoint may be loaded before the first one.
        """
        state: dict[str, Any] = self.state[p]
        _place_step(state, p, hyper)
        _drop_what_is_not_kept_up(state, hyper)
        copies = _add_what_is_missing(state, p, hyper)
        if provisional:
            self._provisional += [(p, key) for key in copies]
        return state

    def _renew(self) -> None:
        """Copies of weights from before the first step: a model may have been loaded since."""
        for p, key in self._provisional:
            if key in self.state.get(p, {}):
                self.state[p][key].copy_(p.detach())

    # ---- what a step leaves behind -------------------------------------------------------------

    @property
    def grad_norm(self) -> Tensor | None:
        """The global norm of the last step's gradients, unscaled and before clipping: 0-d, float64,
        on the first parameter's device. None without max_grad_norm and skip_nonfinite."""
        return self._grad_norm

    @property
    def skipped_steps(self) -> Tensor:
        """How many calls of `step` were skipped since construction, or since a state dict was
        loaded: because of `skip_nonfinite`, or because a GradScaler found an overflow. 0-d, int64,
        on the first parameter's device."""
        if self._skipped is None:
            return torch.zeros((), dtype=torch.int64, device=self._device())
        return self._skipped.clone()

    def telemetry(self) -> Telemetry:
        """The quantities of the last measured step, NaN if it was skipped; RuntimeError if there
        was none."""
        if self._measured is None:
            raise RuntimeError(
                "no step has been measured yet: construct the optimizer with telemetry_every=n, "
                "and each n-th step is"
            )
        calls, table, parameters = self._measured
        return Telemetry(
            names=[name for name, _, _ in parameters],
            numels=[p.numel() * (2 if p.is_complex() else 1) for _, p, _ in parameters],
            methods=[method for _, _, method in parameters],
            table=table,
            step=calls,
        )

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """In here the parameters have the values of their averages; afterwards their own again.

            with opt.ema_weights():
                evaluate(model)

        Values are exchanged in place, a parameter at a time. Weights of 16 bits, whose averages
        are float32, are set aside meanwhile, 2 bytes each: they come back as they were, whatever
        has been done to them since the last step, which master weights would not know. A parameter
        that has not been updated yet stays as it is. Neither `step` nor `state_dict` can be called
        in here.
        """
        self._refuse_swapped("ema_weights()")
        if all(group["ema_decay"] is None for group in self.param_groups):
            raise RuntimeError("there are no averages: construct the optimizer with ema_decay")
        provisional = {p for p, key in self._provisional if key == "ema"}
        with ExitStack() as undo:  # all of it, whatever of it fails
            self._swapped = True
            undo.callback(setattr, self, "_swapped", False)
            for _, _, group, p in self._places():
                ema = self.state.get(p, {}).get("ema")
                if group["ema_decay"] is None or ema is None or p in provisional:
                    continue
                if p.dtype == ema.dtype:
                    _exchange(p, ema)
                    undo.callback(_exchange, p, ema)
                else:
                    undo.callback(_write, p, p.detach().clone())
                    _write(p, ema)
            yield

    def _refuse_swapped(self, what: str) -> None:
        if self._swapped:
            raise RuntimeError(f"{what} in ema_weights(), where weights and averages are exchanged")

    # ---- saving and loading --------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim's; refused in `ema_weights`, where weights and averages are exchanged."""
        self._refuse_swapped("state_dict()")
        self._renew()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class or of torch.optim.Adam / AdamW.

        Tensors are copied. A group's options come from the state dict, as in torch.optim: one that
        was saved with ema_decay=None goes on without averages, and they begin anew, as the weights
        of that moment, if ema_decay is set in the group again. Options that it does not know (a
        torch optimizer's knows neither anchor nor schedule) stay as they are. ValueError, with
        nothing changed, if it does not fit, or if its weight_decay is L2 where this one's is
        decoupled or the other way round.
        """
        self._refuse_swapped("load_state_dict()")
        if not isinstance(state_dict, dict):
            raise ValueError(f"{_NO_STATE_DICT}; it is a {type(state_dict).__name__}")
        loaded: dict[str, Any] = {}

        def check(_: torch.optim.Optimizer, final: dict[str, Any]) -> None:
            self._check_state_dict(final)
            loaded.update(final)

        before_groups = [dict(group) for group in self.param_groups]
        before_state = {p: dict(state) for p, state in self.state.items()}
        hook = self.register_load_state_dict_pre_hook(check)  # the last: it sees the others' work
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()

        for index, (group, before, saved) in enumerate(
            zip(self.param_groups, before_groups, loaded["param_groups"], strict=True)
        ):
            for key in self._foreign(group):
                del group[key]
            for key, value in before.items():
                group.setdefault(key, value)
            group.update(self._of_narrow_weights(before))
            hyper = self._hyper(group, index)
            for p, key in zip(group["params"], saved["params"], strict=True):
                state = dict(loaded["state"].get(key, {}))
                # torch.optim would have carried these along, but not kept them up.
                for entry in _OURS if _by_torch(saved) else ():
                    state.pop(entry, None)
                self._load_state(p, hyper, state, before_state.get(p, {}))

    def _foreign(self, group: dict[str, Any]) -> list[str]:
        """Options of another class; torch's would bind one that loads this one's state later."""
        return [key for key in group if key in _TORCH_CHOICES or (self._method, key) in SENSELESS]

    def _load_state(
        self,
        p: Tensor,
        hyper: Hyper,
        saved: dict[str, Any],
        before: dict[str, Any],
    ) -> None:
        """Copy a saved state; torch would cast and keep the caller's tensors."""
        kept = {"anchor": before["anchor"]} if "anchor" in before and hyper.anchored else {}
        if not saved and not kept:
            return
        state = self.state[p] = {**self.state[p], **kept}
        for entry in _OURS:
            state.pop(entry, None)
        if "step" in saved:
            step = torch.as_tensor(saved["step"], dtype=torch.float32).detach().cpu()
            state["step"] = step.reshape(()).clone()
        wanted = (*storage.entries(p, hyper), "max_exp_avg_sq", "anchor", "ema")
        for key in storage.ALIKE:
            if key in saved and key in wanted:
                dtype = _fitting(saved[key], storage.dtypes_of(key, p, hyper))
                state[key] = saved[key].detach().to(p.device, dtype, copy=True)
        if hyper.method == "swd" and "exp_avg_sq_sum" in saved:
            kept = saved["exp_avg_sq_sum"].detach().to(p.device, torch.float64, copy=True)
            state["exp_avg_sq_sum"] = kept.reshape(())
        if state.get("step") == 0:  # so they are no more than copies
            self._provisional += [(p, key) for key in ("master", "ema") if key in state]
        self._complete_state(p, hyper, provisional=True)

    def _of_narrow_weights(self, group: dict[str, Any]) -> dict[str, Any]:
        """Options that say nothing to a group without such weights, which keeps its own."""
        if any(p.dtype in storage.NARROW for p in group["params"]):
            return {}
        return {key: group[key] for key in ("rounding", "master_weights")}

    def _check_state_dict(self, state_dict: dict[str, Any]) -> None:
        groups, states = state_dict.get("param_groups"), state_dict.get("state")
        if not isinstance(groups, list) or not isinstance(states, dict):
            raise ValueError(
                f"{_NO_STATE_DICT}; it holds {', '.join(map(str, state_dict)) or 'nothing'}"
            )
        if len(groups) != len(self.param_groups):
            raise ValueError(
                f"the state_dict has {len(groups)} param groups, this optimizer "
                f"{len(self.param_groups)}: build it with the groups that were saved"
            )
        checks.check_saved_groups(groups)
        for i, (saved, group) in enumerate(zip(groups, self.param_groups, strict=True)):
            if len(saved["params"]) != len(group["params"]):
                raise ValueError(
                    f"group {i} of the state_dict has {len(saved['params'])} parameters, "
                    f"this optimizer's has {len(group['params'])}: it belongs to another model"
                )
            if missing := [key for key in _NUMBERS if key not in saved]:
                raise ValueError(
                    f"group {i} of the state_dict lacks {', '.join(missing)}: it belongs to "
                    "another kind of optimizer or is damaged"
                )
            merged = {**group, **saved, **self._of_narrow_weights(group), "params": group["params"]}
            for key in self._foreign(merged):
                del merged[key]
            hyper = self._hyper(merged, i)
            if hyper.weight_decay != 0:
                self._check_kind_of_decay(saved, i)
            if any(p.dtype in storage.NARROW for p in group["params"]):
                checks.check_saved_rounding(saved, group, i)
            for k, (p, key) in enumerate(zip(group["params"], saved["params"], strict=True)):
                name = checks.name_of(group, i, k)
                state = states.get(key, {})
                if isinstance(state, dict) and "anchor" in self.state.get(p, {}):
                    state = {"anchor": self.state[p]["anchor"], **state}
                checks.check_saved_state(p, state, hyper, name)
                if "rounding" in saved and not _by_torch(saved):
                    checks.check_kept(p, state, hyper, name)
        known = {key for saved in groups for key in saved["params"]}
        if strays := [repr(key) for key in states if key not in known]:
            raise ValueError(
                f"the state_dict holds a state for {', '.join(strays)}, which is in no group's "
                "params: it is damaged"
            )

    def _check_kind_of_decay(self, saved: dict[str, Any], index: int) -> None:
        """The same number is much for one kind and little for another. SPD takes any."""
        decoupled: bool | None = None
        if _by_torch(saved):
            decoupled = saved.get("decoupled_weight_decay")  # older torch does not say
        elif "decay_scale" in saved or "unmixed" in saved:
            decoupled = "decay_scale" in saved
        place = f"weight_decay of group {index} of the state_dict"
        if decoupled is True and self._method == "l2":
            raise ValueError(
                f"{place} is decoupled, Adam's is L2: load it into AdamW, or set it to 0 there"
            )
        if decoupled is False and self._method in ("decoupled", "swd"):
            raise ValueError(
                f"{place} is L2, {type(self).__name__}'s is decoupled: load it into Adam, or set "
                "it to 0 there"
            )

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_swapped("copying")
        whole = {key: getattr(self, key) for key in ("_backend", "_provisional", *_OF_THE_WHOLE)}
        return {**super().__getstate__(), **whole}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._start()
        self._provisional = state.get("_provisional", [])  # torch loads a state dict this way, too

    def _start(self) -> None:
        """Nothing has been done yet."""
        self._calls = 0
        self._scaled = False
        self._checked = None, False, None
        self._skipped = None
        self._provisional = []
        self._grad_norm = None
        self._measured = None
        self._swapped = False
        self._forget()

    def _forget(self) -> None:
        """Drop what was derived from the groups and the state; the next step finds it again."""
        self._plan = None
        self._hypers = {}
        self._seen = {}
        self._checked_memory = []
        self._values = itemgetter(*_COMMON, *self._own)


def _number_on(device: torch.device, x: Any) -> Tensor | None:
    return None if x is None else torch.as_tensor(x, dtype=torch.float32, device=device)


def _by_torch(group: dict[str, Any]) -> bool:
    """Whether a saved group is of torch.optim, which may have carried our options along."""
    return any(key in group for key in _TORCH_CHOICES)


def _fitting(x: Tensor, dtypes: Sequence[torch.dtype]) -> torch.dtype:
    return x.dtype if x.dtype in dtypes else dtypes[0]


def _place_step(state: dict[str, Any], p: Tensor, hyper: Hyper) -> None:
    """As torch.optim: on the CPU, where the host reads it each step, unless that is not to wait."""
    device = torch.device("cpu") if hyper.live is None else p.device
    if "step" not in state:
        wide = torch.get_default_dtype() == torch.float64
        dtype = torch.float64 if wide else torch.float32
        state["step"] = torch.zeros((), dtype=dtype, device=device)
    elif state["step"].device != device:  # capturable has been switched
        state["step"] = state["step"].to(device)


def _drop_what_is_not_kept_up(state: dict[str, Any], hyper: Hyper) -> None:
    """Options may change in a run; what is needed again later is then made anew."""
    if hyper.ema_decay is None:
        state.pop("ema", None)
    if hyper.amsgrad:
        state.pop("exp_avg_sq_sum", None)


def _add_what_is_missing(state: dict[str, Any], p: Tensor, hyper: Hyper) -> list[str]:
    """Moments of zeros, copies of the weight, SWD's sum of v. Returns which copies it made."""
    missing = [key for key in storage.entries(p, hyper) if key not in state]
    copies = [key for key in missing if key in ("master", "ema")]
    for key in missing:
        dtype, *_ = storage.dtypes_of(key, p, hyper)
        state[key] = torch.zeros_like(p, memory_format=torch.preserve_format, dtype=dtype)
        if key in copies:
            state[key].copy_(p.detach())
    if hyper.method == "swd" and not hyper.amsgrad and "exp_avg_sq_sum" not in state:
        v = state["exp_avg_sq"]
        v = torch.view_as_real(v) if v.is_complex() else v
        state["exp_avg_sq_sum"] = v.sum(dtype=torch.float64)
    return copies


@torch.no_grad()
def _write(to: Tensor, values: Tensor) -> None:
    to.copy_(values)


@torch.no_grad()
def _exchange(p: Tensor, ema: Tensor) -> None:
    before = p.clone()
    p.copy_(ema)
    ema.copy_(before)


class Adam(_Adam):
    """Adam with L2 regularisation: the penalty's gradient enters the gradient.

        g <- g + lambda_t (w - a)      before the moments, so m and v see it
        w <- w - u

    lr multiplies the whole step, decay included, and sqrt(v) divides it.

    unmixed   the moments do not see the penalty: lambda_t (w - a) is added to the bias-corrected m
              in u's numerator instead, still adaptive (the ablation of arXiv 2012.13841). Where a
              gradient stays 0 only eps divides the decay, so keep lr * weight_decay below 2 * eps

    Source: Kingma & Ba 2014, arXiv 1412.6980; torch.optim.Adam. The module's docstring explains
    the common arguments. Raises ValueError or TypeError for bad arguments, naming them.
    """

    _method = "l2"
    _own = ("unmixed",)

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: Number = 0.0,
        amsgrad: bool = False,
        *,
        unmixed: bool = False,
        **common: Unpack[Anchored],
    ) -> None:
        own = {"unmixed": unmixed}
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, own=own, **common)


class AdamW(_Adam):
    """Adam with decoupled weight decay.

        w <- w - d_t (w - a) - u       both from the old w

    decay_scale   "lr"           d_t = eta lambda_t: lr multiplies the decay too
                  "relative_lr"  d_t = (eta/lr_max) lambda_t: only the schedule of lr does (the
                                 original decoupling)
                  "corrected"    d_t = (eta^2/lr_max) lambda_t: AdamC, arXiv 2506.02285
    lr_max        the largest lr of the group's schedule; by default its lr at construction
    cautious      decay only the elements where u (w - a) >= 0 (arXiv 2510.12402)

    Source: Loshchilov & Hutter, arXiv 1711.05101; torch.optim.AdamW. The module's docstring
    explains the common arguments. Raises ValueError or TypeError for bad arguments, naming them.
    """

    _method = "decoupled"
    _own = ("decay_scale", "lr_max", "cautious")

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: Number = 1e-2,
        amsgrad: bool = False,
        *,
        decay_scale: str = "lr",
        lr_max: float | None = None,
        cautious: bool = False,
        **common: Unpack[Anchored],
    ) -> None:
        own = {"decay_scale": decay_scale, "lr_max": lr_max, "cautious": cautious}
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, own=own, **common)


class AdamSWD(AdamW):
    """Adam with Scheduled (or Stable) Weight Decay: decay in proportion to the effective lr.

        w <- w - d_t / sqrt(V) (w - a) - u
        V  = mean of v/(1 - b2^t) after this step's update (max(v) with amsgrad), over all elements
             of all parameters, in all groups, that have a gradient; V = 0 means no decay

    d_t and the arguments are AdamW's; lr multiplies the decay. The state also holds sum(v), as
    `exp_avg_sq_sum` in float64: delete it if you edit `exp_avg_sq`, and it is taken anew.

    Source: Xie et al., NeurIPS 2023, arXiv 2011.11152 (there "AdamS").
    """

    _method = "swd"

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: Number = 5e-4,
        amsgrad: bool = False,
        **options: Unpack[Decoupled],
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, **options)


class AdamSPD(_Adam):
    """Adam with Selective Projection Decay, for fine-tuning: pulls back what runs away.

    Per tensor, with w~ = w - u and g the gradient (negated for maximize):

        if sum(g (w - a)) > 0:
            r = clip((|w~ - a| - |w - a|) / |w~ - a|, 0, 1)        |w~ - a| = 0 means r = 0
            w <- w~ - lambda_t r (w~ - a)
        else:
            w <- w~

    No learning rate in front of lambda_t: weight_decay 1 projects back onto the last distance.
    The anchor is the weights at construction; choose "zero" for LoRA and other added weights.

    Source: Tian, Huang & Kira, NeurIPS 2024, arXiv 2411.01713. The module's docstring explains the
    common arguments. Raises ValueError or TypeError for bad arguments, naming them.
    """

    _method = "spd"

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: Number = 1.0,
        amsgrad: bool = False,
        *,
        anchor: Anchor = "initial",
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, anchor=anchor, **common)
