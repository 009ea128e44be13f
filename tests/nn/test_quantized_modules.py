"""int8 layers: torch.ao's integers where it agrees with itself, the exact ones where it does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.calls import RANGES, Call, conv_calls, expected, integers, linear_calls
from torch import Tensor, nn

import eagerq
from eagerq import QTensor
from eagerq.errors import InvalidInputError
from eagerq.intrinsic import quantized as intrinsic_quantized
from eagerq.nn import quantized
from eagerq.nn.quantized.base import Output

# torch.ao's layers take and give nothing else
UINT8 = st.just(torch.uint8)


def weight_of(call: Call) -> QTensor:
    if len(call["weight_scale"]) == 1:
        return QTensor(call["weight"], float(call["weight_scale"]), 0)
    return QTensor(call["weight"], call["weight_scale"], call["weight_zero_point"], 0)


def input_of(call: Call) -> QTensor:
    return QTensor(call["x"], call["x_scale"], call["x_zero_point"])


def build(kind: Any, call: Call, **others: Any) -> Any:
    """An int8 layer of either library, without parameters yet."""
    out, inside, *kernel = call["weight"].shape
    bias = call["bias"] is not None
    if not kernel:
        return kind(inside, out, bias)
    names = ("stride", "padding", "dilation")
    how = {name: tuple(call[name]) for name in names} | {"groups": call["groups"], "bias": bias} | others
    return kind(inside * call["groups"], out, tuple(kernel), **how)


def ours(kind: Any, call: Call, **others: Any) -> Any:
    layer = build(kind, call, **others)
    layer.set_weight_bias(weight_of(call), call["bias"])
    layer.output = Output(call["scale"], call["zero_point"], call["dtype"], *RANGES[call["dtype"]])
    return layer


def twin_tensor(q: QTensor) -> Tensor:
    """torch's quantized tensor of the same integers."""
    if q.axis is None:
        return torch._make_per_tensor_quantized_tensor(q.integers.contiguous(), q.scale, q.zero_point)
    return torch._make_per_channel_quantized_tensor(q.integers, q.scale, q.zero_point, q.axis)


def twin(kind: Any, call: Call) -> Any:
    layer = build(kind, call)
    layer.set_weight_bias(twin_tensor(weight_of(call)), call["bias"])
    layer.scale, layer.zero_point = call["scale"], call["zero_point"]
    return layer


def distance_from_tie(call: Call) -> Tensor:
    """How far each result of a convolution lies from the middle between two integers, in float64."""
    x, weight = call["x"].double() - call["x_zero_point"], call["weight"].double()
    convolve = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[x.dim()]
    total = convolve(x, weight, None, call["stride"], call["padding"], call["dilation"], call["groups"])
    shape = [-1] + [1] * (x.dim() - 2)
    y = total * call["x_scale"] * call["weight_scale"].double().reshape(shape)
    if call["bias"] is not None:
        y = y + call["bias"].double().reshape(shape)
    steps = y / call["scale"]
    return (steps - steps.floor() - 0.5).abs()


def assert_twins(ao: Oracle, name: str, call: Call) -> None:
    fused = "ReLU" in name
    packages = (intrinsic_quantized, ao.intrinsic_quantized) if fused else (quantized, ao.quantized)
    mine, theirs = (getattr(package, name) for package in packages)
    y, wanted = ours(mine, call)(input_of(call)), twin(theirs, call)(twin_tensor(input_of(call)))
    assert y.q_scale() == wanted.q_scale()
    assert y.q_zero_point() == wanted.q_zero_point()
    apart = (y.int_repr().int() - wanted.int_repr().int()).abs()
    if apart.any():
        # oneDNN has several convolutions, which multiply by the scales in orders of their own: they part
        # where the exact result is a tie, and nowhere else
        assert apart.max() == 1
        assert (distance_from_tie(call)[apart > 0] < 1e-4).all()
    if min(y.shape) > 1:  # so that the strides mean something
        assert y.stride() == wanted.stride()


@pytest.mark.parametrize("name", ["Linear", "LinearReLU"])
def test_linear_is_torchs(ao: Oracle, name: str) -> None:
    @settings(max_examples=40)
    @given(linear_calls(UINT8, UINT8))
    def check(call: Call) -> None:
        assert_twins(ao, name, call)

    check()


@pytest.mark.parametrize("kind", ["Conv", "ConvReLU"])
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_conv_is_torchs(ao: Oracle, kind: str, dim: int) -> None:
    @given(conv_calls(dim, UINT8, UINT8))
    def check(call: Call) -> None:
        assert_twins(ao, f"{kind}{dim}d", call)

    check()


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_conv_in_padding_is_exact(dim: int) -> None:
    """Where a window sees nothing but padding, torch.ao's results vary from run to run."""

    @given(conv_calls(dim, in_padding=True))
    def check(call: Call) -> None:
        y = ours(getattr(quantized, f"Conv{dim}d"), call)(input_of(call))
        assert torch.equal(
            y.int_repr(), expected({**call, "low": RANGES[call["dtype"]][0], "high": RANGES[call["dtype"]][1]})
        )

    check()


