"""A layer with its batch norm in one step each way: the very numbers of its steps one by one, and only where it may."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import eagerq
from eagerq import native
from eagerq.functional import layer as one_layer
from eagerq.intrinsic import qat
from eagerq.intrinsic.in_one import layer_in_one

pytestmark = pytest.mark.skipif(not native.available, reason="the C library was not built: no compiler at installation")

QCONFIG = eagerq.get_default_qat_qconfig("onednn")
DOOR = "eagerq.intrinsic.qat.layer_in_one"
FORMATS: dict[str, Any] = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def never(*arguments: Any) -> None:
    return None


def counted(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One for each call that is taken in one step."""
    calls: list[None] = []
    backward = one_layer._ConvBn.forward

    def forward(*arguments: Any) -> Tensor:
        calls.append(None)
        return backward(*arguments)

    monkeypatch.setattr(one_layer._ConvBn, "forward", staticmethod(forward))
    return calls


def made(kind: str = "ConvBnReLU2d", channels: int = 3, out: int = 4, **options: Any) -> Any:
    torch.manual_seed(0)
    layer = getattr(qat, kind)(channels, out, options.pop("kernel_size", 3), qconfig=QCONFIG, **options)
    nn.init.uniform_(layer.bn.weight, -1, 2)
    nn.init.uniform_(layer.bn.bias, -1, 1)
    return layer


def data(*shape: int) -> Tensor:
    return torch.randn(shape or (2, 3, 7, 6), generator=torch.Generator().manual_seed(1))


def steps(layer: nn.Module, x: Tensor, run: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor | None]:
    """Outputs, gradients and state of two steps."""
    found: dict[str, Tensor | None] = {}
    for step in range(2):
        layer.zero_grad()
        leaf = (x + step).requires_grad_()
        out = (run or layer)(leaf)
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(2)))
        found[f"output {step}"], found[f"input {step}"] = out.detach().clone(), leaf.grad
        found.update({f"{step} {name}": value.grad for name, value in layer.named_parameters()})
    return {**found, **{name: value.clone() for name, value in layer.state_dict().items()}}


def assert_equal(mine: dict[str, Tensor | None], theirs: dict[str, Tensor | None]) -> None:
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        other = theirs[name]
        assert (value is None) == (other is None), name
        if value is not None and other is not None:
            assert value.stride() == other.stride(), name
            torch.testing.assert_close(value, other, rtol=0, atol=0, equal_nan=True, msg=lambda text, n=name: n + text)


def assert_as_step_by_step(layer: Any, x: Tensor, calls: int, run: Any = None) -> None:
    """That a copy's steps one by one give the same; and that as many calls are taken in one step."""
    other = copy.deepcopy(layer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DOOR, never)
        theirs = steps(other, x, run and run(other))
    with pytest.MonkeyPatch.context() as patch:
        taken = counted(patch)
        mine = steps(layer, x, run and run(layer))
    assert len(taken) == calls
    assert_equal(mine, theirs)


@given(
    dim=st.integers(1, 3),
    relu=st.booleans(),
    groups=st.sampled_from([(1, 3, 4), (2, 4, 6), (5, 5, 5), (1, 1, 1)]),
    window=st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(0, 2), st.integers(1, 2)),
    batch=st.integers(1, 3),
    size=st.integers(5, 9),
    last=st.booleans(),
    late=st.booleans(),
)
def test_as_step_by_step(
    dim: int,
    relu: bool,
    groups: tuple[int, int, int],
    window: tuple[int, int, int, int],
    batch: int,
    size: int,
    last: bool,
    late: bool,
) -> None:
    count, channels, out = groups
    kernel, stride, padding, dilation = window
    layer = made(
        f"ConvBn{'ReLU' * relu}{dim}d",
        *(channels, out),
        kernel_size=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=count,
    )
    x = data(batch, channels, *[size] * dim)
    with torch.no_grad():
        layer(x)
    if last and dim == 2:
        layer, x = layer.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    if late:
        layer.apply(eagerq.disable_observer)
    assert_as_step_by_step(layer, x, 2)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dead", [0.0, -0.0, 1e-42])
def test_channels_that_the_batch_norm_multiplies_by_nothing(dead: float, layout: str) -> None:
    layer = made()
    with torch.no_grad():
        layer.bn.weight[1:3] = dead
    assert_as_step_by_step(layer, data().contiguous(memory_format=FORMATS[layout]), 2)


