"""Any strides of any tensor, and tensors that move: the result is that of contiguous ones."""

from __future__ import annotations

import itertools
import random as dice
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import (
    METHODS,
    Variant,
    anchors_of,
    assert_close,
    assert_same_bits,
    every_backend,
    every_method,
    gradient,
    needs_native,
    other_order,
    random,
    sliced,
    snapshot,
    train,
    trained,
)
from support.internals import overlapping, runs_of_memory
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import wdkernels as wd

SHAPE = (2, 3, 4, 5)


def inner(x: Tensor) -> Tensor:
    """A part of something larger in every dimension."""
    whole = torch.full([n + 2 for n in x.shape], 7, dtype=x.dtype)
    return whole[tuple(slice(1, n + 1) for n in x.shape)].copy_(x)


def shifted(x: Tensor) -> Tensor:
    """One element past an aligned address."""
    return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.clone,
    "channels_last": lambda x: x.clone().contiguous(memory_format=torch.channels_last),
    "transposed": other_order,
    "reversed": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "sliced": sliced,
    "inner": inner,
    "shifted": shifted,
}
layouts = list(LAYOUTS.values())
OPTIONS: list[dict[str, Any]] = [{}, {"amsgrad": True, "maximize": True}]
every_option = pytest.mark.parametrize("options", OPTIONS, ids=["plain", "amsgrad-maximize"])


def assert_as(actual: dict[str, Tensor], expected: dict[str, Tensor], variant: Variant) -> None:
    """The same bits, but SWD and SPD add up in the order of memory: their sums round otherwise."""
    if variant.method not in ("swd", "spd"):
        return assert_same_bits(actual, expected)
    assert actual.keys() == expected.keys()
    for name, x in actual.items():
        exact = x.dtype in (torch.float64, torch.complex128) and "sum" not in name
        # A sum of n terms rounds n times, in any order; a few hundred here, in double.
        tolerance = 1e-13 if exact else 1e-6
        torch.testing.assert_close(x, expected[name], rtol=tolerance, atol=tolerance)


# ---- strides -------------------------------------------------------------------------------------


@every_backend
@every_option
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_every_layout_of_parameter_gradient_and_anchor(
    method: str, dtype: torch.dtype, options: dict[str, Any], backend: str
) -> None:
    """One parameter per layout; in as many steps its gradient goes through all of them."""
    variant = Variant(method, options, anchored=True)
    runs, strides = [], []
    for various in (False, True):
        values = [random(*SHAPE, seed=i, dtype=dtype) for i in range(len(layouts))]
        params = [layouts[i * various](w) for i, w in enumerate(values)]
        strides = [p.stride() for p in params]
        anchors = [layouts[(i + 3) % 7 * various](a) for i, a in enumerate(anchors_of(values))]
        optimizer = variant.build(params, backend, anchors)
        for t in range(len(layouts)):
            for i, p in enumerate(params):
                g = gradient(values[i], i, t)
                p.grad = None if g is None else layouts[(i + t) % 7 * various](g)
            optimizer.step()
        assert [p.stride() for p in params] == strides
        runs.append(snapshot(optimizer, params))
    assert len(set(strides)) > 4
    assert_as(runs[1], runs[0], variant)


@every_backend
@every_method
def test_memory_around_a_slice_is_left_alone(variant: Variant, backend: str) -> None:
    whole = random(6, 8, seed=1)
    params = [whole[1:3, ::2], whole[4:, 3:5], whole[0, 1:2]]
    outside = torch.ones_like(whole, dtype=torch.bool)
    outside[1:3, ::2] = outside[4:, 3:5] = outside[0, 1:2] = False
    before = whole.clone()
    train(variant.build(params, backend), params, range(3))
    assert torch.equal(whole[outside], before[outside])
    assert (whole != before)[~outside].all()


@every_backend
@every_method
def test_a_slice_without_gradient_is_not_written(variant: Variant, backend: str) -> None:
    """Autograd would take it for changed."""
    p, q = torch.ones(3), sliced(torch.ones(3)).requires_grad_()
    optimizer = variant.build([p, q], backend)
    for _ in range(2):
        product = (q * q).sum()
        p.grad, q.grad = torch.ones(3), None
        optimizer.step()
        product.backward()