@pytest.mark.parametrize("name", ["Linear", "LinearReLU", "Conv1d", "ConvReLU1d", "Conv2d", "ConvReLU2d", "ConvReLU3d"])
def test_signed_integers(name: str) -> None:
    """int8 in, int8 out, in any mixture with uint8, which torch.ao does not take."""
    dim = int(name[-2]) if name[-1] == "d" else 0

    @settings(max_examples=15)
    @given(conv_calls(dim) if dim else linear_calls())
    def check(call: Call) -> None:
        low, high = RANGES[call["dtype"]]
        relu = "ReLU" in name
        call = {**call, "low": call["zero_point"] if relu else low, "high": high}
        y = ours(getattr(intrinsic_quantized if relu else quantized, name), call)(input_of(call))
        assert y.dtype is call["dtype"]
        assert (y.q_scale(), y.q_zero_point()) == (call["scale"], call["zero_point"])
        assert torch.equal(y.int_repr(), expected(call))

    check()


# --- padding ----------------------------------------------------------------------------------------


def padded_call(dim: int, **arguments: Any) -> tuple[Call, Tensor]:
    """A convolution with an input of 7 in each axis, and its exact sums: torch's own, of the integers in float64."""
    generator = torch.Generator().manual_seed(dim)
    float_layer: Any = getattr(nn, f"Conv{dim}d")(4, 6, bias=False, dtype=torch.float64, **arguments)
    weight = integers(float_layer.weight.shape, torch.int8, generator)
    x = integers((2, 4, *[7] * dim), torch.uint8, generator)
    float_layer.weight.data = weight.double()
    total = float_layer(x.double() - 99).detach()
    each = getattr(quantized, f"Conv{dim}d")(4, 6, **arguments)
    call = {
        "x": x,
        "x_scale": 0.02,
        "x_zero_point": 99,
        "weight": weight,
        "weight_scale": torch.rand(6, generator=generator) * 0.01 + 0.001,
        "weight_zero_point": torch.zeros(6, dtype=torch.int32),
        "bias": torch.randn(6, generator=generator),
        **{name: list(getattr(each, name)) for name in ("stride", "dilation")},
        "padding": [0] * dim,
        "groups": each.groups,
        "scale": 0.02 * weight[0].numel() ** 0.5,
        "zero_point": 120,
        "dtype": torch.uint8,
        "low": 0,
        "high": 255,
    }
    return call, expected(call, total.numpy())


# torch itself, of an even kernel in the float layer
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [1, "uneven", "same", "valid"])
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_padding_modes(dim: int, padding: Any, padding_mode: str) -> None:
    """Also an even kernel and a dilated one, whose ``same`` padding has one more at the far side."""
    if padding == "uneven":
        padding = (2, 1, 3)[:dim]
    arguments = {
        "kernel_size": (3, 2, 4)[:dim],
        "dilation": (1, 3, 1)[:dim],
        "padding": padding,
        "padding_mode": padding_mode,
        "groups": 2,
    }
    for kernel_size in (arguments["kernel_size"], (2, 3, 1)[:dim]):
        call, wanted = padded_call(dim, **{**arguments, "kernel_size": kernel_size})
        # as it is built, with padding and mode of its own
        layer = ours(getattr(quantized, f"Conv{dim}d"), call, padding=padding, padding_mode=padding_mode)
        result = layer(input_of(call)).int_repr()
        assert result.shape == wanted.shape
        assert torch.equal(result, wanted)


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_padding_modes_with_strides(dim: int) -> None:
    for padding_mode in ("zeros", "reflect", "circular"):
        call, wanted = padded_call(dim, kernel_size=3, stride=2, padding=2, padding_mode=padding_mode)
        layer = ours(getattr(quantized, f"Conv{dim}d"), call, padding=2, padding_mode=padding_mode)
        assert torch.equal(layer(input_of(call)).int_repr(), wanted)


# --- the modules themselves -------------------------------------------------------------------------


def ao_of(ao: Oracle, kind: Any) -> Any:
    package = ao.intrinsic_quantized if "ReLU" in kind.__name__ else ao.quantized
    return getattr(package, kind.__name__)


KINDS = [
    *(getattr(quantized, name) for name in ("Linear", "Conv1d", "Conv2d", "Conv3d")),
    *(getattr(intrinsic_quantized, name) for name in ("LinearReLU", "ConvReLU1d", "ConvReLU2d", "ConvReLU3d")),
]


