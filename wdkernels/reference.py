"""The papers' formulas in eager PyTorch: what the kernels are tested against, and the `eager`
backend for devices that have none.

Written to be read beside the papers. It shares no code with the kernels and is not tuned, but it
runs on any device and takes any floating or complex dtype (complex as pairs of reals), any strides
and any size. The host waits for step counts that are on an accelerator, and for the norm of the
gradients and a GradScaler's numbers where they are asked for. Sums are in float64, which the device
must have. A step is taken in the phases of every backend (wdkernels/plan.py): `reduce` and `decide`
look at line 0 and at SWD's V, `update` is lines 1 to 4, `finish` lines 5 and 6.

    w weights   g gradient   a anchor, or 0   t this parameter's own step count
    eta = lr    lambda_t = weight_decay * schedule(t)   (b1, b2) = betas

    0  g  <- scale g                              see `_decide_scale`; -scale to maximize
    1  g  <- g + lambda_t (w - a)                 l2 only
    2  m  <- m + (1 - b1)(g - m)
       v  <- b2 v + (1 - b2) g^2                  amsgrad: vmax <- max(vmax, v), in v's place below
    3  m_ =  m / (1 - b1^t)                       unmixed: m_ <- m_ + lambda_t (w - a)
       u  =  eta m_ / (sqrt(v) / sqrt(1 - b2^t) + eps)
    4  w  <- w - d_t (w - a) - u                  decoupled: d_t = eta lambda_t, or another scale
                                                  swd: d_t / sqrt(V), V the mean of v / (1 - b2^t)
                                                  cautious: d_t = 0 where u (w - a) < 0
                                                  all others: d_t = 0
    5  w  <- w - lambda_t r (w - a)               spd only, per tensor; see `_projection`
    6  ema <- ema + (1 - k_t)(w - ema)            w as it was stored

All of it is computed in float32, or in float64 for weights as wide. Weights of 16 bits are widened
before and rounded after (`_weight`, `_store_weight`), as are bfloat16's moments (`_store_moments`).

Sources: l2 Kingma & Ba 2014; unmixed the ablation of arXiv 2012.13841; decoupled arXiv 1711.05101;
swd arXiv 2011.11152; spd arXiv 2411.01713; anchor arXiv 1802.01483; cautious arXiv 2510.12402;
decay scales arXiv 1711.05101 ("relative_lr") and arXiv 2506.02285 ("corrected"); clipping Pascanu
et al. 2013, arXiv 1211.5063; stochastic and compensated storage arXiv 2010.06192; master weights
arXiv 1710.03740; averaged weights Polyak & Juditsky 1992, as an exponential average.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wdkernels import layouts, rounding, schedules, shards
from wdkernels.coefficients import decay_scale, ema_decay, mix, random_key
from wdkernels.layouts import Numbering
from wdkernels.options import GroupOptions
from wdkernels.plan import Parameter, Request, in_turn
from wdkernels.state import own_part, storage_of
from wdkernels.sums import SUMS
from wdkernels.telemetry import COLUMNS

State = dict[str, Any]


class Group(NamedTuple):
    """A param group: those of its parameters that have a gradient, and their states, in order."""

    options: GroupOptions
    params: list[Tensor]
    grads: list[Tensor]
    states: list[State]
    indices: list[int]  # positions over all groups
    totals: list[int]  # elements of the whole tensors, of which these may be shards
    numberings: list[Numbering]  # which of them these are


def grouped(parameters: Sequence[Parameter], options: Sequence[GroupOptions]) -> list[Group]:
    """The parameters that have a gradient and a state, by group."""
    groups = [Group(each.read(), [], [], [], [], [], []) for each in options]
    for p in parameters:
        if p.tensor.grad is None or p.state is None:
            continue
        group = groups[p.group]
        group.params.append(layouts.local(p.tensor))
        group.grads.append(shards.gradient_of(p.tensor, p.name))
        own = own_part(p.tensor, p.state, options[p.group])
        group.states.append({name: layouts.local(x) for name, x in own.items()})
        group.indices.append(p.position)
        group.totals.append(p.total)
        group.numberings.append(p.numbering)
    return groups


def step(groups: Sequence[Group], request: Request) -> None:
    """One optimizer step, in place on parameters and states (each state's "step" included).

    To be called under ``torch.no_grad()``, with complete states. Either every group uses "swd" or
    none does, for its V is one number for all of them. A step that is to be skipped writes nothing
    but what the request wants to know.
    """
    in_turn(Step(groups, request))


class Plan:
    """The formulas as a backend. It keeps nothing: a plan is for one step."""

    def __init__(
        self,
        parameters: Sequence[Parameter],
        options: Sequence[GroupOptions],
        state: dict[Tensor, Any],
        param_groups: list[dict[str, Any]],
    ) -> None:
        self._groups = grouped(parameters, options)

    def begin(
        self, state: dict[Tensor, Any], param_groups: list[dict[str, Any]], request: Request
    ) -> Step:
        return Step(self._groups, request)

    def step(
        self, state: dict[Tensor, Any], param_groups: list[dict[str, Any]], request: Request
    ) -> bool:
        step(self._groups, request)
        return True


def refuses(tensors: Sequence[Tensor]) -> str | None:
    """None: the formulas take every tensor."""
    return None


class _Scale(NamedTuple):
    """What gradients are multiplied by as they are read; they are never written."""

    unscale: float  # 1 / the scale of a GradScaler, with which the loss was multiplied
    clip: float


class _Parameter:
    """A parameter with its options, gradient and state, at its own step t."""

    def __init__(self, group: Group, k: int, scale: _Scale) -> None:
        self.options, self.scale = group.options, scale
        self.w, self.g, self.state = group.params[k], group.grads[k], group.states[k]
        self.total, self.numbering = group.totals[k], group.numberings[k]
        self.storage = storage_of(self.w, self.options)
        self.t = int(self.state["step"].item()) + 1
        factor = schedules.factor(self.options.decay_schedule, self.t)
        self.lambda_t: float = self.options.weight_decay * factor
        self.key = rounding.key(random_key(self.options, self.t), group.indices[k])


class Step:
    """One step in phases, to be called in this order; `sums` is what they hand on (plan.Phases)."""

    def __init__(self, groups: Sequence[Group], request: Request) -> None:
        self._request = request
        unscale = 1.0
        if request.grad_scale is not None:
            unscale = request.grad_scale.double().reciprocal().item()
        self._parameters = [
            _Parameter(group, k, _Scale(unscale, 1.0))
            for group in groups
            for k in range(len(group.params))
        ]
        self._normed = request.needs_norm
        self._swd = any(p.options.method == "swd" for p in self._parameters)
        self._squared = self._normed or request.telemetry is not None or request.whole is not None
        self.reductions = self._squared + self._swd  # v is that of the scaled gradients
        self._mean_v: Tensor | None = None
        device = self._parameters[0].w.device if self._parameters else None
        self.sums = torch.zeros(
            len(self._parameters), len(SUMS), dtype=torch.float64, device=device
        )
        self._columns = dict(zip(SUMS, self.sums.unbind(1), strict=True))

    def reduce(self, round: int) -> None:
        """The sums over the gradients: of their squares for the norm, then of SWD's v."""
        if self._squared and round == 0:
            for i, p in enumerate(self._parameters):
                self._columns["gradient2"][i] = _dot(_load(p.g), _load(p.g))
        else:
            for i, p in enumerate(self._parameters):
                g = _gradient(p)
                _, _, v_top = _moments(p, g)
                kept = _is_kept(p)
                self._columns["maximum"][i] = _dot(g, g) if kept else v_top.double().sum()

    def decide(self, round: int) -> bool:
        """False if the step is to be skipped, which is counted."""
        if round == 0 and not self._decide_scale():
            if self._request.skipped is not None:
                self._request.skipped.add_(1)
            return False
        if self._swd and round == self.reductions - 1:
            self._decide_mean_v()
        return True

    def _decide_scale(self) -> bool:
        """The gradients' factors.

            norm = unscale |g|, over all gradients;  clip = min(1, max_grad_norm / (norm + 1e-6))

        as in torch.nn.utils.clip_grad_norm_: an infinite norm makes all finite gradients 0, and one
        that is NaN makes all of them NaN.
        """
        request = self._request
        proceed = request.found_inf is None or request.found_inf.item() == 0
        if not self._normed:
            return proceed
        unscale = self._parameters[0].scale.unscale if self._parameters else 1.0
        squares = self._columns["gradient2"].sum() if request.whole is None else request.whole[0]
        norm = unscale * squares.sqrt().item()
        if request.grad_norm is not None:
            request.grad_norm.fill_(norm)
        clip = 1.0
        if request.max_grad_norm < math.inf:
            clip = request.max_grad_norm / (norm + 1e-6)
            clip = 1.0 if clip > 1 else clip
        for p in self._parameters:
            p.scale = _Scale(unscale, clip)
        return proceed and not (request.skip_nonfinite and not math.isfinite(norm))

    def _decide_mean_v(self) -> None:
        """SWD's V: the mean of this step's v / (1 - b2^t) over all elements of all parameters."""
        parts, count = [], 0
        for p, total in zip(self._parameters, self._columns["maximum"], strict=True):
            b2 = p.options.beta2
            if not p.options.amsgrad:
                kept = p.state["exp_avg_sq_sum"]
                if _is_kept(p):
                    total = b2 * kept.to(total.device) + (1 - b2) * total
                kept.copy_(total)
            parts.append(total / (1 - b2**p.t))
            count += p.total
        if (whole := self._request.whole) is None:
            self._mean_v = torch.stack(parts).sum() / count
        else:
            scale = self._parameters[0].scale
            self._mean_v = shards.mean_v(whole, scale.unscale * scale.clip)

    def update(self) -> None:
        """Lines 1 to 4, and line 6 where line 5 does not come between."""
        for i, p in enumerate(self._parameters):
            p.state["step"] += 1
            self._update(i, p)

    def _update(self, i: int, p: _Parameter) -> None:
        w, a, g = _weight(p), _anchor(p), _gradient(p)
        d = w - a
        u, root, pull = _adam(p, d, g)
        new = w - u
        rate: float | Tensor = p.lambda_t
        if p.options.method in ("decoupled", "swd"):
            rate = _decay_rate(p, w, self._mean_v)
            new, pull = _move(p, w, u, d, rate)
        if p.options.method == "spd":
            stepped = w - u - a
            self._tell(i, alignment=_dot(g, d), stepped_distance2=_dot(stepped, stepped))
            self._tell(i, growth2=_dot(w - u - w, stepped + d), distance2=_dot(d, d))
        if (row := self._row(i)) is not None:
            self._tell(
                i,
                weight2=_dot(w, w),
                update2=_dot(u, u),
                decay2=_dot(pull, pull),
                distance2=_dot(d, d),
            )
            self._tell(i, update_weight=_dot(u, w), rate=(p.options.lr / root).double().sum())
            row[COLUMNS.index("decay")] = rate
        _store_weight(p, new, p.key)
        if p.options.method != "spd":
            _average(p)

    def finish(self) -> None:
        """Line 5, per tensor, and what comes behind it; the rows of telemetry."""
        for i, p in enumerate(self._parameters):
            selected = ratio = torch.zeros(())
            if p.options.method == "spd":
                selected, ratio = self._projection(i)
                w, a = _weight(p), _anchor(p)  # what is pulled is what has been stored
                _store_weight(
                    p,
                    w - (p.lambda_t * ratio).to(w.device, w.dtype) * (w - a),
                    mix(p.key + 1 & 0xFFFFFFFF),
                )
                _average(p)
            if (row := self._row(i)) is not None:
                self._write_row(row, i, p, selected, ratio)

    def _projection(self, i: int) -> tuple[Tensor, Tensor]:
        """Selective Projection Decay of one tensor, w~ = w - u: whether it is selected, and r.

            c = -sum(g (w - a));  where c < 0:
            r = clip((norm(w~ - a) - norm(w - a)) / norm(w~ - a), 0, 1)
            w <- w~ - lambda_t r (w~ - a)

        The difference of the norms is that of their squares over their sum, and the difference of
        the squares is summed directly: subtracting two nearly equal norms loses the digits that
        matter.
        """
        sums = {name: column[i] for name, column in self._columns.items()}
        selected = -sums["alignment"] < 0
        before, after = sums["distance2"].sqrt(), sums["stepped_distance2"].sqrt()
        growth = sums["growth2"] / (after + before)
        r = torch.where(after == 0, 0.0, growth / after).clamp(0, 1)
        return selected, torch.where(selected, r, 0.0)

    def _tell(self, i: int, **sums: Tensor) -> None:
        for name, number in sums.items():
            self._columns[name][i] = number

    def _row(self, i: int) -> Tensor | None:
        return None if self._request.telemetry is None else self._request.telemetry[i]

    def _write_row(
        self, row: Tensor, i: int, p: _Parameter, selected: Tensor, ratio: Tensor
    ) -> None:
        sums = {name: column[i] for name, column in self._columns.items()}
        pulled2 = (p.lambda_t * ratio) ** 2 * sums["stepped_distance2"].to(ratio.device)
        numbers = {
            **{name: sums[name] for name in COLUMNS if name in sums},
            "gradient2": p.scale.unscale**2 * sums["gradient2"],
            "decay2": torch.where(ratio == 0, sums["decay2"].to(ratio.device), pulled2),
            "lr": p.options.lr,
            "selected": selected,
            "ratio": ratio,
            "mean_v": 0.0 if self._mean_v is None else self._mean_v,
        }
        for name, value in numbers.items():
            row[COLUMNS.index(name)] = value


# ---- the rule ------------------------------------------------------------------------------------


def _adam(p: _Parameter, d: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lines 1 to 3; the moments are stored. Returns u, what divides it, what the decay adds to w, u
    or g."""
    o, pull = p.options, p.lambda_t * d
    m, v, v_top = _moments(p, g + pull if o.method == "l2" else g)
    _store_moments(p, m, v, v_top)
    root = v_top.sqrt() / math.sqrt(1 - o.beta2**p.t) + o.eps
    m_hat = m / (1 - o.beta1**p.t)
    if o.method == "unmixed":
        m_hat = m_hat + pull
        pull = o.lr * pull / root
    if o.method == "spd":
        pull = torch.zeros_like(pull)  # it comes in line 5
    return o.lr * m_hat / root, root, pull


def _move(
    p: _Parameter, w: Tensor, u: Tensor, d: Tensor, rate: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Line 4: the weight, and what the decay took from it."""
    pull = rate * d
    if p.options.cautious:
        # By signs: u and d may both be so small that their product is 0.
        pull = torch.where(u.sign() * d.sign() >= 0, pull, 0.0)
    return w - pull - u, pull


def _moments(p: _Parameter, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Line 2: m, v, and what stands below the root: v, or its maximum."""
    o, kept = p.options, p.state
    # lerp is line 2 as torch.optim computes it: the same NaN after an inf, exactly g for b1 = 0.
    m = torch.lerp(_load(kept["exp_avg"]), g, 1 - o.beta1)
    v = o.beta2 * _load(kept["exp_avg_sq"]) + (1 - o.beta2) * g * g
    return m, v, torch.maximum(_load(kept["max_exp_avg_sq"]), v) if o.amsgrad else v


def _is_kept(p: _Parameter) -> bool:
    """Whether SWD's sum of v is kept by the recurrence of v: of a v that is rounded to 16 bits it
    is the better one."""
    return p.state["exp_avg_sq"].dtype == torch.bfloat16 and not p.options.amsgrad


def _decay_rate(p: _Parameter, w: Tensor, mean_v: Tensor | None) -> float | Tensor:
    """d_t of line 4; for SWD a 0-d tensor beside w, so that the host need not wait for V."""
    d = decay_scale(p.options) * p.lambda_t
    if mean_v is None:
        return d
    return torch.where(mean_v == 0, 0.0, d / mean_v.sqrt()).to(w.device, w.dtype)


def _average(p: _Parameter) -> None:
    """Line 6, with the weight as it has been stored."""
    if p.options.averaged:
        k = ema_decay(p.options, p.t)
        _store(p.state["ema"], torch.lerp(_load(p.state["ema"]), _load(p.w), 1 - k))


# ---- what is read and written --------------------------------------------------------------------


def _gradient(p: _Parameter) -> Tensor:
    """Line 0. The factors meet in double and are rounded once."""
    scale = p.scale.unscale * p.scale.clip
    return _load(p.g) * (-scale if p.options.maximize else scale)


def _anchor(p: _Parameter) -> Tensor | float:
    if not p.options.anchored:
        return 0.0
    return _load(p.state["ema" if p.options.anchor == "ema" else "anchor"])


def _weight(p: _Parameter) -> Tensor:
    """w as it is computed with: with all that is kept of it."""
    if p.storage == "master":
        return _load(p.state["master"])
    if p.storage == "kahan":
        return _load(p.w) + _load(p.state["compensation"])
    return _load(p.w)


def _store_weight(p: _Parameter, w: Tensor, key: int) -> None:
    """Weights of 16 bits lose what is less than half of their last bit, unless it is kept in the
    master copy or in the compensation (Kahan 1965), or counts as the chance of a whole bit."""
    if p.storage == "direct":
        _store(p.w, w)
        return
    random = rounding.noise(key, p.w, p.numbering) if p.storage == "stochastic" else None
    p.w.copy_(rounding.narrow(w, p.w.dtype, random))
    if p.storage == "master":
        _store(p.state["master"], w)
    if p.storage == "kahan":
        p.state["compensation"].copy_(rounding.narrow(w - _load(p.w), p.w.dtype))


def _store_moments(p: _Parameter, m: Tensor, v: Tensor, v_top: Tensor) -> None:
    """In bfloat16 always stochastically: near b2 = 1 a step adds less to v than its last bit."""
    moments = [("exp_avg", m, 0), ("exp_avg_sq", v, 16)]
    if p.options.amsgrad:
        moments.append(("max_exp_avg_sq", v_top, 16))
    for name, value, shift in moments:
        if p.state[name].dtype == torch.bfloat16:
            random = rounding.noise(mix(p.key + 2 & 0xFFFFFFFF), p.w, p.numbering) >> shift
            value = rounding.narrow(value, torch.bfloat16, random)
        _store(p.state[name], value)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x.double() * y.double()).sum()


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x


def _load(x: Tensor) -> Tensor:
    """The tensor as reals of at least float32, which is what a step computes in."""
    x = _real(x.resolve_conj())
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _store(x: Tensor, value: Tensor) -> None:
    """Write through whatever strides x has, rounding to nearest."""
    _real(x).copy_(value)
