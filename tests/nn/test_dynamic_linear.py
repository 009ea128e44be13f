"""Dynamic Linear and LinearReLU: torch.ao's numbers, plain state, float in and out."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Oracle
from hypothesis import given
from hypothesis import strategies as st
from nn.tables import relative, save_and_load
from torch import Tensor, nn

import eagerq
from eagerq import intrinsic
from eagerq.errors import CheckpointError, InvalidConfigError, InvalidInputError, UnsupportedError
from eagerq.intrinsic.quantized import dynamic as intrinsic_dynamic
from eagerq.nn import qat
from eagerq.nn.qat import dynamic as qat_dynamic
from eagerq.nn.quantized import dynamic

QCONFIGS = ("default_dynamic_qconfig", "per_channel_dynamic_qconfig", "float16_dynamic_qconfig")
qconfigs = pytest.mark.parametrize("qconfig", QCONFIGS)


def float_layer(name: str, bias: bool = True) -> Any:
    linear = nn.Linear(12, 7, bias)
    return linear if name == "Linear" else intrinsic.LinearReLU(linear, nn.ReLU())


def converted(name: str, qconfig: str, bias: bool = True) -> Any:
    layer = float_layer(name, bias)
    layer.qconfig = getattr(eagerq, qconfig)
    kind = dynamic.Linear if name == "Linear" else intrinsic_dynamic.LinearReLU
    return kind.from_float(layer)


kinds = pytest.mark.parametrize("name", ["Linear", "LinearReLU"])


# --- numbers ------------------------------------------------------------------------------------------


@given(st.data())
@pytest.mark.parametrize("qconfig", QCONFIGS[:2])
def test_output_is_torchs(ao: Oracle, qconfig: str, data: st.DataObject) -> None:
    width, out, rows = (data.draw(st.integers(1, 40)) for _ in range(3))
    layer: Any = nn.Linear(width, out, data.draw(st.booleans()))
    layer.qconfig = getattr(eagerq, qconfig)
    ours = dynamic.Linear.from_float(layer)
    layer.qconfig = getattr(ao.quantization, qconfig)
    theirs = ao.dynamic.Linear.from_float(layer)
    assert torch.equal(ours.weight().int_repr(), theirs.weight().int_repr())
    x = torch.randn(rows, width) * 10.0 ** data.draw(st.integers(-3, 3)) + data.draw(st.sampled_from([0, 1, -2]))
    assert torch.equal(ours(x), theirs(x))
    layers = x[None].expand(2, -1, -1)
    assert torch.equal(ours(layers), theirs(layers))


@given(st.data())
def test_relu_is_applied(ao: Oracle, data: st.DataObject) -> None:
    """torch's own operator leaves the ReLU out with this engine, so the oracle is its Linear."""
    layer: Any = float_layer("LinearReLU", data.draw(st.booleans()))
    layer.qconfig = eagerq.default_dynamic_qconfig
    ours = intrinsic_dynamic.LinearReLU.from_float(layer)
    layer[0].qconfig = ao.quantization.default_dynamic_qconfig
    theirs = ao.dynamic.Linear.from_float(layer[0])
    x = torch.randn(9, 12)
    assert torch.equal(ours(x), theirs(x).relu())
    assert bool((ours(x) == 0).any())


@kinds
def test_float16(name: str) -> None:
    layer = converted(name, "float16_dynamic_qconfig")
    torch.manual_seed(0)
    real = float_layer(name)
    linear = real if name == "Linear" else real[0]
    x = torch.randn(5, 12)
    with torch.no_grad():
        linear.weight.copy_(linear.weight.half())
    real.qconfig = eagerq.float16_dynamic_qconfig
    layer = type(layer).from_float(real)
    assert layer.dtype is torch.float16
    assert layer.weight().dtype is torch.float32
    assert relative(layer(x), real(x)) < 1e-6


def test_float16_of_huge_weights() -> None:
    layer: Any = nn.Linear(1, 2, bias=False)
    layer.weight = nn.Parameter(torch.tensor([[1e9], [-1e9]]))
    layer.qconfig = eagerq.float16_dynamic_qconfig
    assert dynamic.Linear.from_float(layer)(torch.ones(1, 1)).tolist() == [[65504.0, -65504.0]]


@kinds
@qconfigs
def test_close_to_float(name: str, qconfig: str) -> None:
    layer = converted(name, qconfig)
    torch.manual_seed(0)
    x = torch.randn(64, 12)
    weight, bias = layer.weight(), layer.bias()
    wanted = F.linear(x, weight.dequantize() if isinstance(weight, eagerq.QTensor) else weight, bias)
    assert relative(layer(x), wanted.relu() if name == "LinearReLU" else wanted) < 0.03