@pytest.mark.parametrize("wanting", ["input", "weight", "bn.weight", "bn.bias"])
def test_only_what_is_wanted_gets_a_gradient(wanting: str) -> None:
    layer = made().requires_grad_(False)
    if wanting != "input":
        layer.get_parameter(wanting).requires_grad_()
    x = data().requires_grad_(wanting == "input")
    other = copy.deepcopy(layer)
    out = layer(x)
    assert type(out.grad_fn).__name__ == "_ConvBnBackward"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DOOR, never)
        reference = other(x)
    found = []
    for module, result in ((layer, out), (other, reference)):
        leaf = x if wanting == "input" else module.get_parameter(wanting)
        found.append(torch.autograd.grad(result.square().sum(), leaf)[0])
    assert torch.equal(*found)


def test_the_first_call_of_all() -> None:
    """It makes room for the ranges."""
    layer = made()
    assert layer.weight_fake_quant.scale.shape == (1,)
    assert_as_step_by_step(layer, data(), 2)
    assert layer.weight_fake_quant.scale.shape == (4,)


def test_gradients_twice_from_one_pass() -> None:
    layer, x = made(), data().requires_grad_()
    out = layer(x).square().sum()
    once = torch.autograd.grad(out, [x, *layer.parameters()], retain_graph=True)
    assert all(map(torch.equal, once, torch.autograd.grad(out, [x, *layer.parameters()])))


def both(call: Callable[[], Any]) -> list[Any]:
    """What a call gives with and without the layer in one step."""
    results = []
    for door in (None, never):
        with pytest.MonkeyPatch.context() as patch:
            if door:
                patch.setattr(DOOR, door)
            results.append(call())
    return results


