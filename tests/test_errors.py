"""Bad input: an exception that names the place and says what to do, and nothing has changed."""

from __future__ import annotations

import copy
import importlib.util
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import (
    BACKENDS,
    METHODS,
    Variant,
    Wrapper,
    anchors_of,
    assert_same_bits,
    bits,
    every_backend,
    internals,
    needs_native,
    random,
    set_gradients,
    snapshot,
    train,
)
from torch import Tensor, nn

import wdkernels as wd
from wdkernels import schedules

# Checks are the same for all, before one is chosen; not so what a plan sees of a tensor later.
even_triton = pytest.mark.parametrize(
    "backend",
    [
        *BACKENDS,
        pytest.param(
            "triton",
            marks=pytest.mark.skipif(
                not importlib.util.find_spec("triton") or torch.cuda.is_available(),
                reason="in Triton's interpreter, on CPU tensors",
            ),
        ),
    ],
)
OPTIMIZERS = {"l2": wd.Adam, "decoupled": wd.AdamW, "swd": wd.AdamSWD, "spd": wd.AdamSPD}
SHAPES = [(3, 4), (7,), (2, 2)]
every_optimizer = pytest.mark.parametrize("method", OPTIMIZERS)


def weights() -> list[Tensor]:
    return [random(*shape, seed=i, dtype=torch.float32) for i, shape in enumerate(SHAPES)]


def assert_same(x: Any, y: Any) -> None:
    """Equal to the bit, down to the last tensor of nested containers."""
    assert type(x) is type(y)
    if isinstance(x, Tensor):
        assert x.dtype == y.dtype
        assert torch.equal(bits(x), bits(y)) if x.device.type != "meta" else x.shape == y.shape
    elif isinstance(x, dict):
        assert x.keys() == y.keys()
        for key in x:
            assert_same(x[key], y[key])
    elif isinstance(x, (list, tuple)):
        assert len(x) == len(y)
        for each, other in zip(x, y, strict=True):
            assert_same(each, other)
    else:
        assert x == y or (x != x and y != y)


def everything(optimizer: Any, params: list[Tensor]) -> Any:
    """Copies of all that a failed call might have changed."""
    grads = [p.grad for p in params if p.grad is not None and p.grad.layout == torch.strided]
    weights = [p.detach().as_subclass(Tensor) for p in params]
    return copy.deepcopy((weights, grads, optimizer.state_dict(), optimizer.defaults))


def refuse(
    optimizer: Any,
    params: list[Tensor],
    call: Callable[[], Any],
    error: type[Exception],
    match: str,
) -> None:
    before = everything(optimizer, params)
    with pytest.raises(error, match=match):
        call()
    assert_same(everything(optimizer, params), before)


# ---- a step --------------------------------------------------------------------------------------

Break = Callable[[Any, list[Tensor]], Callable[[], None]]  # returns what mends it again


def sparse_gradient(_: Any, params: list[Tensor]) -> Callable[[], None]:
    good = params[-1].grad
    params[-1].grad = torch.ones(2, 2).to_sparse()
    return lambda: setattr(params[-1], "grad", good)


def other_data(data: Callable[[Tensor], Tensor]) -> Break:
    """autograd guards `.grad`; a parameter can turn away from its gradient all the same."""

    def damage(_: Any, params: list[Tensor]) -> Callable[[], None]:
        good = params[-1].data
        params[-1].data = data(good)
        return lambda: setattr(params[-1], "data", good)

    return damage


def gradient_elsewhere(_: Any, params: list[Tensor]) -> Callable[[], None]:
    """autograd would not take such a gradient; a parameter of another make might have one."""

    class Elsewhere(Tensor):
        @property
        def grad(self) -> Tensor:
            return torch.ones(2, 2, device="meta")

    params[-1].__class__ = Elsewhere
    return lambda: setattr(params[-1], "__class__", Tensor)


def shared_memory(_: Any, params: list[Tensor]) -> Callable[[], None]:
    good = params[-1].data
    params[-1].data = params[0].data.view(-1)[8:].view(2, 2)
    return lambda: setattr(params[-1], "data", good)


def another(index: int | None) -> Break:
    """One of the parameters once more, or integers."""

    def damage(optimizer: Any, params: list[Tensor]) -> Callable[[], None]:
        members = optimizer.param_groups[1]["params"]
        members.append(torch.ones(3, dtype=torch.int64) if index is None else params[index])
        return members.pop

    return damage


def in_state(key: str, value: Any) -> Break:
    """Replace or remove an entry of the last parameter's state."""

    def damage(optimizer: Any, params: list[Tensor]) -> Callable[[], None]:
        state = optimizer.state[params[-1]]
        good = dict(state)
        if value is None:
            del state[key]
        else:
            state[key] = value(state[key]) if callable(value) else value

        def mend() -> None:
            state.clear()
            state.update(good)

        return mend

    return damage


def in_group(key: str, value: Any) -> Break:
    def damage(optimizer: Any, _: Any) -> Callable[[], None]:
        good = optimizer.param_groups[1][key]
        optimizer.param_groups[1][key] = value
        return lambda: optimizer.param_groups[1].__setitem__(key, good)

    return damage


