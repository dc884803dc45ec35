"""The papers' formulas in eager PyTorch: what the kernels are tested against, and the `eager`
backend for devices that have none.

Written to be read beside the papers. It shares no code with the kernels and is not tuned, but it
runs on any device and takes any floating or complex dtype (complex as pairs of reals), any strides
and any size. The host waits for step counts that live on an accelerator, and for the norm of the
gradients and a GradScaler's numbers where they are asked for. Sums are in float64, which the device
must have.

    w weights   g gradient   a anchor, or 0   t this parameter's own step count
    eta = lr    lambda_t = weight_decay * schedule(t)   (b1, b2) = betas

    0  g  <- scale g                              see `_scale`; -scale to maximize
    1  g  <- g + lambda_t (w - a)                 l2 only
    2  m  <- m + (1 - b1)(g - m)
       v  <- b2 v + (1 - b2) g^2                  amsgrad: vmax <- max(vmax, v), in v's place below
    3  m_ =  m / (1 - b1^t)                       unmixed: m_ <- m_ + lambda_t (w - a)
       u  =  eta m_ / (sqrt(v) / sqrt(1 - b2^t) + eps)
    4  w  <- w - d_t (w - a) - u                  decoupled: d_t = eta lambda_t, or another scale
                                                  swd: d_t / sqrt(V), V the mean of v / (1 - b2^t)
                                                  cautious: d_t = 0 where u (w - a) < 0
                                                  all others: d_t = 0
    5  w  <- w - lambda_t r (w - a)               spd only, per tensor; see `_project`
    6  ema <- ema + (1 - k_t)(w - ema)            w as it was stored

All of it is computed in float32, or in float64 for weights as wide. Weights of 16 bits are widened
before and rounded after (`_weight`, `_store_weight`), as are moments in bfloat16 (`_store_moment`).

Sources: l2 Kingma & Ba 2014; unmixed the ablation of arXiv 2012.13841; decoupled arXiv 1711.05101;
swd arXiv 2011.11152; spd arXiv 2411.01713; anchor arXiv 1802.01483; cautious arXiv 2510.12402;
decay scales arXiv 1711.05101 ("relative_lr") and arXiv 2506.02285 ("corrected"); clipping Pascanu
et al. 2013, arXiv 1211.5063; stochastic and compensated storage arXiv 2010.06192; master weights
arXiv 1710.03740; averaged weights Polyak & Juditsky 1992, as an exponential average.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wdkernels import rounding, schedules, storage
from wdkernels.coefficients import Hyper, ema_decay, mix, random_key
from wdkernels.plan import Request

State = dict[str, Any]


class Group(NamedTuple):
    """A param group: those of its parameters that have a gradient, and their states, in order."""

    hyper: Hyper
    params: list[Tensor]
    grads: list[Tensor]
    states: list[State]
    indices: list[int]  # positions over all groups


def step(groups: Sequence[Group], request: Request) -> None:
    """One optimizer step, in place on parameters and states (each state's "step" included).

    To be called under ``torch.no_grad()``, with initialised states. Either every group uses "swd"
    or none does, for its V is one number for all of them. A step that is to be skipped writes
    nothing but what the request wants to know.
    """
    scale = _scale(groups, request)
    if scale is None:
        if request.skipped is not None:
            request.skipped.add_(1)
        return
    parameters = list(_parameters(groups, scale))
    scheduled = any(p.h.method == "swd" for p in parameters)
    mean_v = _mean_v(parameters) if scheduled else None
    for row, p in enumerate(parameters):
        told = None if request.telemetry is None else request.telemetry[row]
        _update(p, mean_v, told)


class _Scale(NamedTuple):
    """What gradients are multiplied by as they are read; they are never written."""

    unscale: float  # 1 / the scale of a GradScaler, with which the loss was multiplied
    clip: float


def _scale(groups: Sequence[Group], request: Request) -> _Scale | None:
    """The gradients' factors; None if this step is to be skipped.

        norm = unscale |g|, over all gradients;  clip = min(1, max_grad_norm / (norm + 1e-6))

    as in torch.nn.utils.clip_grad_norm_: an infinite norm makes all finite gradients 0, and one
    that is NaN makes all of them NaN.
    """
    unscale = 1.0
    if request.grad_scale is not None:
        unscale = request.grad_scale.double().reciprocal().item()
    clip = 1.0
    skip = request.found_inf is not None and request.found_inf.item() != 0
    clips = request.max_grad_norm < math.inf
    if clips or request.skip_nonfinite or request.grad_norm is not None:
        squares = [_dot(g, g) for group in groups for g in map(_load, group.grads)]
        norm = unscale * _sum(squares).sqrt().item() if squares else 0.0
        if request.grad_norm is not None:
            request.grad_norm.fill_(norm)
        if clips:
            clip = request.max_grad_norm / (norm + 1e-6)
            clip = 1.0 if clip > 1 else clip
        skip = skip or (request.skip_nonfinite and not math.isfinite(norm))
    return None if skip else _Scale(unscale, clip)


class _Parameter(NamedTuple):
    """A parameter with its hyper-parameters, gradient and state, at its own step t."""

    h: Hyper
    w: Tensor
    g: Tensor
    state: State
    place: int  # over all groups
    scale: _Scale
    t: int
    lambda_t: float


def _parameters(groups: Sequence[Group], scale: _Scale) -> Iterator[_Parameter]:
    for h, *tensors in groups:
        for w, g, state, place in zip(*tensors, strict=True):
            state["step"] += 1
            t = int(state["step"].item())
            lambda_t = h.weight_decay * schedules.factor(h.decay_schedule, t)
            yield _Parameter(h, w, g, state, place, scale, t, lambda_t)


def _update(p: _Parameter, mean_v: Tensor | None, told: Tensor | None) -> None:
    """Lines 0 to 6, in place. A measured step tells of itself in the row `told`."""
    h, state, t = p.h, p.state, p.t
    w, a, g = _weight(p), _anchor(p), _gradient(p)
    d = w - a
    rate: float | Tensor = p.lambda_t  # multiplies d where the decay enters ...
    pull = rate * d  # ... which adds this to w, u or g
    selected = ratio = torch.tensor(0.0)  # spd

    m, v, v_top = _moments(p, g + pull if h.method == "l2" else g)
    _store_moments(p, m, v, v_top)
    root = v_top.sqrt() / math.sqrt(1 - h.beta2**t) + h.eps
    m_hat = m / (1 - h.beta1**t)
    if h.method == "unmixed":
        m_hat = m_hat + pull
        pull = h.lr * pull / root
    u = h.lr * m_hat / root

    if h.method == "spd":
        pull, selected, ratio = _project(w - u, w, g, a, p.lambda_t)
        new = w - u  # what is pulled is what has been stored of it
    elif h.method in ("decoupled", "swd"):
        rate = _decay_rate(p, w, mean_v)
        pull = rate * d
        if h.cautious:
            # By signs: u and d may both be so small that their product is 0.
            pull = torch.where(u.sign() * d.sign() >= 0, pull, 0.0)
        new = w - pull - u
    else:
        new = w - u
    if told is not None:
        gradient2 = p.scale.unscale**2 * _dot(_load(p.g), _load(p.g))
        columns = [
            *(_dot(w, w), gradient2, _dot(u, u), _dot(pull, pull), _dot(d, d)),
            *(_dot(u, w), (h.lr / root).sum(dtype=torch.float64), h.lr, rate),
            *(selected, ratio, 0.0 if mean_v is None else mean_v),
        ]
        for place, number in enumerate(columns):  # as in wdkernels.telemetry.COLUMNS
            told[place] = _everywhere(number)

    _store_weight(p, new, _key(p))
    if h.method == "spd":
        new = _weight(p)
        rate = (p.lambda_t * ratio).to(new.dtype)
        _store_weight(p, new - rate * (new - a), mix(_key(p) + 1 & 0xFFFFFFFF))
    if h.ema_decay is not None:
        k = ema_decay(h, t)
        _store(state["ema"], torch.lerp(_load(state["ema"]), _load(p.w), 1 - k))


def _moments(p: _Parameter, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Line 2: m, v, and what stands below the root: v, or its maximum."""
    h, state = p.h, p.state
    # lerp is line 2 as torch.optim computes it: the same NaN after an inf, exactly g for b1 = 0.
    m = torch.lerp(_load(state["exp_avg"]), g, 1 - h.beta1)
    v = h.beta2 * _load(state["exp_avg_sq"]) + (1 - h.beta2) * g * g
    return m, v, torch.maximum(_load(state["max_exp_avg_sq"]), v) if h.amsgrad else v


def _mean_v(parameters: Sequence[_Parameter]) -> Tensor:
    """SWD's V: the mean of v / (1 - b2^t) over all elements of all parameters; 0-d, float64.

    V is of this step's v, so this comes before all updates, and computes v for itself.
    """
    sums, count = [], 0
    for p in parameters:
        h, g = p.h, _gradient(p)
        _, v, v_top = _moments(p, g)
        total = v_top.sum(dtype=torch.float64)
        if not h.amsgrad:
            kept = p.state["exp_avg_sq_sum"]
            if p.state["exp_avg_sq"].dtype == torch.bfloat16:
                # The sum obeys the recurrence of v. Of a v that is rounded it is the better one.
                total = h.beta2 * kept + (1 - h.beta2) * _dot(g, g)
            kept.copy_(total)
        sums.append(total / (1 - h.beta2**p.t))
        count += v.numel()
    return _sum(sums) / count


def _decay_rate(p: _Parameter, w: Tensor, mean_v: Tensor | None) -> float | Tensor:
    """d_t of line 4; for SWD a 0-d tensor beside w, so that the host need not wait for V."""
    scale = p.h.lr
    if p.h.decay_scale == "relative_lr":
        scale = p.h.lr / p.h.lr_max
    elif p.h.decay_scale == "corrected":
        scale = p.h.lr**2 / p.h.lr_max
    d = scale * p.lambda_t
    if mean_v is None:
        return d
    return torch.where(mean_v == 0, 0.0, d / mean_v.sqrt()).to(w.device, w.dtype)


def _project(
    stepped: Tensor, w: Tensor, g: Tensor, a: Tensor | float, lambda_t: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Selective Projection Decay of one tensor; `stepped` is w~ = w - u.

        c = -sum(g (w - a));  where c < 0:
        r = clip((norm(w~ - a) - norm(w - a)) / norm(w~ - a), 0, 1);  w <- w~ - lambda_t r (w~ - a)

    The difference of the norms is that of their squares over their sum, and the difference of the
    squares is summed directly: subtracting two nearly equal norms loses the digits that matter.

    Returns what is subtracted from w~, whether the tensor is selected, and r: 0 if it is not.
    """
    before, after = w - a, stepped - a
    selected = -_dot(g, before) < 0
    norm_before, norm_after = _dot(before, before).sqrt(), _dot(after, after).sqrt()
    growth = _dot(stepped - w, after + before) / (norm_after + norm_before)
    r = torch.where(norm_after == 0, 0.0, growth / norm_after).clamp(0, 1)
    pull = (lambda_t * r).to(w.dtype) * after
    return torch.where(selected, pull, 0.0), selected, torch.where(selected, r, 0.0)


# ---- what is read and written --------------------------------------------------------------------


def _gradient(p: _Parameter) -> Tensor:
    """Line 0. The factors meet in double and are rounded once."""
    scale = p.scale.unscale * p.scale.clip
    return _load(p.g) * (-scale if p.h.maximize else scale)


def _anchor(p: _Parameter) -> Tensor | float:
    return _load(p.state["anchor"]) if p.h.anchored else 0.0


def _weight(p: _Parameter) -> Tensor:
    """w as it is computed with: with all that is kept of it."""
    if p.w.dtype in storage.NARROW and p.h.master_weights:
        return _load(p.state["master"])
    if p.w.dtype in storage.NARROW and p.h.rounding == "kahan":
        return _load(p.w) + _load(p.state["compensation"])
    return _load(p.w)


def _store_weight(p: _Parameter, w: Tensor, key: int) -> None:
    """Weights of 16 bits lose what is less than half of their last bit, unless it is kept in the
    master copy or in the compensation (Kahan 1965), or counts as the chance of a whole bit."""
    if p.w.dtype not in storage.NARROW:
        _store(p.w, w)
    elif p.h.master_weights:
        _store(p.state["master"], w)
        p.w.copy_(rounding.narrow(w, p.w.dtype))
    elif p.h.rounding == "kahan":
        p.w.copy_(rounding.narrow(w, p.w.dtype))
        p.state["compensation"].copy_(rounding.narrow(w - _load(p.w), p.w.dtype))
    else:
        random = rounding.noise(key, p.w) if p.h.rounding == "stochastic" else None
        p.w.copy_(rounding.narrow(w, p.w.dtype, random))


def _store_moments(p: _Parameter, m: Tensor, v: Tensor, v_top: Tensor) -> None:
    """In bfloat16 always stochastically: near b2 = 1 a step adds less to v than its last bit."""
    moments = [("exp_avg", m, 0), ("exp_avg_sq", v, 16)]
    if p.h.amsgrad:
        moments.append(("max_exp_avg_sq", v_top, 16))
    for name, value, shift in moments:
        if p.state[name].dtype == torch.bfloat16:
            random = rounding.right_shift(rounding.noise(mix(_key(p) + 2 & 0xFFFFFFFF), p.w), shift)
            value = rounding.narrow(value, torch.bfloat16, random)
        _store(p.state[name], value)


def _key(p: _Parameter) -> int:
    return rounding.key(random_key(p.h, p.t), p.place)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x.double() * y.double()).sum()


def _sum(numbers: Sequence[Tensor]) -> Tensor:
    """Of 0-d tensors, which may be on several devices."""
    return torch.stack([each.to(numbers[0].device) for each in numbers]).sum()


def _everywhere(number: Any) -> Any:
    """A DTensor's number, for every process."""
    return number.full_tensor() if hasattr(number, "full_tensor") else number


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x


def _load(x: Tensor) -> Tensor:
    """The tensor as reals of at least float32, which is what a step computes in."""
    x = _real(x.resolve_conj())
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _store(x: Tensor, value: Tensor) -> None:
    """Write through whatever strides x has, rounding to nearest."""
    _real(x).copy_(value)