@every_backend
@every_method
def test_interleaved_slices_of_one_tensor_are_two_parameters(
    variant: Variant, backend: str
) -> None:
    runs = []
    for base in (random(5, 2, seed=1), random(5, 2, seed=1).t().contiguous().t()):
        params = [base[:, 0], base[:, 1]]
        runs.append(trained(variant.build(params, backend, anchor="initial"), params, 4))
    assert_as(runs[0], runs[1], variant)


@every_backend
@every_method
@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 3), (3, 0), (1, 1, 1)], ids=str)
def test_small_shapes(variant: Variant, shape: tuple[int, ...], backend: str) -> None:
    """Alone and beside another; elements of a 0-d parameter may lie anywhere in a tensor."""
    runs = []
    for others in ([], [random(3, seed=2)]):
        params = [random(*shape, seed=1), random(7, seed=1)[3] if shape == () else None, *others]
        params = [p for p in params if p is not None]
        optimizer = variant.build(params, backend, amsgrad=True, anchor="initial")
        runs.append(trained(optimizer, params, 3))
        assert runs[-1]["exp_avg 0"].shape == shape
    if variant.method != "swd":
        assert torch.equal(runs[0]["weight 0"], runs[1]["weight 0"])


@every_backend
@every_method
def test_strides_of_size_one_dimensions_do_not_count(variant: Variant, backend: str) -> None:
    runs = []
    for strides in ((4, 4, 1), (999, 4, 77), (0, 4, 0)):
        p = torch.empty(12).as_strided((1, 3, 1), strides).copy_(random(1, 3, 1, seed=1))
        optimizer = variant.build([p], backend)
        for t in range(3):
            p.grad = torch.empty(40).as_strided((1, 3, 1), (strides[-1], 4, 5))
            p.grad.copy_(random(1, 3, 1, seed=t))
            optimizer.step()
        runs.append(snapshot(optimizer, [p]))
    for run in runs:
        assert_same_bits(run, runs[0])


@every_backend
@every_method
def test_expanded_parameters(variant: Variant, backend: str) -> None:
    """Size 1 expanded to size 1 is itself; an element that stands for several cannot be updated."""
    p = torch.ones(1, 3).expand(1, 3)
    train(variant.build([p], backend), [p], range(2))
    assert (p != 1).all()

    first, p = torch.ones(2), torch.ones(1, 3).expand(4, 3)
    optimizer = variant.build([first, p], backend)
    first.grad, p.grad = torch.ones(2), torch.ones(4, 3)
    before = snapshot(optimizer, [first, p])
    with pytest.raises(RuntimeError, match=r"parameter 1 of group 0 .*\(an expanded tensor\?\)"):
        optimizer.step()
    assert_same_bits(snapshot(optimizer, [first, p]), before)


@every_backend
@every_method
def test_expanded_gradients(variant: Variant, backend: str) -> None:
    runs = []
    for expanded in (False, True):
        params = [random(3, 4, seed=1), random(4, seed=2), random(seed=3)]
        optimizer = variant.build(params, backend)
        for t in range(3):
            values = [random(1, 4, seed=t), random(1, seed=t), random(seed=t)]
            for p, g in zip(params, values, strict=True):
                p.grad = g.expand(p.shape) if expanded else g.expand(p.shape).clone()
            optimizer.step()
        runs.append(snapshot(optimizer, params))
    assert_same_bits(*runs)


@every_backend
@every_method
@pytest.mark.parametrize("shape", [(), (1,), (4, 3)], ids=str)
def test_lazily_conjugated_and_negated_gradients(
    variant: Variant, shape: tuple[int, ...], backend: str
) -> None:
    """`conj` and what it makes of `imag` are flags of a tensor; its memory holds other numbers."""
    runs = []
    for lazy in (False, True):
        z, x = random(*shape, seed=1, dtype=torch.complex128), random(*shape, seed=2)
        optimizer = variant.build([z, x], backend)
        for t in range(3):
            conjugate = random(*shape, seed=10 + t, dtype=torch.complex128).conj()
            z.grad, x.grad = conjugate, conjugate.imag
            assert z.grad.is_conj()
            assert x.grad.is_neg()
            if not lazy:
                z.grad, x.grad = z.grad.resolve_conj(), x.grad.resolve_neg().clone()
            optimizer.step()
        runs.append(snapshot(optimizer, [z, x]))
    assert_same_bits(*runs)