LAST = "parameter 1 of group 1"  # parameter 0 of group 0 comes first and is fine
STATES: list[tuple[str, Any, type[Exception], str]] = [
    ("exp_avg", torch.ones(3), ValueError, r" has shape \(3,\) but the parameter has \(2, 2\)"),
    ("exp_avg_sq", Tensor.double, RuntimeError, " has dtype torch.float64 but the parameter has"),
    ("exp_avg", lambda x: x.to("meta"), RuntimeError, " has device meta but the parameter has cpu"),
    ("exp_avg", 3.0, ValueError, " must be a tensor, not float"),
    ("step", 3, RuntimeError, " must be a floating-point tensor"),
    ("step", torch.tensor(3), RuntimeError, " must be a floating-point tensor"),
    ("step", torch.ones((), device="meta"), RuntimeError, " is on meta: move it to the CPU"),
    ("anchor", torch.ones(3), ValueError, " has shape"),
]
LAST = "parameter 1 of group 1"  # parameter 0 of group 0 comes first and is fine
BOTH = f"(parameter 0 of group 0 and {LAST}|{LAST} and parameter 0 of group 0)"
STEPS: dict[str, tuple[Break, type[Exception], str]] = {
    "sparse gradient": (sparse_gradient, RuntimeError, f"{LAST} is sparse .*sparse=False"),
    "gradient of another shape": (
        *(other_data(lambda _: torch.ones(4, 2)), RuntimeError),
        rf"gradient of {LAST} has shape \(2, 2\) but the parameter has \(4, 2\): .*zero_grad",
    ),
    "gradient of another dtype": (
        *(other_data(Tensor.double), RuntimeError),
        rf"gradient of {LAST} has dtype torch.float32 but the parameter has torch.float64: ",
    ),
    "gradient on another device": (
        *(gradient_elsewhere, RuntimeError),
        f"gradient of {LAST} has device meta but the parameter has cpu: ",
    ),
    "shared memory": (shared_memory, RuntimeError, f"{BOTH} share memory"),
    "expanded": (
        *(other_data(lambda _: torch.ones(1, 2).expand(2, 2)), RuntimeError),
        f"{LAST} holds several elements at one address .*clone",
    ),
    "the same parameter twice": (another(0), RuntimeError, "share memory"),
    "integer parameter": (another(None), TypeError, "parameter 2 of group 1 has dtype torch.int64"),
    **{
        f"{key}{match} ({type(value).__name__})": (
            *(in_state(key, value), error),
            f"{key} of {LAST}{match}",
        )
        for key, value, error, match in STATES
    },
    **{
        f"no {key}": (in_state(key, None), ValueError, f"{LAST} (lacks|has no) {key}")
        for key in ("exp_avg_sq", "step", "anchor")
    },
    **{
        f"step {t}": (in_state("step", torch.tensor(t)), ValueError, f"{LAST} has step .*whole num")
        for t in (math.nan, -1.0, math.inf, 1.5, [1.0, 1.0])
    },
}

# Hyper-parameters: what is wrong with each, by name, and what the message says.
NUMBERS = [-0.1, math.nan, math.inf, -math.inf, "0.1", None, True, torch.tensor([0.1, 0.2])]
NUMBERS += [torch.tensor(-1.0), torch.tensor(math.nan)]
ELSEWHERE = torch.tensor(0.1, device="meta")  # as on a GPU: to read it would be to wait
WAITS = "is a tensor on meta, for which the host would have to wait in every step: pass a number"
VALUES: list[tuple[str, Any, str]] = [
    *[(key, ELSEWHERE, f"{key} {WAITS}") for key in ("lr", "weight_decay", "eps", "ema_decay")],
    ("betas", (ELSEWHERE, 0.9), rf"betas\[0\] {WAITS}"),
    ("betas", (0.9, ELSEWHERE), rf"betas\[1\] {WAITS}"),
    *[(key, x, f"{key} must be") for key in ("lr", "weight_decay", "eps") for x in NUMBERS],
    *[("betas", (x, 0.9), r"betas\[0\] must be") for x in (*NUMBERS, 1.0, 1.5)],
    *[("betas", (0.9, x), r"betas\[1\] must be") for x in (*NUMBERS, 1.0, 1.5)],
    *[("betas", x, "betas must be a pair") for x in ((0.9,), (0.9, 0.9, 0.9), 0.9, None, "ab")],
    *[
        (key, x, f"{key} must be True or False")
        for key in ("amsgrad", "maximize")
        for x in (1, None)
    ],
    ("capturable", True, "capturable=True is for parameters on a GPU"),
    ("decay_schedule", "cosine", "a decay schedule is None or a dict"),
    ("decay_schedule", {"kind": "sine"}, "unknown kind of decay schedule 'sine'; there are"),
    ("decay_schedule", {"kind": "linear", "start": 1.0}, "'linear' lacks 'end', 'steps'"),
    ("decay_schedule", {**schedules.early(3), "stop": math.nan}, "'stop' .* must be an int"),
    ("decay_schedule", {**schedules.cosine(steps=3), "end": -1.0}, "'end' .* must be a finite"),
]
DECOUPLED_VALUES: list[tuple[str, Any, str]] = [
    *[("lr_max", x, "lr_max must be") for x in NUMBERS if x is not None],
    ("lr_max", ELSEWHERE, f"lr_max {WAITS}"),
    ("decay_scale", "eta", "unknown decay_scale 'eta'; there are 'lr', 'relative_lr', 'corrected'"),
    ("decay_scale", None, "unknown decay_scale None"),
    ("cautious", 1, "cautious must be True or False"),
]
# All of them on the optimizer that has every option, and one for each option on the others.
METHODS_AND_VALUES = [("decoupled", *each) for each in (*VALUES, *DECOUPLED_VALUES)]
ONE_EACH = {each[0]: each for each in VALUES}.values()
METHODS_AND_VALUES += [(method, *each) for method in ("l2", "swd", "spd") for each in ONE_EACH]


