"""The reference kernels against their documented rules, computed in numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.calls import (
    BYTES,
    RANGES,
    SCALE_KINDS,
    Call,
    bounds,
    conv_calls,
    expected,
    integers,
    linear_calls,
    real,
    scales,
    zero_points,
)
from torch import Tensor

from eagerq import kernels
from eagerq.kernels import reference

ANY = st.sampled_from(sorted(RANGES, key=str))


@st.composite
def with_weight_zero_points(draw: st.DrawFn, calls: st.SearchStrategy[Call]) -> Call:
    call = draw(calls)
    if draw(st.booleans()):
        count = len(call["weight_scale"])
        shifts = draw(st.lists(st.integers(-128, 127), min_size=count, max_size=count))
        call["weight_zero_point"] = torch.tensor(shifts, dtype=torch.int32)
    return call


def assert_follows_rule(call: Call) -> None:
    kernel = reference.conv if "groups" in call else reference.linear
    result = kernel(*call.values())
    wanted = expected(call)
    assert result.dtype is wanted.dtype
    assert torch.equal(result, wanted)
    # and the rule is what it is meant to be: the real number, rounded to the nearest integer
    unrounded = real(call).clip(call["low"], call["high"])
    error = np.abs(unrounded - result.numpy().astype(np.float64))
    assert (error <= 0.5 + 1e-5 + 1e-6 * np.abs(real(call))).all()


@given(with_weight_zero_points(linear_calls(output_dtypes=ANY)))
def test_linear(call: Call) -> None:
    assert_follows_rule(call)


@pytest.mark.parametrize("in_padding", [False, True])
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_conv(dim: int, in_padding: bool) -> None:
    @settings(max_examples=15)
    @given(with_weight_zero_points(conv_calls(dim, output_dtypes=ANY, in_padding=in_padding)))
    def check(call: Call) -> None:
        assert_follows_rule(call)
        result = reference.conv(*call.values())
        channel = result.movedim(1, -1)
        assert channel.is_contiguous()

    check()


def test_ties_go_to_even() -> None:
    """1, 3, 5 … halves of a step, and the zero point counts: it is added before the rounding."""
    x = torch.arange(-7, 8, dtype=torch.int8).reshape(-1, 1)
    weight = torch.ones(1, 1, dtype=torch.int8)
    one, zero = torch.ones(1), torch.zeros(1, dtype=torch.int32)
    for zero_point in (0, 1):
        result = reference.linear(x, 1.0, 0, weight, one, zero, None, 2.0, zero_point, torch.int8, -128, 127)
        wanted = [round(value / 2 + zero_point) for value in range(-7, 8)]
        assert result.flatten().tolist() == wanted


@pytest.mark.parametrize(
    ("total", "x_scale", "weight_scale", "scale", "wanted"),
    [
        (31924, 0.043260686099529266, 0.011884203180670738, 0.24680796265602112, 70),
        (87933, 0.06487743556499481, 0.006829706486314535, 0.45570260286331177, 88),
        (36819, 0.02137570083141327, 0.013418497517704964, 0.25447675585746765, 45),
    ],
)
def test_scales_are_applied_one_after_the_other(
    total: int, x_scale: float, weight_scale: float, scale: float, wanted: int
) -> None:
    """Rounding their product first would end one step away."""
    squares, rest = divmod(total, 127 * 127)
    tens, ones = divmod(rest, 127)
    x = torch.tensor([[*[127] * squares, tens, ones]], dtype=torch.uint8)
    weight = torch.tensor([[*[127] * squares, 127, 1]], dtype=torch.int8)
    columns = torch.tensor([weight_scale]), torch.zeros(1, dtype=torch.int32)
    result = reference.linear(x, x_scale, 0, weight, *columns, None, scale, 3, torch.uint8, 0, 255)
    assert result.item() == wanted


# --- quantize and dequantize ------------------------------------------------------------------------


def _inverse(scale: float) -> np.float32:
    return np.float32(1) / np.float32(scale)


def _clamped(steps: Any, dtype: torch.dtype, low: int, high: int) -> Tensor:
    return torch.from_numpy(np.asarray(np.rint(steps).astype(np.float64).clip(low, high))).to(dtype)


def quantized(x: Tensor, scale: float, zero_point: int, dtype: torch.dtype, low: int, high: int) -> Tensor:
    """``round(x·(1/scale) + zero_point)``; the product of two float32 is exact in float64."""
    product = x.float().numpy().astype(np.float64) * np.float64(_inverse(scale))
    return _clamped((product + zero_point).astype(np.float32), dtype, low, high)


@st.composite
def reals(draw: st.DrawFn, scale: float) -> Tensor:
    """Values around ``scale``'s steps, ties and values far out of range among them."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = draw(st.sampled_from([(), (1,), (7,), (64,), (130,), (3, 0), (2, 3, 5), (2, 3, 4, 5)]))
    steps = torch.randn(shape, generator=generator) * draw(st.sampled_from([3.0, 60.0, 1e4]))
    if draw(st.booleans()):
        steps = (steps * 2).round() / 2
    x = steps * scale
    if draw(st.booleans()) and x.dim() > 1:
        x = x.transpose(0, -1)
    return x.to(draw(st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16])))


