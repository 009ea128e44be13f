"""Each door to integer arithmetic in Q/DQ form: dequantize, the float operator, quantize."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eagerq.pt2e import operators
from eagerq.scheme import integer_type

__all__ = ["DOORS"]

_CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


def quantize(x: Tensor, scale: float, zero_point: int, dtype: torch.dtype, low: int, high: int) -> Tensor:
    """``x`` in integers; as it is where a float dtype is asked for. A fused ReLU is taken out of the range."""
    if dtype.is_floating_point:
        return x.to(dtype)
    least = integer_type(dtype).minimum
    if low == zero_point > least:
        x, low = torch.relu(x), least
    return operators.QUANTIZE_PER_TENSOR(x, scale, zero_point, low, high, dtype)


def dequantize(q: Tensor, scale: float, zero_point: int) -> Tensor:
    kind = integer_type(q.dtype)
    return operators.DEQUANTIZE_PER_TENSOR(q, scale, zero_point, kind.minimum, kind.maximum, q.dtype)


def _real_weight(weight: Tensor, scale: Tensor, zero_point: Tensor, axis: int = 0) -> Tensor:
    kind = integer_type(weight.dtype)
    limits = (kind.minimum, kind.maximum, weight.dtype)
    if scale.numel() == 1 and weight.shape[axis] != 1:
        return operators.DEQUANTIZE_PER_TENSOR_DYNAMIC(weight, scale, zero_point, *limits)
    return operators.DEQUANTIZE_PER_CHANNEL(weight, scale, zero_point, axis, *limits)


def _linear(
    x: Tensor,
    x_scale: float,
    x_zero_point: int,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor,
    bias: Tensor | None,
    *output: Any,
) -> Tensor:
    real = _real_weight(weight, weight_scale, weight_zero_point)
    return quantize(F.linear(dequantize(x, x_scale, x_zero_point), real, bias), *output)


def _conv(
    x: Tensor,
    x_scale: float,
    x_zero_point: int,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    *output: Any,
) -> Tensor:
    real = _real_weight(weight, weight_scale, weight_zero_point)
    how = (bias, stride, padding, dilation, groups)
    return quantize(_CONVOLUTIONS[x.dim()](dequantize(x, x_scale, x_zero_point), real, *how), *output)


def _of_two(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def run(
        a: Tensor,
        a_scale: float,
        a_zero_point: int,
        b: Tensor,
        b_scale: float,
        b_zero_point: int,
        *output: Any,
    ) -> Tensor:
        return quantize(function(dequantize(a, a_scale, a_zero_point), dequantize(b, b_scale, b_zero_point)), *output)

    return run


def _cat(
    tensors: Sequence[Tensor], scales: Sequence[float], zero_points: Sequence[int], dim: int, *output: Any
) -> Tensor:
    parts = [dequantize(*part) for part in zip(tensors, scales, zero_points, strict=True)]
    return quantize(torch.cat(parts, dim), *output)


DOORS: dict[str, Callable[..., Any]] = {
    "add": _of_two(torch.add),
    "cat": _cat,
    "conv": _conv,
    "dequantize": dequantize,
    "linear": _linear,
    "matmul": _of_two(torch.matmul),
    "mul": _of_two(torch.mul),
    "quantize": quantize,
    "requantize": quantize,
}
