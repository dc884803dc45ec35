"""Param groups of a model: which of its weights decay, and how fast each layer learns."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import ParametrizationList

from wdkernels.options import number
from wdkernels.tables import aligned


class ParamGroups(list[dict[str, Any]]):
    """Param groups, of which `print` shows a table.

    `frozen`: the names of the parameters that were left out because they do not learn.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], frozen: Sequence[str]) -> None:
        super().__init__(groups)
        self.frozen = list(frozen)

    def __str__(self) -> str:
        """A line for each group: its name, decay, learning rate if it has its own, how many tensors
        and numbers it holds, and the first of their names."""
        lines = [["group", "weight_decay", "lr", "tensors", "numbers", "first"]]
        for group in self:
            if "param_names" in group:  # where an optimizer has taken them
                names, tensors = group["param_names"], group["params"]
            else:
                names, tensors = zip(*group["params"], strict=True)
            lr = f"{group['lr']:.4g}" if "lr" in group else ""
            numbers = f"{sum(p.numel() for p in tensors):,}"
            decay = f"{group['weight_decay']:.4g}"
            lines.append([group["name"], decay, lr, str(len(tensors)), numbers, names[0]])
        if self.frozen:
            lines.append(["frozen: in no group", "", "", str(len(self.frozen)), "", self.frozen[0]])
        return aligned(lines, right=range(1, 5))


class _Owner(NamedTuple):
    """A module that has a parameter of its own, and the name by which it has it."""

    module: nn.Module
    name: str
    p: Tensor


# ---- which weights do not decay ------------------------------------------------------------------


def _is_bias(owner: _Owner) -> bool:
    """By its name, as torch and others have it: bias, in_proj_bias, bias_ih_l0."""
    return re.search(r"(^|_)bias(_|$)", owner.name) is not None and not owner.name.endswith("table")


_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)


def _is_norm(owner: _Owner) -> bool:
    """One of torch's, or one that says so by its class's name and has a gain or shift: a tensor
    with no more than one dimension that counts."""
    if isinstance(owner.module, _NORMS):
        return True
    named = "norm" in type(owner.module).__name__.lower()
    return named and owner.p.numel() == max(owner.p.shape, default=1)


def _is_embedding(owner: _Owner) -> bool:
    """One of torch's, or one that says so by its class's name."""
    if isinstance(owner.module, (nn.Embedding, nn.EmbeddingBag)):
        return True
    return re.search(r"Embeddings?(Bag)?$", type(owner.module).__name__) is not None


_KINDS: dict[str, Callable[[_Owner], bool]] = {
    "bias": _is_bias,
    "norm": _is_norm,
    "embedding": _is_embedding,
}


def _kinds(no_decay: Any) -> list[Callable[[_Owner], bool]]:
    if isinstance(no_decay, str) or not isinstance(no_decay, Sequence):
        raise TypeError(
            f"no_decay must be a sequence of kinds and module types, such as ('bias', 'norm'), not "
            f"{no_decay!r}"
        )
    return [_kind(each) for each in no_decay]


def _kind(each: Any) -> Callable[[_Owner], bool]:
    if isinstance(each, type) and issubclass(each, nn.Module):
        return lambda owner: isinstance(owner.module, each)
    if isinstance(each, str) and each in _KINDS:
        return _KINDS[each]
    raise ValueError(
        f"no_decay holds {each!r}: there are {', '.join(map(repr, _KINDS))}, and types of modules"
    )


def _owners(model: nn.Module) -> Iterator[_Owner]:
    """Every module with every parameter of its own. A parametrized weight is its module's."""
    modules = dict(model.named_modules())
    for path, module in modules.items():
        for name, p in module.named_parameters(recurse=False):
            if isinstance(module, ParametrizationList):
                parent, _, name = path.rpartition(".")
                module_of = modules[parent.rpartition(".")[0]]
                yield _Owner(module_of, name, p)
            else:
                yield _Owner(module, name, p)


def _declared(model: nn.Module) -> Iterator[str]:
    """The parameters of which the model itself says that they do not decay, as timm's do."""
    for path, module in model.named_modules():
        if callable(says := getattr(module, "no_weight_decay", None)):
            yield from (f"{path}.{name}".lstrip(".") for name in says())


# ---- which layer a parameter is in ---------------------------------------------------------------


def _layers_in(module: nn.Module) -> list[str]:
    """The names of its children if these are layers: two or more modules that are themselves made
    of modules; in a Sequential or ModuleDict, which may hold all of a model, they are of one type.
    """
    if not isinstance(module, (nn.ModuleList, nn.Sequential, nn.ModuleDict)):
        return []
    layers = {name: x for name, x in module.named_children() if _has_parameters(x)}
    made_of_modules = all(any(map(_has_parameters, x.children())) for x in layers.values())
    alike = isinstance(module, nn.ModuleList) or len({*map(type, layers.values())}) == 1
    return [*layers] if len(layers) > 1 and made_of_modules and alike else []


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _found_layers(module: nn.Module, path: str = "") -> Iterator[str]:
    if layers := _layers_in(module):
        yield from (f"{path}{name}" for name in layers)
    else:
        for name, child in module.named_children():
            yield from _found_layers(child, f"{path}{name}.")


