"""Pooling and interpolation of quantized tensors; the parameters stay."""

from __future__ import annotations

import warnings
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from eagerq.nn.quantized.functional.inputs import quantized
from eagerq.qtensor import QTensor

__all__ = [
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "avg_pool2d",
    "avg_pool3d",
    "interpolate",
    "max_pool1d",
    "max_pool2d",
    "upsample",
    "upsample_bilinear",
    "upsample_nearest",
]


def avg_pool2d(
    input: QTensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Average over each window of ``[N, C, H, W]``, as :func:`torch.nn.functional.avg_pool2d`.

    Returns:
        QTensor with the parameters of ``input``: ``round(mean + zero_point)``.
    """
    x = quantized(input, "avg_pool2d")
    return F.avg_pool2d(x, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)


def avg_pool3d(
    input: QTensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """As :func:`avg_pool2d`, over ``[N, C, D, H, W]``."""
    x = quantized(input, "avg_pool3d")
    return F.avg_pool3d(x, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)


def adaptive_avg_pool2d(input: QTensor, output_size: Any) -> Tensor:
    """Average of ``[N, C, H, W]`` over as many windows as make ``output_size``; the parameters stay."""
    return F.adaptive_avg_pool2d(quantized(input, "adaptive_avg_pool2d"), output_size)


def adaptive_avg_pool3d(input: QTensor, output_size: Any) -> Tensor:
    """As :func:`adaptive_avg_pool2d`, over ``[N, C, D, H, W]``."""
    return F.adaptive_avg_pool3d(quantized(input, "adaptive_avg_pool3d"), output_size)


def max_pool1d(
    input: QTensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """Largest value in each window of ``[N, C, L]``; with ``return_indices`` also where it stood."""
    pool: Any = F.max_pool1d
    x = quantized(input, "max_pool1d")
    return pool(x, kernel_size, stride, padding, dilation, ceil_mode=ceil_mode, return_indices=return_indices)


def max_pool2d(
    input: QTensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """As :func:`max_pool1d`, over ``[N, C, H, W]``."""
    pool: Any = F.max_pool2d
    x = quantized(input, "max_pool2d")
    return pool(x, kernel_size, stride, padding, dilation, ceil_mode=ceil_mode, return_indices=return_indices)


def interpolate(
    input: QTensor, size: Any = None, scale_factor: Any = None, mode: str = "nearest", align_corners: bool | None = None
) -> Tensor:
    """Resize to ``size`` or by ``scale_factor``, as :func:`torch.nn.functional.interpolate`; the parameters stay."""
    return F.interpolate(quantized(input, "interpolate"), size, scale_factor, mode, align_corners)


def _deprecated(name: str) -> None:
    warnings.warn(f"eagerq.nn.quantized.functional.{name} is deprecated: use interpolate", stacklevel=3)


def upsample(
    input: QTensor, size: Any = None, scale_factor: Any = None, mode: str = "nearest", align_corners: bool | None = None
) -> Tensor:
    """:func:`interpolate`; deprecated."""
    _deprecated("upsample")
    return interpolate(input, size, scale_factor, mode, align_corners)


def upsample_bilinear(input: QTensor, size: Any = None, scale_factor: Any = None) -> Tensor:
    """:func:`interpolate` with ``mode="bilinear", align_corners=True``; deprecated."""
    _deprecated("upsample_bilinear")
    return interpolate(input, size, scale_factor, mode="bilinear", align_corners=True)


def upsample_nearest(input: QTensor, size: Any = None, scale_factor: Any = None) -> Tensor:
    """:func:`interpolate` with ``mode="nearest"``; deprecated."""
    _deprecated("upsample_nearest")
    return interpolate(input, size, scale_factor, mode="nearest")
