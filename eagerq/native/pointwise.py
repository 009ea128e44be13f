"""The C library's functions on tensors; each gives exactly what the plain formulas give."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eagerq.native.library import LIBRARY, Pair, serves
from eagerq.native.recording import recorded

__all__ = ["add", "max_pool", "quantize", "spatial_mean"]

_BYTES = (torch.uint8, torch.int8)


def _add_binding(
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
) -> tuple[Any, ...]:
    numbers = Pair(
        *(a.dtype is torch.int8, b.dtype is torch.int8),
        *(a_scale, -_product(a_scale, a_zero_point), b_scale, -_product(b_scale, b_zero_point)),
        *(_inverse(scale), zero_point, low, high),
    )
    return (a, b), LIBRARY.eagerq_add, (a.numel(), ctypes.byref(numbers))


@recorded(_add_binding)
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
) -> Any:
    """As :func:`eagerq.kernels.add`, of two tensors of one shape and layout."""
    if not (a.shape == b.shape and a.stride() == b.stride() and {a.dtype, b.dtype, dtype} <= {*_BYTES} and serves(a)):
        return NotImplemented
    out = torch.empty_like(a, dtype=dtype)
    numbers = (a, a_scale, a_zero_point, b, b_scale, b_zero_point, scale, zero_point, dtype, low, high)
    _, call, rest = _add_binding(*numbers)
    call(a.data_ptr(), b.data_ptr(), out.data_ptr(), *rest)
    return out


def _single(value: float) -> float:
    return ctypes.c_float(value).value


def _product(scale: float, zero_point: int) -> float:
    return _single(_single(scale) * zero_point)


def _inverse(scale: float) -> float:
    return _single(1.0 / _single(scale))


def _quantize_binding(
    x: Tensor, scale: float, zero_point: int, dtype: torch.dtype, low: int, high: int
) -> tuple[Any, ...]:
    return (x,), LIBRARY.eagerq_quantize, (x.numel(), _inverse(scale), zero_point, low, high)


@recorded(_quantize_binding)
def quantize(x: Tensor, scale: float, zero_point: int, dtype: torch.dtype, low: int, high: int) -> Any:
    """As :func:`eagerq.kernels.quantize`."""
    if x.dtype is not torch.float32 or dtype not in _BYTES or not serves(x):
        return NotImplemented
    out = torch.empty_like(x, dtype=dtype)
    _, call, rest = _quantize_binding(x, scale, zero_point, dtype, low, high)
    call(x.data_ptr(), out.data_ptr(), *rest)
    return out


def _pool_binding(x: Tensor, *how: Sequence[int]) -> tuple[Any, ...]:
    *window, size = how
    each = (ctypes.c_int64 * 8)(*(number for numbers in window for number in numbers))
    batch, channels, height, width = x.shape
    rest = (batch, height, width, channels, *size, each, x.dtype is torch.int8)
    return (x,), LIBRARY.eagerq_max_pool, rest


@recorded(_pool_binding)
def max_pool(
    x: Tensor,
    taps: Sequence[int],
    strides: Sequence[int],
    pads: Sequence[int],
    steps: Sequence[int],
    size: Sequence[int],
) -> Tensor:
    """Largest integer of each window of ``[N, C, H, W]`` with channels last in memory; ``size`` of the result."""
    out = torch.empty((*x.shape[:2], *size), dtype=x.dtype, memory_format=torch.channels_last)
    _, call, rest = _pool_binding(x, taps, strides, pads, steps, size)
    call(x.data_ptr(), out.data_ptr(), *rest)
    return out


def _mean_binding(x: Tensor, zero_point: int, low: int, high: int) -> tuple[Any, ...]:
    batch, channels, height, width = x.shape
    rest = (batch, height * width, channels, zero_point, low, high, x.dtype is torch.int8)
    return (x,), LIBRARY.eagerq_mean, rest


@recorded(_mean_binding)
def spatial_mean(x: Tensor, zero_point: int, low: int, high: int) -> Tensor:
    """Averages of ``[N, C, H, W]`` with channels last in memory, ``[N, C, 1, 1]``, rounded to its own integers."""
    out = torch.empty((*x.shape[:2], 1, 1), dtype=x.dtype, memory_format=torch.channels_last)
    _, call, rest = _mean_binding(x, zero_point, low, high)
    call(x.data_ptr(), out.data_ptr(), *rest)
    return out