def new(kind: Any) -> Any:
    return kind(4, 6) if "Linear" in kind.__name__ else kind(4, 6, 3)


def x_for(kind: Any, batch: int = 2) -> QTensor:
    shape = (batch, 4) if "Linear" in kind.__name__ else (batch, 4, *[5] * int(kind.__name__[-2]))
    return eagerq.quantize_per_tensor(torch.randn(shape), 0.05, 128, torch.uint8)


@pytest.mark.parametrize("kind", KINDS)
def test_new_layers_are_like_torchs(ao: Oracle, kind: Any) -> None:
    """Weight and bias of zero, scale 1, zero point 0."""
    mine, theirs = new(kind), new(ao_of(ao, kind))
    assert mine.weight().shape == theirs.weight().shape
    assert not mine.weight().int_repr().any()
    assert torch.equal(mine.bias(), theirs.bias())
    assert (mine.scale, mine.zero_point) == (theirs.scale, theirs.zero_point)
    for name in (
        "in_features",
        "in_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
    ):
        assert getattr(mine, name, None) == getattr(theirs, name, None)
    assert mine._get_name() == theirs._get_name()
    assert not list(mine.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_empty_batches(kind: Any) -> None:
    layer = new(kind)
    assert layer(x_for(kind, 0)).shape == (0, *layer(x_for(kind, 1)).shape[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_inputs_are_refused(kind: Any) -> None:
    layer, x = new(kind), x_for(kind)
    wrong: list[tuple[Any, str]] = [
        (x.dequantize(), r"torch\.float32.*QuantStub"),
        (x.int_repr(), r"torch\.uint8"),
        (None, "NoneType"),
        (QTensor(x.integers, torch.ones(4), torch.zeros(4), 1), "one scale"),
        (x[:, :3], "got"),
    ]
    if "Conv" in kind.__name__:
        wrong += [(x[0], "unsqueeze"), (x.unsqueeze(0), "dimensions")]
    for value, words in wrong:
        with pytest.raises(InvalidInputError, match=rf"{kind.__name__}.*{words}"):
            layer(value)


def test_unfitting_kernels_are_refused() -> None:
    with pytest.raises(RuntimeError, match="Kernel size"):
        quantized.Conv2d(4, 6, 7)(x_for(quantized.Conv2d))


@pytest.mark.parametrize("kind", KINDS)
def test_weight_and_bias_go_in_and_out(kind: Any) -> None:
    layer = new(kind)
    shape = layer.weight().shape
    weight = eagerq.quantize_per_channel(torch.randn(shape), torch.rand(6) + 0.1, torch.arange(6), 0, torch.int8)
    layer.set_weight_bias(weight, torch.arange(6.0))
    w, b = layer._weight_bias()
    assert torch.equal(w.int_repr(), weight.int_repr())
    assert torch.equal(w.q_per_channel_scales(), weight.q_per_channel_scales())
    assert w.q_per_channel_zero_points().tolist() == list(range(6))
    assert b.tolist() == list(range(6))
    layer.set_weight_bias(eagerq.quantize_per_tensor(torch.randn(shape), 0.5, 3, torch.int8), None)
    assert (layer.weight().q_scale(), layer.weight().q_zero_point(), layer.bias()) == (0.5, 3, None)


@pytest.mark.parametrize(
    "make",
    [
        lambda: quantized.Conv2d(
            4, 6, 3, stride=2, padding=1, dilation=2, groups=2, padding_mode="reflect", bias=False
        ),
        lambda: quantized.Linear(4, 6),
        lambda: intrinsic_quantized.LinearReLU(4, 6),
    ],
)
def test_repr_tells_the_parameters(make: Callable[[], nn.Module]) -> None:
    layer: Any = make()
    layer.scale, layer.zero_point = 0.25, 3
    words = repr(layer)
    assert words.startswith(f"Quantized{type(layer).__name__}(")
    told = ["scale=0.25", "zero_point=3"]
    if isinstance(layer, quantized.Conv2d):
        told += ["stride=(2, 2)", "dilation=(2, 2)", "groups=2", "padding_mode=reflect", "bias=False"]
    assert all(word in words for word in told)


def test_non_contiguous_inputs() -> None:
    for kind in KINDS:
        layer, x = new(kind), x_for(kind, 4)
        layer._weight = integers(layer._weight.shape, torch.int8, torch.Generator().manual_seed(1))
        layer.scale = 3.0
        wanted = layer(QTensor(x.integers[::2].contiguous(), x.scale, x.zero_point)).int_repr()
        assert torch.equal(layer(x[::2]).int_repr(), wanted)
        assert torch.equal(layer(x).int_repr()[::2], wanted)
