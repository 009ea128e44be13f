"""Fake quantization while training, in C; numbers are exactly those of :mod:`eagerq.functional`."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from eagerq.native.library import LIBRARY, Quantizer

__all__ = ["Rounding", "Running", "fake_quantize", "masked", "masked_rows", "rectify_", "unpacked"]


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


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def fake_quantize(x: Tensor, to: Rounding, factor: Tensor | None, mask: bool) -> tuple[Tensor, Tensor | None] | None:
    """Take ``x·factor`` into the running range, if there is one, and round it.

    Args:
        x: float32, dense.
        factor: float32, one for each index of axis 0; only with rows.
        mask: keep a bit for each value, whether it was inside the range; each row starts a byte.

    Returns:
        The rounded values, like ``x``, and the bits; None, with nothing changed, for values that are not finite.
    """
    out = torch.empty_like(x)
    count = x.numel()
    rows = len(x) if to.rows else 1
    width = count // rows
    inside = torch.empty(rows * ((width + 7) // 8), dtype=torch.uint8) if mask else None
    low, high, constant, symmetric = to.running or (None, None, 0.0, False)
    quantizer = Quantizer(
        *(to.scale.data_ptr(), to.zero_point.data_ptr(), _address(low), _address(high)),
        *(constant, to.quant_min, to.quant_max, symmetric),
    )
    arguments = out.data_ptr(), _address(inside)
    if to.rows:
        finite = LIBRARY.eagerq_fake_quantize_rows(
            x.data_ptr(), _address(factor), *arguments, rows, width, ctypes.byref(quantizer)
        )
    else:
        finite = LIBRARY.eagerq_fake_quantize(x.data_ptr(), *arguments, count, ctypes.byref(quantizer))
    if not finite:
        return None
    if to.running and not to.scale.is_inference():
        torch.autograd.graph.increment_version((to.scale, to.zero_point, to.running.low, to.running.high))
    return out, inside


def masked(grad: Tensor, inside: Tensor) -> Tensor:
    """``grad`` (float32, dense) where the bit of ``inside`` is set, else zero."""
    out = torch.empty_like(grad)
    LIBRARY.eagerq_masked(grad.data_ptr(), inside.data_ptr(), out.data_ptr(), grad.numel())
    return out


def masked_rows(
    grad: Tensor, inside: Tensor, x: Tensor | None, factor: Tensor | None, rows: int
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the rounded ``x·factor`` for ``x`` and ``factor``; all float32, dense, of one layout."""
    out = torch.empty_like(grad)
    of_factor = None if factor is None else torch.empty_like(factor)
    LIBRARY.eagerq_masked_rows(
        *(grad.data_ptr(), inside.data_ptr(), _address(x), _address(factor), out.data_ptr(), _address(of_factor)),
        *(rows, grad.numel() // rows),
    )
    return out, of_factor


def rectify_(x: Tensor) -> Tensor:
    """Cut ``x`` (float32, dense) at zero, in place; the result has a bit for each value, whether it was above."""
    above = torch.empty((x.numel() + 7) // 8, dtype=torch.uint8)
    LIBRARY.eagerq_rectify(x.data_ptr(), above.data_ptr(), x.numel())
    return above


def unpacked(bits: Tensor, like: Tensor) -> Tensor:
    """The bits of values in memory order as a bool tensor of the values' shape and layout."""
    flags = torch.empty_like(like, dtype=torch.bool)
    LIBRARY.eagerq_unpack(bits.data_ptr(), flags.data_ptr(), like.numel())
    return flags