def _layers_of(model: nn.Module, layers: Sequence[str] | None) -> dict[str, int]:
    """The layer of each parameter by its name: 0 is what stands before the first."""
    if layers is None:
        layers = [*_found_layers(model)]
        if not layers:
            raise ValueError(
                "layer_decay found no layers in the model: no ModuleList or Sequential of modules "
                "that are made of modules. Name them in layers=, in order from the input on"
            )
    elif isinstance(layers, str):
        raise TypeError(f"layers must be a sequence of names of modules, not {layers!r}")
    known = {name for name, _ in model.named_modules()}
    if strange := [name for name in layers if name not in known]:
        raise ValueError(f"layers holds {strange[0]!r}, which is no module of the model")
    number_of = {name: i for i, name in enumerate(layers, start=1)}
    found, last = {}, 0
    for name, _ in model.named_parameters():
        parts = name.split(".")
        prefixes = (".".join(parts[:i]) for i in range(len(parts), 0, -1))
        layer = next((number_of[x] for x in prefixes if x in number_of), None)
        if layer is not None:
            found[name] = last = layer
        else:  # with the layer before it, or behind them all
            found[name] = last if last < len(layers) else len(layers) + 1
    return found


# ---- groups --------------------------------------------------------------------------------------


def param_groups(
    model: nn.Module,
    weight_decay: float,
    no_decay: Sequence[str | type[nn.Module]] = ("bias", "norm", "embedding"),
    layer_decay: float | None = None,
    *,
    lr: float | None = None,
    layers: Sequence[str] | None = None,
) -> ParamGroups:
    """The param groups of a model, for any optimizer; `print` shows them as a table.

        opt = wd.AdamW(wd.param_groups(model, weight_decay=0.1), lr=3e-4)

    Two groups, "decay" and "no_decay", each with its parameters' names. A parameter does not decay
    if it is of a kind in `no_decay`, told by the module that has it and not by its place in the
    model:

        "bias"         has bias in its name there (bias, in_proj_bias, bias_ih_l0)
        "norm"         a module of torch's normalisations; or one whose class is called Norm, if the
                       parameter is a vector
        "embedding"    nn.Embedding, or a class called Embedding; and whatever the model itself
                       lists in no_weight_decay(), as timm's models do (cls_token, pos_embed)
        a type         a module of this type

    A tied weight is in one group, once: in "no_decay" if any module that has it would have it
    there. Frozen parameters are in none (`frozen` has their names): whoever lets one learn later
    adds it by `add_param_group`.

    `layer_decay`, in (0, 1], with `lr`: layer k of L learns with lr * layer_decay^(L - k), as in
    BEiT and timm (Bao et al. 2021, arXiv 2106.08254); groups are "layer_k.decay" and
    "layer_k.no_decay" and have their own lr, which schedulers that multiply leave in proportion.
    Layers are the children of each outermost ModuleList (or Sequential, or ModuleDict, of one type)
    of modules that are made of modules, in the order of registration, which must be that of the
    forward pass; or the modules named in `layers`. Layer 0 is what was registered before the
    first, L what stands behind the last, or the last itself; what stands between two is of the one
    before it.

    Raises TypeError or ValueError that names what is wrong: no module, no parameter that learns, an
    unknown kind, a lazy parameter, no layers, a missing lr.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    weight_decay = number(weight_decay, "weight_decay")
    kinds = _kinds(no_decay)
    if layer_decay is None:
        if lr is not None or layers is not None:
            raise ValueError("lr and layers belong to layer_decay: give lr to the optimizer")
        layer_of: dict[str, int] = {}
    else:
        layer_decay = number(layer_decay, "layer_decay")
        if not 0 < layer_decay <= 1:
            raise ValueError(f"layer_decay must be in (0, 1], not {layer_decay!r}")
        if lr is None:
            raise ValueError("layer_decay multiplies a learning rate: pass lr, that of the last")
        lr = number(lr, "lr")
        layer_of = _layers_of(model, layers)
    exempt = {id(owner.p) for owner in _owners(model) if any(kind(owner) for kind in kinds)}
    if "embedding" in no_decay:
        named = dict(model.named_parameters(remove_duplicate=False))
        exempt |= {id(named[name]) for name in _declared(model) if name in named}
    groups: dict[str, dict[str, Any]] = {}
    frozen = []
    top = max(layer_of.values(), default=0)
    for name, p in model.named_parameters():
        if isinstance(p, UninitializedParameter):
            raise ValueError(f"{name} has no shape yet: run the model once, then make the groups")
        if not p.requires_grad:
            frozen.append(name)
            continue
        decays = id(p) not in exempt
        kind = "decay" if decays else "no_decay"
        key = kind if layer_decay is None else f"layer_{layer_of[name]}.{kind}"
        if key not in groups:
            groups[key] = {
                "name": key,
                "params": [],
                "weight_decay": weight_decay if decays else 0.0,
            }
            if layer_decay is not None and lr is not None:
                groups[key]["lr"] = lr * layer_decay ** (top - layer_of[name])
        groups[key]["params"].append((name, p))
    if not groups:
        raise ValueError("the model has no parameter that learns")
    return ParamGroups([*groups.values()], frozen)
