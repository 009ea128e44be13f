"""What stands between the products of an int8 network, in C; each gives exactly what the plain formulas give."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from eagerq.native.library import LIBRARY, dense, serves
from eagerq.native.recording import Bound, bound, recorded

__all__ = ["layer_norm", "look_up", "quantize_dynamic"]

_BYTES = (torch.uint8, torch.int8)


class _Norm(ctypes.Structure):
    _fields_ = [
        ("count", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("weight", "bias")),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_float) for name in ("x_scale", "x_zero", "factor", "zero", "low", "high")),
        ("x_signed", ctypes.c_int),
    ]


@bound
def _look_up(x: Tensor, table: Tensor) -> Any:
    if x.dtype not in _BYTES or not serves(x):
        return NotImplemented
    result = partial(torch.empty_like, x, dtype=table.dtype)
    return Bound((x,), LIBRARY.eagerq_look_up, (table.data_ptr(), x.numel()), result, kept=table)


def look_up(x: Tensor, table: Tensor) -> Any:
    """``table[x]`` byte for byte, both without a sign; it lies in memory as ``x`` does, but for gaps."""
    return _look_up(x if dense(x) else x.clone(), table)


look_up.unrecorded = _look_up.unrecorded  # type: ignore[attr-defined]  # a tape hears of what it does


@recorded
def quantize_dynamic(x: Tensor, quant_max: int) -> tuple[Tensor, float, int] | None:
    """``x`` (float32) as integers from 0 to ``quant_max`` by its own range, with scale and zero point.

    None for what C cannot read, and where a value is not finite.
    """
    if x.dtype is not torch.float32 or not serves(x):
        return None
    out = torch.empty_like(x, dtype=torch.uint8)
    scale, zero_point = ctypes.c_float(), ctypes.c_int()
    refused = LIBRARY.eagerq_quantize_dynamic(
        *(x.data_ptr(), out.data_ptr(), x.numel(), quant_max, ctypes.byref(scale), ctypes.byref(zero_point))
    )
    return None if refused else (out, scale.value, zero_point.value)


def _readable(x: Tensor | None) -> bool:
    return x is None or (x.dtype is torch.float32 and x.is_contiguous() and serves(x))


@recorded
def layer_norm(
    x: Tensor,
    x_scale: float,
    x_zero_point: int,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: float,
    zero_point: int,
    dtype: torch.dtype,
    low: int,
    high: int,
) -> Any:
    """As :func:`eagerq.kernels.layer_norm`."""
    count = torch.Size(normalized_shape).numel()
    readable = x.dtype in _BYTES and x.is_contiguous() and serves(x) and _readable(weight) and _readable(bias)
    if not readable or dtype not in _BYTES or x.numel() == 0:
        return NotImplemented
    out = torch.empty_like(x, dtype=dtype)
    pointers = (None if each is None else each.data_ptr() for each in (weight, bias))
    factor = ctypes.c_float(1.0 / ctypes.c_float(scale).value)
    numbers = _Norm(count, *pointers, eps, x_scale, x_zero_point, factor, zero_point, low, high, x.dtype is torch.int8)
    LIBRARY.eagerq_layer_norm(x.data_ptr(), out.data_ptr(), x.numel() // count, ctypes.byref(numbers))
    return out
