"""Each door to integer arithmetic in Q/DQ form: dequantize, the float operator, quantize."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eagerq import kernels
from eagerq.functional.qparams import SMALLEST_TRAINING_SCALE
from eagerq.kernels.reference import single
from eagerq.pt2e import operators
from eagerq.scheme import integer_type

__all__ = ["DOORS"]

_Door = Callable[..., Any]

_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
_TRANSPOSED: dict[int, Callable[..., Tensor]] = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}

# how many arguments say what the result is quantized to, the last of every door
_OUTPUT = 5


def _float32(x: Tensor) -> Tensor:
    return x if x.dtype is torch.float32 else x.to(torch.float32)  # the first would be a node of the graph, too


def quantize(x: Tensor, scale: float, zero_point: int, dtype: torch.dtype, low: int, high: int) -> Tensor:
    """``x`` in integers; as it is where a float dtype is asked for.

    Compilers quantize to all of the dtype, whatever range the operator names: what a range leaves out is clamped by
    operators of its own. A fused ReLU is one. Other ends are clamped between two quantizes, since one of real
    numbers would part the layer from its quantize.
    """
    x = _float32(x)
    if dtype.is_floating_point:
        return x
    least, most = integer_type(dtype).minimum, integer_type(dtype).maximum
    if low == zero_point > least:
        x, low = torch.relu(x), least
    q = operators.QUANTIZE_PER_TENSOR(x, scale, zero_point, least, most, dtype)
    if (low, high) == (least, most):
        return q
    ends = (None if end == edge else (end - zero_point) * scale for end, edge in ((low, least), (high, most)))
    x = torch.clamp(dequantize(q, scale, zero_point), *ends)
    return operators.QUANTIZE_PER_TENSOR(x, scale, zero_point, least, most, dtype)


def dequantize(q: Tensor, scale: float, zero_point: int) -> Tensor:
    kind = integer_type(q.dtype)
    return operators.DEQUANTIZE_PER_TENSOR(q, scale, zero_point, kind.minimum, kind.maximum, q.dtype)


def _quantize_per_channel(
    x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, dtype: torch.dtype, low: int, high: int
) -> Tensor:
    return operators.QUANTIZE_PER_CHANNEL(_float32(x), scale, zero_point, axis, low, high, dtype)


def _dequantize_per_channel(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int, high: int | None = None) -> Tensor:
    kind = integer_type(q.dtype)
    high = kind.maximum if high is None else high
    return operators.DEQUANTIZE_PER_CHANNEL(q, scale, zero_point, axis, kind.minimum, high, q.dtype)


def _real_weight(axis: int, weight: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    if scale.numel() != weight.shape[axis]:  # one for all; those of modules are spread before
        scale, zero_point = scale.expand(weight.shape[axis]), zero_point.expand(weight.shape[axis])
    return _dequantize_per_channel(weight, scale, zero_point, axis)


def _quantized_as_it_comes(x: Tensor, reduce_range: bool) -> Tensor:
    """``x`` rounded to 8 bits of its own range, and real again."""
    x, limits = _float32(x), (0, 127 if reduce_range else 255)
    scale, zero_point = operators.CHOOSE_QPARAMS_AFFINE(x, *limits, SMALLEST_TRAINING_SCALE, torch.uint8)
    q = operators.QUANTIZE_PER_TENSOR_DYNAMIC(x, scale, zero_point, *limits, torch.uint8)
    return operators.DEQUANTIZE_PER_TENSOR_DYNAMIC(q, scale, zero_point, *limits, torch.uint8)


def _conv(x: Tensor, weight: Tensor, *how: Any) -> Tensor:
    return _CONVOLUTIONS[x.dim()](x, weight, *how)


def _conv_transpose(x: Tensor, weight: Tensor, *how: Any) -> Tensor:
    *most, dilation, groups = how
    return _TRANSPOSED[x.dim()](x, weight, *most, groups, dilation)


def _weighted(name: str, operator: Callable[..., Tensor], axis: int = 0) -> dict[str, _Door]:
    """A layer with a weight, of an input quantized before or as it comes.

    Args:
        operator: of real input and weight, the bias, and how.
        axis: the weight's, with a scale for each index.
    """

    def static(x: Tensor, x_scale: float, x_zero_point: int, *rest: Any) -> Tensor:
        weight, (bias, *how), output = rest[:3], rest[3:-_OUTPUT], rest[-_OUTPUT:]
        y = operator(dequantize(x, x_scale, x_zero_point), _real_weight(axis, *weight), bias, *how)
        return quantize(y, *output)

    def dynamic(x: Tensor, *rest: Any) -> Tensor:
        weight, (bias, *how, reduce_range) = rest[:3], rest[3:]
        return operator(_quantized_as_it_comes(x, reduce_range), _real_weight(axis, *weight), bias, *how)

    return {name: static, f"{name}_dynamic": dynamic}


def _of_one(function: Callable[..., Tensor]) -> _Door:
    """One activation, then what the function takes besides."""

    def run(x: Tensor, x_scale: float, x_zero_point: int, *rest: Any) -> Tensor:
        return quantize(function(dequantize(x, x_scale, x_zero_point), *rest[:-_OUTPUT]), *rest[-_OUTPUT:])

    return run


def _of_two(function: Callable[[Tensor, Tensor], Tensor]) -> _Door:
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


def _elu(x: Tensor, alpha: float, input_scale: float) -> Tensor:
    return torch.ops.aten.elu.default(x, alpha, 1.0, input_scale)


_POINTWISE: dict[str, Callable[..., Tensor]] = {
    "elu": _elu,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "leaky_relu": F.leaky_relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "threshold": F.threshold,
}


def _between_steps(threshold: float, scale: float, zero_point: int) -> float:
    """What parts the integers as ``threshold`` does eagerly, whichever way the value of one on it is rounded."""
    if not math.isfinite(threshold):
        return threshold
    nearest = round(threshold / scale)
    value = single(single(scale) * (nearest + zero_point) - single(single(scale) * zero_point))
    return (nearest + (0.5 if value <= single(threshold) else -0.5)) * scale


def _pointwise(
    x: Tensor, function: str, arguments: Sequence[float], x_scale: float, x_zero_point: int, *output: Any
) -> Tensor:
    if function == "threshold":
        arguments = (_between_steps(arguments[0], x_scale, x_zero_point), arguments[1])
    return quantize(_POINTWISE[function](dequantize(x, x_scale, x_zero_point), *arguments), *output)


def _prelu(x: Tensor, *weight: Tensor) -> Tensor:
    return F.prelu(x, _real_weight(0, *weight))


def _batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    return F.batch_norm(x, mean, var, weight, bias, eps=eps)


def _layer_norm(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    return F.layer_norm(x, list(normalized_shape), weight, bias, eps)


def _add_scalar(x: Tensor, x_scale: float, x_zero_point: int, steps: int, *output: Any) -> Tensor:
    return quantize(dequantize(x, x_scale, x_zero_point) + steps * x_scale, *output)


def _real_table(weight: Tensor, scale: Tensor, zero_point: Tensor, columns: int | None) -> Tensor:
    if columns is None:
        return _dequantize_per_channel(weight, scale, zero_point, 0)
    if weight.shape[1] != columns:
        weight = kernels.unpack_halves(weight, columns)
    return _dequantize_per_channel(weight, scale, zero_point, 0, high=15)


def _embedding(
    indices: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor, columns: int | None = None
) -> Tensor:
    return F.embedding(indices, _real_table(weight, scale, zero_point, columns))


def _embedding_bag(
    indices: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    offsets: Tensor | None,
    mode: str,
    per_sample_weights: Tensor | None,
    include_last_offset: bool,
    padding_idx: int | None,
    columns: int | None = None,
) -> Tensor:
    if offsets is not None and offsets.dtype is not indices.dtype:
        offsets = offsets.to(indices.dtype)
    return F.embedding_bag(
        indices,
        _real_table(weight, scale, zero_point, columns),
        offsets,
        mode=mode,
        per_sample_weights=None if per_sample_weights is None else _float32(per_sample_weights),
        include_last_offset=include_last_offset,
        padding_idx=padding_idx,
    )


def _linear_dynamic_float16(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(_float32(x), weight.to(torch.float32), bias)


DOORS: dict[str, _Door] = {
    **_weighted("linear", F.linear),
    **_weighted("conv", _conv),
    **_weighted("conv_transpose", _conv_transpose, axis=1),
    "add": _of_two(torch.add),
    "add_scalar": _add_scalar,
    "batch_norm": _of_one(_batch_norm),
    "cat": _cat,
    "dequantize": dequantize,
    "dequantize_per_channel": _dequantize_per_channel,
    "embedding": _embedding,
    "embedding_bag": _embedding_bag,
    "group_norm": _of_one(F.group_norm),
    "layer_norm": _of_one(_layer_norm),
    "linear_dynamic_float16": _linear_dynamic_float16,
    "matmul": _of_two(torch.matmul),
    "mul": _of_two(torch.mul),
    "mul_scalar": _of_one(torch.mul),
    "pointwise": _pointwise,
    "prelu": _of_one(_prelu),
    "quantize": quantize,
    "quantize_per_channel": _quantize_per_channel,
    "requantize": quantize,
}
