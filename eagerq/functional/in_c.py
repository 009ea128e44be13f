"""What training does value by value, in the C library: fewer passes, and a bit kept where torch keeps a value.

Each function says None where the library is not there or does not take the tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eagerq import native
from eagerq.functional.qparams import channel_shape
from eagerq.functional.rebuilding import Recipe
from eagerq.native import Rounding, Running

__all__ = ["Rounding", "Running", "bit_flags", "in_order", "relu_", "round_in_c"]


def in_order(grad: Tensor, strides: tuple[int, ...]) -> Tensor:
    """``grad`` with its values in memory in this order."""
    each = zip(grad.shape, grad.stride(), strides, strict=True)
    if all(length == 1 or one == other for length, one, other in each) and native.serves(grad):
        return grad
    return torch.empty_strided(grad.shape, strides, dtype=grad.dtype).copy_(grad)


def bit_flags(inside: Tensor, like: Tensor, rows: int) -> Tensor:
    """The bits as numbers 0 and 1, one for each value; a row begins with a byte."""
    bits = (inside.reshape(rows, -1, 1) >> torch.arange(8, dtype=torch.uint8)) & 1
    flat = bits.reshape(rows, -1)[:, : like.numel() // rows].reshape(-1)
    return flat.as_strided(like.shape, like.stride()).to(like.dtype)


class _Rounded(torch.autograd.Function):
    """Round ``x·factor``; straight-through gradients inside the range."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor | None, to: Rounding, graded: bool) -> Tensor | None:
        result = native.fake_quantize(x, to, factor, mask=graded)
        if result is None:
            return None
        out, inside = result
        ctx.rows, ctx.strides = len(x) if to.rows else 1, x.stride()
        ctx.save_for_backward(inside, factor, None if factor is None else x)
        ctx.recipe = Recipe.of(x, factor, to) if to.rows and graded else None
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        inside, factor, x = ctx.saved_tensors
        grad = in_order(grads[0], ctx.strides)
        if torch.is_grad_enabled():  # to be differentiated again
            kept = grad * bit_flags(inside, grad, ctx.rows)
            if factor is None:
                return kept, None, None, None
            return kept * factor.reshape(channel_shape(kept.dim(), 0)), (kept * x).flatten(1).sum(1), None, None
        if ctx.rows == 1 and factor is None:
            return native.masked(grad, inside), None, None, None
        return *native.masked_rows(grad, inside, x, factor, ctx.rows), None, None


def round_in_c(x: Tensor, to: Rounding, factor: Tensor | None = None) -> Tensor | None:
    """Take ``x·factor`` into a running range, if ``to`` has one, and round it to the parameters there.

    Args:
        x: float tensor of any shape.
        to: parameters and, perhaps, a running range; both updated in place.
        factor: one for each index of axis 0, where each has parameters of its own.

    Returns:
        Tensor like ``x``; None, with nothing changed, where C does not serve: other dtypes, devices, layouts or
        numbers of parameters, code that is being compiled, values that are not finite.
    """
    if not (x.dtype is torch.float32 and x.numel() and native.serves(x)) or (to.rows and not x.dim()):
        return None
    count = len(x) if to.rows else 1
    numbers = [to.scale] if to.running is None else [to.scale, to.running.low, to.running.high]
    if to.zero_point.dtype is not torch.int32 or to.zero_point.numel() != count:
        return None
    for one in numbers if factor is None else [*numbers, factor]:
        if one.dtype is not torch.float32 or one.numel() != count or one.device.type != "cpu":
            return None
        if not one.is_contiguous():
            return None
    graded = torch.is_grad_enabled() and (x.requires_grad or (factor is not None and factor.requires_grad))
    rounded: Tensor | None = _Rounded.apply(x, factor, to, graded)
    return rounded


class _Rectified(torch.autograd.Function):
    """ReLU in place, keeping a bit for each value."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.strides = y.stride()
        ctx.save_for_backward(native.rectify_(y))
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        (above,) = ctx.saved_tensors
        grad = in_order(grads[0], ctx.strides)
        if torch.is_grad_enabled():
            return grad * bit_flags(above, grad, 1)
        return native.masked(grad, above)


def relu_(y: Tensor) -> Tensor | None:
    """ReLU of what nobody else looks at, in place; None, with nothing changed, where C does not serve."""
    if not (y.dtype is torch.float32 and native.serves(y)) or (y.is_leaf and y.requires_grad) or y._is_view():
        return None
    rectified: Tensor = _Rectified.apply(y)
    return rectified
