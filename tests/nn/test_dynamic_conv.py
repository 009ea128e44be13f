"""Dynamic convolutions: the integers of torch.ao before they are cut to the input's range, and float64."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from nn.tables import relative, save_and_load
from torch import Tensor, nn

import eagerq
from eagerq import kernels
from eagerq.errors import CheckpointError, InvalidConfigError, InvalidInputError
from eagerq.nn.quantized import dynamic

ORDINARY = ("Conv1d", "Conv2d", "Conv3d")
TRANSPOSED = ("ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d")
every = pytest.mark.parametrize("name", ORDINARY + TRANSPOSED)
QCONFIGS = ("default_dynamic_qconfig", "per_channel_dynamic_qconfig")


def float_layer(name: str, qconfig: Any = eagerq.per_channel_dynamic_qconfig, **how: Any) -> Any:
    layer: Any = getattr(nn, name)(**{"in_channels": 6, "out_channels": 4, "kernel_size": 3, **how})
    layer.qconfig = qconfig
    return layer


def given_to(layer: nn.Module, seed: int = 0) -> Tensor:
    dim = len(layer.kernel_size)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, layer.in_channels, *[7, 6, 5][:dim], generator=generator)  # type: ignore[call-overload, no-any-return]


def converted(name: str, **how: Any) -> Any:
    return getattr(dynamic, name).from_float(float_layer(name, **how))


@st.composite
def hows(draw: st.DrawFn, name: str) -> dict[str, Any]:
    """What a layer may be made with."""
    groups = draw(st.sampled_from([1, 1, 2]))
    how = {
        "in_channels": groups * draw(st.integers(2, 5)),
        "out_channels": groups * draw(st.integers(1, 5)),
        "kernel_size": draw(st.sampled_from([1, 2, 3])),
        "stride": draw(st.sampled_from([1, 2])),
        "dilation": draw(st.sampled_from([1, 2])),
        "padding": draw(st.sampled_from([0, 1])),
        "groups": groups,
        "bias": draw(st.booleans()),
    }
    return {**how, "padding": min(how["padding"], how["kernel_size"] - 1)}


def in_float64(layer: Any, x: Tensor, reduce_range: bool) -> tuple[Tensor, Tensor]:
    """The exact result of an input that is rounded to steps, and what half a step more could make of it."""
    weight = layer.weight().dequantize().double()
    span = max(float(x.max()), 0.0) - min(float(x.min()), 0.0)
    how: dict[str, Any] = {"stride": layer.stride, "dilation": layer.dilation, "groups": layer.groups}
    how["padding"] = layer.padding
    names = {3: "conv1d", 4: "conv2d", 5: "conv3d"}
    call = getattr(F, names[x.dim()].replace("conv", "conv_transpose") if layer.transposed else names[x.dim()])
    bias = None if layer.bias() is None else layer.bias().double()
    step = max(span / (127 if reduce_range else 255), 6.1e-5)
    return call(x.double(), weight, bias, **how), call(torch.ones_like(x).double(), weight.abs(), **how) * step


@settings(max_examples=15)
@given(st.data())
@every
def test_against_float64(name: str, data: st.DataObject) -> None:
    how, reduce_range = data.draw(hows(name)), data.draw(st.booleans())
    qconfig = getattr(eagerq, data.draw(st.sampled_from(QCONFIGS)))
    layer = getattr(dynamic, name).from_float(float_layer(name, qconfig, **how))
    x = given_to(layer, data.draw(st.integers(0, 99))) * 10.0 ** data.draw(st.integers(-3, 3))
    got = layer(x, reduce_range)
    wanted, allowed = in_float64(layer, x, reduce_range)
    assert got.shape == wanted.shape
    assert got.dtype is torch.float32
    assert bool(((got - wanted).abs() <= allowed + 1e-5 * wanted.abs() + 1e-6).all())


@settings(max_examples=15)
@given(st.data())
@pytest.mark.parametrize("name", ORDINARY)
def test_torchs_integers(ao: Oracle, name: str, data: st.DataObject) -> None:
    """torch.ao rounds the result to the steps of the input and cuts it to the input's range: ours then agrees."""
    how, qconfig = data.draw(hows(name)), data.draw(st.sampled_from(QCONFIGS))
    layer = float_layer(name, getattr(eagerq, qconfig), **how)
    ours = getattr(dynamic, name).from_float(layer)
    layer.qconfig = getattr(ao.quantization, qconfig)
    with pytest.warns(UserWarning, match="poor numerical accuracy"):
        theirs = getattr(ao.dynamic, name).from_float(layer)
    x = given_to(layer, data.draw(st.integers(0, 99))) * 10.0 ** data.draw(st.integers(-2, 2))
    scale, zero_point = torch._choose_qparams_per_tensor(x, reduce_range=True)
    as_theirs = kernels.quantize(ours(x), scale, zero_point, torch.uint8, 0, 255)
    wanted = (theirs(x) / scale).round() + zero_point
    away = (as_theirs - wanted).abs()
    assert float(away.max()) <= 1  # on ties of theirs
    assert float((away > 0).double().mean()) < 0.01