def disturbed(method: str, backend: str, damage: Break, error: type[Exception], match: str) -> None:
    """A run with failed steps, before the first one and later, is the run without them."""
    runs = []
    for disturb in (False, True):
        params = weights()
        groups = [
            {"params": params[:1], "anchor": anchors_of(params[:1])},
            {"params": params[1:], "anchor": anchors_of(params[1:])},
        ]
        optimizer = Variant(method).build(groups, backend)
        optimizer.state_dict()  # which makes the states, for the anchors that were given
        for t in range(4):
            set_gradients(params, 3 * t)
            if disturb and t in (0, 2):
                mend = damage(optimizer, params)
                refuse(optimizer, params, optimizer.step, error, match)
                mend()
            optimizer.step()
        runs.append(snapshot(optimizer, params))
    assert_same_bits(*runs)


@every_backend
@pytest.mark.parametrize(("damage", "error", "match"), STEPS.values(), ids=STEPS.keys())
@pytest.mark.parametrize("method", METHODS)
def test_a_step_validates_everything_before_it_writes_anything(
    method: str, damage: Break, error: type[Exception], match: str, backend: str
) -> None:
    disturbed(method, backend, damage, error, match)


@every_backend
def test_a_sum_of_swd_in_another_precision(backend: str) -> None:
    match = f"exp_avg_sq_sum of {LAST} has dtype torch.float32 but it must be torch.float64: delete"
    disturbed("swd", backend, in_state("exp_avg_sq_sum", Tensor.float), RuntimeError, match)


def given_back(x: Tensor) -> Tensor:
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