def test_full_range() -> None:
    layer = converted("Linear", "default_dynamic_qconfig")
    x = torch.randn(64, 12)
    weight, bias = layer.weight().dequantize(), layer.bias()
    reduced = relative(layer(x), F.linear(x, weight, bias))
    layer.reduce_range = False
    assert relative(layer(x), F.linear(x, weight, bias)) < 0.75 * reduced
    other = dynamic.Linear(12, 7)
    other.load_state_dict(save_and_load(layer))
    assert other.reduce_range is False
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_result_has_the_inputs_dtype(dtype: torch.dtype) -> None:
    layer = converted("Linear", "default_dynamic_qconfig")
    x = torch.randn(3, 12).to(dtype)
    assert layer(x).dtype is dtype
    assert torch.equal(layer(x), layer(x.float()).to(dtype))


def test_lone_vector_and_empty_batch() -> None:
    layer = converted("Linear", "default_dynamic_qconfig")
    x = torch.randn(12)
    assert torch.equal(layer(x), layer(x[None])[0])
    assert layer(torch.randn(0, 12)).shape == (0, 7)


# --- where it comes from --------------------------------------------------------------------------------


def test_without_a_weight_observer() -> None:
    layer: Any = nn.Linear(3, 4)
    layer.qconfig = None
    assert dynamic.Linear.from_float(layer).dtype is torch.int8
    layer.qconfig = eagerq.QConfig(eagerq.PlaceholderObserver, None)
    assert dynamic.Linear.from_float(layer).dtype is torch.int8


def test_the_float_module_is_left_as_it_is() -> None:
    layer: Any = nn.Linear(3, 4)
    layer.qconfig = eagerq.default_dynamic_qconfig
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    made = dynamic.Linear.from_float(layer)
    made._bias.add_(0)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_refused_modules() -> None:
    plain: Any = nn.Linear(3, 4)
    with pytest.raises(InvalidConfigError, match="must have qconfig defined"):
        dynamic.Linear.from_float(plain)
    conv: Any = nn.Conv2d(3, 4, 1)
    conv.qconfig = eagerq.default_dynamic_qconfig
    with pytest.raises(AssertionError, match=r"dynamic.Linear.from_float only works for Linear, got Conv2d"):
        dynamic.Linear.from_float(conv)
    plain.qconfig = eagerq.default_quint8_weight_qconfig
    with pytest.raises(AssertionError, match=r"torch.int8 and torch.float16, got: torch.uint8"):
        dynamic.Linear.from_float(plain)
    with pytest.raises(UnsupportedError, match=r"stored in torch.int8 or torch.float16, not in torch.bfloat16"):
        dynamic.Linear(3, 4, dtype=torch.bfloat16)


def test_old_dtype_names() -> None:
    old = getattr(torch, "qint8", None)
    if old is not None:
        assert dynamic.Linear(3, 4, dtype=old).dtype is torch.int8


# --- QAT ------------------------------------------------------------------------------------------------


def test_qat_linear_is_torchs(ao: Oracle) -> None:
    torch.manual_seed(0)
    ours = qat_dynamic.Linear(12, 7, qconfig=eagerq.default_dynamic_qat_qconfig)
    torch.manual_seed(0)
    package = __import__("torch.ao.nn.qat.dynamic", fromlist=["Linear"])
    theirs = package.Linear(12, 7, qconfig=ao.quantization.default_dynamic_qat_qconfig)
    assert isinstance(ours, qat.Linear)
    for _ in range(3):
        x = torch.randn(5, 12)
        mine, other = ours(x), theirs(x)
        assert relative(mine, other) < 1e-6
        mine.square().sum().backward()
        other.square().sum().backward()
    assert relative(ours.weight.grad, theirs.weight.grad) < 1e-5
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    x = torch.randn(5, 12)
    assert torch.equal(dynamic.Linear.from_float(ours)(x), ao.dynamic.Linear.from_float(theirs)(x))


def test_qat_linear_refuses_averages() -> None:
    with pytest.raises(ValueError, match="averaging constant equal to 1"):
        qat_dynamic.Linear(3, 4, qconfig=eagerq.default_qat_qconfig)
    with pytest.raises(InvalidConfigError, match="qconfig must be provided"):
        qat_dynamic.Linear(3, 4)


def test_as_trained_keeps_the_scale_of_training() -> None:
    layer: Any = qat_dynamic.Linear(12, 7, qconfig=eagerq.default_dynamic_qat_qconfig)
    layer(torch.randn(2, 12))
    with torch.no_grad():
        layer.weight.mul_(0.9)
    made = dynamic.Linear.from_float(layer, as_trained=True)
    assert made.weight().q_scale() == float(layer.weight_fake_quant.scale)
    assert made.weight().q_scale() != dynamic.Linear.from_float(layer).weight().q_scale()


