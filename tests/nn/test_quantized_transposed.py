"""int8 transposed convolutions: torch.ao's integers where it computes them right, the exact ones elsewhere."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import Oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.calls import RANGES, Call
from kernels.test_transposed import call_of, sums, transposed_calls, wanted
from torch import Tensor, nn

import eagerq
from eagerq import QTensor
from eagerq.errors import InvalidArgumentError, InvalidConfigError, InvalidInputError
from eagerq.nn import quantized
from eagerq.nn.quantized.base import Output

DIMS = pytest.mark.parametrize("dim", [1, 2, 3])


def build(package: Any, call: Call) -> Any:
    inside, outside, *kernel = call["weight"].shape
    how = {name: tuple(call[name]) for name in ("stride", "padding", "output_padding", "dilation")}
    kind = getattr(package, f"ConvTranspose{len(kernel)}d")
    return kind(
        inside,
        outside * call["groups"],
        tuple(kernel),
        groups=call["groups"],
        bias=call["bias"] is not None,
        **how,
    )


def ours(call: Call) -> Any:
    layer = build(quantized, call)
    scale, zero_point = call["weight_scale"], call["weight_zero_point"]
    if len(scale) == 1:
        weight = QTensor(call["weight"], float(scale), int(zero_point))
    else:
        weight = QTensor(call["weight"], scale, zero_point, 1)
    layer.set_weight_bias(weight, call["bias"])
    layer.output = Output(call["scale"], call["zero_point"], call["dtype"], *RANGES[call["dtype"]])
    return layer


def input_of(call: Call) -> QTensor:
    return QTensor(call["x"], call["x_scale"], call["x_zero_point"])


def in_full_range(call: Call) -> Call:
    low, high = RANGES[call["dtype"]]
    return {**call, "low": low, "high": high}


@DIMS
def test_integers_are_exact(dim: int) -> None:
    @given(transposed_calls(dim))
    def check(call: Call) -> None:
        y = ours(call)(input_of(call))
        assert y.dtype is call["dtype"]
        assert (y.q_scale(), y.q_zero_point()) == (call["scale"], call["zero_point"])
        assert torch.equal(y.int_repr(), wanted(in_full_range(call)))

    check()


@st.composite
def right_in_torch(draw: st.DrawFn, dim: int) -> Call:
    """What torch.ao's engine computes, and rightly: no output padding; inputs as many as outputs, or but one
    of either in a group; one weight scale; and no output that gets no input at all."""
    call = draw(transposed_calls(dim, st.just(torch.uint8)))
    outside = call["weight"].shape[1]
    per_group = call["weight"].shape[0] // call["groups"]
    if outside != per_group and 1 not in (outside, per_group):
        call["weight"] = call["weight"][:, :1].repeat_interleave(per_group, 1).clone()
        call["weight"] = call["weight"] ^ torch.arange(per_group, dtype=torch.int8).reshape(1, -1, *[1] * dim)
        if call["bias"] is not None:
            call["bias"] = torch.randn(per_group * call["groups"]) * call["scale"] * 20
    kernel = call["weight"].shape[2:]
    stride = [
        1 if step > 1 or taps < every else every
        for taps, every, step in zip(kernel, call["stride"], call["dilation"], strict=True)
    ]
    padding = [
        min(pad, step * (taps - 1) // 2)
        for pad, step, taps in zip(call["padding"], call["dilation"], kernel, strict=True)
    ]
    call.update(stride=stride, padding=padding, output_padding=[0] * dim)
    call.update(weight_scale=call["weight_scale"][:1].clone(), weight_zero_point=call["weight_zero_point"][:1].clone())
    return call


def assert_torchs(y: QTensor, theirs: Tensor, exact: Tensor) -> None:
    """torch.ao's integers, but where it is wrong (on 2.15 now and then, by what it computed before) or on a tie,
    where oneDNN's kernels part, each with an order of its own for the scales."""
    steps = (exact / y.q_scale() + y.q_zero_point()).clamp(0, 255)
    mine, other = y.int_repr(), theirs.int_repr()
    assert ((mine - steps).abs() <= 0.5 + 1e-4).all()
    assert ((other - steps).abs()[mine != other] > 0.5 - 1e-4).all()


