"""The native backend: compiled loops (csrc/), one call for all tensors and groups of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from wdkernels import layouts
from wdkernels.coefficients import Hyper, factors
from wdkernels.device_memory import DeviceMemory
from wdkernels.plan import Parameter, Request, Weights

try:
    import wdkernels._C as _C
except ImportError as error:  # installed with WDK_NATIVE=0
    _missing = f"the compiled module is not part of this installation ({error})"
else:
    _missing = ""

_DTYPES = (
    *(torch.float32, torch.float64, torch.bfloat16, torch.float16),
    *(torch.complex64, torch.complex128),
)


def refuses(tensors: Sequence[Tensor]) -> str | None:
    """Why this backend cannot update these tensors; None if it can."""
    if _missing:
        return _missing
    for x in tensors:
        if not layouts.has_memory(x):
            return f"a {type(x).__name__} has no memory of its own"
        if x.device.type != "cpu" and not _is_gpu(x.device):
            return f"it has no kernels for {x.device.type} tensors"
        if x.dtype not in _DTYPES:
            return f"it has no loops for {x.dtype}"
    devices = {x.device for x in tensors}
    if len(devices) > 1:
        return f"the tensors are on several devices ({', '.join(sorted(map(str, devices)))})"
    device = devices.pop() if devices else torch.device("cpu")
    return _C.cuda_refusal(device.index or 0) or None if _is_gpu(device) else None


def _is_gpu(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None


def _stream_of(device: torch.device) -> tuple[int, bool]:
    """The current stream of a GPU, and whether it is being captured into a graph."""
    return torch.cuda.current_stream(device).cuda_stream, torch.cuda.is_current_stream_capturing()


class Plan:
    """All tensors of an optimizer, as the compiled loops see them; valid until `step` says no."""

    def __init__(
        self,
        parameters: Sequence[Parameter],
        hypers: Sequence[Hyper],
        state: dict[Tensor, Any],
        param_groups: list[dict[str, Any]],
    ) -> None:
        self._weights = Weights(parameters)
        self._device = parameters[0].tensor.device if parameters else torch.device("cpu")
        self._on_gpu = _is_gpu(self._device)
        self._core = _C.Plan(
            state=state,
            groups=param_groups,
            device=self._device.index or 0,
            memory=DeviceMemory(self._device) if self._on_gpu else None,
        )
        for index, hyper in enumerate(hypers):
            self.set_hyper(index, hyper)
        for position, p in enumerate(parameters):
            self._core.add_parameter(
                parameter=p.tensor,
                weight=self._weights[position],
                state=p.state,
                group=p.group,
                index=p.position,
            )

    def set_hyper(self, group: int, hyper: Hyper) -> None:
        """Numbers may change; what decides over the streams that are read may not."""
        self._core.set_hyper(group, _hyper(hyper))

    def step(
        self, state: dict[Tensor, Any], param_groups: list[dict[str, Any]], request: Request
    ) -> bool:
        """One optimizer step; False, with nothing done, if the plan is out of date."""
        stream, capturing = _stream_of(self._device) if self._on_gpu else (0, False)
        # Steps may be counted on the device without: a graph would repeat the host's lr and decay.
        if capturing and not all(group["capturable"] for group in param_groups):
            raise RuntimeError(
                "a CUDA graph is being captured, which a step can only join if every param group "
                "has capturable=True"
            )
        irregular = self._core.gather(state, param_groups)
        if irregular is None:
            return False
        gradients = [(position, self._weights.gradient(position)) for position in irregular]
        for position, gradient in gradients:
            self._core.set_gradient(position, gradient)
        self._weights.load()
        updated = self._core.step(request=_request(request), stream=stream, capturing=capturing)
        # Autograd must know, as of any in-place operation, that saved weights are out of date.
        torch.autograd.graph.increment_version(updated)
        self._weights.store()
        return True


def _hyper(h: Hyper) -> Any:
    decay = {"swd": "decoupled", "spd": "projection"}.get(h.method, h.method)
    live = h.live or {}
    ema_decay, ema_schedule = (
        (1.0, h.ema_decay) if isinstance(h.ema_decay, dict) else (h.ema_decay, None)
    )
    return _C.Hyper(
        decay=getattr(_C.Decay, decay),
        stable=h.method == "swd",
        anchored=h.anchored,
        amsgrad=h.amsgrad,
        cautious=h.cautious,
        maximize=h.maximize,
        lr=h.lr,
        lr_max=h.lr_max,
        beta1=h.beta1,
        beta2=h.beta2,
        eps=h.eps,
        weight_decay=h.weight_decay,
        decay_scale=getattr(_C.DecayScale, h.decay_scale),
        schedule=_schedules(h.decay_schedule),
        rounding=getattr(_C.Rounding, h.rounding),
        master=h.master_weights,
        seed=h.seed,
        averaged=h.ema_decay is not None,
        ema_decay=1.0 if ema_decay is None else ema_decay,
        ema_schedule=_schedules(ema_schedule),
        counted=h.live is not None,
        live_lr=live.get("lr"),
        live_weight_decay=live.get("weight_decay"),
    )


def _schedules(schedule: Any) -> list[Any]:
    """As a product of two."""
    return [
        _C.Schedule(kind=getattr(_C.ScheduleKind, kind), start=start, end=end, steps=steps)
        for kind, start, end, steps in factors(schedule)
    ]


def _request(r: Request) -> Any:
    return _C.Request(
        grad_scale=r.grad_scale,
        found_inf=r.found_inf,
        max_norm=r.max_grad_norm,
        skip_nonfinite=r.skip_nonfinite,
        grad_norm=r.grad_norm,
        skipped=r.skipped,
        telemetry=r.telemetry,
    )