# --- state ----------------------------------------------------------------------------------------------


@kinds
@qconfigs
@pytest.mark.parametrize("bias", [False, True])
def test_state(name: str, qconfig: str, bias: bool) -> None:
    layer = converted(name, qconfig, bias)
    state = layer.state_dict()
    wanted = {"weight"} if "16" in qconfig else {"weight", "weight_scale", "weight_zero_point"}
    assert state.keys() == (wanted | {"bias"} if bias else wanted)
    assert all(type(value) is Tensor for value in state.values())
    torch.manual_seed(1)
    other = converted(name, qconfig, bias)
    x = torch.randn(3, 12)
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(save_and_load(layer))
    for twin in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.half()):
        assert torch.equal(twin(x), layer(x))
        assert twin.dtype is layer.dtype
        assert repr(twin) == repr(layer)


def test_a_file_of_the_other_dtype_is_refused() -> None:
    small, smaller = (
        eagerq.quantize_dynamic(nn.Sequential(nn.Linear(12, 7)), dtype=dtype) for dtype in (torch.float16, torch.int8)
    )
    for model, other in ((small, smaller), (smaller, small)):
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(CheckpointError):
            model.load_state_dict(other.state_dict())
        with pytest.raises(CheckpointError):
            model.load_state_dict(other.state_dict(), strict=False)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_of_the_other_kind_are_refused() -> None:
    weight = eagerq.quantize_per_tensor(torch.randn(4, 3), 0.1, 0, torch.int8)
    with pytest.raises(InvalidConfigError, match=r"stored in torch.float16, got a quantized weight"):
        dynamic.Linear(3, 4, dtype=torch.float16).set_weight_bias(weight, None)
    with pytest.raises(InvalidConfigError, match=r"stored in torch.int8, got a weight of torch.float32"):
        dynamic.Linear(3, 4).set_weight_bias(torch.randn(4, 3), None)


@pytest.mark.parametrize("qconfig", ["default_dynamic_qconfig", "float16_dynamic_qconfig"])
@pytest.mark.parametrize("version", [3, 4])
def test_files_of_torch_ao(ao: Oracle, qconfig: str, version: int) -> None:
    """Those before version 4 quantize their input to all 8 bits."""
    engine = torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm" if "16" in qconfig else engine  # the other has no float16
    try:
        layer: Any = nn.Linear(12, 7)
        layer.qconfig = getattr(ao.quantization, qconfig)
        theirs = ao.dynamic.Linear.from_float(layer)
        state = theirs.state_dict()
        state._metadata[""]["version"] = version
        theirs.load_state_dict(state)
        ours = converted("Linear", qconfig)
        ours.load_state_dict(state)
        x = torch.randn(9, 12)
        assert relative(ours(x), theirs(x)) < (1e-6 if "16" in qconfig else 1e-12)
        assert ours.reduce_range is (version == 4)
    finally:
        torch.backends.quantized.engine = engine


# --- use ------------------------------------------------------------------------------------------------


def test_wrong_inputs() -> None:
    model = nn.Sequential(dynamic.Linear(3, 4))
    eagerq.errors.stamp_names(model)
    for bad, message in (
        (
            eagerq.quantize_per_tensor(torch.randn(2, 3), 0.1, 0, torch.uint8),
            "expected a float tensor, got a quantized",
        ),
        (torch.ones(2, 3, dtype=torch.int64), "expected a float tensor, got torch.int64"),
        (torch.randn(2, 5), "expected shape"),
    ):
        with pytest.raises(InvalidInputError, match=r"'0' \(eagerq.nn.quantized.dynamic.Linear\): " + message):
            model(bad)


@qconfigs
def test_compiled_and_exported(qconfig: str) -> None:
    layer = converted("LinearReLU", qconfig)
    x = torch.randn(3, 12)
    wanted = layer(x)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), wanted)
    assert torch.equal(torch.export.export(layer, (x,)).module()(x), wanted)


def test_repr() -> None:
    assert repr(dynamic.Linear(3, 4)) == (
        "DynamicQuantizedLinear(in_features=3, out_features=4, dtype=torch.int8, qscheme=torch.per_tensor_affine)"
    )
    assert repr(intrinsic_dynamic.LinearReLU(3, 4, bias=False, dtype=torch.float16)) == (
        "DynamicQuantizedLinearReLU(in_features=3, out_features=4, dtype=torch.float16)"
    )
