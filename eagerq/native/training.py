"""Fake quantization while training, in C; numbers are exactly those of :mod:`eagerq.functional`."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eagerq.native.library import LIBRARY, Quantizer, address

__all__ = [
    "Passing",
    "Rounding",
    "Running",
    "fake_quantize",
    "masked",
    "masked_rows",
    "masked_rows_",
    "rectify_",
    "room_for_bits",
    "round_over",
    "sum_of",
    "unpacked",
]


class Running(NamedTuple):
    """A running range that is to take in what is rounded.

    Attributes:
        low, high: float32 ``[1]``, 0-d or ``[rows]``; updated.
        constant: how much a batch counts in the moving average.
        symmetric: whether the parameters that follow are.
    """

    low: Tensor
    high: Tensor
    constant: float
    symmetric: bool


class Rounding(NamedTuple):
    """What to round to.

    Attributes:
        scale: float32, one value or one for each row; updated where there is a running range.
        zero_point: int32, as many.
        quant_min, quant_max: the integers to use.
        rows: whether each index of axis 0 has parameters of its own.
        running: the range that the parameters are to follow, if they are.
    """

    scale: Tensor
    zero_point: Tensor
    quant_min: int
    quant_max: int
    rows: bool = False
    running: Running | None = None


class Passing:
    """Where a gradient passes: at what was above a ReLU and, once rounded, inside the range.

    Attributes:
        bits: one for each value; None while all pass.
        rows: how many rows of bits there are, each of which starts a byte.
        ends: the values' smallest and largest, if known: two C floats.
    """

    __slots__ = ("bits", "ends", "rows")

    def __init__(self, bits: Tensor | None, rows: int = 1, ends: Any = None) -> None:
        self.bits = bits
        self.rows = rows
        self.ends = ends


def room_for_bits(count: int, rows: int) -> Tensor:
    """Uninitialised bits for so many values, with rows that start a byte."""
    return torch.empty(rows * ((count // rows + 7) // 8), dtype=torch.uint8)


@lru_cache(maxsize=4096)  # C only reads it; what it points to may change
def _numbers(*numbers: Any) -> Quantizer:
    return Quantizer(*numbers)


def _quantizer(to: Rounding) -> Quantizer:
    if (running := to.running) is None:
        return _numbers(to.scale.data_ptr(), to.zero_point.data_ptr(), None, None, 0.0, to.quant_min, to.quant_max, 0)
    return _numbers(
        *(to.scale.data_ptr(), to.zero_point.data_ptr(), running.low.data_ptr(), running.high.data_ptr()),
        *(running.constant, to.quant_min, to.quant_max, running.symmetric),
    )


def _updated(to: Rounding) -> None:
    if to.running and not to.scale.is_inference():
        torch.autograd.graph.increment_version((to.scale, to.zero_point, to.running.low, to.running.high))


def _taps_of(weight: Tensor) -> int:
    """How many values a pair of channels has in a contiguous weight whose order in channels_last is another one."""
    turned = weight.dim() == 4 and weight.shape[1] > 1 and weight.is_contiguous()
    return weight.shape[2] * weight.shape[3] if turned else 1


def fake_quantize(
    x: Tensor, to: Rounding, factor: Tensor | None, mask: bool, last: bool = False
) -> tuple[Tensor, Tensor | None] | None:
    """Take ``x·factor`` into the running range, if there is one, and round it.

    Args:
        x: float32, dense.
        factor: float32, one for each index of axis 0; only with rows.
        mask: keep a bit for each value, whether it was inside the range; each row starts a byte.
        last: store the rounded values of a convolution's weight as channels_last; only with rows.

    Returns:
        The rounded values, like ``x``, and the bits; None, with nothing changed, for values that are not finite.
    """
    taps = _taps_of(x) if last else 1
    out = torch.empty_like(x, memory_format=torch.channels_last if taps > 1 else torch.preserve_format)
    count = x.numel()
    rows = len(x) if to.rows else 1
    width = count // rows
    inside = room_for_bits(count, rows) if mask else None
    quantizer = _quantizer(to)
    arguments = out.data_ptr(), address(inside)
    if to.rows:
        finite = LIBRARY.eagerq_fake_quantize_rows(
            x.data_ptr(), address(factor), *arguments, rows, width, taps, ctypes.byref(quantizer)
        )
    else:
        finite = LIBRARY.eagerq_fake_quantize(x.data_ptr(), *arguments, count, ctypes.byref(quantizer))
    if not finite:
        return None
    _updated(to)
    return out, inside


def round_over(x: Tensor, to: Rounding, passing: Passing, merge: bool = True) -> bool:
    """:func:`fake_quantize` with one scale in ``x``'s own memory; what was outside the range passes no more.

    Args:
        merge: into the bits that are there, if any; otherwise they are written over.

    Returns:
        False, with nothing changed, for values that are not finite.
    """
    bits = room_for_bits(x.numel(), passing.rows) if passing.bits is None else passing.bits
    width = x.numel() // passing.rows
    finite = LIBRARY.eagerq_round_over(
        *(x.data_ptr(), bits.data_ptr(), merge and passing.bits is not None, passing.rows, width, passing.ends),
        ctypes.byref(_quantizer(to)),
    )
    if finite:
        passing.bits, passing.ends = bits, None
        _updated(to)
        torch.autograd.graph.increment_version(x)
    return bool(finite)


def masked(grad: Tensor, inside: Tensor) -> Tensor:
    """``grad`` (float32, dense) where the bit of ``inside`` is set, else zero."""
    out = torch.empty_like(grad)
    LIBRARY.eagerq_masked(grad.data_ptr(), inside.data_ptr(), out.data_ptr(), grad.numel())
    return out


def masked_rows(
    grad: Tensor, inside: Tensor, x: Tensor | None, factor: Tensor | None, rows: int, over: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the rounded ``x·factor`` for ``x`` and ``factor``; all float32, dense, of one layout.

    Args:
        over: the memory of ``grad`` takes that for ``x``.
    """
    return _masked_rows(grad, inside, x, factor, rows, grad if over else torch.empty_like(grad), 1)


