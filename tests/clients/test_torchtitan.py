"""torchtitan's container of optimizers: how it builds them, and its flat state dicts by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loops import OPTIONS, STEPS, Net, assert_as_torch, batches, loss_of, needs

import wdkernels as wd

# torch's own, of what torchtitan imports.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def container(model: Any, kind: str, options: dict[str, Any]) -> Any:
    """With ours among the optimizers it knows by name."""
    optimizer = needs("torchtitan.components.optimizer")

    class Container(optimizer.OptimizersContainer):
        @staticmethod
        def _resolve_optimizer_factory(name: str) -> Any:
            if name.startswith("wd."):
                return getattr(wd, name.removeprefix("wd."))
            return optimizer.OptimizersContainer._resolve_optimizer_factory(name)

    groups = [
        optimizer.ParamGroupConfig(
            pattern=r"bias|norm|embedding",
            optimizer_name=kind,
            optimizer_kwargs={**options, "weight_decay": 0.0},
        ),
        optimizer.ParamGroupConfig(pattern=".*", optimizer_name=kind, optimizer_kwargs=options),
    ]
    # On a CPU torch's own is told to use its loop; ours takes either word.
    words = "fused" if kind.startswith("wd.") else "for-loop"
    config = optimizer.OptimizersContainer.Config(param_groups=groups, implementation=words)
    return Container(config, model_parts=[model])


def trained(model: Any, optimizers: Any, part: Any) -> list[float]:
    found = []
    for x, y in part:
        optimizers.zero_grad()
        loss = loss_of(model, x, y)
        loss.backward()
        optimizers.step()
        found.append(loss.item())
    return found


def test_torchtitan() -> None:
    found = []
    for kind in ("wd.AdamW", "AdamW"):
        model = Net()
        found.append(trained(model, container(model, kind, OPTIONS), batches()))
    assert_as_torch(*found)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("wd.AdamW", {}),
        ("wd.AdamW", {"ema_decay": 0.5, "anchor": "ema"}),
        ("wd.AdamSWD", {}),
        ("wd.AdamSPD", {"weight_decay": 1.0}),
    ],
)
def test_its_state_dicts(kind: str, more: dict[str, Any]) -> None:
    """Saved in the middle of a run; loaded into a container that has not made a step."""
    data, options = batches(), {**OPTIONS, **more}
    model = Net()
    optimizers = container(model, kind, options)
    trained(model, optimizers, data[: STEPS // 2])
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    saved = optimizers.state_dict()
    saved = {key: x.clone() if isinstance(x, torch.Tensor) else x for key, x in saved.items()}
    went_on = trained(model, optimizers, data[STEPS // 2 :])
    other = Net()
    fresh = container(other, kind, options)
    fresh.load_state_dict(saved)
    other.load_state_dict(weights)
    assert trained(other, fresh, data[STEPS // 2 :]) == went_on


def test_one_of_torch_goes_on_with_ours() -> None:
    data, model = batches(), Net()
    optimizers = container(model, "AdamW", OPTIONS)
    trained(model, optimizers, data[: STEPS // 2])
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    saved = {
        key: x.clone() if isinstance(x, torch.Tensor) else x
        for key, x in optimizers.state_dict().items()
    }
    went_on = trained(model, optimizers, data[STEPS // 2 :])
    other = Net()
    other.load_state_dict(weights)
    ours = container(other, "wd.AdamW", OPTIONS)
    ours.load_state_dict(saved)
    found = trained(other, ours, data[STEPS // 2 :])
    torch.testing.assert_close(found, went_on, rtol=1e-3, atol=0)
