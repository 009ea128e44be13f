"""The doors that have fast implementations, with their schemas and registrations, and what is made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eagerq import native
from eagerq.kernels import native_conv, native_linear, onednn, reference, transposed
from eagerq.kernels.dispatch import Kernel, door

__all__ = [
    "add",
    "add_scalar",
    "cat",
    "conv",
    "conv_transpose",
    "dequantize",
    "linear",
    "matmul",
    "mul",
    "mul_scalar",
    "quantize",
]

_X = "Tensor x, float x_scale, int x_zero_point"
_WEIGHT = "Tensor weight, Tensor weight_scale, Tensor weight_zero_point, Tensor? bias"
_OUTPUT = "float scale, int zero_point, ScalarType dtype, int low, int high"


def _fake_linear(
    x: Tensor,
    x_scale: float,
    x_zero_point: int,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor,
    bias: Tensor | None,
    scale: float,
    zero_point: int,
    dtype: torch.dtype,
    low: int,
    high: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


def _fake_conv(
    x: Tensor,
    x_scale: float,
    x_zero_point: int,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    scale: float,
    zero_point: int,
    dtype: torch.dtype,
    low: int,
    high: int,
) -> Tensor:
    size = [
        (length + 2 * pad - step * (taps - 1) - 1) // every + 1
        for length, pad, step, taps, every in zip(x.shape[2:], padding, dilation, weight.shape[2:], stride, strict=True)
    ]
    return reference.channels_last(x.new_empty((x.shape[0], weight.shape[0], *size), dtype=dtype))


def _fake_conv_transpose(
    x: Tensor,
    x_scale: float,
    x_zero_point: int,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    scale: float,
    zero_point: int,
    dtype: torch.dtype,
    low: int,
    high: int,
) -> Tensor:
    size = transposed.output_size(x.shape[2:], weight.shape[2:], stride, padding, output_padding, dilation)
    return reference.channels_last(x.new_empty((x.shape[0], weight.shape[1] * groups, *size), dtype=dtype))


def _fake_add(a: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(a + rest[2], dtype=rest[-3])


add = Kernel(f"add({_X.replace('x', 'a')}, {_X.replace('x', 'b')}, {_OUTPUT}) -> Tensor", reference.add, _fake_add)
quantize = Kernel(f"quantize(Tensor x, {_OUTPUT}) -> Tensor", reference.quantize)
linear = Kernel(f"linear({_X}, {_WEIGHT}, {_OUTPUT}) -> Tensor", reference.linear, _fake_linear)
conv = Kernel(
    f"conv({_X}, {_WEIGHT}, int[] stride, int[] padding, int[] dilation, int groups, {_OUTPUT}) -> Tensor",
    reference.conv,
    _fake_conv,
)
conv_transpose = Kernel(
    f"conv_transpose({_X}, {_WEIGHT}, int[] stride, int[] padding, int[] output_padding, int[] dilation, int groups, "
    f"{_OUTPUT}) -> Tensor",
    reference.conv_transpose,
    _fake_conv_transpose,
)

if native.available:
    add.register("cpu", native.add)
    quantize.register("cpu", native.quantize)
if native.conv_ready():
    conv.register("cpu", native_conv.conv)
    linear.register("cpu", native_linear.linear)
if onednn.available():
    linear.register("cpu", onednn.linear)
    conv.register("cpu", onednn.conv)
    conv_transpose.register("cpu", transposed.conv_transpose)


@door
def dequantize(q: Tensor, scale: float, zero_point: int) -> Tensor:
    """``(q - zero_point)·scale`` in float32."""
    if native.available and not torch.compiler.is_compiling():
        real = native.dequantize(q, scale, zero_point)
        if real is not NotImplemented:
            values: Tensor = real
            return values
    return reference.dequantize(q, scale, zero_point)


@door
def mul(
    a: Tensor,
    a_scale: float,
    a_zero_point: int,
    b: Tensor,
    b_scale: float,
    b_zero_point: int,
    scale: float,
    zero_point: int,
    dtype: torch.dtype,
    low: int,
    high: int,
) -> Tensor:
    """``a * b`` of two quantized tensors (broadcasting), requantized."""
    call = (a, a_scale, a_zero_point, b, b_scale, b_zero_point, scale, zero_point, dtype, low, high)
    if native.available and not torch.compiler.is_compiling():
        product = native.mul(*call)
        if product is not NotImplemented:
            return product
    return reference.mul(*call)


@door
def cat(
    tensors: Sequence[Tensor],
    scales: Sequence[float],
    zero_points: Sequence[int],
    dim: int,
    scale: float,
    zero_point: int,
    dtype: torch.dtype,
    low: int,
    high: int,
) -> Tensor:
    """Concatenate quantized tensors, each requantized where its parameters differ from the result's."""
    parts = []
    for q, q_scale, q_zero_point in zip(tensors, scales, zero_points, strict=True):
        if (q_scale, q_zero_point, q.dtype) == (scale, zero_point, dtype):
            parts.append(q if (low, high) == _limits(dtype) else q.clamp(low, high))
        else:
            parts.append(quantize(reference.dequantize(q, q_scale, q_zero_point), scale, zero_point, dtype, low, high))
    return torch.cat(parts, dim)


