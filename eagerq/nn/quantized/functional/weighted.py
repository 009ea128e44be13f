"""Convolutions and linear maps of quantized tensors, with a weight that is given each time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.utils import _ntuple

from eagerq import kernels
from eagerq.errors import InvalidArgumentError, UnsupportedError
from eagerq.nn.quantized.functional.inputs import quantized
from eagerq.qtensor import QTensor
from eagerq.scheme import integer_type

__all__ = ["conv1d", "conv2d", "conv3d", "linear"]

_SHAPES = {1: "(N, C, L)", 2: "(N, C, H, W)", 3: "(N, C, D, H, W)"}


def _weight(weight: Any, name: str, features: int, groups: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Integers, scales and zero points (1-d) of a weight for an input of so many features."""
    if not isinstance(weight, QTensor) or weight.integers.dtype is not torch.int8:
        got = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise UnsupportedError(
            f"'quantized.{name}' got a weight of {got}",
            remedy="quantize it with dtype=torch.int8, per tensor or per channel",
        )
    if weight.axis not in (None, 0):
        raise InvalidArgumentError(
            f"'quantized.{name}' got a weight with a scale for each index of axis {weight.axis}",
            remedy="quantize it along axis 0",
        )
    if weight.shape[1] * groups != features:
        raise InvalidArgumentError(
            f"'quantized.{name}' got {features} input features, and a weight of shape {tuple(weight.shape)} "
            f"for {weight.shape[1] * groups}"
        )
    device = weight.integers.device
    scale = torch.as_tensor(weight.scale, dtype=torch.float32, device=device).reshape(-1)
    return weight.integers, scale, torch.as_tensor(weight.zero_point, device=device).to(torch.int32).reshape(-1)


def _conv(
    dim: int,
    input: Any,
    weight: Any,
    bias: Tensor | None,
    how: Sequence[Any],
    groups: int,
    padding_mode: str,
    scale: float,
    zero_point: int,
    dtype: Any,
) -> QTensor:
    name = f"conv{dim}d"
    if padding_mode != "zeros":
        raise UnsupportedError(
            f"Only zero-padding is supported! 'quantized.{name}' got {padding_mode!r}",
            remedy=f"use eagerq.nn.quantized.Conv{dim}d, or pad the input before",
        )
    x, each = quantized(input, name), _ntuple(dim)
    if x.dim() != dim + 2:
        raise InvalidArgumentError(f"Input shape must be `{_SHAPES[dim]}`! 'quantized.{name}' got {tuple(x.shape)}")
    packed = _weight(weight, name, x.shape[1], groups)
    stride, padding, dilation = (list(each(value)) for value in how)
    kind, scale, zero_point = integer_type(dtype), float(scale), int(zero_point)
    integers = kernels.conv(
        *(x.integers, x.scale, x.zero_point),
        *(*packed, bias),
        *(stride, padding, dilation, groups),
        *(scale, zero_point, kind.storage, kind.minimum, kind.maximum),
    )
    return QTensor(integers, scale, zero_point)


def conv1d(
    input: QTensor,
    weight: QTensor,
    bias: Tensor | None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    scale: float = 1.0,
    zero_point: int = 0,
    dtype: Any = torch.uint8,
) -> QTensor:
    """Convolution of integers; the modules (:class:`eagerq.nn.quantized.Conv1d` …) keep what they prepare.

    Args:
        input: QTensor ``[N, in_channels, L]``.
        weight: QTensor of int8 ``[out_channels, in_channels / groups, K]``, per tensor or with ``axis=0``.
        bias: float32 ``[out_channels]``, or None.
        stride, padding, dilation, groups: as for :func:`torch.nn.functional.conv1d`; padding means 0.0.
        padding_mode: ``"zeros"``.
        scale, zero_point, dtype: parameters and integer dtype of the result.

    Returns:
        QTensor ``[N, out_channels, …]``.

    Raises:
        NotQuantizedError: when ``input`` is a float tensor.
        InvalidArgumentError: when it has another number of axes.
        UnsupportedError: for another padding mode, or a weight that is not int8.
    """
    return _conv(1, input, weight, bias, (stride, padding, dilation), groups, padding_mode, scale, zero_point, dtype)


def conv2d(
    input: QTensor,
    weight: QTensor,
    bias: Tensor | None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    scale: float = 1.0,
    zero_point: int = 0,
    dtype: Any = torch.uint8,
) -> QTensor:
    """As :func:`conv1d`, of ``[N, in_channels, H, W]``."""
    return _conv(2, input, weight, bias, (stride, padding, dilation), groups, padding_mode, scale, zero_point, dtype)


def conv3d(
    input: QTensor,
    weight: QTensor,
    bias: Tensor | None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    scale: float = 1.0,
    zero_point: int = 0,
    dtype: Any = torch.uint8,
) -> QTensor:
    """As :func:`conv1d`, of ``[N, in_channels, D, H, W]``."""
    return _conv(3, input, weight, bias, (stride, padding, dilation), groups, padding_mode, scale, zero_point, dtype)


def linear(
    input: QTensor,
    weight: QTensor,
    bias: Tensor | None = None,
    scale: float | None = None,
    zero_point: int | None = None,
) -> QTensor:
    """``x Wᵀ + b`` on integers.

    Args:
        input: QTensor ``[…, in_features]``.
        weight: QTensor of int8 ``[out_features, in_features]``, per tensor or with ``axis=0``.
        bias: float32 ``[out_features]``, or None.
        scale, zero_point: parameters of the result; those of ``input`` where None.

    Returns:
        QTensor ``[…, out_features]`` of ``input``'s dtype.

    Example:
        >>> import eagerq
        >>> x = eagerq.quantize_per_tensor(torch.tensor([[1.0, 2.0]]), 0.5, 10, torch.uint8)
        >>> w = eagerq.quantize_per_tensor(torch.tensor([[1.0, -1.0]]), 0.5, 0, torch.int8)
        >>> linear(x, w, torch.tensor([3.0])).dequantize()
        tensor([[2.]])
    """
    x = quantized(input, "linear")
    kind = integer_type(x.integers.dtype)
    scale = x.scale if scale is None else float(scale)
    zero_point = x.zero_point if zero_point is None else int(zero_point)
    output = (scale, zero_point, kind.storage, kind.minimum, kind.maximum)
    integers = kernels.linear(x.integers, x.scale, x.zero_point, *_weight(weight, "linear", x.shape[-1]), bias, *output)
    return QTensor(integers, scale, zero_point)
