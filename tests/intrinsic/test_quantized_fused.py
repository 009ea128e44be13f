"""int8 layers with a second input or an activation fused: torch.ao's integers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import Oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.calls import RANGES, Call, conv_calls, integers, linear_calls, sums
from torch import Tensor, nn

import eagerq
from eagerq import QTensor, intrinsic
from eagerq.errors import InvalidConfigError, InvalidInputError
from eagerq.intrinsic import quantized
from eagerq.nn.quantized.base import Output

UINT8 = st.just(torch.uint8)
ADDS = ("ConvAdd2d", "ConvAddReLU2d")
LINEARS = ("LinearLeakyReLU", "LinearTanh", "LinearReLU")
adds, linears = pytest.mark.parametrize("name", ADDS), pytest.mark.parametrize("name", LINEARS)
SLOPE = 0.2


def build(package: Any, name: str, call: Call, slope: float = SLOPE) -> Any:
    out, inside, *kernel = call["weight"].shape
    if kernel:
        how = {name: tuple(call[name]) for name in ("stride", "padding", "dilation")}
        groups = call["groups"]
        return getattr(package, name)(inside * groups, out, tuple(kernel), groups=groups, **how)
    return getattr(package, name)(inside, out, *([slope] if name == "LinearLeakyReLU" else []), bias=True)


def old(q: QTensor) -> Tensor:
    if q.axis is None:
        return torch._make_per_tensor_quantized_tensor(q.integers.contiguous(), q.scale, q.zero_point)
    return torch._make_per_channel_quantized_tensor(q.integers, q.scale, q.zero_point, 0)


def twins(ao: Oracle, name: str, call: Call, slope: float = SLOPE) -> tuple[Any, Any]:
    mine, theirs = build(quantized, name, call, slope), build(ao.intrinsic_quantized, name, call, slope)
    scale = call["weight_scale"]
    weight = QTensor(call["weight"], scale, call["weight_zero_point"], 0)
    if len(scale) == 1:
        weight = QTensor(call["weight"], float(scale), 0)
    for layer, w in ((mine, weight), (theirs, old(weight))):
        layer.set_weight_bias(w, call["bias"])
        layer.scale, layer.zero_point = call["scale"], call["zero_point"]
    return mine, theirs


def input_of(call: Call) -> QTensor:
    return QTensor(call["x"], call["x_scale"], call["x_zero_point"])


def real(call: Call) -> Tensor:
    """Product and bias in float64."""
    total = torch.from_numpy(sums(call)).double()
    shape = [-1] + [1] * (total.dim() - 2 if "groups" in call else 0)
    y = total * call["x_scale"] * call["weight_scale"].double().reshape(shape)
    return y if call["bias"] is None else y + call["bias"].double().reshape(shape)


def assert_near(y: QTensor, exact: Tensor, low: int = 0) -> None:
    """The nearest integers to the exact results, but for float32's last bits."""
    steps = (exact / y.q_scale() + y.q_zero_point()).clamp(low, 255)
    assert (y.int_repr() - steps).abs().max() <= 0.5 + 1e-4


# --- a second input ---------------------------------------------------------------------------------


@adds
def test_adds_are_torchs(ao: Oracle, name: str) -> None:
    @settings(max_examples=60)
    @given(conv_calls(2, UINT8, UINT8), st.data())
    def check(call: Call, data: st.DataObject) -> None:
        mine, theirs = twins(ao, name, call)
        x = input_of(call)
        shape = real(call).shape
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
        factor = data.draw(st.sampled_from([0.5, 1.0, 2.0, 0.77]))
        extra = QTensor(
            integers(shape, torch.uint8, generator), call["scale"] * factor, data.draw(st.sampled_from([0, 77, 255]))
        )
        before = extra.integers.clone()
        y = mine(x, extra)
        assert torch.equal(extra.integers, before)
        wanted = theirs(old(x), old(extra)).int_repr()
        assert_near(y, real(call) + extra.dequantize().double(), call["zero_point"] if "ReLU" in name else 0)
        apart = (y.int_repr().int() - wanted.int()).abs()
        if apart.any():  # on ties oneDNN's kernels part, each with an order of its own for the scales
            assert apart.max() == 1
            steps = ((real(call) + extra.dequantize().double()) / call["scale"])[apart > 0]
            assert ((steps - steps.floor() - 0.5).abs() < 1e-4).all()

    check()


