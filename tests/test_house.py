"""Every fact stands in one table; where it stands once more, it is the same."""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support import METHODS, saved

import wdkernels as wd
from wdkernels import options, schedules, state, sums, telemetry

ROOT = Path(__file__).resolve().parent.parent
OPTIMIZERS: dict[str, Any] = {
    "l2": wd.Adam,
    "decoupled": wd.AdamW,
    "swd": wd.AdamSWD,
    "spd": wd.AdamSPD,
}
# A value of each option that is not its default.
VALUES: dict[str, Any] = {
    "lr": 0.25,
    "betas": (0.5, 0.75),
    "eps": 0.125,
    "weight_decay": 0.375,
    "amsgrad": True,
    "maximize": True,
    "capturable": True,
    "decay_schedule": schedules.early(3),
    "decay_scale": "relative_lr",
    "lr_max": 0.5,
    "cautious": True,
    "unmixed": True,
    "anchor": "initial",
    "rounding": "nearest",
    "master_weights": True,
    "moment_dtype": torch.bfloat16,
    "seed": 5,
    "ema_decay": 0.5,
    "max_grad_norm": 2.0,
    "skip_nonfinite": True,
    "telemetry_every": 3,
    "process_group": torch.distributed.ProcessGroup(0, 1),
    "backend": "eager",
    "foreach": True,
    "fused": True,
    "differentiable": True,
}
PAIRS = list(itertools.product(OPTIMIZERS, options.OPTIONS))
HAVE = [(m, name) for m, name in PAIRS if m not in options.OPTIONS[name].senseless]
HAVE_NOT = [pair for pair in PAIRS if pair not in HAVE]
IN_GROUPS = [(m, name) for m, name in HAVE if name in options.GROUP_OPTIONS]
ON_A_GPU = ("capturable",)  # refused elsewhere, by its name
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def in_words(name: str, text: str) -> bool:
    """Whether `name` stands there as code: alone or with a value."""
    return re.search(rf"`{name}(`|=|\b[^`\n]*`)|\b{name}=", text) is not None


def value(method: str, name: str) -> Any:
    """AdamSPD's default anchor is what is another's second choice."""
    return "zero" if (method, name) == ("spd", "anchor") else VALUES[name]


def weight(name: str) -> torch.Tensor:
    """Master weights are for weights of 16 bits only; no other option asks for them."""
    dtype = torch.bfloat16 if name in options.OF_NARROW_WEIGHTS else torch.float32
    return torch.ones(3, dtype=dtype, requires_grad=True)


def build(method: str, name: str) -> Any:
    """An optimizer of two groups, of which the second has the option."""
    chosen = {"params": [weight(name)], name: value(method, name)}
    return OPTIMIZERS[method]([{"params": [weight(name)]}, chosen])


# ---- options -------------------------------------------------------------------------------------


def test_every_option_is_tested_here() -> None:
    assert VALUES.keys() == options.OPTIONS.keys()
    for name, row in options.OPTIONS.items():
        assert name in options.BY_POSITION or VALUES[name] != row.default, name


@pytest.mark.parametrize("name", options.OPTIONS)
def test_an_option_is_documented(name: str) -> None:
    assert any(in_words(name, path.read_text()) for path in DOCUMENTS)


@pytest.mark.parametrize(("method", "name"), HAVE)
def test_an_option_is_in_the_help_of_those_that_have_it(method: str, name: str) -> None:
    text = inspect.getdoc(OPTIMIZERS[method])
    assert text is not None
    assert re.search(rf"^\s*{name}$", text, re.MULTILINE)
    assert "".join(options.OPTIONS[name].text.split()) in "".join(text.split())


@pytest.mark.parametrize(("method", "name"), HAVE_NOT)
def test_and_not_in_that_of_those_that_have_it_not(method: str, name: str) -> None:
    """Which refuse it with the reason, wherever it is given."""
    assert not re.search(rf"^\s*{name}$", inspect.getdoc(OPTIMIZERS[method]) or "", re.MULTILINE)
    reason = f"{name} makes no sense .*{re.escape(options.OPTIONS[name].senseless[method])}"
    given = {name: VALUES[name]}
    with pytest.raises(ValueError, match=reason):
        OPTIMIZERS[method]([weight(name)], **given)
    with pytest.raises(ValueError, match=f"group 1: {reason}"):
        build(method, name)
    optimizer = OPTIMIZERS[method]([weight(name)])
    with pytest.raises(ValueError, match=f"group 1: {reason}"):
        optimizer.add_param_group({"params": [weight(name)], **given})


