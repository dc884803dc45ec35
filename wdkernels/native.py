"""The native backend: compiled loops (csrc/), one call for all tensors and groups of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from wdkernels import layouts
from wdkernels.coefficients import average_factors, factors
from wdkernels.device_memory import DeviceMemory
from wdkernels.options import GroupOptions
from wdkernels.plan import Parameter, Phases, Request, Weights
from wdkernels.sums import SUMS

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
        options: Sequence[GroupOptions],
        state: dict[Tensor, Any],
        param_groups: list[dict[str, Any]],
    ) -> None:
        self._weights = Weights(parameters)
        devices = (p.tensor.device for p in parameters if p.state is not None)
        self._device = next(devices, torch.device("cpu"))
        self._on_gpu = _is_gpu(self._device)
        self._options = list(options)  # the core reads their tensors' memory
        self._method_sums = any(each.method in ("swd", "spd") for each in options)
        self._core = _C.Plan(
            state=state,
            groups=param_groups,
            device=self._device.index or 0,
            memory=DeviceMemory(self._device) if self._on_gpu else None,
        )
        for group, each in enumerate(options):
            self.set_options(group, each)
        for position, p in enumerate(parameters):
            self._core.add_parameter(
                parameter=p.tensor,
                weight=self._weights[position],
                state=p.state,
                streams=p.streams,
                storage=p.storage,
                group=p.group,
                index=p.position,
                total=p.total,
                numbering=p.numbering,
            )

    def set_options(self, group: int, options: GroupOptions) -> None:
        """Numbers may change; what decides over the streams that are read may not."""
        self._options[group] = options
        self._core.set_options(group, _options(options))

    def set_number(self, group: int, name: str, value: float) -> None:
        """One of the options that are plain numbers, for less than `set_options` costs."""
        self._core.set_number(group, name, value)

    def step(
        self, state: dict[Tensor, Any], param_groups: list[dict[str, Any]], request: Request
    ) -> bool:
        """One optimizer step; False, with nothing done, if the plan is out of date."""
        gathered = self._gather(state, param_groups)
        if gathered is None:
            return False
        needs_sums = (
            self._method_sums or request.grad_norm is not None or request.telemetry is not None
        )
        sums = self._empty_sums(gathered) if needs_sums else None
        updated = self._core.step(gathered, _request(request), sums, *self._stream())
        _increment_versions(updated)
        self._weights.store()
        return True

    def begin(
        self, state: dict[Tensor, Any], param_groups: list[dict[str, Any]], request: Request
    ) -> Phases | None:
        """The same step, to be taken phase by phase; None if the plan is out of date."""
        gathered = self._gather(state, param_groups)
        if gathered is None:
            return None
        sums = self._empty_sums(gathered)
        reductions = self._core.begin(gathered, _request(request), sums, *self._stream())
        return _Phases(self._core, self._weights, request, sums, reductions)

    def _gather(self, state: dict[Tensor, Any], param_groups: list[dict[str, Any]]) -> Any:
        """The gradients, each in the order of its weight; None if the plan is out of date."""
        # Steps may be counted on the device without: a graph would repeat the host's lr and decay.
        if self._stream()[1] and not all(group["capturable"] for group in param_groups):
            raise RuntimeError(
                "a CUDA graph is being captured, which a step can only join if every param group "
                "has capturable=True"
            )
        gathered = self._core.gather(state, param_groups)
        if gathered is None:
            return None
        gradients = [
            (position, self._weights.gradient(position)) for position in gathered.irregular
        ]
        for position, gradient in gradients:
            gathered.set_gradient(position, gradient)
        self._weights.load()
        return gathered

    def _stream(self) -> tuple[int, bool]:
        return _stream_of(self._device) if self._on_gpu else (0, False)

    def _empty_sums(self, gathered: Any) -> Tensor:
        return torch.empty(len(gathered), len(SUMS), dtype=torch.float64, device=self._device)


class _Phases:
    """One step of a plan, in phases. No other begins until it is finished, skipped or dropped."""

    def __init__(
        self, core: Any, weights: Weights, request: Request, sums: Tensor, reductions: int
    ) -> None:
        self.sums = sums
        self.reductions = reductions
        self._core = core
        self._weights = weights
        self._request = request  # whose tensors' memory the core writes
        self._ended = False

    def reduce(self, round: int) -> None:
        self._core.reduce(round)

    def decide(self, round: int) -> bool:
        proceed: bool = self._core.decide(round)
        if not proceed:
            self._end()
        return proceed

    def update(self) -> None:
        _increment_versions(self._core.update())

    def finish(self) -> None:
        self._core.finish()
        self._end()
        self._weights.store()

    def _end(self) -> None:
        if not self._ended:
            self._ended = True
            self._core.end()

    def __del__(self) -> None:
        self._end()


def _increment_versions(updated: list[Tensor]) -> None:
    """Autograd must know, as of any in-place operation, that saved weights are out of date."""
    torch.autograd.graph.increment_version(updated)


# Options that have the same name and meaning in the core.
_SAME = (
    *("cautious", "maximize", "lr", "lr_max", "beta1", "beta2", "eps", "weight_decay", "seed"),
    "decay_scale",
)
_DECAYS = {"swd": "decoupled", "spd": "projection"}


def _options(o: GroupOptions) -> Any:
    found = _C.GroupOptions()
    for name in _SAME:
        setattr(found, name, getattr(o, name))
    found.decay = _DECAYS.get(o.method, o.method)
    found.swd = o.method == "swd"
    found.decay_schedule = factors(o.decay_schedule)
    found.ema_decay, found.ema_schedule = average_factors(o)
    found.counted_on_device = o.device_numbers is not None
    for name, tensor in (o.device_numbers or {}).items():
        setattr(found, f"device_{name}", tensor)
    return found


def _request(r: Request) -> Any:
    found = _C.Request()
    for name, value in zip(r._fields, r, strict=True):
        if value is not None:
            setattr(found, name, value)
    return found
