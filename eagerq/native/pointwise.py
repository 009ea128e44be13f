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

__all__ = ["add", "dequantize", "max_pool", "quantize", "spatial_mean"]

_BYTES = (torch.uint8, torch.int8)


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
    if not (a.shape == b.shape and a.stride() == b.stride() and {a.dtype, b.dtype, dtype} <= {*_BYTES} and serves(a)):
        return NotImplemented
    numbers = Pair(
        *(a.dtype is torch.int8, b.dtype is torch.int8),
        *(a_scale, -_product(a_scale, a_zero_point), b_scale, -_product(b_scale, b_zero_point)),
        *(_inverse(scale), zero_point, low, high),
    )
    result = partial(torch.empty_like, a, dtype=dtype)
    return Bound((a, b), LIBRARY.eagerq_add, (a.numel(), ctypes.byref(numbers)), result)


def _single(value: float) -> float:
    return ctypes.c_float(value).value


def _product(scale: float, zero_point: int) -> float:
    return _single(_single(scale) * zero_point)


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