def assert_close(mine: list[Tensor], theirs: list[Tensor]) -> None:
    for one, other in zip(mine, theirs, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


def test_second_derivatives() -> None:
    def derived() -> list[Tensor]:
        layer, x = made(), data().requires_grad_()
        leaves = [x, *layer.parameters()]
        first = torch.autograd.grad(layer(x).pow(3).sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(one.square().sum() for one in first), leaves)  # type: ignore[arg-type]
        return [*first, *second]

    assert_close(*both(derived))


@pytest.mark.parametrize("door", [layer_in_one, never])
def test_gradients_to_be_differentiated_are_the_same(door: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a layer whose input comes of its own weight."""
    monkeypatch.setattr(DOOR, door)
    layer, x = made(channels=4, padding=1), data(2, 4, 7, 6).requires_grad_()
    layer(x)
    layer.apply(eagerq.disable_observer)
    out, leaves = layer(layer(x)).pow(3).sum(), [x, *layer.parameters()]
    once = torch.autograd.grad(out, leaves, retain_graph=True)
    assert_close(list(torch.autograd.grad(out, leaves, create_graph=True)), list(once))


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_activation_checkpointing(reentrant: bool) -> None:
    def again(layer: Any) -> Callable[[Tensor], Tensor]:
        return lambda x: checkpoint(layer, x, use_reentrant=reentrant)

    layer = made()
    layer(data())
    layer.apply(eagerq.disable_observer).bn.momentum = 0.0
    other = copy.deepcopy(layer)
    with pytest.MonkeyPatch.context() as patch:
        taken = counted(patch)
        mine = steps(layer, data(), again(layer))
    assert len(taken) == (2 if reentrant else 4)  # the first of both passes of the former keeps nothing
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DOOR, never)
        theirs = steps(other, data(), again(other))
    for found in (mine, theirs):  # how far the second forward pass goes depends on what there is to save
        del found["bn.num_batches_tracked"]
    assert_equal(mine, theirs)


def test_saved_tensors_go_through_the_user_s_hooks() -> None:
    packed: list[Tensor] = []

    def run(layer: Any) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            with torch.autograd.graph.saved_tensors_hooks(lambda saved: packed.append(saved) or saved.clone(), _same):
                return layer(x)

        return call

    assert_as_step_by_step(made(), data(), 2, run)
    assert any(saved.shape == data().shape for saved in packed)


def test_what_a_hook_keeps_stays() -> None:
    """Gradients take the memory of what nobody else has."""
    packed: list[tuple[Tensor, Tensor]] = []
    layer = made()
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: packed.append((saved, saved.clone())) or saved, _same):
        out = layer(data().requires_grad_())
    out.square().sum().backward()
    assert len(packed) > 5
    for saved, before in packed:
        assert torch.equal(saved, before)


def _same(kept: Tensor) -> Tensor:
    return kept


@pytest.mark.parametrize("name", ["weight", "bn.weight"])
def test_what_changed_before_backward_is_refused(name: str) -> None:
    layer = made()
    out = layer(data())
    with torch.no_grad():
        layer.get_parameter(name).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_weight_that_is_not_finite_counts() -> None:
    layer = made()
    layer(data())
    with torch.no_grad():
        layer.weight[1, 0, 0, 0] = float("nan")
    assert_as_step_by_step(layer, data(), 0)
    assert layer.weight_fake_quant.activation_post_process.nonfinite_batches > 0


def test_layers_in_threads() -> None:
    layers = [made() for _ in range(4)]
    wanted = steps(copy.deepcopy(layers[0]), data())
    found: dict[int, dict[str, Tensor | None]] = {}
    threads = [
        threading.Thread(target=lambda k=k, layer=layer: found.update({k: steps(layer, data())}))
        for k, layer in enumerate(layers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for one in found.values():
        assert_equal(one, wanted)


# --- where somebody can tell, all goes step by step -------------------------------------------------------


class Stepped(qat.ConvBnReLU2d):
    """A user's own."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return 2 * super()._conv_forward(x, weight, bias)


class Halved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2


def _subclassed(layer: Any) -> None:
    layer.__class__ = Stepped


def _parametrized(layer: Any) -> None:
    parametrize.register_parametrization(layer, "weight", Halved())


def _hooked(layer: Any) -> None:
    layer.weight_fake_quant.register_forward_hook(_doubled)


def _normed(layer: Any) -> None:
    layer.bn.register_forward_hook(_doubled)


def _doubled(module: Any, arguments: Any, out: Tensor) -> Tensor:
    return 2 * out


def _patched(layer: Any) -> None:
    layer._conv_forward = lambda x, weight, bias: torch.nn.functional.conv2d(x, 2 * weight)


def _circular(layer: Any) -> None:
    layer.padding_mode, layer.padding, layer._reversed_padding_repeated_twice = "circular", (1, 1), [1, 1, 1, 1]


def _same_size(layer: Any) -> None:
    layer.padding = "same"


def _plain_average(layer: Any) -> None:
    layer.bn.momentum = None


def _unrounded(layer: Any) -> None:
    layer.apply(eagerq.disable_fake_quant)


def _frozen(layer: Any) -> None:
    layer(data())
    layer.freeze_bn_stats()


ODD = [_subclassed, _parametrized, _hooked, _normed, _patched, _circular, _same_size, _plain_average]
ODD += [_unrounded, _frozen]


@pytest.mark.parametrize("make_odd", ODD)
def test_odd_layers_go_step_by_step(make_odd: Callable[[Any], None]) -> None:
    layer = made()
    make_odd(layer)
    twin = layer if make_odd is _patched else copy.deepcopy(layer)
    assert_as_step_by_step(twin, data(), 0)


def test_a_bias_goes_step_by_step() -> None:
    assert_as_step_by_step(made(bias=True), data(), 0)


def test_images_out_of_order_go_step_by_step() -> None:
    layer, wide = made(), data(2, 3, 7, 12)

    def run(layer: Any) -> Callable[[Tensor], Tensor]:
        return lambda x: layer(x[..., ::2])

    assert_as_step_by_step(layer, wide, 0, run)


def test_autocast_goes_step_by_step() -> None:
    def run(layer: Any) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return layer(x).float()

        return call

    assert_as_step_by_step(made(), data(), 0, run)


def test_without_gradients_goes_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    layer, other = made(), made()
    with torch.no_grad():
        out = layer(data())
    assert not calls
    torch.testing.assert_close(other(data()).detach(), out, rtol=0, atol=0)
    assert calls
    assert all(map(torch.equal, layer.state_dict().values(), other.state_dict().values()))


def test_function_transforms_see_torch_s_operators() -> None:
    layer = made()
    layer(data())
    layer.apply(eagerq.disable_observer)
    layer.bn.momentum, buffers = 0.0, dict(layer.named_buffers())

    def loss(weight: Tensor, buffers: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight, **buffers}, (data(),)).sum()

    assert torch.func.grad(loss)(layer.weight.detach(), buffers).shape == layer.weight.shape


@pytest.mark.parametrize("shape", [(1, 3, 3, 3), (3, 7, 6), (2, 4, 7, 6)])
def test_what_torch_refuses_leaves_no_trace(shape: tuple[int, ...]) -> None:
    layer = made()
    before = layer.bn.running_mean.clone(), layer.bn.running_var.clone()
    with pytest.raises((ValueError, RuntimeError)):
        layer(data(*shape))
    assert all(map(torch.equal, (layer.bn.running_mean, layer.bn.running_var), before))


def test_no_images_at_all() -> None:
    layer, other = made(), made()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DOOR, never)
        raised = _what_is_raised(other)
    assert _what_is_raised(layer) == raised


def _what_is_raised(layer: Any) -> str:
    try:
        return str(layer(data(0, 3, 7, 6)).shape)
    except (ValueError, RuntimeError) as error:
        return str(error)