@given(st.data())
def test_quantize(data: st.DataObject) -> None:
    dtype = data.draw(ANY)
    scale, zero_point = data.draw(SCALE_KINDS.flatmap(scales)), data.draw(zero_points(dtype))
    low, high = data.draw(bounds(dtype, zero_point))
    x = data.draw(reals(scale))
    result = reference.quantize(x, scale, zero_point, dtype, low, high)
    assert result.dtype is dtype
    assert result.shape == x.shape
    assert torch.equal(result, quantized(x, scale, zero_point, dtype, low, high))


@pytest.mark.parametrize("count", [1, 5, 16, 33, 1000])
def test_quantize_rounds_once(count: int) -> None:
    """Values whose product and sum, rounded one after the other, would end on the other side of a tie."""
    scale, zero_point = 0.12268995493650436, 102
    x = (torch.arange(count * 4) - count * 2).float() * 0.5 * scale
    wanted = quantized(x, scale, zero_point, torch.uint8, 0, 255)
    assert torch.equal(reference.quantize(x, scale, zero_point, torch.uint8, 0, 255), wanted)


def test_quantize_to_int32_stops_at_its_ends() -> None:
    """float32 has no 2**31 - 1."""
    x = torch.tensor([3e9, -3e9, 2.0**31, 1.0])
    ends = RANGES[torch.int32]
    wanted = [ends[1], ends[0], ends[1], 1]
    assert reference.quantize(x, 1.0, 0, torch.int32, *ends).tolist() == wanted
    one, zero = torch.ones(1), torch.zeros(1, dtype=torch.int64)
    assert reference.quantize_per_channel(x[None], one, zero, 0, torch.int32, *ends).tolist() == [wanted]


@given(st.data())
def test_quantize_per_channel(data: st.DataObject) -> None:
    dtype = data.draw(ANY)
    low, high = data.draw(bounds(dtype, 0))
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    count = shape[axis]
    scale = torch.tensor([data.draw(SCALE_KINDS.flatmap(scales)) for _ in range(count)])
    zero_point = torch.tensor([data.draw(zero_points(dtype)) for _ in range(count)])
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    along = [1] * len(shape)
    along[axis] = count
    x = (torch.randn(shape, generator=generator) * 100).round() / 2 * scale.reshape(along)
    result = reference.quantize_per_channel(x, scale, zero_point, axis, dtype, low, high)
    inverse = np.float32(1) / scale.numpy().reshape(along)
    steps = x.numpy() * inverse + zero_point.numpy().astype(np.float32).reshape(along)
    assert steps.dtype == np.float32
    assert torch.equal(result, _clamped(steps, dtype, low, high))
    back = reference.dequantize_per_channel(result, scale, zero_point, axis)
    shifted = result.numpy().astype(np.float32) - zero_point.numpy().astype(np.float32).reshape(along)
    assert back.dtype is torch.float32
    assert np.array_equal(back.numpy(), shifted * scale.numpy().reshape(along))


@given(st.data())
def test_dequantize(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([torch.uint8, torch.int8, torch.int16]))
    scale, zero_point = data.draw(SCALE_KINDS.flatmap(scales)), data.draw(zero_points(dtype))
    q = integers((3, 70), dtype, torch.Generator().manual_seed(data.draw(st.integers(0, 2**31))), 2**16)
    result = reference.dequantize(q, scale, zero_point)
    assert result.dtype is torch.float32
    assert np.array_equal(result.numpy(), np.float32(q.numpy().astype(np.int64) - zero_point) * np.float32(scale))


