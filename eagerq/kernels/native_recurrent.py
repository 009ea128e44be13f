"""LSTM and GRU through time with the help of C, where the steps of plain torch cost more than the work."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eagerq import native
from eagerq.kernels.dispatch import dialect
from eagerq.kernels.native_linear import packed_dynamic, serves

__all__ = ["recur"]


def _plain(x: Tensor) -> bool:
    """Whether C can go through ``x`` value by value, and no gradient flows through it."""
    free = not (x.requires_grad and torch.is_grad_enabled())
    return free and x.dtype is torch.float32 and x.is_contiguous() and native.serves(x)


def recur(
    x: Tensor,
    sizes: Sequence[int],
    start: Sequence[Tensor],
    weight: Tensor,
    weight_scale: Tensor | None,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    reduce_range: bool,
    reverse: bool,
) -> tuple[Tensor, tuple[Tensor, ...]] | None:
    """An LSTM (of two states) or GRU (of one) through time, with few words per step; None where that cannot be.

    Args:
        x: the input's part of all gates, float32 ``[rows of all steps, gates·hidden]``.
        sizes: how many rows each step has, the most at first.
        start: hidden and, for LSTM, cell state before, float32 ``[rows of the first step, hidden]``.
        weight, weight_scale, weight_zero_point, bias: recurrent ones, as of :data:`eagerq.kernels.linear_dynamic`; not
            served without scale and zero point, as a float32 weight is.
        reduce_range: as there.
        reverse: from the last step to the first.

    Returns:
        All outputs, one below the other, and the state after.
    """
    if torch.compiler.is_compiling() or dialect() is not None or not all(map(_plain, (x, *start))):
        return None
    if weight_scale is None or weight_zero_point is None:  # torch's product rounds otherwise in memory laid out ahead
        return None
    if not serves(sizes[0], start[0].shape[1], weight, weight_scale) or not native.conv_ready():
        return None
    packed = packed_dynamic(weight, weight_scale, weight_zero_point, bias)
    return native.recur(x, sizes, start, packed, 127 if reduce_range else 255, reverse)