def masked_rows_(grad: Tensor, inside: Tensor, weight: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """As :func:`masked_rows`, in the memory of ``grad``: that may be channels_last, and gets the weight's order."""
    taps = 1 if grad.is_contiguous() else _taps_of(weight)
    out = grad.as_strided(weight.shape, weight.stride())
    return _masked_rows(grad, inside, weight, factor, len(weight), out, taps)


def _masked_rows(
    grad: Tensor, inside: Tensor, x: Tensor | None, factor: Tensor | None, rows: int, out: Tensor, taps: int
) -> tuple[Tensor, Tensor | None]:
    of_factor = None if factor is None else torch.empty_like(factor)
    done = LIBRARY.eagerq_masked_rows(
        *(grad.data_ptr(), inside.data_ptr(), address(x), address(factor), out.data_ptr(), address(of_factor)),
        *(rows, grad.numel() // rows, taps),
    )
    if not done:
        raise MemoryError("no memory to turn a weight's gradient")
    return out, of_factor


def rectify_(x: Tensor) -> Tensor:
    """Cut ``x`` (float32, dense) at zero, in place; the result has a bit for each value, whether it was above."""
    above = room_for_bits(x.numel(), 1)
    LIBRARY.eagerq_rectify(x.data_ptr(), above.data_ptr(), x.numel())
    return above


def sum_of(a: Tensor, b: Tensor, relu: bool, mask: bool) -> tuple[Tensor, Passing]:
    """``a + b`` (float32, dense, of one layout), perhaps cut at zero; the mask tells where a ReLU let pass."""
    out = torch.empty_like(a)
    passing = Passing(room_for_bits(a.numel(), 1) if relu and mask else None, 1, (ctypes.c_float * 2)())
    addresses = a.data_ptr(), b.data_ptr(), out.data_ptr(), address(passing.bits)
    LIBRARY.eagerq_sum(*addresses, relu, a.numel(), passing.ends)
    return out, passing


def unpacked(bits: Tensor, like: Tensor) -> Tensor:
    """The bits of values in memory order as a bool tensor of the values' shape and layout."""
    flags = torch.empty_like(like, dtype=torch.bool)
    LIBRARY.eagerq_unpack(bits.data_ptr(), flags.data_ptr(), like.numel())
    return flags