@every
@given(st.data())
@settings(max_examples=10)
def test_fast_and_reference(name: str, data: st.DataObject) -> None:
    layer = getattr(dynamic, name).from_float(float_layer(name, **data.draw(hows(name))))
    x = given_to(layer, data.draw(st.integers(0, 99)))
    door = kernels.conv_transpose_dynamic if layer.transposed else kernels.conv_dynamic
    more = [list(layer.output_padding)] if layer.transposed else []
    how = (list(layer.stride), list(layer.padding), *more, list(layer.dilation), layer.groups)
    arguments = (x, layer._weight, layer._weight_scale, layer._weight_zero_point, layer._bias, *how, True)
    assert torch.equal(door(*arguments), door.reference(*arguments))
    assert torch.equal(door(*arguments), layer(x))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")  # of the float layer
@pytest.mark.parametrize("name", ORDINARY)
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [1, "same", "valid"])
def test_padding(name: str, mode: str, padding: Any) -> None:
    layer = float_layer(name, padding_mode=mode, padding=padding, kernel_size=2)
    x = given_to(layer)
    assert relative(getattr(dynamic, name).from_float(layer)(x), layer(x)) < 0.03


@pytest.mark.parametrize("name", TRANSPOSED)
def test_output_size(name: str) -> None:
    layer = float_layer(name, stride=2)
    x, made = given_to(layer), getattr(dynamic, name).from_float(layer)
    for more in (0, 1):
        size = [2 * length + 1 + more for length in x.shape[2:]]
        assert relative(made(x, output_size=size), layer(x, output_size=size)) < 0.03


@every
def test_full_range(name: str) -> None:
    layer = converted(name)
    x = given_to(layer)
    wanted, _ = in_float64(layer, x, reduce_range=False)
    reduced = relative(layer(x), wanted)
    assert relative(layer(x, reduce_range=False), wanted) < 0.75 * reduced
    layer.reduce_range = False
    assert relative(layer(x), wanted) < 0.75 * reduced


def test_no_accuracy_is_lost_by_a_large_result() -> None:
    """torch.ao cuts results to the input's range; these exceed it many times."""
    layer = float_layer("Conv2d", in_channels=64)
    with torch.no_grad():
        layer.weight.abs_()
    x = torch.rand(1, 64, 8, 8)
    assert relative(dynamic.Conv2d.from_float(layer)(x), layer(x)) < 0.01


@every
def test_state(name: str) -> None:
    layer = converted(name)
    x, state = given_to(layer), layer.state_dict()
    assert state.keys() == {"weight", "weight_scale", "weight_zero_point", "bias"}
    assert all(type(value) is Tensor for value in state.values())
    other = converted(name)
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(save_and_load(layer))
    for twin in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.half()):
        assert torch.equal(twin(x), layer(x))
        assert repr(twin) == repr(layer)
    assert repr(layer).startswith(f"DynamicQuantized{name}(6, 4, kernel_size=(3,")


@every
def test_compiled_and_exported(name: str) -> None:
    layer = converted(name, stride=2)
    x = given_to(layer)
    wanted = layer(x)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), wanted)
    assert torch.equal(torch.export.export(layer, (x,)).module()(x), wanted)


def test_in_a_model() -> None:
    """Asked for by a mapping of one's own: the default one has no convolutions, as torch.ao's."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2), nn.Flatten(), nn.Linear(196, 2))
    names = ("Conv2d", "ConvTranspose2d")
    mapping = {getattr(nn, name): getattr(dynamic, name) for name in names}
    mapping |= eagerq.get_default_dynamic_quant_module_mappings()
    made = eagerq.quantize_dynamic(model, {nn.Linear, nn.Conv2d, nn.ConvTranspose2d}, mapping=mapping)
    assert [type(made[number]) for number in (0, 2, 4)] == [  # type: ignore[index]
        dynamic.Conv2d,
        dynamic.ConvTranspose2d,
        dynamic.Linear,
    ]
    x = torch.randn(2, 3, 8, 8)
    assert relative(made(x), model(x)) < 0.05
    assert all(getattr(nn, name) not in eagerq.get_default_dynamic_quant_module_mappings() for name in names)
    other = eagerq.quantize_dynamic(model, {nn.Linear})
    with pytest.raises(CheckpointError):
        other.load_state_dict(made.state_dict())


@every
def test_wrong_inputs(name: str) -> None:
    model = nn.Sequential(converted(name))
    eagerq.errors.stamp_names(model)
    x = given_to(model[0])
    named = rf"'0' \(eagerq.nn.quantized.dynamic.{name}\): expected"
    with pytest.raises(InvalidInputError, match=f"{named} a float tensor, got a quantized tensor"):
        model(eagerq.quantize_per_tensor(x, 0.1, 0, torch.uint8))
    for bad in (x[0], x[:, :3]):
        with pytest.raises(InvalidInputError, match=f"{named} .* dimensions"):
            model(bad)
    with pytest.raises(InvalidConfigError, match=r"torch.int8, got: torch.float16"):
        getattr(dynamic, name).from_float(float_layer(name, eagerq.float16_dynamic_qconfig))
    with pytest.raises(InvalidConfigError, match="only works for"):
        getattr(dynamic, name).from_float(nn.Linear(2, 2))


def test_the_range_may_be_given_at_construction() -> None:
    x = torch.randn(2, 3, 9)
    full, reduced = (dynamic.Conv1d(3, 4, 3, reduce_range=reduce_range) for reduce_range in (False, True))
    for layer in (full, reduced):
        layer.set_weight_bias(
            eagerq.quantize_per_tensor(torch.linspace(-1, 1, 36).reshape(4, 3, 3), 0.01, 0, torch.int8), None
        )
    assert torch.equal(reduced(x, reduce_range=False), full(x))
    assert not torch.equal(reduced(x), full(x))
    assert "reduce_range" in full.state_dict()