@pytest.mark.parametrize(("method", "name"), HAVE)
def test_an_option_is_taken(method: str, name: str) -> None:
    """By the constructor, where a bad one is refused by its name."""
    given = {name: value(method, name)}
    if name == "differentiable" or name in ON_A_GPU:
        with pytest.raises(ValueError, match=name):
            OPTIMIZERS[method]([weight(name)], **given)
        return
    optimizer = OPTIMIZERS[method]([weight(name)], **given)
    if name in options.GROUP_OPTIONS:
        assert optimizer.param_groups[0][name] == given[name]
    elif name not in options.TORCH_CHOICES:
        assert getattr(optimizer, name, given[name]) == given[name]
    if name not in options.TORCH_CHOICES:
        with pytest.raises((ValueError, TypeError), match=name.replace("_", "[_ ]")):
            OPTIMIZERS[method]([weight(name)], **{name: object()})


@pytest.mark.parametrize(("method", "name"), IN_GROUPS)
def test_an_option_of_a_group_is_taken_by_each(method: str, name: str) -> None:
    if name in ON_A_GPU:
        with pytest.raises(ValueError, match=f"group 1: .*{name}"):
            build(method, name)
        return
    optimizer = build(method, name)
    chosen = value(method, name)
    optimizer.add_param_group({"params": [weight(name)], name: chosen})
    first, *others = optimizer.param_groups
    assert first[name] != chosen
    assert [group[name] for group in others] == [chosen] * 2


@pytest.mark.parametrize(("method", "name"), [p for p in IN_GROUPS if p[1] not in ON_A_GPU])
def test_a_state_dict_holds_an_option_that_differs(method: str, name: str) -> None:
    """And gives it to whoever loads it: those of 16-bit weights only if they agree already."""
    optimizer = build(method, name)
    checkpoint = saved(optimizer.state_dict())
    always, default = name in options.ALWAYS_IN_GROUPS, options.OPTIONS[name].default_of(method)
    for group, kept in zip(optimizer.param_groups, checkpoint["param_groups"], strict=True):
        assert (name in kept) == (always or group[name] != default)
    loaded = build(method, name)
    if name not in options.OF_NARROW_WEIGHTS:
        loaded = OPTIMIZERS[method]([{"params": [weight(name)]} for _ in range(2)])
    loaded.load_state_dict(checkpoint)
    assert [group[name] for group in loaded.param_groups] == [
        group[name] for group in optimizer.param_groups
    ]


def test_no_optimizer_has_an_option_that_is_in_no_row() -> None:
    for kind in OPTIMIZERS.values():
        named = set(inspect.signature(kind.__init__).parameters) - {"self", "params", "options"}
        assert named <= options.OPTIONS.keys()
        with pytest.raises(TypeError, match="momentum"):
            kind([weight("lr")], momentum=0.9)


# ---- states --------------------------------------------------------------------------------------

METHODS_MD = (ROOT / "docs" / "methods.md").read_text()


@pytest.mark.parametrize("name", [entry.name for entry in state.ENTRIES])
def test_an_entry_of_a_state_is_documented(name: str) -> None:
    assert in_words(name, METHODS_MD)


def test_every_entry_of_a_state_is_made_by_some_optimizer() -> None:
    """And no optimizer makes one that has no row."""
    found = set()
    ways: list[dict[str, Any]] = [
        {"amsgrad": True, "ema_decay": 0.5},
        {"rounding": "kahan"},
        {"master_weights": True},
    ]
    for kind, way in itertools.product(OPTIMIZERS.values(), ways):
        w = torch.ones(3, dtype=torch.bfloat16)
        optimizer = kind([w], anchor="initial", **way)
        w.grad = torch.ones_like(w)
        optimizer.step()
        found |= optimizer.state[w].keys()
    assert found == {entry.name for entry in state.ENTRIES}


