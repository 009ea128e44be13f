"""The integer operations in plain torch: right on every device, and what the fast ones are held to.

Sums of products are exact (float64 holds every integer that an int8 layer can reach).  What follows
is float32, rounded step by step as oneDNN's kernels do: ``((sum·sx)·sw + bias)·(1/so) + zo``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from eagerq.functional import channel_shape
from eagerq.kernels.dispatch import door

__all__ = [
    "add",
    "channels_last",
    "conv",
    "conv_transpose",
    "dequantize",
    "dequantize_per_channel",
    "linear",
    "mul",
    "quantize",
    "quantize_per_channel",
    "reciprocal",
    "requantize",
    "requantized",
    "scaled",
    "single",
]

MEMORY_FORMATS = {3: torch.contiguous_format, 4: torch.channels_last, 5: torch.channels_last_3d}
_CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
_TRANSPOSED = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}


def single(value: float) -> float:
    """``value`` rounded to float32, in arithmetic that a compiler can trace (Veltkamp's splitting)."""
    shifted = value * (2.0**29 + 1)
    return shifted - (shifted - value)


def reciprocal(scale: float) -> float:
    """``1/scale``, every number a float32."""
    return single(1.0 / single(scale))


def _scalar(value: float) -> Tensor:
    """A number as an operand of any tensor, whatever the default device and dtype."""
    return torch.tensor(value, dtype=torch.float32, device="cpu")


def channels_last(x: Tensor) -> Tensor:
    """``x`` as activations flow: channels last in memory, since a change of layout costs more than a convolution."""
    if x.dim() == 3:
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    return x.contiguous(memory_format=MEMORY_FORMATS[x.dim()])


def _stored(steps: Tensor, dtype: torch.dtype, low: int, high: int) -> Tensor:
    """Rounded numbers as integers of ``[low, high]``; consumes ``steps``."""
    if high >= 2**24:  # float32 has not every integer up to there
        steps = steps.double()
    return steps.clamp_(low, high).to(dtype)


def quantize(x: Tensor, scale: float, zero_point: int, dtype: torch.dtype, low: int, high: int) -> Tensor:
    """``clamp(round(x·(1/scale) + zero_point), low, high)``, the sum rounded once (fused multiply-add)."""
    shift = _scalar(float(zero_point))
    steps = torch.add(shift, x.to(torch.float32), alpha=reciprocal(scale))
    return _stored(steps.round_(), dtype, low, high)


@door
def quantize_per_channel(
    x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, dtype: torch.dtype, low: int, high: int
) -> Tensor:
    """As :func:`quantize`, with a scale and zero point for each index of ``axis``."""
    shape = channel_shape(x.dim(), axis)
    inverse = scale.to(torch.float32).reciprocal().reshape(shape)
    steps = x.to(torch.float32) * inverse + zero_point.to(torch.float32).reshape(shape)
    return _stored(steps.round_(), dtype, low, high)


@door
def dequantize(q: Tensor, scale: float, zero_point: int) -> Tensor:
    """``(q - zero_point)·scale`` in float32."""
    return q.to(torch.float32).sub_(zero_point).mul_(scale)


@door
def dequantize_per_channel(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    """As :func:`dequantize`, with a scale and zero point for each index of ``axis``."""
    shape = channel_shape(q.dim(), axis)
    return q.to(torch.float32).sub_(zero_point.reshape(shape)).mul_(scale.reshape(shape))


def _requantize(
    total: Tensor,
    axis: int,
    x_scale: float,
    weight_scale: Tensor,
    bias: Tensor | None,
    scale: float,
    zero_point: int,
    dtype: torch.dtype,
    low: int,
    high: int,
) -> Tensor:
    shape = channel_shape(total.dim(), axis)
    y = total.to(torch.float32).mul_(x_scale).mul_(weight_scale.reshape(shape))
    if bias is not None:
        y.add_(bias.reshape(shape))
    if dtype.is_floating_point:  # real numbers are asked for
        return y.to(dtype)
    return requantize(y, scale, zero_point, dtype, low, high)


@door
def requantize(y: Tensor, scale: float, zero_point: int, dtype: torch.dtype, low: int, high: int) -> Tensor:
    """A layer's real results as integers, ``round(y·(1/scale) + zero_point)`` in two roundings; consumes ``y``."""
    return _stored(y.mul_(reciprocal(scale)).add_(zero_point).round_(), dtype, low, high)


def _centred(weight: Tensor, zero_point: Tensor, axis: int = 0) -> Tensor:
    return weight.double().sub_(zero_point.reshape(channel_shape(weight.dim(), axis)))


def linear(
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
    """Integers ``[…, in]`` times integers ``[out, in]``, requantized to ``[…, out]``; left real in a float dtype."""
    total = F.linear(x.double().sub_(x_zero_point), _centred(weight, weight_zero_point))
    return _requantize(total, -1, x_scale, weight_scale, bias, scale, zero_point, dtype, low, high)


def conv(
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
    """1-, 2- or 3-dimensional convolution of integers ``[N, C, …]``, requantized; padding means 0.0.

    A float dtype leaves the result in real numbers.
    The result has its channels last in memory.
    """
    total = _CONVOLUTIONS[x.dim()](
        x.double().sub_(x_zero_point),
        _centred(weight, weight_zero_point),
        None,
        stride,
        padding,
        dilation,
        groups,
    )
    return channels_last(_requantize(total, 1, x_scale, weight_scale, bias, scale, zero_point, dtype, low, high))


def conv_transpose(
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
    """Transposed convolution of integers ``[N, C, …]`` in one to three dimensions, requantized.

    The weight is ``[in, out / groups, …]``, its scales and zero points ``[1]`` or ``[out / groups]``, the
    same for every group.  The result has its channels last in memory.
    """
    total = _TRANSPOSED[x.dim()](
        x.double().sub_(x_zero_point),
        _centred(weight, weight_zero_point, axis=1),
        None,
        stride,
        padding,
        output_padding,
        groups,
        dilation,
    )
    each = weight_scale if weight_scale.numel() == 1 else weight_scale.repeat(groups)
    return channels_last(_requantize(total, 1, x_scale, each, bias, scale, zero_point, dtype, low, high))


def requantized(y: Tensor, factor: float, zero_point: int, dtype: torch.dtype, low: int, high: int) -> Tensor:
    """Real numbers times ``factor`` as integers; the zero point is added after rounding, unlike in :func:`quantize`.

    Activations and operators on two of them have always done so.  Consumes ``y``.
    """
    return _stored(y.mul_(factor).round_().add_(zero_point), dtype, low, high)


def scaled(q: Tensor, scale: float, zero_point: int) -> Tensor:
    """``q·scale - zero_point·scale``, the difference rounded once (fused multiply-add), as sums have always had it."""
    shift = -single(single(scale) * zero_point)
    if torch.compiler.is_compiling():  # would multiply and add apart; float64 holds the exact difference
        return (q.double() * single(scale) + shift).to(torch.float32)
    return torch.add(_scalar(shift), q.to(torch.float32), alpha=scale)


def add(
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
    """``a + b`` of two quantized tensors (broadcasting), requantized."""
    total = scaled(a, a_scale, a_zero_point) + scaled(b, b_scale, b_zero_point)
    return requantized(total, reciprocal(scale), zero_point, dtype, low, high)


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
    product = a.to(torch.float32).sub_(a_zero_point) * b.to(torch.float32).sub_(b_zero_point)
    factor = single(single(single(a_scale) * single(b_scale)) * reciprocal(scale))
    return requantized(product, factor, zero_point, dtype, low, high)
