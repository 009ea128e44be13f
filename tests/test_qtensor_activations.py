"""torch's activation functions on QTensors: the integers of torch's quantized tensors, for every input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Oracle
from hypothesis import given
from hypothesis import strategies as st
from kernels.calls import BYTES, LAYOUTS, SCALE_KINDS, laid_out, scales, zero_points
from torch import Tensor, nn

from eagerq import QTensor, kernels, quantize_per_channel, quantize_per_tensor
from eagerq.errors import InvalidInputError
from eagerq.kernels.activation import FUNCTIONS

# what torch's functions do with torch's quantized tensors too
FUNCTIONS_OF_BOTH: dict[str, Callable[[Any], Any]] = {
    "sigmoid": torch.sigmoid,
    "sigmoid, method": lambda q: q.sigmoid(),
    "tanh": torch.tanh,
    "tanh, method": lambda q: q.tanh(),
    "hardsigmoid": F.hardsigmoid,
    "hardsigmoid in place": lambda q: F.hardsigmoid(q, inplace=True),
    "leaky_relu": lambda q: F.leaky_relu(q, 0.3),
    "leaky_relu in place": lambda q: F.leaky_relu(q, 0.1, inplace=True),
    "leaky_relu_": F.leaky_relu_,
    "threshold": lambda q: F.threshold(q, 0.25, -1.5),
    "torch.threshold": lambda q: torch.threshold(q, -0.5, 1.0),
    "gelu": F.gelu,
    "gelu, tanh": lambda q: F.gelu(q, approximate="tanh"),
    "std": lambda q: q.view(4, 64).std(0),
}
CHANGING = [name for name in FUNCTIONS_OF_BOTH if "place" in name or name.endswith("_")]


@st.composite
def every_integer(draw: st.DrawFn) -> QTensor:
    """All 256 integers, with drawn parameters."""
    dtype = draw(BYTES)
    integers = torch.arange(256, dtype=torch.uint8).view(dtype)
    return QTensor(integers, draw(scales(draw(SCALE_KINDS))), draw(zero_points(dtype)))


def twin(q: QTensor) -> Tensor:
    return torch._make_per_tensor_quantized_tensor(q.integers.clone(), q.scale, q.zero_point)


def assert_twins(got: QTensor, wanted: Tensor) -> None:
    assert torch.equal(got.int_repr(), wanted.int_repr())
    assert got.q_scale() == pytest.approx(wanted.q_scale(), rel=1e-7)
    assert got.q_zero_point() == wanted.q_zero_point()


@pytest.mark.parametrize("name", FUNCTIONS_OF_BOTH)
@given(q=every_integer())
def test_integers_are_those_of_torch(name: str, ao: Oracle, q: QTensor) -> None:
    function = FUNCTIONS_OF_BOTH[name]
    wanted = function(twin(q))
    assert_twins(function(QTensor(q.integers.clone(), q.scale, q.zero_point)), wanted)


@pytest.mark.parametrize("name", CHANGING)
def test_in_place(name: str) -> None:
    q = quantize_per_tensor(torch.linspace(-4, 4, 9), 0.05, 100, torch.uint8)
    wanted = FUNCTIONS_OF_BOTH[name](q.clone())
    integers = q.integers
    assert FUNCTIONS_OF_BOTH[name](q) is q
    assert q.integers is integers
    assert torch.equal(q.dequantize(), wanted.dequantize())


def test_threshold_in_place() -> None:
    q = quantize_per_tensor(torch.linspace(-4, 4, 9), 0.05, 100, torch.uint8)
    for function in (lambda x: F.threshold(x, 1.0, 0.5, inplace=True), lambda x: torch.threshold_(x, 1.0, 0.5)):
        x = q.clone()
        assert function(x) is x
        assert torch.equal(x.int_repr(), F.threshold(q, 1.0, 0.5).int_repr())


@given(dim=st.integers(-3, 2), dtype=BYTES, power=st.integers(-8, -1))
def test_softmax_covers_the_unit_interval(dim: int, dtype: torch.dtype, power: int) -> None:
    q = quantize_per_tensor(torch.randn(3, 4, 5) * 3, 2.0**power, 3, dtype)
    exact = torch.softmax(q.dequantize().double(), dim)
    for got in (F.softmax(q, dim), torch.softmax(q, dim), q.softmax(dim), nn.Softmax(dim)(q)):
        assert (got.q_scale(), got.q_zero_point()) == (1 / 256, 0 if dtype is torch.uint8 else -128)
        assert (got.dequantize() - exact.clamp(max=255 / 256)).abs().max() < 0.501 / 256


def test_softmax_of_an_axis_left_open() -> None:
    q = quantize_per_tensor(torch.randn(3, 4), 0.1, 3, torch.uint8)
    with pytest.warns(UserWarning, match="Implicit dimension choice for softmax"):
        assert torch.equal(F.softmax(q).int_repr(), F.softmax(q, 1).int_repr())


@given(shape=st.lists(st.integers(0, 5), max_size=5), dtype=BYTES, layout=LAYOUTS)
def test_any_shape_and_layout(shape: list[int], dtype: torch.dtype, layout: str) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(dtype)
    wanted = F.leaky_relu(QTensor(every, 0.1, 20), 0.3).int_repr()
    x = torch.randint(0, 256, shape, dtype=torch.uint8)
    got = F.leaky_relu(QTensor(laid_out(x.view(dtype), layout), 0.1, 20), 0.3).int_repr()
    assert torch.equal(got, wanted[x.long()])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_channels_last_stay_last(dtype: torch.dtype) -> None:
    x = torch.randint(0, 100, (2, 3, 4, 5)).to(dtype).contiguous(memory_format=torch.channels_last)
    for function in (torch.sigmoid, F.leaky_relu):
        assert function(QTensor(x, 0.1, 20)).int_repr().stride() == x.stride()


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_wider_integers(name: str, dtype: torch.dtype) -> None:
    arguments = {"elu": [1.5, 1.0], "leaky_relu": [0.2], "threshold": [0.5, 0.25]}.get(name, [])
    q = quantize_per_tensor(torch.linspace(-4, 4, 101), 2**-10, 5, dtype)
    y = kernels.pointwise(q.integers, name, arguments, q.scale, q.zero_point, 2**-11, 7, dtype, -30000, 30000)
    exact = FUNCTIONS[name](q.dequantize().double(), *arguments)
    assert y.dtype is dtype
    assert (QTensor(y, 2**-11, 7).dequantize() - exact).abs().max() <= 2**-12 * 1.001


@pytest.mark.parametrize("function", [torch.sigmoid, torch.tanh, F.hardsigmoid])
def test_wider_integers_get_their_whole_range(function: Any) -> None:
    for dtype in (torch.int16, torch.int32):
        q = quantize_per_tensor(torch.linspace(-9, 9, 101), 2**-8, 5, dtype)
        assert (function(q).dequantize() - function(q.dequantize())).abs().max() < 1e-4


def test_result_is_the_same_in_any_mode_and_device(device: torch.device) -> None:
    x = torch.arange(256, dtype=torch.uint8)
    wanted = torch.tanh(QTensor(x, 0.02, 99)).int_repr()
    with torch.inference_mode():
        assert torch.equal(torch.tanh(QTensor(x, 0.03, 99)).int_repr(), torch.tanh(QTensor(x, 0.03, 99)).int_repr())
    assert torch.equal(torch.tanh(QTensor(x.to(device), 0.02, 99)).int_repr().cpu(), wanted)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(torch.tanh(QTensor(x, 0.02, 99)).int_repr(), wanted)
        assert torch.tanh(QTensor(x, 0.04, 98)).dtype is torch.uint8
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_fake_tensor_leaves_no_table_behind() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = kernels.pointwise(
            torch.empty(4, dtype=torch.uint8), "tanh", [], 0.017, 99, 2**-7, 128, torch.uint8, 0, 255
        )
    assert fake.shape == (4,)
    x = torch.arange(256, dtype=torch.uint8)
    y = kernels.pointwise(x, "tanh", [], 0.017, 99, 2**-7, 128, torch.uint8, 0, 255)
    assert (QTensor(y, 2**-7, 128).dequantize() - torch.tanh((x - 99.0) * 0.017)).abs().max() <= 2**-7


@pytest.mark.parametrize("function", [torch.sigmoid, torch.tanh, F.hardsigmoid, F.leaky_relu, F.gelu, torch.std])
def test_per_channel_tensors_are_refused(function: Any) -> None:
    q = quantize_per_channel(torch.randn(2, 3), torch.ones(2), torch.zeros(2), 0, torch.int8)
    with pytest.raises(InvalidInputError, match="per-channel"):
        function(q)


@pytest.mark.parametrize("function", [F.elu, F.hardswish, F.silu, F.log_softmax])
def test_functions_whose_range_is_not_known_are_refused(function: Any) -> None:
    with pytest.raises(InvalidInputError, match="not defined"):
        function(quantize_per_tensor(torch.randn(2, 3), 0.1, 10, torch.uint8))