def inferred(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


def sparse(x: Tensor) -> Tensor:
    return x.reshape(-1).to_sparse()


def nested(x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a prototype
        return torch.nested.nested_tensor([x.reshape(-1)])


# What may stand in a state without being of use to a step, by entry: of float32 weights with
# averages, under SWD, whose sum is one of the entries.
NO_MEMORY = "has no memory of its own: make it a plain tensor"
ODD: list[tuple[str, Callable[[Tensor], Any], type[Exception], str]] = [
    *[
        (key, odd, error, f"{key} of {LAST}{match}")
        for key in ("exp_avg", "exp_avg_sq", "ema")
        for odd, error, match in (
            (Wrapper, ValueError, f" is a Wrapper, which {NO_MEMORY}"),
            (given_back, ValueError, " has been given back: allocate it again"),
            (nested, ValueError, " must be a dense tensor, not nested"),
            (sparse, ValueError, " must be a dense tensor, not torch.sparse_coo"),
            (lambda x: x[:1, :1].expand(2, 2), RuntimeError, " holds several elements at one addr"),
            (torch._neg_view, ValueError, " is a lazily conjugated or negated view, .*resolve"),
            (inferred, RuntimeError, r" was made in torch.inference_mode\(\), .*clone"),
            (Tensor.bfloat16, RuntimeError, " has dtype torch.bfloat16 but the parameter has"),
        )
    ],
    ("anchor", Wrapper, ValueError, f"anchor of {LAST} is a Wrapper, which {NO_MEMORY}"),
    ("anchor", given_back, ValueError, f"anchor of {LAST} has been given back"),
    ("anchor", nested, ValueError, f"anchor of {LAST} must be a dense tensor, not nested"),
    *[
        ("step", odd, RuntimeError, f"step of {LAST} must be .*, float32 or float64, not tensor")
        for odd in (Tensor.half, Tensor.bfloat16, lambda x: x.to(torch.float8_e5m2))
    ],
    *[
        ("step", odd, ValueError, rf"{LAST} has step (?s:.*): it must be a whole number")
        for odd in (sparse, nested)
    ],
    ("step", Wrapper, ValueError, f"step of {LAST} is a Wrapper, which {NO_MEMORY}"),
    ("step", given_back, ValueError, f"step of {LAST} has been given back"),
    ("step", inferred, RuntimeError, f"step of {LAST} was made in torch.inference_mode"),
    *[
        ("exp_avg_sq_sum", odd, ValueError, f"exp_avg_sq_sum of {LAST} must be a tensor of one")
        for odd in (sparse, nested, lambda _: 3.0)
    ],
    *[
        ("exp_avg_sq_sum", odd, RuntimeError, f"exp_avg_sq_sum of {LAST} has {match}.*: delete it")
        for odd, match in (
            (lambda x: x.to("meta"), "device meta but it must be cpu"),
            (lambda x: x.reshape(1), "ndim 1 but it must be 0"),
        )
    ],
    ("exp_avg_sq_sum", Wrapper, ValueError, f"exp_avg_sq_sum of {LAST} is a Wrapper, which"),
    ("exp_avg_sq_sum", given_back, ValueError, f"exp_avg_sq_sum of {LAST} has been given back"),
]


def odd_state_is_refused(
    backend: str,
    damage: Callable[[dict[str, Any], dict[str, Any]], Any],
    error: type[Exception],
    match: str,
) -> None:
    """`damage` is given the state of the last parameter and that of the one before."""
    runs = []
    for disturb in (False, True):
        params = weights()
        groups = [
            {"params": params[:1]},
            {"params": params[1:], "anchor": anchors_of(params[1:])},
        ]
        optimizer = wd.AdamSWD(groups, lr=0.1, backend=backend, ema_decay=0.5)
        train(optimizer, params, range(2, 4))
        set_gradients(params, 5)
        if disturb:
            state, before = optimizer.state[params[-1]], [p.clone() for p in params]
            good = dict(state)
            damage(state, optimizer.state[params[-2]])
            with pytest.raises(error, match=match):
                optimizer.step()
            assert all(map(torch.equal, params, before))
            state.clear()
            state.update(good)
        optimizer.step()
        runs.append(snapshot(optimizer, params))
    assert_same_bits(*runs)


@even_triton
@pytest.mark.parametrize(("key", "odd", "error", "match"), ODD)
def test_an_odd_entry_of_a_state(
    key: str, odd: Callable[[Tensor], Any], error: type[Exception], match: str, backend: str
) -> None:
    odd_state_is_refused(
        backend, lambda state, _: state.update({key: odd(state[key])}), error, match
    )


@even_triton
def test_a_lazily_conjugated_moment(backend: str) -> None:
    w = torch.ones(3, dtype=torch.complex64)
    optimizer = wd.AdamW([w], lr=0.1, backend=backend)
    train(optimizer, [w], range(1))
    optimizer.state[w]["exp_avg"] = optimizer.state[w]["exp_avg"].conj()
    before = w.clone()
    match = (
        "exp_avg of parameter 0 of group 0 is a lazily conjugated or negated view, .*resolve_conj"
    )
    with pytest.raises(ValueError, match=match):
        optimizer.step()
    assert torch.equal(w, before)


@even_triton
def test_entries_of_a_state_that_share_memory(backend: str) -> None:
    """Each would be updated with what the other has become."""
    own = rf"exp_avg of {LAST} and exp_avg_sq of {LAST} share memory and would be updated twice"
    odd_state_is_refused(backend, lambda x, _: x.update(exp_avg_sq=x["exp_avg"]), RuntimeError, own)
    others = rf"step of {LAST.replace('1', '0', 1)} and step of {LAST} share memory"
    odd_state_is_refused(
        backend, lambda x, other: x.update(step=other["step"]), RuntimeError, others
    )


@pytest.mark.parametrize("key", ["master", "compensation"])
@every_backend
def test_what_only_16_bits_need_beside_weights_that_were_widened(key: str, backend: str) -> None:
    """As by model.float(), after which the weights are those that are rounded."""
    w = torch.ones(3, dtype=torch.bfloat16)
    mode = {"master": {"master_weights": True}, "compensation": {"rounding": "kahan"}}[key]
    optimizer = wd.AdamW([w], lr=0.1, backend=backend, **mode)
    w.grad = torch.ones_like(w)
    optimizer.step()
    w.data, w.grad = w.data.float(), None
    w.grad = torch.ones_like(w)
    match = f"parameter 0 of group 0 has {key}, which only weights of 16 bits have, .* float32: add"
    refuse(optimizer, [w], optimizer.step, ValueError, match.replace(" float32", "torch.float32"))
    del optimizer.state[w][key]
    optimizer.step()


@even_triton
@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("what", ["the gradient of ", ""])
def test_memory_that_has_been_given_back(what: str, stepped: bool, backend: str) -> None:
    w = torch.ones(3)
    optimizer = wd.AdamW([w], backend=backend)
    w.grad = torch.ones(3)
    if stepped:
        optimizer.step()
    (w.grad if what else w).untyped_storage().resize_(0)
    match = f"the memory of {what}parameter 0 of group 0 has been given back: allocate it again"
    with pytest.raises(RuntimeError, match=match):
        optimizer.step()


@even_triton
@pytest.mark.parametrize("stepped", [False, True])
def test_a_gradient_without_memory(stepped: bool, backend: str) -> None:
    w = torch.ones(3)
    optimizer = wd.AdamW([w], backend=backend)
    w.grad = torch.ones(3)
    if stepped:
        optimizer.step()
    w.grad = Wrapper(torch.ones(3))
    match = f"the gradient of parameter 0 of group 0 is a Wrapper, which {NO_MEMORY}"
    before = w.clone()
    with pytest.raises(RuntimeError, match=match):
        optimizer.step()
    assert torch.equal(w, before)


@every_backend
def test_a_parameter_of_inference(backend: str) -> None:
    with torch.inference_mode():
        w = torch.ones(3)
        w.grad = torch.ones(3)
    optimizer = wd.AdamW([w], backend=backend)
    match = r"parameter 0 of group 0 was made in torch.inference_mode\(\), .*clone"
    refuse(optimizer, [w], optimizer.step, RuntimeError, match)
    with torch.inference_mode():
        optimizer.step()


def test_a_step_count_on_a_device_is_not_read() -> None:
    """Reading would wait for the device; a meta tensor has no number at all."""
    p = torch.ones(2, device="meta")
    state = {"step": p[0], "exp_avg": p, "exp_avg_sq": p}
    internals.check_state(p, state, wd.AdamW([p]).param_groups[0], LAST)


@every_backend
@pytest.mark.parametrize(("method", "key", "value", "match"), METHODS_AND_VALUES, ids=str)
def test_an_edited_group(method: str, key: str, value: Any, match: str, backend: str) -> None:
    disturbed(method, backend, in_group(key, value), ValueError, f"group 1: .*{match}")


@every_backend
@pytest.mark.parametrize("value", ["first", None, [torch.ones(7), torch.ones(2, 2)]], ids=str)
@every_optimizer
def test_an_edited_anchor(method: str, value: Any, backend: str) -> None:
    disturbed(method, backend, in_group("anchor", value), ValueError, "group 1: .*anchor")


@every_backend
@every_optimizer
@pytest.mark.parametrize("stepped", [False, True])
def test_an_anchor_cannot_be_switched_on_later(method: str, stepped: bool, backend: str) -> None:
    params = weights()
    optimizer = Variant(method).build(params, backend, anchor="zero")
    if stepped:
        train(optimizer, params, range(1))
    chosen = "initial" if stepped else "given"  # an initial one is taken at the first step
    optimizer.param_groups[0]["anchor"] = chosen
    for p in params:
        p.grad = torch.ones_like(p)
    refuse(optimizer, params, optimizer.step, ValueError, "parameter 0 of group 0 has no anchor")


@every_backend
def test_messages_use_the_names_of_parameters(backend: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Embedding(3, 2, sparse=True))
    optimizer = wd.AdamW(model.named_parameters(), backend=backend)
    params = list(model.parameters())
    (model[0](torch.ones(2)).sum() + model[1](torch.tensor([1])).sum()).backward()
    match = r"the gradient of '1.weight' \(parameter 2 of group 0\) is sparse"
    refuse(optimizer, params, optimizer.step, RuntimeError, match)


@every_backend
def test_a_closure_that_fails(backend: str) -> None:
    params = weights()
    optimizer = wd.AdamW(params, backend=backend)
    train(optimizer, params, range(2))

    def closure() -> None:
        raise ZeroDivisionError("inside")

    refuse(optimizer, params, lambda: optimizer.step(closure), ZeroDivisionError, "inside")


@needs_native
@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.float8_e4m3fn], ids=str)
def test_native_without_loops_for_a_dtype(method: str, dtype: torch.dtype) -> None:
    params = [torch.ones(3), torch.ones(3).to(dtype)]
    optimizer = OPTIMIZERS[method](params, backend="native")
    for p in params:
        p.grad = torch.ones_like(p)
    match = f"'native' can't be had: it has no loops for {dtype}; try backend='auto'"
    refuse(optimizer, params, optimizer.step, ValueError, match)


