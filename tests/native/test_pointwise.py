"""The C kernels give the plain formulas' very numbers, or decline."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import eagerq
from eagerq import kernels, native
from eagerq.functional import fake_quantize
from eagerq.kernels import pooling, reference

pytestmark = pytest.mark.skipif(not native.available, reason="the C library was not built: no compiler at installation")

DTYPES = st.sampled_from([torch.uint8, torch.int8])
# powers of two make ties
SCALES = st.sampled_from([2.0**-k for k in range(-2, 9)]) | st.floats(1e-4, 10)
# around the vector widths, and beyond where the work is split between threads
COUNTS = st.sampled_from([0, 1, 7, 8, 9, 63, 64, 65, 8191, 8192, 8193, 40_000])
SPECIAL = [float("inf"), float("-inf"), 0.0, -0.0, 1e-42, 3e38, -3e38]


def limits(dtype: torch.dtype) -> tuple[int, int]:
    info = torch.iinfo(dtype)
    return info.min, info.max


@st.composite
def outputs(draw: st.DrawFn) -> tuple[float, int, torch.dtype, int, int]:
    dtype = draw(DTYPES)
    low, high = limits(dtype)
    first, last = sorted((draw(st.integers(low, high)), draw(st.integers(low, high))))
    return draw(SCALES), draw(st.integers(low, high)), dtype, first, last


def integers(count: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator).view(dtype)


def reals(count: int, seed: int, scale: float) -> Tensor:
    """Normal values, values on ties, and special ones."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, generator=generator) * 150 * scale
    x[::3] = (x[::3] / scale).round() * scale + scale / 2
    x[:: max(1, count // 7)][:7] = torch.tensor(SPECIAL)[: len(x[:: max(1, count // 7)][:7])]
    return x


@given(COUNTS, DTYPES, DTYPES, SCALES, SCALES, st.integers(-128, 255), st.integers(-128, 255), outputs())
def test_add(
    count: int, one: Any, other: Any, a_scale: float, b_scale: float, a_zero: int, b_zero: int, output: Any
) -> None:
    a, b = integers(count, one, 1), integers(count, other, 2)
    arguments = (a, a_scale, a_zero, b, b_scale, b_zero, *output)
    assert torch.equal(native.add(*arguments), reference.add(*arguments))


@given(
    st.tuples(st.integers(1, 3), st.sampled_from([1, 3, 16, 70]), st.integers(1, 40), st.integers(1, 40)),
    *(DTYPES, DTYPES, SCALES, SCALES, st.integers(-128, 255), st.integers(-128, 255), outputs()),
    *(st.booleans(), st.booleans()),
)
def test_mul(
    shape: tuple[int, ...],
    one: Any,
    other: Any,
    a_scale: float,
    b_scale: float,
    a_zero: int,
    b_zero: int,
    output: Any,
    last: bool,
    channels: bool,
) -> None:
    layout = torch.channels_last if last else torch.contiguous_format
    a = integers(math.prod(shape), one, 1).reshape(shape).contiguous(memory_format=layout)
    b = integers(math.prod(shape), other, 2).reshape(shape).contiguous(memory_format=layout)
    b = b[..., :1, :1].contiguous() if channels else b
    arguments = (a, a_scale, a_zero, b, b_scale, b_zero, *output)
    wanted, got = reference.mul(*arguments), native.mul(*arguments)
    if channels and not a.is_contiguous(memory_format=torch.channels_last) and a.shape != b.shape:
        assert got is NotImplemented
    else:
        assert torch.equal(got, wanted)
        assert got.stride() == a.stride()
        assert torch.equal(native.mul(b, b_scale, b_zero, a, a_scale, a_zero, *output), wanted)
    assert torch.equal(kernels.mul(*arguments), wanted)


@pytest.mark.parametrize("change", [lambda x: x[:, ::2], lambda x: x.expand(3, *x.shape), lambda x: x.int()])
def test_mul_declines_what_it_does_not_read(change: Any) -> None:
    x = integers(64, torch.uint8, 1).reshape(4, 16)
    a, b = change(x), change(x.flip(0))
    arguments = (a, 0.1, 3, b, 0.2, 7, 0.05, 9, torch.uint8, 0, 255)
    assert native.mul(*arguments) is NotImplemented
    assert torch.equal(kernels.mul(*arguments), reference.mul(*arguments))


@pytest.mark.parametrize("dim", [0, 1])
def test_look_up_of_a_part(dim: int) -> None:
    x, table = integers(4096, torch.uint8, 1).reshape(64, 64), integers(256, torch.uint8, 2)
    for part in x.chunk(4, dim):
        found = native.look_up(part, table)
        assert torch.equal(found, table[part.long()])
        assert found.is_contiguous()


@given(COUNTS, outputs(), st.integers(0, 5))
def test_quantize(count: int, output: Any, seed: int) -> None:
    x = reals(count, seed, output[0])
    assert torch.equal(native.quantize(x, *output), reference.quantize(x, *output))


def test_nan_as_the_reference_has_it() -> None:
    x = torch.full((100,), float("nan"))
    for dtype in (torch.uint8, torch.int8):
        output = (0.5, 3, dtype, *limits(dtype))
        assert torch.equal(native.quantize(x, *output), reference.quantize(x, *output))


@given(COUNTS, SCALES, st.integers(0, 255), st.integers(0, 5), st.booleans())
def test_fake_quantize_and_its_gradient(count: int, scale: float, zero_point: int, seed: int, wide: bool) -> None:
    x = reals(count, seed, scale)
    grad = torch.randn(count)
    low, high = (0, 255) if wide else (3, 17)
    qparams = torch.tensor([scale]), torch.tensor([min(max(zero_point, low), high)], dtype=torch.int32)
    inverse = 1.0 / qparams[0]
    steps = torch.round(x * inverse) + qparams[1]
    wanted = (steps.clamp(low, high) - qparams[1]) * qparams[0]
    inside = (steps >= low) & (steps <= high)
    out, bits = native.fake_quantize(x, native.Rounding(*qparams, low, high), None, mask=True) or (None, None)
    assert torch.equal(out, wanted)
    assert bits is not None
    assert torch.equal(native.masked(grad, bits), torch.where(inside, grad, 0.0))
    x.requires_grad_()
    fake_quantize(x, *qparams, low, high).backward(grad)
    assert x.grad is not None
    assert torch.equal(x.grad, torch.where(inside, grad, 0.0))


@given(
    st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(3, 9), st.integers(3, 9)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.integers(1, 3),
    st.integers(1, 2),
    st.booleans(),
    DTYPES,
)
def test_max_pool(shape: Any, taps: Any, stride: int, dilation: int, ceil_mode: bool, dtype: torch.dtype) -> None:
    x = integers(torch.Size(shape).numel(), dtype, 3).reshape(shape)
    padding = [tap // 2 for tap in taps]
    if any(
        length + 2 * pad < dilation * (tap - 1) + 1 for length, pad, tap in zip(shape[2:], padding, taps, strict=True)
    ):
        return
    arguments = (taps, stride, padding, dilation, ceil_mode)
    wanted = torch.nn.functional.max_pool2d(x.to(torch.float32), *arguments)
    pooled = pooling.max_pool(x, *arguments)
    assert torch.equal(pooled.to(torch.float32), wanted)
    assert pooled.is_contiguous(memory_format=torch.channels_last)


def test_only_plain_dense_tensors() -> None:
    x = torch.rand(2, 3, 4, 5)
    assert native.serves(x)
    assert native.serves(x.to(memory_format=torch.channels_last))
    assert native.serves(torch.rand(2, 5, 3).transpose(1, 2))
    assert not native.serves(x[:, :, ::2])
    assert not native.serves(x.permute(0, 2, 1, 3))
    assert not native.serves(x.to("meta"))
    output = (0.1, 0, torch.uint8, 0, 255)
    assert native.quantize(x[:, :, ::2], *output) is NotImplemented
    assert native.quantize(x.double(), *output) is NotImplemented
    q = x.to(torch.uint8)
    assert native.add(q, 1.0, 0, q.transpose(0, 1), 1.0, 0, *output) is NotImplemented
    assert native.add(q.int(), 1.0, 0, q.int(), 1.0, 0, *output) is NotImplemented


def test_a_view_of_the_other_sign_is_read_as_it_is() -> None:
    """The imaginary part of a conjugate lies in memory with the sign of the number that it was made of."""
    x = torch.complex(torch.zeros(1), torch.tensor([0.5])).conj().imag
    assert x.is_neg()
    assert x.is_contiguous()
    assert eagerq.quantize_per_tensor(x, 0.1, 128, torch.uint8).dequantize() == -0.5


def test_layout_stays() -> None:
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    output = (0.1, 100, torch.uint8, 0, 255)
    q = native.quantize(x, *output)
    assert q.stride() == x.stride()
    assert torch.equal(q, reference.quantize(x, *output))
    assert native.add(q, 0.1, 100, q, 0.1, 100, *output).stride() == x.stride()


@given(
    st.tuples(*map(st.integers, (1,) * 4, (3, 300, 9, 9))),
    DTYPES,
    st.integers(0, 255),
    st.sampled_from([(2, 3), (3, 2), (-1, -2), [2, -1]]),
    st.booleans(),
)
def test_average_over_space(shape: tuple[int, ...], dtype: Any, zero_point: int, axes: Any, keepdim: bool) -> None:
    low, high = limits(dtype)
    zero_point += low
    x = integers(math.prod(shape), dtype, 3).reshape(shape).contiguous(memory_format=torch.channels_last)
    q = eagerq.QTensor(x, 0.1, zero_point)
    for result, keeps in ((F.adaptive_avg_pool2d(q, 1), True), (q.mean(axes, keepdim), keepdim)):
        average = (x.float() - zero_point).mean(axes, keeps).add(zero_point).round().clamp(low, high)
        assert result.int_repr().dtype is dtype
        assert torch.equal(result.int_repr(), average.to(dtype))
    found = pooling.global_average(torch.mean, x, zero_point, (axes,), {"keepdim": keepdim})
    assert found is not NotImplemented


@pytest.mark.parametrize(
    ("func", "args", "kwargs"),
    [
        (torch.mean, (), {}),
        (torch.mean, (1,), {}),
        (torch.mean, ((1, 2),), {}),
        (torch.mean, ((2, 3),), {"dtype": torch.float64}),
        (F.adaptive_avg_pool2d, (2,), {}),
        (F.avg_pool2d, (1,), {}),
    ],
)
def test_other_averages_are_declined(func: Any, args: Any, kwargs: Any) -> None:
    x = torch.zeros(2, 3, 4, 4, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    assert pooling.global_average(func, x, 0, args, kwargs) is NotImplemented
