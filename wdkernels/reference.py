"""The papers' formulas in eager PyTorch: what the kernels are tested against, and the `eager`
backend for devices that have none.

Written to be read beside the papers. It shares no code with the kernels and is not tuned, but it
runs on any device and takes any floating or complex dtype (complex as pairs of reals), any strides
and any size. The host waits only for step counts that live on an accelerator. SWD and SPD sum in
float64, which the device must have.

    w weights   g gradient   a anchor, or 0   t this parameter's own step count
    eta = lr    lambda_t = weight_decay * schedule(t)   (b1, b2) = betas

    0  g  <- -g                                   maximize only
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

Sources: l2 Kingma & Ba 2014; unmixed the ablation of arXiv 2012.13841; decoupled arXiv 1711.05101;
swd arXiv 2011.11152; spd arXiv 2411.01713; anchor arXiv 1802.01483; cautious arXiv 2510.12402;
decay scales arXiv 1711.05101 ("relative_lr") and arXiv 2506.02285 ("corrected").
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wdkernels import schedules
from wdkernels.coefficients import Hyper
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
    or none does, for its V is one number for all of them.
    """
    parameters = list(_parameters(groups))
    for p in parameters:
        _update_moments(p)
    scheduled = any(p.h.method == "swd" for p in parameters)
    mean_v = _mean_v(parameters) if scheduled else None
    for p in parameters:
        _update_weights(p, mean_v)


class _Parameter(NamedTuple):
    """A parameter with its hyper-parameters, gradient and state, at its own step t."""

    h: Hyper
    w: Tensor
    g: Tensor
    state: State
    t: int
    lambda_t: float


def _parameters(groups: Sequence[Group]) -> Iterator[_Parameter]:
    for h, *tensors in groups:
        for w, g, state, _ in zip(*tensors, strict=True):
            state["step"] += 1
            t = int(state["step"].item())
            lambda_t = h.weight_decay * schedules.factor(h.decay_schedule, t)
            yield _Parameter(h, w, g, state, t, lambda_t)


def _update_moments(p: _Parameter) -> None:
    """Lines 0 to 2."""
    h, state = p.h, p.state
    g = _gradient(p)
    if h.method == "l2":
        g = g + p.lambda_t * (_load(p.w) - _anchor(p))

    # lerp is line 2 as torch.optim computes it: the same NaN after an inf, exactly g for b1 = 0.
    m = torch.lerp(_load(state["exp_avg"]), g, 1 - h.beta1)
    v = h.beta2 * _load(state["exp_avg_sq"]) + (1 - h.beta2) * g * g

    _store(state["exp_avg"], m)
    _store(state["exp_avg_sq"], v)
    if h.amsgrad:
        _store(state["max_exp_avg_sq"], torch.maximum(_load(state["max_exp_avg_sq"]), v))
    elif h.method == "swd":
        state["exp_avg_sq_sum"].copy_(v.sum(dtype=torch.float64))


def _mean_v(parameters: Sequence[_Parameter]) -> Tensor:
    """SWD's V: the mean of v / (1 - b2^t) over all elements of all parameters; 0-d, float64."""
    sums, count = [], 0
    for h, w, _, state, t, _ in parameters:
        if h.amsgrad:
            total = _load(state["max_exp_avg_sq"]).sum(dtype=torch.float64)
        else:
            total = state["exp_avg_sq_sum"]
        sums.append(total / (1 - h.beta2**t))
        count += _real(w).numel()
    return torch.stack([each.to(sums[0].device) for each in sums]).sum() / count


def _update_weights(p: _Parameter, mean_v: Tensor | None) -> None:
    """Lines 3 to 5."""
    h, state, t = p.h, p.state, p.t
    w, a = _load(p.w), _anchor(p)
    v = _load(state["max_exp_avg_sq" if h.amsgrad else "exp_avg_sq"])

    m_hat = _load(state["exp_avg"]) / (1 - h.beta1**t)
    if h.method == "unmixed":
        m_hat = m_hat + p.lambda_t * (w - a)
    u = h.lr * m_hat / (v.sqrt() / math.sqrt(1 - h.beta2**t) + h.eps)

    if h.method == "spd":
        w = _project(w - u, w, _gradient(p), a, p.lambda_t)
    elif h.method in ("decoupled", "swd"):
        pull = _decay_rate(p, w, mean_v) * (w - a)
        if h.cautious:
            # By signs: u and w - a may both be so small that their product is 0.
            pull = torch.where(u.sign() * (w - a).sign() >= 0, pull, 0.0)
        w = w - pull - u
    else:
        w = w - u
    _store(p.w, w)


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


def _project(stepped: Tensor, w: Tensor, g: Tensor, a: Tensor | float, lambda_t: float) -> Tensor:
    """Selective Projection Decay of one tensor; `stepped` is w~ = w - u.

        c = -sum(g (w - a));  where c < 0:
        r = clip((norm(w~ - a) - norm(w - a)) / norm(w~ - a), 0, 1);  w <- w~ - lambda_t r (w~ - a)

    The difference of the norms is that of their squares over their sum, and the difference of the
    squares is summed directly: subtracting two nearly equal norms loses the digits that matter.
    """
    before, after = w - a, stepped - a
    c = -_dot(g, before)
    norm_before, norm_after = _dot(before, before).sqrt(), _dot(after, after).sqrt()
    growth = _dot(stepped - w, after + before) / (norm_after + norm_before)
    r = torch.where(norm_after == 0, 0.0, growth / norm_after).clamp(0, 1)
    projected = stepped - (lambda_t * r).to(w.dtype) * after
    return torch.where(c < 0, projected, stepped)


def _gradient(p: _Parameter) -> Tensor:
    g = _load(p.g.resolve_conj())
    return -g if p.h.maximize else g


def _anchor(p: _Parameter) -> Tensor | float:
    return _load(p.state["anchor"]) if p.h.anchored else 0.0


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x.double() * y.double()).sum()


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x


def _load(x: Tensor) -> Tensor:
    """The tensor as reals of at least float32, which is what a step computes in."""
    x = _real(x)
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _store(x: Tensor, value: Tensor) -> None:
    """Write through whatever strides x has, rounding to nearest."""
    _real(x).copy_(value)