@every_backend
@every_method
@pytest.mark.parametrize("shape", [(), (1,), (4, 3)], ids=str)
def test_lazily_conjugated_and_negated_anchors(
    variant: Variant, shape: tuple[int, ...], backend: str
) -> None:
    runs = []
    for lazy in (False, True):
        params = [random(*shape, seed=1, dtype=torch.complex128), random(*shape, seed=2)]
        conjugate = random(*shape, seed=3, dtype=torch.complex128).conj()
        anchors = [conjugate, conjugate.imag]
        if not lazy:
            anchors = [conjugate.resolve_conj(), conjugate.imag.resolve_neg().clone()]
        runs.append(trained(variant.build(params, backend, anchor=anchors), params, 3))
    assert_same_bits(*runs)


@pytest.mark.parametrize("shape", [(), (1,), (4, 3)], ids=str)
def test_lazily_conjugated_and_negated_parameters_are_refused(shape: tuple[int, ...]) -> None:
    """torch.optim cannot update the first either; of the second, memory holds the negative."""
    conjugate = random(*shape, seed=1, dtype=torch.complex128).conj()
    for p in (conjugate, conjugate.imag):
        with pytest.raises(ValueError, match=r"parameter 1 of group 0 .*resolve_conj"):
            wd.AdamW([torch.ones(1), p])


@needs_native
@every_method
def test_dense_tensors_of_equal_strides_cost_nothing(variant: Variant) -> None:
    """A planned step calls no operation of torch: nothing is copied, filled or converted."""
    calls = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, call: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append(str(call))
            return call(*args, **(kwargs or {}))

    params = [layouts[i](random(*SHAPE, seed=i)) for i in range(4)]
    optimizer = variant.build(params, "native", anchor="initial")
    for t in range(3):
        for i, p in enumerate(params):
            p.grad = layouts[i](random(*SHAPE, seed=t))
        if t == 0:
            optimizer.step()
        else:
            with Calls():
                optimizer.step()
    assert optimizer.state[params[0]]["step"] == 3
    sums = ["aten.empty.memory_format"] * 2 if variant.method in ("swd", "spd") else []
    assert [call for call in calls if not call.startswith("profiler.")] == sums


# ---- tensors that change between steps -----------------------------------------------------------


def twins(
    variant: Variant, backend: str, change: Callable[[Any, list[Tensor], int], None], steps: int = 6
) -> None:
    """`change` rearranges an optimizer and its parameters before each step, and changes nothing."""
    runs = []
    for changing in (False, True):
        params = [random(*SHAPE, seed=1), random(4, 4, seed=2), random(5, seed=3), random(seed=4)]
        optimizer = variant.build(params, backend)
        for t in range(steps):
            if changing:
                change(optimizer, params, t)
            train(optimizer, params, range(t, t + 1))
        runs.append(snapshot(optimizer, params))
    assert_as(runs[1], runs[0], variant)


every_changing = pytest.mark.parametrize(
    "variant", [Variant(method, {"amsgrad": True}, True) for method in METHODS], ids=str
)


@every_backend
@every_changing
def test_parameters_at_new_addresses(variant: Variant, backend: str) -> None:
    def change(_: Any, params: list[Tensor], t: int) -> None:
        params[t % 4].data = params[t % 4].data.clone()

    twins(variant, backend, change)


@every_backend
@every_changing
def test_parameters_in_new_layouts(variant: Variant, backend: str) -> None:
    """As of model.to(memory_format=...) in the middle of a run; the state keeps its own."""

    def change(_: Any, params: list[Tensor], t: int) -> None:
        params[0].data = layouts[t](params[0].data)

    twins(variant, backend, change)


@every_backend
@every_changing
def test_states_at_new_addresses(variant: Variant, backend: str) -> None:
    def change(optimizer: Any, params: list[Tensor], t: int) -> None:
        for key, x in optimizer.state[params[t % 2]].items():
            optimizer.state[params[t % 2]][key] = x.clone()

    twins(variant, backend, change)


@every_backend
@every_changing
def test_states_at_new_addresses_in_the_same_tensors(variant: Variant, backend: str) -> None:
    """As offloading does: the tensor object stays, its memory goes and comes back elsewhere."""

    def change(optimizer: Any, params: list[Tensor], t: int) -> None:
        for x in optimizer.state[params[t % 2]].values():
            x.data = x.data.clone()

    twins(variant, backend, change)


@every_backend
@every_changing
def test_states_in_other_layouts(variant: Variant, backend: str) -> None:
    def change(optimizer: Any, params: list[Tensor], t: int) -> None:
        for x in optimizer.state[params[0]].values():
            if x.dim() == 4:
                x.data = layouts[t](x.data)

    twins(variant, backend, change)