def _limits(dtype: torch.dtype) -> tuple[int, int]:
    info = torch.iinfo(dtype)
    return info.min, info.max


def _farthest(dtype: torch.dtype, zero_point: int) -> int:
    """How far integers of a dtype can be from the zero point."""
    least, most = _limits(dtype)
    return max(zero_point - least, most - zero_point)


# asked once: not every compiler of torch can trace the question
_CASTING = frozenset(
    kind
    for kind in ("cpu", "cuda", "xpu", "mps", "hpu", "xla", "mtia", "maia", "ipu", "privateuseone")
    if torch.amp.is_autocast_available(kind)
)


def _autocast(device_type: str) -> bool:
    return device_type in _CASTING and torch.is_autocast_enabled(device_type)


@door
def matmul(
    a: Tensor,
    a_scale: float,
    a_zero_point: int,
    b: Tensor,
    b_scale: float,
    b_zero_point: int,
    scale: float,
    zero_point: int,
    dtype: torch.dtype,
    low: int,
    high: int,
) -> Tensor:
    """``a @ b`` of two quantized tensors, requantized."""
    largest = a.shape[-1] * _farthest(a.dtype, a_zero_point) * _farthest(b.dtype, b_zero_point)
    # float32 has every integer up to there, whatever the order of the sum; autocast would have fewer of them
    wide = torch.float32 if largest <= 2**24 and not _autocast(a.device.type) else torch.float64
    product = (a.to(wide).sub_(a_zero_point) @ b.to(wide).sub_(b_zero_point)).to(torch.float32)
    real = product.mul_(reference.single(reference.single(a_scale) * reference.single(b_scale)))
    return quantize(real, scale, zero_point, dtype, low, high)


@door
def add_scalar(
    q: Tensor,
    q_scale: float,
    q_zero_point: int,
    steps: int,
    scale: float,
    zero_point: int,
    dtype: torch.dtype,
    low: int,
    high: int,
) -> Tensor:
    """``q + steps·q_scale``: the integers themselves where only the zero point is another."""
    if (scale, zero_point) == (q_scale, q_zero_point - steps):
        return q
    return quantize(reference.dequantize(q, q_scale, q_zero_point - steps), scale, zero_point, dtype, low, high)


@door
def mul_scalar(
    q: Tensor,
    q_scale: float,
    q_zero_point: int,
    factor: float,
    scale: float,
    zero_point: int,
    dtype: torch.dtype,
    low: int,
    high: int,
) -> Tensor:
    """``q·factor`` where the new parameters take it up: the integers themselves, for a negative factor mirrored."""
    if factor == 0:
        return torch.zeros_like(q)
    return q if factor > 0 else low + high - q