# ---- construction and add_param_group ------------------------------------------------------------


@pytest.mark.parametrize(("method", "key", "value", "match"), METHODS_AND_VALUES, ids=str)
def test_a_bad_value_at_construction(method: str, key: str, value: Any, match: str) -> None:
    with pytest.raises(ValueError, match=f"group 0: .*{match}"):
        OPTIMIZERS[method](weights(), **{key: value})
    groups = [{"params": weights()}, {"params": weights(), key: value}]
    with pytest.raises(ValueError, match=f"group 1: .*{match}"):
        OPTIMIZERS[method](groups)


@pytest.mark.parametrize(("method", "key", "value", "match"), METHODS_AND_VALUES, ids=str)
def test_a_bad_value_in_add_param_group(method: str, key: str, value: Any, match: str) -> None:
    bad_group(method, {"params": torch.ones(2), key: value}, ValueError, f"group 1: .*{match}")


def bad_group(method: str, group: Any, error: type[Exception], match: str) -> None:
    """Refused, after which the optimizer goes on as if nothing had been asked of it."""
    runs = []
    for disturb in (False, True):
        params = weights()
        optimizer = OPTIMIZERS[method](params, lr=0.1)
        for t in range(3):
            if disturb and t in (0, 2):
                group = group(params) if callable(group) else group
                add = optimizer.add_param_group
                refuse(optimizer, params, lambda: add(dict(group)), error, match)  # noqa: B023
            train(optimizer, params, range(t, t + 1))
        runs.append(snapshot(optimizer, params))
    assert_same_bits(*runs)


