"""The C library's functions on tensors; each gives exactly what the plain formulas give."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from eagerq.native.library import LIBRARY, Pair, serves
from eagerq.native.recording import Bound, bound

__all__ = ["add", "dequantize", "max_pool", "mul", "product_numbers", "quantize", "spatial_mean", "sum_numbers"]

_BYTES = (torch.uint8, torch.int8)


_Operands = tuple[tuple[torch.dtype, float, int], tuple[torch.dtype, float, int]]


def sum_numbers(operands: _Operands, scale: float, zero_point: int, low: int, high: int) -> Pair:
    """What a sum is made with; operands by dtype, scale and zero point."""
    (a_type, a_scale, a_zero), (b_type, b_scale, b_zero) = operands
    return Pair(
        *(a_type is torch.int8, b_type is torch.int8),
        *(a_scale, -_product(a_scale, a_zero), b_scale, -_product(b_scale, b_zero)),
        *(_inverse(scale), zero_point, low, high),
    )


def product_numbers(operands: _Operands, scale: float, zero_point: int, low: int, high: int) -> Pair:
    """What a product is made with, as :func:`sum_numbers`."""
    (a_type, a_scale, a_zero), (b_type, b_scale, b_zero) = operands
    factor = _single(_product(a_scale, _single(b_scale)) * _inverse(scale))
    return Pair(
        *(a_type is torch.int8, b_type is torch.int8, 0, -a_zero, 0, -b_zero),
        *(factor, zero_point, low, high),
    )


@bound
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
    if not (a.shape == b.shape and a.stride() == b.stride() and _are_bytes(a, b, dtype) and serves(a)):
        return NotImplemented
    operands = (a.dtype, a_scale, a_zero_point), (b.dtype, b_scale, b_zero_point)
    numbers = sum_numbers(operands, scale, zero_point, low, high)
    result = partial(torch.empty_like, a, dtype=dtype)
    return Bound((a, b), LIBRARY.eagerq_add, (a.numel(), ctypes.byref(numbers)), result)


@bound
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
) -> Any:
    """As :func:`eagerq.kernels.mul`, of two tensors of one shape and layout, or images and a value for each channel."""
    if not _are_bytes(a, b, dtype) or not serves(a) or not serves(b):
        return NotImplemented
    if a.numel() < b.numel():
        (a, a_scale, a_zero_point), (b, b_scale, b_zero_point) = (b, b_scale, b_zero_point), (a, a_scale, a_zero_point)
    sizes = _rows(a, b)
    if sizes is None:
        return NotImplemented
    operands = (a.dtype, a_scale, a_zero_point), (b.dtype, b_scale, b_zero_point)
    numbers = product_numbers(operands, scale, zero_point, low, high)
    result = partial(torch.empty_like, a, dtype=dtype)
    return Bound((a, b), LIBRARY.eagerq_mul, (*sizes, ctypes.byref(numbers)), result)


def _are_bytes(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    return {a.dtype, b.dtype, dtype} <= {*_BYTES}


def _rows(a: Tensor, b: Tensor) -> tuple[int, int, int] | None:
    """Parts, rows of ``a`` in each, and how long a row is: all rows of a part meet the same one of ``b``."""
    if a.shape == b.shape and a.stride() == b.stride():
        return 1, 1, a.numel()
    per_channel = a.dim() == 4 and b.shape == (*a.shape[:2], 1, 1)
    if not (per_channel and a.is_contiguous(memory_format=torch.channels_last)):
        return None
    batch, channels, height, width = a.shape
    return batch, height * width, channels


def _single(value: float) -> float:
    return ctypes.c_float(value).value


def _product(scale: float, by: float) -> float:
    return _single(_single(scale) * by)


def _inverse(scale: float) -> float:
    return _single(1.0 / _single(scale))


@bound
def quantize(x: Tensor, scale: float, zero_point: int, dtype: torch.dtype, low: int, high: int) -> Any:
    """As :func:`eagerq.kernels.quantize`."""
    if x.dtype is not torch.float32 or dtype not in _BYTES or not serves(x):
        return NotImplemented
    rest = (x.numel(), _inverse(scale), zero_point, low, high)
    return Bound((x,), LIBRARY.eagerq_quantize, rest, partial(torch.empty_like, x, dtype=dtype))


@bound
def dequantize(q: Tensor, scale: float, zero_point: int) -> Any:
    """As :func:`eagerq.kernels.dequantize`."""
    if q.dtype not in _BYTES or not serves(q):
        return NotImplemented
    rest = (q.numel(), zero_point, scale, q.dtype is torch.int8)
    return Bound((q,), LIBRARY.eagerq_dequantize, rest, partial(torch.empty_like, q, dtype=torch.float32))


def _channels_last(x: Tensor, size: Sequence[int]) -> Callable[[], Tensor]:
    return partial(torch.empty, (*x.shape[:2], *size), dtype=x.dtype, memory_format=torch.channels_last)


@bound
def max_pool(
    x: Tensor,
    taps: Sequence[int],
    strides: Sequence[int],
    pads: Sequence[int],
    steps: Sequence[int],
    size: Sequence[int],
) -> Bound:
    """Largest integer of each window of ``[N, C, H, W]`` with channels last in memory; ``size`` of the result."""
    window = (ctypes.c_int64 * 8)(*taps, *strides, *pads, *steps)
    batch, channels, height, width = x.shape
    rest = (batch, height, width, channels, *size, window, x.dtype is torch.int8)
    return Bound((x,), LIBRARY.eagerq_max_pool, rest, _channels_last(x, size))


@bound
def spatial_mean(x: Tensor, zero_point: int, low: int, high: int) -> Bound:
    """Averages of ``[N, C, H, W]`` with channels last in memory, ``[N, C, 1, 1]``, rounded to its own integers."""
    batch, channels, height, width = x.shape
    rest = (batch, height * width, channels, zero_point, low, high, x.dtype is torch.int8)
    return Bound((x,), LIBRARY.eagerq_mean, rest, _channels_last(x, (1, 1)))