@every_backend
@every_changing
def test_states_loaded_in_other_layouts(variant: Variant, backend: str) -> None:
    def change(optimizer: Any, params: list[Tensor], t: int) -> None:
        checkpoint = optimizer.state_dict()
        for state in checkpoint["state"].values():
            for key, x in state.items():
                state[key] = layouts[t](x) if x.dim() == 4 else x
        optimizer.load_state_dict(checkpoint)

    twins(variant, backend, change)


@every_backend
@every_changing
def test_an_address_that_is_used_again(variant: Variant, backend: str) -> None:
    """Pointer, size and type stay as they were and the order of the elements does not."""
    runs = []
    for same_address in (False, True):
        p = random(4, 4, seed=1)
        memory = torch.empty(16, dtype=torch.float64)
        optimizer = variant.build([p], backend)
        for t in range(6):
            # Swap the dimensions in place: the weight, then the gradient, then a state.
            if t == 2:
                p.data = p.data.t() if same_address else p.data.t().clone()
            if t == 4:
                x = optimizer.state[p]["exp_avg"]
                x.data = x.data.t() if same_address else x.data.t().clone()
            g = random(4, 4, seed=t)
            if same_address:
                g = (memory.view(4, 4) if t % 2 else memory.view(4, 4).t()).copy_(g)
            p.grad = g
            optimizer.step()
        runs.append(snapshot(optimizer, [p]))
    assert_as(runs[1], runs[0], variant)


@every_backend
@every_changing
def test_gradients_come_and_go(variant: Variant, backend: str) -> None:
    """Any subset of the parameters takes part in a step, whatever took part in the one before."""
    subsets = dice.Random(0)
    runs: list[Any] = []
    params = [[random(3 + i, seed=i) for i in range(6)] for _ in range(2)]
    optimizers = [variant.build(params[0], backend), variant.reference(params[1])]
    for t in range(25):
        chosen = [subsets.random() < 0.6 for _ in range(6)]
        for each, optimizer in zip(params, optimizers, strict=True):
            for i, p in enumerate(each):
                p.grad = random(*p.shape, seed=100 * t + i) * 0.9**t if chosen[i] else None
            optimizer.step()
    runs = [snapshot(o, each) for o, each in zip(optimizers, params, strict=True)]
    # The reference knows the states of all parameters from the start.
    assert_close(runs[0], {key: runs[1][key] for key in runs[0]})


@every_backend
@pytest.mark.parametrize("method", METHODS)
def test_edited_groups(method: str, backend: str) -> None:
    """Parameters leave a group, change places, come back with their state, and are exchanged."""
    runs = []
    for kind in (backend, "eager"):
        params = [random(4, seed=i) for i in range(4)]
        groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.3}]
        optimizer = Variant(method).build(groups, kind)
        train(optimizer, params, range(2))
        first, second = (group["params"] for group in optimizer.param_groups)
        first[0], second[0] = second[0], first[0]
        train(optimizer, params, range(2, 3))
        left = first.pop()
        train(optimizer, params, range(3, 4))
        second.append(left)
        train(optimizer, params, range(4, 5))
        optimizer.param_groups[0]["params"] = [*first]
        params.append(random(4, seed=9))
        second[0] = params[-1]
        train(optimizer, params, range(5, 6))
        optimizer.param_groups.reverse()
        train(optimizer, params, range(6, 7))
        runs.append(snapshot(optimizer, params))
    assert_close(*runs)


@every_backend
@every_method
def test_states_that_are_deleted_start_anew(variant: Variant, backend: str) -> None:
    p = random(4, seed=1)
    optimizer = variant.build([p], backend)
    train(optimizer, [p], range(2))
    optimizer.state.clear()
    w = p.clone()
    fresh = variant.build([w], backend)
    train(optimizer, [p], range(2, 4))
    train(fresh, [w], range(2, 4))
    assert_same_bits(snapshot(optimizer, [p]), snapshot(fresh, [w]))


def test_memory_that_comes_to_be_shared() -> None:
    """Looked at again whenever a parameter has moved; a gradient is not needed for that."""
    p, q = torch.ones(4), torch.ones(4)
    optimizer = wd.AdamW([p, q])
    train(optimizer, [p, q], range(1))
    q.data = p.data
    p.grad, q.grad = torch.ones(4), torch.ones(4)
    with pytest.raises(RuntimeError, match="parameter 0 of group 0 and parameter 1 of group 0"):
        optimizer.step()