@DIMS
def test_integers_are_torchs(ao: Oracle, dim: int) -> None:
    @settings(max_examples=40)
    @given(right_in_torch(dim))
    def check(call: Call) -> None:
        theirs = build(ao.quantized, call)
        scale, zero_point = float(call["weight_scale"]), 0
        weight = torch._make_per_tensor_quantized_tensor(call["weight"], scale, zero_point)
        theirs.set_weight_bias(weight, call["bias"])
        theirs.scale, theirs.zero_point = call["scale"], call["zero_point"]
        x = torch._make_per_tensor_quantized_tensor(call["x"].contiguous(), call["x_scale"], call["x_zero_point"])
        y = ours(call)(input_of(call))
        exact = torch.from_numpy(sums(call)).double() * call["x_scale"] * call["weight_scale"].double()
        if call["bias"] is not None:
            exact = exact + call["bias"].double().reshape(-1, *[1] * dim)
        assert_torchs(y, theirs(x), exact)
        assert y.q_scale() == theirs(x).q_scale()

    check()


# --- from float to int8 -----------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, library: Any, *layers: nn.Module) -> None:
        super().__init__()
        self.quant, self.dequant = library.QuantStub(), library.DeQuantStub()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.dequant(self.layers(self.quant(x)))
        return y


def float_layer(dim: int, **changed: Any) -> Any:
    arguments = {"stride": 2, "padding": 1, "groups": 2, **changed}
    return getattr(nn, f"ConvTranspose{dim}d")(4, 4, 3, **arguments)


def batch(dim: int, seed: int = 0) -> Tensor:
    return torch.randn(2, 4, *[5] * dim, generator=torch.Generator().manual_seed(seed))


def converted(library: Any, net: nn.Module, qconfig: Any, dim: int) -> Any:
    net.qconfig = qconfig
    prepared = library.prepare(net.eval())
    prepared(batch(dim))
    return library.convert(prepared)


@pytest.mark.parametrize("with_bn", [False, True])
@DIMS
def test_converted_like_torchs(ao: Oracle, dim: int, with_bn: bool) -> None:
    layers = [float_layer(dim, groups=1)]
    if with_bn:
        bn = getattr(nn, f"BatchNorm{dim}d")(4)
        bn.running_mean.normal_()
        bn.running_var.uniform_(0.5, 2)
        layers.append(bn)
    models = []
    for library in (eagerq, ao.quantization):
        net = Net(library, *copy.deepcopy(layers)).eval()
        if with_bn:
            net = library.fuse_modules(net, ["layers.0", "layers.1"])
        models.append(converted(library, net, library.default_qconfig, dim))
    mine, theirs = models
    assert type(mine.layers[0]) is getattr(quantized, f"ConvTranspose{dim}d")
    assert torch.equal(mine.layers[0].weight().int_repr(), theirs.layers[0].weight().int_repr())
    layer, x = mine.layers[0], mine.quant(batch(dim, 1))
    transpose = getattr(nn.functional, f"conv_transpose{dim}d")
    exact = transpose(x.dequantize().double(), layer.weight().dequantize().double(), layer.bias().double(), 2, 1)
    assert_torchs(layer(x), theirs.layers[0](theirs.quant(batch(dim, 1))), exact)
    # and the file of the other
    blank = Net(eagerq, *copy.deepcopy(layers)).eval()
    blank = eagerq.fuse_modules(blank, ["layers.0", "layers.1"]) if with_bn else blank
    blank = converted(eagerq, blank, eagerq.default_qconfig, dim)
    blank.load_state_dict(theirs.state_dict())
    assert torch.equal(blank(batch(dim, 1)), mine(batch(dim, 1)))


@pytest.mark.parametrize("qconfig", [eagerq.get_default_qconfig("onednn"), eagerq.get_default_qat_qconfig("onednn")])
@DIMS
def test_a_scale_for_each_output_channel(dim: int, qconfig: Any) -> None:
    """torch.ao refuses such a qconfig. A channel 100 times the size of the others costs them nothing."""
    layer = float_layer(dim, groups=1)
    with torch.no_grad():
        layer.weight[:, 0] *= 100
    net = Net(eagerq, layer)
    one = converted(eagerq, copy.deepcopy(net), qconfig, dim).layers[0].weight()
    scales = one.q_per_channel_scales()
    assert one.q_per_channel_axis() == 1
    assert scales.shape == (4,)
    each = [layer.weight.detach()[:, channel].abs().max() for channel in range(4)]
    assert torch.allclose(scales * 127.5, torch.stack(each), rtol=1e-6)
    error = (one.dequantize() - layer.weight.detach()).abs()
    shape = (1, 4, *[1] * dim)
    assert (error <= scales.reshape(shape) * 0.51).all() or qconfig.weight is None