@given(st.floats(1.0, 2.0), st.integers(-100, 100))
def test_single(value: float, exponent: int) -> None:
    value *= 2.0**exponent
    assert reference.single(value) == float(np.float32(value))


# --- two operands -----------------------------------------------------------------------------------


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Any, ...]:
    """``a`` and ``b`` with their parameters, and a result's that fit ``a``'s size roughly."""
    kind = draw(SCALE_KINDS)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    a_shape, b_shape = draw(
        st.sampled_from(
            [((7,), (7,)), ((130,), (130,)), ((2, 3, 4), (4,)), ((2, 1), (1, 5)), ((), (3,)), ((0, 2), (2,))]
        )
    )
    operands: list[Any] = []
    for shape in (a_shape, b_shape):
        operand_type = draw(BYTES)
        zero_point = draw(zero_points(operand_type))
        scale = draw(scales(kind) | st.just(operands[1])) if operands else draw(scales(kind))
        operands += [integers(shape, operand_type, generator), scale, zero_point]
    dtype = draw(st.sampled_from([torch.uint8, torch.int8, torch.int16]))
    zero_point = draw(zero_points(dtype))
    scale = draw(scales(kind) | st.just(operands[1])) * draw(st.sampled_from([2, 1, 16]))
    return (*operands, scale, zero_point, dtype, *draw(bounds(dtype, zero_point)))


def _shifted(q: Tensor, zero_point: int) -> np.ndarray:
    return np.float32(q.numpy().astype(np.int64) - zero_point)


def scaled(q: Tensor, scale: float, zero_point: int) -> np.ndarray:
    """``q·scale - zero_point·scale``: the subtrahend rounded, then the difference."""
    shift = np.float32(scale) * np.float32(zero_point)
    return np.float32(q.numpy().astype(np.float64) * np.float64(np.float32(scale)) - np.float64(shift))


def added(a: Any, sa: Any, za: Any, b: Any, sb: Any, zb: Any, so: Any, zo: Any, dtype: Any, low: Any, high: Any) -> Any:
    """``round((a + b)·(1/so)) + zo``: rounded before the zero point is added."""
    total = scaled(a, sa, za) + scaled(b, sb, zb)
    return _clamped(np.rint(total * _inverse(so)) + zo, dtype, low, high)


def multiplied(
    a: Any, sa: Any, za: Any, b: Any, sb: Any, zb: Any, so: Any, zo: Any, dtype: Any, low: Any, high: Any
) -> Any:
    """``round(a·b·(sa·sb·(1/so))) + zo``."""
    factor = np.float32(sa) * np.float32(sb) * _inverse(so)
    assert factor.dtype == np.float32
    return _clamped(np.rint(_shifted(a, za) * _shifted(b, zb) * factor) + zo, dtype, low, high)


@pytest.mark.parametrize(("kernel", "rule"), [(kernels.add, added), (kernels.mul, multiplied)])
def test_two_operands(kernel: Callable[..., Tensor], rule: Callable[..., Tensor]) -> None:
    @settings(max_examples=60)
    @given(pairs())
    def check(pair: tuple[Any, ...]) -> None:
        before = pair[0].clone(), pair[3].clone()
        result = kernel(*pair)
        assert torch.equal(result, rule(*pair))
        assert torch.equal(pair[0], before[0])
        assert torch.equal(pair[3], before[1])

    check()


def test_default_device_and_dtype_do_not_matter() -> None:
    x, q = torch.randn(5), torch.arange(5, dtype=torch.uint8)
    whole = (torch.uint8, 0, 255)

    def results() -> list[Tensor]:
        return [
            kernels.quantize(x, 0.1, 3, *whole),
            kernels.quantize(x[0], 0.1, 3, *whole),
            kernels.add(q, 0.1, 3, q, 0.2, 1, 0.3, 7, *whole),
            kernels.mul(q, 0.1, 3, q, 0.2, 1, 0.3, 7, *whole),
            kernels.cat([q, q], [0.1, 0.2], [3, 1], 0, 0.3, 7, *whole),
            kernels.dequantize(q, 0.1, 3),
        ]

    wanted = results()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            others = results()
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(wanted, others, strict=True):
        assert one.dtype is other.dtype
        assert torch.equal(one, other)