BAD_ANCHORS: dict[str, tuple[Any, str]] = {
    "unknown name": ("first", "group 1: anchor must be 'zero', 'initial', 'ema' or a list"),
    "None": (None, "group 1: anchor must be 'zero', 'initial', 'ema' or a list"),
    "reserved name": ("given", "group 1: anchor must be 'zero', 'initial', 'ema' or a list"),
    "number": (3.0, "group 1: anchor must be 'zero', 'initial', 'ema' or a list"),
    "too few": ([torch.ones(3, 4)], "group 1: anchor holds 1 tensors for 2 parameters"),
    "too many": ([torch.ones(3, 4)] * 3, "group 1: anchor holds 3 tensors for 2 parameters"),
    "shape": (
        [torch.ones(3, 4), torch.ones(2)],
        rf"the anchor of {LAST} has shape \(2,\) but the parameter has \(7,\)",
    ),
    "dtype": (
        [torch.ones(3, 4), torch.ones(7).double()],
        f"the anchor of {LAST} has dtype torch.float64 but the parameter has torch.float32",
    ),
    "device": (
        [torch.ones(3, 4), torch.ones(7, device="meta")],
        f"the anchor of {LAST} has device meta but the parameter has cpu",
    ),
    "no tensor": (
        [torch.ones(3, 4), [0.0] * 7],
        f"the anchor of {LAST} must be a tensor, not list",
    ),
}


@pytest.mark.parametrize(("anchor", "match"), BAD_ANCHORS.values(), ids=BAD_ANCHORS.keys())
@every_optimizer
def test_bad_anchors(method: str, anchor: Any, match: str) -> None:
    group = {"params": [torch.ones(3, 4), torch.ones(7)], "anchor": anchor}
    bad_group(method, group, ValueError, match)
    with pytest.raises(ValueError, match=match.replace("group 1", "group 0")):
        OPTIMIZERS[method](group["params"], anchor=anchor)


@every_optimizer
def test_anchors_are_copied(method: str) -> None:
    p, q = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    optimizer = OPTIMIZERS[method]([{"params": [p], "anchor": [q]}, {"params": [q], "anchor": [q]}])
    p.grad, q.grad = torch.ones(3), torch.ones(3)
    optimizer.step()
    assert not q.equal(torch.ones(3))
    assert optimizer.state[p]["anchor"].equal(torch.ones(3))
    assert optimizer.state[q]["anchor"].equal(torch.ones(3))


@every_optimizer
def test_one_list_of_anchors_for_two_groups(method: str) -> None:
    groups = [{"params": [torch.ones(3)]}, {"params": [torch.ones(3)]}]
    with pytest.raises(ValueError, match="give each group its own"):
        OPTIMIZERS[method](groups, anchor=[torch.zeros(3)])


@every_optimizer
def test_a_parameter_twice(method: str) -> None:
    p, q = torch.ones(2), torch.ones(3)
    kind = OPTIMIZERS[method]
    with pytest.raises(ValueError, match="parameter 2 of group 0 is parameter 0 of group 0 once"):
        kind([p, q, p])
    with pytest.raises(ValueError, match="parameter 1 of group 1 is parameter 0 of group 0 once"):
        kind([{"params": [p]}, {"params": [q, p]}])
    with pytest.raises(ValueError, match=r"'b' \(.*\) is 'a' \(parameter 0 of group 0\) once"):
        kind([("a", p), ("b", p)])

    def group(params: list[Tensor]) -> dict[str, Any]:
        return {"params": [torch.ones(1), params[2]]}

    match = "parameter 1 of group 1 is parameter 2 of group 0 once more"
    bad_group(method, group, ValueError, match)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8], ids=str)
@every_optimizer
def test_integer_parameters(method: str, dtype: torch.dtype) -> None:
    p = torch.ones(2).to(dtype)
    with pytest.raises(TypeError, match=f"parameter 1 of group 0 has dtype {dtype}; only floating"):
        OPTIMIZERS[method]([torch.ones(2), p])
    bad_group(method, {"params": [torch.ones(2), p]}, TypeError, "parameter 1 of group 1 has dtype")


@every_optimizer
def test_parameters_that_are_none(method: str) -> None:
    kind = OPTIMIZERS[method]
    with pytest.raises(TypeError, match=r"parameter 1 of group 0 has layout .*sparse_coo"):
        kind([torch.ones(2), torch.ones(2).to_sparse()])
    with pytest.raises(ValueError, match="empty parameter list"):
        kind([])
    with pytest.raises(TypeError):
        kind(torch.ones(2))
    with pytest.raises(TypeError, match="Tensors"):
        kind([[1.0, 2.0]])
    with pytest.raises(ValueError, match="non-leaf"):
        kind([torch.ones(2, requires_grad=True) * 2])
    for group in ({"lr": 0.1}, [torch.ones(2)], {"params": [3.0]}):
        with pytest.raises((TypeError, KeyError)):
            wd.AdamW([torch.ones(1)]).add_param_group(group)


@pytest.mark.parametrize("backend", ["cuda", "", None, "Native"], ids=str)
@every_optimizer
def test_an_unknown_backend(method: str, backend: Any) -> None:
    match = "unknown backend .*; there are 'auto', 'native', 'triton', 'eager'"
    with pytest.raises(ValueError, match=match):
        OPTIMIZERS[method](weights(), backend=backend)


