"""Look-ups in tables of integer rows, in C: exactly what :mod:`eagerq.kernels.embedding` gives."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from eagerq.native.library import LIBRARY, serves
from eagerq.native.recording import recorded

__all__ = ["embedding", "embedding_bag"]

_MODES = {"sum": 0, "mean": 1, "max": 2}
_NUMBERS = (torch.int64, torch.int32)


class _Table(ctypes.Structure):
    _fields_ = [
        ("bytes", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "pitch")),
        *((name, ctypes.c_void_p) for name in ("scale", "zero")),
        ("halves", ctypes.c_int),
    ]


class _Indices(ctypes.Structure):
    _fields_ = [("rows", ctypes.c_void_p), ("count", ctypes.c_int64), ("wide", ctypes.c_int)]


def _numbers(x: Tensor) -> bool:
    return x.dtype in _NUMBERS and x.is_contiguous() and serves(x)


def _table(weight: Tensor, scale: Tensor, zero_point: Tensor, columns: int | None) -> _Table | None:
    """None where C cannot read it."""
    rows, pitch = weight.shape
    for x in (weight, scale, zero_point):
        wanted = torch.uint8 if x is weight else torch.float32
        if x.dtype is not wanted or x.shape[0] != rows or not x.is_contiguous() or not serves(x):
            return None
    pointers = (weight.data_ptr(), rows, columns or pitch, pitch, scale.data_ptr(), zero_point.data_ptr())
    return _Table(*pointers, columns is not None)


def _factors(x: Tensor, indices: Tensor) -> bool:
    wanted = x.dtype is torch.float32 and x.shape == indices.shape and x.is_contiguous() and serves(x)
    return wanted and not (x.requires_grad and torch.is_grad_enabled())


def _indices(x: Tensor) -> _Indices:
    return _Indices(x.data_ptr(), x.numel(), x.dtype is torch.int64)


@recorded
def embedding(indices: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor, columns: int | None) -> Any:
    """As :func:`eagerq.kernels.embedding`; ``NotImplemented`` for what C cannot read, and rows out of range."""
    table = _table(weight, scale, zero_point, columns) if _numbers(indices) else None
    if table is None:
        return NotImplemented
    out = torch.empty((*indices.shape, table.columns), dtype=torch.float32)
    refused = LIBRARY.eagerq_embedding(ctypes.byref(table), ctypes.byref(_indices(indices)), out.data_ptr())
    return NotImplemented if refused else out


@recorded
def embedding_bag(
    indices: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    offsets: Tensor,
    mode: str,
    per_sample_weights: Tensor | None,
    include_last_offset: bool,
    padding_idx: int | None,
    columns: int | None,
) -> Any:
    """As :func:`eagerq.kernels.embedding_bag` of 1-d indices; ``NotImplemented`` as :func:`embedding`."""
    each = per_sample_weights
    table = _table(weight, scale, zero_point, columns)
    if (
        table is None
        or not (_numbers(indices) and _numbers(offsets))
        or not (each is None or (mode == "sum" and _factors(each, indices)))
        or len(offsets) <= include_last_offset
    ):
        return NotImplemented
    bags = len(offsets) - include_last_offset
    out = torch.empty((bags, table.columns), dtype=torch.float32)
    refused = LIBRARY.eagerq_embedding_bag(
        *(ctypes.byref(table), ctypes.byref(_indices(indices)), ctypes.byref(_indices(offsets)), bags),
        None if each is None else each.data_ptr(),
        -1 if padding_idx is None else padding_idx,
        _MODES[mode],
        out.data_ptr(),
    )
    return NotImplemented if refused else out
