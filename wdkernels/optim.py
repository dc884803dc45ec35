"""The optimizers: `torch.optim` conventions around one fused step.

    w weights   g gradient   a anchor, or 0   t the parameter's own step count = 1, 2, 3, ...
    eta = lr    (b1, b2) = betas    lambda_t = weight_decay * decay_schedule at t

    m <- m + (1 - b1)(g - m)         v <- v + (1 - b2)(g^2 - v)
    u  = eta/(1 - b1^t) * m / (sqrt(v)/sqrt(1 - b2^t) + eps)

Each class below says where its decay enters; wdkernels/options.py is the table of what they take,
and wdkernels/state.py that of what they keep of each parameter.

Parameters may be float32, float64, bfloat16, float16 or complex (as pairs of reals), of any shape
and strides. States are named as in torch.optim, and state dicts move both ways between
torch.optim.Adam / AdamW and these classes. torch.amp.GradScaler hands its scale to the step, which
unscales the gradients as it reads them.

A step checks everything before it writes anything: on an exception nothing has changed.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from operator import is_
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from wdkernels import averages, checkpoint, groups, shards, state, steps
from wdkernels.options import (
    GROUP_OPTIONS,
    OPTIMIZER_OPTIONS,
    TORCH_CHOICES,
    AdamOptions,
    AdamSPDOptions,
    AdamWOptions,
    Anchor,
    Group,
    GroupOptions,
    Number,
    ParamsT,
    described,
    refuse_differentiable,
    refuse_unknown,
)
from wdkernels.plan import Request
from wdkernels.telemetry import COLUMNS, Telemetry

_NOTHING = Request()
_OF_A_STEP = ("max_grad_norm", "skip_nonfinite", "telemetry_every")


class _Adam(torch.optim.Optimizer):
    """What the optimizers share: construction, the step, GradScaler, averages and results."""

    _step_supports_amp_scaling: ClassVar[bool] = True  # torch.amp.GradScaler asks
    _method: ClassVar[str]

    _loaded: checkpoint.Loaded | None = None  # while a state dict is being loaded
    max_grad_norm: float | None
    skip_nonfinite: bool
    telemetry_every: int | None
    process_group: Any = None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "_method" in vars(cls) and cls.__doc__:
            cls.__doc__ = f"{cls.__doc__.rstrip()}\n\n    Options:\n\n{described(cls._method)}\n"

    def __init__(
        self,
        params: ParamsT,
        lr: Number,
        betas: tuple[float, float],
        eps: float,
        weight_decay: Number,
        amsgrad: bool,
        **given: Any,
    ) -> None:
        refuse_unknown(self._method, given, type(self).__name__)
        own = {name: given.pop(name, row.default) for name, row in OPTIMIZER_OPTIONS.items()}
        refuse_differentiable(own["differentiable"])
        self._backend = OPTIMIZER_OPTIONS["backend"].check(own["backend"], "backend")
        for name in _OF_A_STEP:
            setattr(self, name, own[name])
        self.process_group = OPTIMIZER_OPTIONS["process_group"].check(
            own["process_group"], "process_group"
        )
        self._run = steps.Run()
        self._check_options_of_a_step()
        anchor = given.get("anchor", "zero")
        if not isinstance(params, (Tensor, dict)):
            entries: list[Any] = list(params)
            params = entries
            heirs = [each for each in entries if isinstance(each, dict) and "anchor" not in each]
            if len(heirs) > 1 and not isinstance(anchor, str):
                raise ValueError("a list of anchors belongs to one group: give each group its own")
        positional = {"lr": lr, "betas": betas, "eps": eps}
        positional |= {"weight_decay": weight_decay, "amsgrad": amsgrad}
        rows = {n: row for n, row in GROUP_OPTIONS.items() if self._method not in row.senseless}
        defaults = {name: row.default_of(self._method) for name, row in rows.items()}
        super().__init__(params, {**defaults, **positional, **given})
        if not isinstance(anchor, str):
            self.defaults["anchor"] = "given"  # those tensors were for the first group

    # ---- groups and their options --------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch.optim does; it may hold its own `anchor`."""
        index = len(self.param_groups)
        if not isinstance(param_group["params"], (Tensor, set)):
            param_group["params"] = list(param_group["params"])
            groups.refuse_duplicates(self.param_groups, param_group["params"])
        super().add_param_group(param_group)
        group = Group.of(self.param_groups.pop(), self._method)
        refuse_differentiable(group.get("differentiable"))
        for key in TORCH_CHOICES:
            group.pop(key, None)
        given = groups.given_anchors(group, index)
        options = self._read(group, index)
        state.check_group(group["params"], options, f"group {index}")
        if options.decay_scale in ("relative_lr", "corrected"):
            group["lr_max"] = options.lr_max  # the lr of now
        self._run.given.update(given)
        self.param_groups.append(group)
        self._run.forget()

    def _read(self, group: Mapping[str, Any], index: int) -> GroupOptions:
        # A host that is not to wait cannot count steps of which only the device knows.
        counted = self.skip_nonfinite or self._run.scaled
        return groups.read(self._method, group, index, counted)

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
        run, request = self._run, self._request()
        run.plan = groups.read_again(self.param_groups, run.known, self._read, run.plan)
        if not steps.take(self._subject(), request):
            return loss
        run.calls += 1
        run.grad_norm = request.grad_norm
        if request.telemetry is not None:
            run.measured = run.calls, request.telemetry, groups.active(self.param_groups)
        return loss

    def _request(self) -> Request:
        """What is asked of this step. Its tensors are new: nobody waits for those of the last."""
        run, options = self._run, tuple(getattr(self, name) for name in _OF_A_STEP)
        if not all(map(is_, options, run.checked)):  # == may wait for a device, or have no answer
            self._check_options_of_a_step()
        # GradScaler sets both for this step, found_inf to the number 0 if there are no gradients.
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if found_inf is not None and not run.scaled:
            run.scaled = True
            run.forget()
        if options == (None, False, None) and grad_scale is None and found_inf is None:
            return _NOTHING
        device = self._device()
        norm = options[:2] != (None, False)
        if self.skip_nonfinite or found_inf is not None:
            before = run.skipped
            if before is None or before.device != device:  # or the weights have moved
                now = torch.zeros((), dtype=torch.int64, device=device)
                run.skipped = now if before is None else before.to(device)
        table = None
        if self.telemetry_every is not None and (run.calls + 1) % self.telemetry_every == 0:
            size = len(groups.active(self.param_groups)), len(COLUMNS)
            table = torch.full(size, math.nan, dtype=torch.float64, device=device)
        return Request(
            grad_scale=_number_on(device, grad_scale),
            found_inf=_number_on(device, found_inf),
            max_grad_norm=OPTIMIZER_OPTIONS["max_grad_norm"].check(options[0], "max_grad_norm"),
            skip_nonfinite=self.skip_nonfinite,
            grad_norm=torch.empty((), dtype=torch.float64, device=device) if norm else None,
            skipped=run.skipped,
            telemetry=table,
        )

    def _check_options_of_a_step(self) -> None:
        options = tuple(getattr(self, name) for name in _OF_A_STEP)
        for name, value in zip(_OF_A_STEP, options, strict=True):
            OPTIMIZER_OPTIONS[name].check(value, name)
        if self.skip_nonfinite is not self._run.checked[1]:
            self._run.forget()  # it decides where steps are counted
        self._run.checked = options

    def _subject(self) -> steps.Subject:
        return steps.Subject(
            *(self._method, self._backend, self.process_group),
            *(self.param_groups, self.state, self._run),
        )

    def _device(self) -> torch.device:
        return groups.first_device(self.param_groups)

    # ---- what a step leaves behind -------------------------------------------------------------

    @property
    def grad_norm(self) -> Tensor | None:
        """The global norm of the last step's gradients, unscaled and before clipping: 0-d, float64,
        on the first parameter's device. None without max_grad_norm and skip_nonfinite."""
        return self._run.grad_norm

    @property
    def skipped_steps(self) -> Tensor:
        """How many calls of `step` were skipped since construction, or since a state dict was
        loaded: because of `skip_nonfinite`, or because a GradScaler found an overflow. 0-d, int64,
        on the first parameter's device."""
        if self._run.skipped is None:
            return torch.zeros((), dtype=torch.int64, device=self._device())
        return self._run.skipped.clone()

    def telemetry(self) -> Telemetry:
        """The quantities of the last measured step, NaN if it was skipped; RuntimeError if there
        was none."""
        if self._run.measured is None:
            raise RuntimeError(
                "no step has been measured yet: construct the optimizer with telemetry_every=n, "
                "and each n-th step is"
            )
        calls, table, parameters = self._run.measured
        return Telemetry(
            names=[name for name, _ in parameters],
            numels=[groups.elements(p) for _, p in parameters],
            method=self._method,
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
        every = {p for *_, p in groups.parameters(self.param_groups)}
        not_moved = self._run.copies.of("ema")
        with ExitStack() as undo:  # all of it, whatever of it fails
            undo.callback(shards.reshard, every)
            shards.reshard(every)
            self._run.swapped = True
            undo.callback(setattr, self._run, "swapped", False)
            for _, _, group, p in groups.parameters(self.param_groups):
                ema = self.state.get(p, {}).get("ema")
                if group["ema_decay"] is None or ema is None or p in not_moved:
                    continue
                averages.swap_in(p, ema, undo)
            yield

    def _refuse_swapped(self, what: str) -> None:
        if self._run.swapped:
            raise RuntimeError(f"{what} in ema_weights(), where weights and averages are exchanged")

    # ---- saving and loading: wdkernels/checkpoint.py ---------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim's; refused in `ema_weights`, where weights and averages are exchanged.

        Groups hold the options that differ from their defaults.
        """
        self._refuse_swapped("state_dict()")
        if self._run.given:  # which would be lost; but either all states exist or none
            options = [self._read(group, i) for i, group in enumerate(self.param_groups)]
            steps.complete(self._subject(), options, groups.learns)
        self._run.copies.renew(self.state)
        found = super().state_dict()
        found["param_groups"] = [
            checkpoint.saved_group(group, self._method) for group in found["param_groups"]
        ]
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class, of torch.optim.Adam / AdamW, or of apex's, Transformer
        Engine's or DeepSpeed's fused Adam (docs/migration.md; where it keeps the lower halves of
        bfloat16 weights, load the model first).

        Tensors are copied. A group's options come from the state dict, as in torch.optim: one that
        was saved with ema_decay=None goes on without averages, and they begin anew, as the weights
        of that moment, if ema_decay is set in the group again. Options that it does not know (a
        torch optimizer's knows neither anchor nor schedule) stay as they are. ValueError, with
        nothing changed, if it does not fit, or if its weight_decay is L2 where this one's is
        decoupled or the other way round.
        """
        self._refuse_swapped("load_state_dict()")
        checkpoint.check_form(state_dict)

        def take(_: torch.optim.Optimizer, final: dict[str, Any]) -> dict[str, Any]:
            target = checkpoint.Target(
                *(type(self).__name__, self._method, self.param_groups, self.state),
                *(self._run.given, self._read, steps.reducer_of(self._subject())),
            )
            self._loaded = checkpoint.merged(target, final)
            return {**final, "state": {}}  # torch would cast, and keep the caller's tensors

        hook = self.register_load_state_dict_pre_hook(take)  # the last: it sees the others' work
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
            self._loaded = None

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_swapped("copying")
        if self.process_group is not None:
            raise RuntimeError(
                "an optimizer with a process_group cannot be copied or pickled, like the group: "
                "set process_group to None first, or take a state_dict"
            )
        own = {name: getattr(self, name) for name in ("_backend", *_OF_A_STEP)}
        unsettled = {"given": self._run.given, "copies": self._run.copies}
        return {**super().__getstate__(), **own, "_unsettled": unsettled}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """torch unpickles this way, and loads a state dict before others' hooks may look at it."""
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # torch's, in the defaults of whatever it loads
        fresh = steps.Run(**state.pop("_unsettled", {}))
        if self._loaded is not None:
            self.state = defaultdict(dict, self._loaded.states)
            self.param_groups = list(self._loaded.groups)
            fresh = steps.Run(given=self._run.given, completed=self._loaded.options)
        run: steps.Run = vars(self).setdefault("_run", fresh)
        vars(run).update(vars(fresh))
        if self._loaded is not None:
            for p in steps.take_note(run, self.state, self._loaded.made):
                if shards.is_shard(p):  # only a step adds up what shards have
                    del self.state[p]["exp_avg_sq_sum"]


def _number_on(device: torch.device, x: Any) -> Tensor | None:
    return None if x is None else torch.as_tensor(x, dtype=torch.float32, device=device)


class Adam(_Adam):
    """Adam with L2 regularisation: the penalty's gradient enters the gradient.

        g <- g + lambda_t (w - a)      before the moments, so m and v see it
        w <- w - u

    lr multiplies the whole step, decay included, and sqrt(v) divides it.

    Source: Kingma & Ba 2014, arXiv 1412.6980; torch.optim.Adam. The module's docstring explains
    the symbols. Raises ValueError or TypeError for bad options, naming them.
    """

    _method = "l2"

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: Number = 0.0,
        amsgrad: bool = False,
        **options: Unpack[AdamOptions],
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, **options)