@DIMS
def test_after_training_beside_it(dim: int) -> None:
    """prepare_qat leaves it in float, with its output fake-quantized, and convert makes it int8."""
    net = Net(eagerq, float_layer(dim)).train()
    net.qconfig = eagerq.get_default_qat_qconfig("onednn")
    net = eagerq.prepare_qat(net)
    net(batch(dim)).sum().backward()
    for as_trained in (False, True):
        int8 = eagerq.convert(copy.deepcopy(net).eval(), as_trained=as_trained)
        step = int8.layers[0].scale
        assert (int8(batch(dim)) - net.eval()(batch(dim))).abs().max() < 3 * step


def test_weights_of_fewer_outputs_than_inputs_along_axis_0_are_refused() -> None:
    layer = quantized.ConvTranspose2d(4, 6, 3)
    weight = eagerq.quantize_per_channel(torch.randn(4, 6, 3, 3), torch.ones(4), torch.zeros(4), 0, torch.int8)
    with pytest.raises(InvalidConfigError, match=r"ConvTranspose2d.*axis 0.*axis 1"):
        layer.set_weight_bias(weight, None)


# --- the module itself ------------------------------------------------------------------------------


@DIMS
def test_new_layers_are_like_torchs(ao: Oracle, dim: int) -> None:
    name = f"ConvTranspose{dim}d"
    # positional, in torch's order: padding 1, output_padding 0, groups 2
    mine, theirs = (getattr(one, name)(4, 6, 3, 2, 1, 0, 2) for one in (quantized, ao.quantized))
    assert mine.weight().shape == theirs.weight().shape
    assert torch.equal(mine.bias(), theirs.bias())
    for attribute in (
        *("in_channels", "out_channels", "kernel_size", "stride", "padding", "output_padding", "dilation", "groups"),
        *("transposed", "padding_mode", "scale", "zero_point"),
    ):
        assert getattr(mine, attribute) == getattr(theirs, attribute), attribute
    assert mine._get_name() == theirs._get_name()
    assert "output_padding=1" in repr(getattr(quantized, name)(4, 6, 3, 2, 1, 1)).replace("(", "").replace(",)", "")


@DIMS
def test_wrong_arguments_are_refused(dim: int) -> None:
    kind = getattr(quantized, f"ConvTranspose{dim}d")
    with pytest.raises(ValueError, match='Only "zeros" padding mode is supported for ConvTranspose'):
        kind(4, 6, 3, padding_mode="reflect")
    for channels in ((3, 6), (4, 5)):
        with pytest.raises(InvalidArgumentError, match="divisible by groups"):
            kind(*channels, 3, groups=2)
    layer, x = kind(4, 6, 3), eagerq.quantize_per_tensor(batch(dim), 0.05, 128, torch.uint8)
    for value, words in ((batch(dim), "QuantStub"), (x[:, :3], "got shape"), (x[0], "unsqueeze")):
        with pytest.raises(InvalidInputError, match=words):
            layer(value)


@DIMS
def test_output_size(dim: int) -> None:
    """As torch's float layer takes it."""
    layer = float_layer(dim)
    int8 = converted(eagerq, Net(eagerq, layer), eagerq.default_qconfig, dim).layers[0]
    x = eagerq.quantize_per_tensor(batch(dim), 0.05, 128, torch.uint8)
    for length in (9, 10):
        y = int8(x, output_size=[length] * dim)
        exact = layer(x.dequantize(), output_size=[length] * dim).detach()
        assert y.shape == exact.shape
        low, high = ((end - int8.zero_point) * int8.scale for end in (0, 255))
        assert (y.dequantize() - exact.clamp(low, high)).abs().max() < 3 * int8.scale
    with pytest.raises(ValueError, match="requested an output size"):
        int8(x, output_size=[11] * dim)


@DIMS
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_and_exported(dim: int) -> None:
    net = converted(eagerq, Net(eagerq, float_layer(dim)), eagerq.default_qconfig, dim)
    x = batch(dim, 1)
    wanted_ = net(x)
    assert torch.equal(torch.compile(net, fullgraph=True, backend="aot_eager")(x), wanted_)
    for strict in (False, True):
        assert torch.equal(torch.export.export(net, (x,), strict=strict).module()(x), wanted_)


def test_signed_bytes_and_reduced_ranges() -> None:
    call = call_of((1, 2, 5, 5), (2, 3, 3, 3), dtype=torch.int8, zero_point=3)
    layer = ours(call)
    layer.output = layer.output._replace(low=-20, high=20)
    y = layer(input_of(call)).int_repr()
    assert torch.equal(y, wanted({**call, "low": -20, "high": 20}))
    assert (int(y.min()), int(y.max())) == (-20, 20)