@pytest.mark.parametrize("decay_scale", ["relative_lr", "corrected"])
@pytest.mark.parametrize("method", ["decoupled", "swd"])
def test_a_decay_scale_without_lr_max(method: str, decay_scale: str) -> None:
    """A schedule that warms up from 0 leaves nothing to take the default from."""
    with pytest.raises(ValueError, match=r"group 0: .*divides by lr_max.*: pass lr_max"):
        OPTIMIZERS[method](weights(), lr=0.0, decay_scale=decay_scale)
    OPTIMIZERS[method](weights(), lr=0.0, lr_max=0.1, decay_scale=decay_scale)


@every_optimizer
def test_an_option_that_does_not_exist(method: str) -> None:
    with pytest.raises(TypeError, match="momentum"):
        OPTIMIZERS[method](weights(), momentum=0.9)


# ---- state dicts ---------------------------------------------------------------------------------


Damage = Callable[[dict[str, Any]], Any]


def with_group(**values: Any) -> Damage:
    """Values of the saved group; ... removes one."""
    return lambda saved: {**saved, "param_groups": [replaced(saved["param_groups"][0], values)]}


def with_state(**values: Any) -> Damage:
    """Values of the last parameter's saved state; ... removes one."""
    return lambda saved: {
        **saved,
        "state": {**saved["state"], 2: replaced(saved["state"][2], values)},
    }


def twice(saved: dict[str, Any]) -> dict[str, Any]:
    return {**saved, "param_groups": saved["param_groups"] * 2}


def replaced(values: dict[str, Any], by: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in {**values, **by}.items() if value is not ...}


STATE_OF = "parameter 2 of group 0"
NOT_ONE = "this is not the state_dict of an optimizer"
CORRUPT: dict[str, tuple[Damage, str]] = {
    "not a dict": (lambda _: [1, 2], NOT_ONE),
    "None": (lambda _: None, NOT_ONE),
    "empty": (lambda _: {}, f"{NOT_ONE}.*nothing"),
    "of a model": (lambda _: {"weight": torch.ones(2)}, f"{NOT_ONE}.*weight"),
    "state a list": (lambda saved: {**saved, "state": []}, NOT_ONE),
    "groups a dict": (lambda saved: {**saved, "param_groups": {}}, NOT_ONE),
    "a group a list": (lambda saved: {**saved, "param_groups": [[1]]}, "group 0 .* must be a dict"),
    **{
        name: (damage, match.replace("GROUP", "group 0 of the state_dict"))
        for name, damage, match in (
            ("two groups", twice, "has 2 param groups, this optimizer 1"),
            ("few", with_group(params=[0, 1]), "GROUP has 2 parameters, this optimizer's has 3"),
            ("twice", with_group(params=[0, 1, 1]), "params of GROUP hold 1 a second time"),
            ("a list", with_group(params=[0, 1, [2]]), r"params of GROUP hold \[2\]"),
            ("no betas", with_group(betas=...), "GROUP lacks betas"),
            *(
                (
                    f"names {x}",
                    with_group(param_names=x),
                    "param_names of GROUP must be a list of 3",
                )
                for x in (["a", "b"], ["a", "b", 3], "abc")
            ),
            *(
                (f"parameters {x}", with_group(params=x), "params of GROUP must be a list")
                for x in (..., None, 3, "abc", {0: 0, 1: 1, 2: 2})
            ),
        )
    },
    "a state of no parameter": (
        lambda saved: {**saved, "state": {**saved["state"], 7: saved["state"][2]}},
        "the state_dict holds a state for 7, which is in no group's params",
    ),
    "bad lr": (with_group(lr=-1.0), "group 0: lr must be"),
    "bad betas": (with_group(betas=(0.9, math.nan)), r"group 0: betas\[1\] must be"),
    "bad schedule": (with_group(decay_schedule={"kind": "sine"}), "group 0: unknown kind"),
    "bad anchor": (with_group(anchor="first"), "group 0: anchor"),
    "a state a list": (
        lambda saved: {**saved, "state": {**saved["state"], 2: [1]}},
        f"the state of {STATE_OF} must be a dict",
    ),
    "no exp_avg": (with_state(exp_avg=...), f"{STATE_OF} lacks exp_avg"),
    "no step": (with_state(step=...), f"{STATE_OF} lacks step"),
    **{
        f"{key} of another shape": (
            with_state(**{key: torch.ones(3)}),
            rf"{key} of {STATE_OF} has shape \(3,\) but the parameter has \(2, 2\)",
        )
        for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "anchor")
    },
    "complex": (
        with_state(exp_avg=torch.ones(2, 2, dtype=torch.complex64)),
        f"exp_avg of {STATE_OF} is torch.complex64 but the parameter is torch.float32",
    ),
    "no tensor": (with_state(exp_avg="zeros"), f"exp_avg of {STATE_OF} must be a tensor, not str"),
    **{
        f"{what} {key}": (with_state(**{key: odd(x)}), f"{key} of {STATE_OF}{match}")
        for key, x in (("exp_avg", torch.ones(2, 2)), ("anchor", torch.ones(2, 2)))
        for what, odd, match in (
            ("meta", lambda x: x.to("meta"), " is on the meta device, where there are no numbers"),
            ("integers", Tensor.long, " is torch.int64, which moments and weights never are"),
            ("nested", nested, " must be a dense tensor, not nested"),
            ("without memory", Wrapper, f" is a Wrapper, which {NO_MEMORY}"),
            ("given back", given_back, " has been given back: allocate it again"),
        )
    },
    "meta step": (with_state(step=torch.ones((), device="meta")), "step of .* meta device"),
    "sparse step": (
        with_state(step=sparse(torch.ones(()))),
        rf"{STATE_OF} has step (?s:.*): it must",
    ),
    "step without memory": (with_state(step=Wrapper(torch.ones(()))), f"step of .*{NO_MEMORY}"),
    **{
        f"step {step}": (
            with_state(step=step),
            f"{STATE_OF} has step .*: it must be a whole number",
        )
        for step in (math.nan, torch.tensor(math.nan), -1, 1.5, "3", None, torch.ones(2), math.inf)
    },
}