def test_memory_shared_by_tensors_of_different_types() -> None:
    """The imaginary part of every other element, and the elements between them."""
    z = torch.ones(8, dtype=torch.complex64)
    imaginary = torch.view_as_real(z)[::2, 1]
    optimizer = wd.AdamW([z[1::2], imaginary])
    train(optimizer, optimizer.param_groups[0]["params"], range(1))
    optimizer = wd.AdamW([z[::2], imaginary])
    with pytest.raises(RuntimeError, match="share memory"):
        train(optimizer, optimizer.param_groups[0]["params"], range(1))


def test_tensors_overlap_if_they_share_a_byte() -> None:
    """Against sets of bytes: slices of one buffer, in any order of dimensions, of any type."""

    def slices(x: Tensor, seed: int) -> Tensor:
        numbers = torch.randint(0, 12, (8,), generator=torch.Generator().manual_seed(seed)).tolist()
        x = x.view(torch.float32 if numbers[0] % 2 else torch.complex64)
        x = x[: numbers[1] + 1, numbers[2] % 4 :: numbers[3] % 3 + 1]
        x = x[numbers[4] :: numbers[5] % 4 + 1]
        return x.t() if numbers[6] % 2 else x.unfold(0, 1 + numbers[7] % 2, 1) if len(x) > 2 else x

    def bytes_of(x: Tensor) -> list[int]:
        places = itertools.product(*map(range, x.shape))
        starts = [sum(i * s for i, s in zip(at, x.stride(), strict=True)) for at in places]
        size = x.element_size()
        return [x.data_ptr() + start * size + k for start in starts for k in range(size)]

    buffer = torch.zeros(12, 10)
    outcomes = set()
    for seed in range(300):
        tensors = [slices(buffer, 4 * seed + k) for k in range(2 + seed % 3)]
        found = overlapping(tensors)
        everything = [bytes_of(x) for x in tensors]
        distinct = len(set().union(*everything))
        assert (found is None) == (distinct == sum(map(len, everything)))
        if found is not None:
            i, k = found
            together = everything[i] + (everything[k] if i != k else [])
            assert len(set(together)) < len(together)
        outcomes.add(found if found is None else found[0] == found[1])
    assert outcomes == {None, False, True}


def test_tensors_that_begin_within_an_element_of_another() -> None:
    buffer = bytearray(40)
    x = torch.frombuffer(buffer, dtype=torch.float32)
    y = torch.frombuffer(buffer, dtype=torch.float32, offset=2, count=9)
    assert overlapping([x[::2], y[1::2]]) == (0, 1)


def test_many_slices_of_one_tensor_are_told_apart() -> None:
    whole = torch.empty(1000, 1000)
    columns = list(whole.unbind(1))
    blocks = [whole[i : i + 10, j : j + 10] for i in range(0, 500, 10) for j in range(0, 500, 10)]
    assert overlapping(columns) is None
    assert overlapping(blocks) is None
    assert overlapping([*columns, whole[10:20, 7:8]]) == (7, 1000)
    assert overlapping([*blocks, whole[499:501, 499:501]]) == (2499, 2500)


def test_memory_is_looked_at_without_listing_elements() -> None:
    """Neither those of a tensor that is one run, nor those of one that is expanded."""
    assert overlapping([torch.ones(1).expand(10**9, 10**9)]) == (0, 0)
    x = torch.empty(2, 2**34, device="meta")
    assert runs_of_memory(x)[1] == 2**37


def test_meta_tensors_share_no_memory() -> None:
    params = [torch.ones(3, device="meta"), torch.ones(2, device="meta")]
    optimizer = wd.AdamW(params)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.state[params[1]]["exp_avg"].is_meta


def test_a_gradient_that_is_the_weight() -> None:
    """As in p.grad = p.detach(): the step must not read what it has written."""
    for kind in (wd.AdamW, wd.AdamSPD, wd.AdamSWD):
        p = torch.linspace(-1, 1, 40, dtype=torch.float64).requires_grad_()
        q = p.detach().clone().requires_grad_()
        p.grad, q.grad = p.detach(), q.detach().clone()
        for weight in (p, q):
            kind([weight], lr=0.3, weight_decay=0.2, anchor="zero").step()
        assert p.equal(q)