def float_add(library: Any, name: str, conv: nn.Module) -> Any:
    parts = (torch.add, nn.ReLU()) if "ReLU" in name else (torch.add,)
    return getattr(library, name)(conv, *parts)


class AddNet(nn.Module):
    def __init__(self, library: Any, fused: Any, name: str, conv: nn.Module) -> None:
        super().__init__()
        self.quant, self.dequant = library.QuantStub(), library.DeQuantStub()
        self.layer = float_add(fused, name, conv)

    def forward(self, x: Tensor) -> Tensor:
        q = self.quant(x)
        y: Tensor = self.dequant(self.layer(q, q))
        return y


@pytest.mark.parametrize("engine", ["onednn", "qnnpack"])
@adds
@pytest.mark.usefixtures("fresh_compiler")
def test_added_nets_convert_like_torchs(ao: Oracle, name: str, engine: str) -> None:
    conv, x = nn.Conv2d(4, 4, 3, padding=1), torch.randn(2, 4, 6, 6)
    models = []
    for library, fused in ((eagerq, intrinsic), (ao.quantization, ao.intrinsic)):
        net = AddNet(library, fused, name, copy.deepcopy(conv)).eval()
        net.qconfig = library.get_default_qconfig(engine)
        net = library.prepare(net)
        net(x)
        models.append(library.convert(net))
    mine, theirs = models
    assert type(mine.layer) is getattr(quantized, name)
    assert torch.equal(mine.layer.weight().int_repr(), theirs.layer.weight().int_repr())
    assert torch.equal(mine(x), theirs(x.clone()))
    mine.load_state_dict(theirs.state_dict())
    assert torch.equal(mine(x), theirs(x.clone()))
    assert torch.equal(torch.compile(mine, fullgraph=True, backend="aot_eager")(x), mine(x))
    assert torch.equal(torch.export.export(mine, (x,)).module()(x), mine(x))


def test_what_cannot_be_added_is_refused() -> None:
    layer = quantized.ConvAddReLU2d(4, 6, 3)
    x = eagerq.quantize_per_tensor(torch.randn(1, 4, 5, 5), 0.05, 128, torch.uint8)
    extra = eagerq.quantize_per_tensor(torch.randn(1, 6, 3, 3), 0.05, 128, torch.uint8)
    assert layer(x, extra).shape == (1, 6, 3, 3)
    for wrong, words in ((extra.dequantize(), "QuantStub"), (extra[:, :1], "shortcut"), (x, "shortcut")):
        with pytest.raises(InvalidInputError, match=f"ConvAddReLU2d.*{words}"):
            layer(x, wrong)
    with pytest.raises(InvalidInputError, match="ConvAddReLU2d"):
        layer(x.dequantize(), extra)


# --- an activation ----------------------------------------------------------------------------------


def activated(name: str, y: Tensor, slope: float) -> Tensor:
    if name == "LinearTanh":
        return y.tanh()
    return torch.where(y > 0, y, y * (slope if "Leaky" in name else 0.0))