def refuse_checkpoint(variant: Variant, backend: str, damage: Damage, match: str) -> None:
    """Refused as a whole: the run that was under way goes on, to the bit."""
    runs = []
    for disturb in (False, True):
        params = weights()
        optimizer = variant.build(params, backend)
        for t in range(4):
            if disturb and t != 1:
                load, bad = optimizer.load_state_dict, optimizer.state_dict()
                if t == 0:
                    other = weights()
                    trained = variant.build(other, backend)
                    train(trained, other, range(3))
                    bad = trained.state_dict()
                bad = damage(copy.deepcopy(bad))
                refuse(optimizer, params, lambda: load(bad), ValueError, match)  # noqa: B023
            train(optimizer, params, range(t, t + 1))
        runs.append(snapshot(optimizer, params))
    assert_same_bits(*runs)


@every_backend
@pytest.mark.parametrize(("damage", "match"), CORRUPT.values(), ids=CORRUPT.keys())
@every_optimizer
def test_a_corrupt_state_dict(method: str, damage: Damage, match: str, backend: str) -> None:
    refuse_checkpoint(Variant(method, {"amsgrad": True}, True), backend, damage, match)


@every_backend
@pytest.mark.parametrize("index", [0, 1])
def test_a_state_dict_with_the_names_of_one_group(index: int, backend: str) -> None:
    params = weights()
    optimizer = wd.AdamW([{"params": params[:1]}, {"params": params[1:]}], backend=backend)
    bad = optimizer.state_dict()
    bad["param_groups"][index]["param_names"] = ["a", "b"][: index + 1]
    match = f"group {index} of the state_dict has param_names, another has none"
    refuse(optimizer, params, lambda: optimizer.load_state_dict(bad), ValueError, match)


@every_backend
def test_a_state_dict_with_a_parameter_in_two_groups(backend: str) -> None:
    params = weights()
    optimizer = wd.AdamW([{"params": params[:1]}, {"params": params[1:]}], backend=backend)
    bad = optimizer.state_dict()
    bad["param_groups"][1]["params"] = [1, 0]
    match = "params of group 1 of the state_dict hold 0 a second time"
    refuse(optimizer, params, lambda: optimizer.load_state_dict(bad), ValueError, match)


@every_backend
@pytest.mark.parametrize("bad", [-1.0, math.nan, -math.inf], ids=str)
def test_a_sum_of_swd_that_no_squares_have(bad: float, backend: str) -> None:
    match = f"exp_avg_sq_sum of {STATE_OF} is {bad}: a sum of squares is >= 0"
    damage = with_state(exp_avg_sq_sum=torch.tensor(bad, dtype=torch.float64))
    refuse_checkpoint(Variant("swd"), backend, damage, match)


def test_a_sum_of_swd_that_has_overflowed() -> None:
    params = weights()
    optimizer = wd.AdamSWD(params)
    train(optimizer, params, range(3))
    big = with_state(exp_avg_sq_sum=torch.tensor(math.inf, dtype=torch.float64))
    optimizer.load_state_dict(big(optimizer.state_dict()))
    assert optimizer.state[params[2]]["exp_avg_sq_sum"] == math.inf


@every_backend
@pytest.mark.parametrize("bad", [1.0, torch.ones(2), torch.ones(0), torch.tensor(1), "1"], ids=str)
def test_a_corrupt_sum_of_swd(bad: Any, backend: str) -> None:
    match = f"exp_avg_sq_sum of {STATE_OF} must be a tensor of one number"
    refuse_checkpoint(Variant("swd"), backend, with_state(exp_avg_sq_sum=bad), match)


@every_backend
@pytest.mark.parametrize(
    ("kind", "match"),
    [
        (torch.optim.SGD, "group 0 of the state_dict lacks betas, eps"),
        (torch.optim.Adagrad, "group 0 of the state_dict lacks betas"),
        (torch.optim.RMSprop, "group 0 of the state_dict lacks betas"),
        (torch.optim.Adamax, "parameter 0 of group 0 lacks exp_avg_sq .*another kind"),
        # NAdam's is not here: it has Adam's moments, and entries beside them belong to anybody.
    ],
)
@every_optimizer
def test_the_state_dict_of_another_kind_of_optimizer(
    method: str, kind: Any, match: str, backend: str
) -> None:
    params = weights()
    other = kind(params, lr=0.1)
    train(other, params, range(2))
    refuse_checkpoint(Variant(method), backend, lambda _: other.state_dict(), match)