class AdamW(_Adam):
    """Adam with decoupled weight decay.

        w <- w - d_t (w - a) - u       both from the old w

    d_t is eta lambda_t, or as `decay_scale` says: lr multiplies the decay too.

    Source: Loshchilov & Hutter, arXiv 1711.05101; torch.optim.AdamW. The module's docstring
    explains the symbols. Raises ValueError or TypeError for bad options, naming them.
    """

    _method = "decoupled"

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: Number = 1e-2,
        amsgrad: bool = False,
        **options: Unpack[AdamWOptions],
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, **options)


class AdamSWD(AdamW):
    """Adam with Scheduled (or Stable) Weight Decay: decay in proportion to the effective lr.

        w <- w - d_t / sqrt(V) (w - a) - u
        V  = mean of v/(1 - b2^t) after this step's update (max(v) with amsgrad), over all elements
             of all parameters, in all groups, that have a gradient; V = 0 means no decay

    d_t is AdamW's; lr multiplies the decay. The state also holds sum(v), as `exp_avg_sq_sum` in
    float64: delete it if you edit `exp_avg_sq`, and it is taken anew.

    Source: Xie et al., NeurIPS 2023, arXiv 2011.11152 (there "AdamS"). The module's docstring
    explains the symbols. Raises ValueError or TypeError for bad options, naming them.
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
        **options: Unpack[AdamWOptions],
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
    The default anchor is "initial"; choose "zero" for LoRA and other added weights.

    Source: Tian, Huang & Kira, NeurIPS 2024, arXiv 2411.01713. The module's docstring explains the
    symbols. Raises ValueError or TypeError for bad options, naming them.
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
        **options: Unpack[AdamSPDOptions],
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, anchor=anchor, **options)