# ---- names that the kernels know too, by their positions -----------------------------------------


def strings(header: str, table: str) -> tuple[str, ...]:
    """Those of a table in C++."""
    text = (ROOT / "csrc" / header).read_text()
    match = re.search(rf"\b{table}\[\] = \{{(.*?)\}};", text, re.DOTALL)
    assert match, f"{table} is not in csrc/{header}"
    return tuple(re.findall(r'"(\w+)"', match[1]))


def enumerators(header: str, name: str, prefix: str = "") -> tuple[str, ...]:
    """Those of an enumeration in C++, as Python spells them, without a count at the end."""
    text = re.sub(r"//.*", "", (ROOT / "csrc" / header).read_text())
    match = re.search(rf"\benum (?:class )?{name}\b[^{{;]*\{{(.*?)\}}", text, re.DOTALL)
    assert match, f"there is no enum {name} in csrc/{header}"
    names = [each.strip().partition(" ")[0] for each in match[1].split(",") if each.strip()]
    plain = [re.sub(r"(?<=[a-z0-9])([A-Z])", r"_\1", x.removeprefix(prefix)).lower() for x in names]
    return tuple(x for x, written in zip(plain, names, strict=True) if written != f"k{name}s")


SCHEDULE_KINDS = [kind for kind in schedules._KEYS if kind != "product"]
DECAYS = list(dict.fromkeys({"swd": "decoupled", "spd": "projection"}.get(m, m) for m in METHODS))


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        pytest.param(strings("options.h", "kDecayScaleNames"), options.DECAY_SCALES, id="scales"),
        pytest.param(enumerators("options.h", "DecayScale"), options.DECAY_SCALES, id="scale"),
        pytest.param(strings("options.h", "kScheduleKindNames"), SCHEDULE_KINDS, id="kinds"),
        pytest.param(enumerators("options.h", "Kind"), SCHEDULE_KINDS, id="kind"),
        pytest.param(strings("options.h", "kDecayNames"), DECAYS, id="decays"),
        pytest.param(enumerators("update.h", "Decay"), DECAYS, id="decay"),
        pytest.param(
            strings("dtype.h", "kStorageNames"), enumerators("dtype.h", "Storage"), id="storage"
        ),
        pytest.param(enumerators("sums.h", "Sum", "k"), sums.SUMS, id="sums"),
        pytest.param(enumerators("decide.h", "Column", "kColumn"), telemetry.COLUMNS, id="columns"),
    ],
)
def test_cpp_has_the_names_of_python_in_their_order(found: Any, expected: Any) -> None:
    assert list(found) == list(expected)


def test_storage_has_the_names_that_python_chooses_between() -> None:
    chosen = {"direct", "master", *options.ROUNDINGS}
    assert set(strings("dtype.h", "kStorageNames")) == chosen


def streams() -> list[str]:
    return list(dict.fromkeys(entry.stream or entry.name for entry in state.ENTRIES))


def test_cpp_takes_every_stream() -> None:
    text = (ROOT / "csrc" / "plan.cpp").read_text()
    assert [name for name in streams() if f'{{"{name}",' not in text] == []


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed")
def test_triton_has_the_names_of_python_in_their_order() -> None:
    from wdkernels import triton_tables

    assert triton_tables.DECAY_SCALES == options.DECAY_SCALES
    assert list(triton_tables.SCHEDULE_KINDS) == SCHEDULE_KINDS
    # Steps are counted beside the tensors' table.
    assert {*triton_tables.STREAMS, "step"} == {*streams()}


# ---- files ---------------------------------------------------------------------------------------


def test_no_file_is_longer_than_can_be_read_at_once() -> None:
    files = [*(ROOT / "wdkernels").glob("*.py*"), *(ROOT / "csrc").iterdir()]
    long = {path.name: n for path in files if (n := len(path.read_bytes().splitlines())) > 600}
    assert {name: n for name, n in long.items() if not name.endswith((".so", ".pyc"))} == {}