@linears
def test_linears_are_torchs(ao: Oracle, name: str) -> None:
    @settings(max_examples=60)
    @given(linear_calls(UINT8, UINT8), st.sampled_from([0.01, 0.25, 0.2, 1.5, 0.0, -0.5]), st.data())
    def check(call: Call, slope: float, data: st.DataObject) -> None:
        if name == "LinearTanh":  # results within [-1, 1], from sums in its bend
            call["scale"] = data.draw(st.sampled_from([2.0**-7, 2.0**-6, 0.0093]))
            shrink = float(real(call).abs().max()) / 3 + 1e-9
            call["x_scale"] = call["x_scale"] / shrink
            if call["bias"] is not None:
                call["bias"] = call["bias"] / shrink
        slope = torch.tensor(slope).item()
        mine, theirs = twins(ao, name, call, slope)
        y, wanted = mine(input_of(call)), theirs(old(input_of(call)))
        assert (y.q_scale(), y.q_zero_point()) == (wanted.q_scale(), wanted.q_zero_point())
        assert torch.equal(y.int_repr(), wanted.int_repr())
        assert_near(y, activated(name, real(call), slope))

    check()


@pytest.mark.parametrize("name", ["LinearLeakyReLU", "LinearTanh"])
@pytest.mark.usefixtures("fresh_compiler")
def test_linear_nets_convert_like_torchs(ao: Oracle, name: str) -> None:
    linear, x = nn.Linear(5, 4), torch.randn(6, 5)
    activation = nn.Tanh() if "Tanh" in name else nn.LeakyReLU(0.3)
    models = []
    for library, fused in ((eagerq, intrinsic), (ao.quantization, ao.intrinsic)):
        net = library.QuantWrapper(nn.Sequential(getattr(fused, name)(copy.deepcopy(linear), activation))).eval()
        net.qconfig = library.get_default_qconfig("onednn")
        net = library.prepare(net)
        net(x)
        models.append(library.convert(net))
    mine, theirs = models
    layer = mine.module[0]
    assert type(layer) is getattr(quantized, name)
    assert getattr(layer, "negative_slope", 0.3) == 0.3
    assert torch.equal(mine(x), theirs(x))
    mine.load_state_dict(theirs.state_dict())
    assert torch.equal(mine(x), theirs(x))
    assert torch.equal(torch.compile(mine, fullgraph=True, backend="aot_eager")(x), mine(x))
    assert torch.equal(torch.export.export(mine, (x,)).module()(x), mine(x))


@linears
def test_torchs_argument_names(ao: Oracle, name: str) -> None:
    slope = {"negative_slope": 0.1} if "Leaky" in name else {}
    for package in (quantized, ao.intrinsic_quantized):
        layer = getattr(package, name)(in_features=4, out_features=6, bias=False, **slope)
        assert layer.bias() is None or package is not quantized
        assert layer._get_name() == f"Quantized{name}"
        assert tuple(layer.weight().shape) == (6, 4)
    assert quantized.LinearReLU(4, 6, False).bias() is None


def test_the_ranges_trained_with_are_kept() -> None:
    for name in LINEARS[:2]:
        layer = getattr(quantized, name)(4, 6, *([SLOPE] if "Leaky" in name else []))
        layer.set_weight_bias(eagerq.quantize_per_tensor(torch.randn(6, 4) * 9, 0.1, 0, torch.int8), torch.randn(6) * 9)
        layer.output = Output(0.01, 30, torch.uint8, 0, 60)
        x = eagerq.quantize_per_tensor(torch.randn(20, 4), 0.05, 128, torch.uint8)
        y = layer(x).int_repr()
        assert (int(y.min()), int(y.max())) == (0, 60)
        assert RANGES[torch.uint8] == (0, 255)


def test_only_the_right_parts_are_fused() -> None:
    linear = nn.Linear(2, 2)
    for make in (
        lambda: intrinsic.LinearTanh(linear, nn.ReLU()),
        lambda: intrinsic.LinearLeakyReLU(nn.Conv2d(1, 1, 1), nn.LeakyReLU()),
        lambda: intrinsic.ConvAdd2d(linear, torch.add),
        lambda: quantized.ConvAdd2d.from_float(intrinsic.ConvAddReLU2d(nn.Conv2d(1, 1, 1), torch.add, torch.relu)),
    ):
        with pytest.raises(InvalidConfigError):
            make()
