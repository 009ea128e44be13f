"""What training does value by value, in the C library: fewer passes, and a bit kept where torch keeps a value.

Each function says None where the library is not there or does not take the tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eagerq import native
from eagerq.functional.qparams import channel_shape
from eagerq.functional.rebuilding import Recipe, is_alone
from eagerq.native import Passing, Rounding, Running

__all__ = [
    "Rounding",
    "Running",
    "bit_flags",
    "in_order",
    "keep",
    "kept",
    "relu_",
    "round_in_c",
    "round_over",
    "serves_rounding",
    "sum_in_c",
    "unmoved",
    "worth_rebuilding",
]

# values of a weight, below which a rounded copy kept costs less than what it takes to make it again
_WORTH_REBUILDING = 1 << 16


def worth_rebuilding(weight: Tensor) -> bool:
    """Whether the backward pass had better round a weight once more than have the rounded one kept."""
    return weight.numel() >= _WORTH_REBUILDING


def unmoved(*saved: Tensor) -> None:
    """Raise where a parameter that was saved is not what C can read any more.

    Raises:
        RuntimeError: when it has another dtype or device by now.
    """
    for one in saved:
        if one.dtype is not torch.float32 or not native.serves(one):
            raise RuntimeError(
                f"a variable needed for gradient computation is {one.dtype} on {one.device} by now, and was "
                "torch.float32 on the CPU in the forward pass: convert or move a model before that, or after backward"
            )


def in_order(grad: Tensor, strides: tuple[int, ...]) -> Tensor:
    """``grad`` with its values in memory in this order."""
    found = grad.stride()
    if found != strides:  # those of a length of one do not count
        each = zip(grad.shape, found, strides, strict=True)
        found = strides if all(length == 1 or one == other for length, one, other in each) else found
    if found == strides and native.serves(grad):
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
        ctx.recipe = Recipe.of(x, factor, to) if to.rows and graded and worth_rebuilding(x) else None
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
    if not serves_rounding(x, to, factor):
        return None
    graded = torch.is_grad_enabled() and (x.requires_grad or (factor is not None and factor.requires_grad))
    rounded: Tensor | None = _Rounded.apply(x, factor, to, graded)
    return rounded


def round_over(x: Tensor, to: Rounding) -> Tensor | None:
    """:func:`round_in_c` in ``x``'s own memory, if ``x`` is a result of this package that nobody else looks at.

    The gradient passes where the value was inside the range and where that result's own let it pass.

    Returns:
        ``x`` itself; None, with nothing changed, where that cannot be.
    """
    passing: Passing | None = getattr(x.grad_fn, "passing", None)
    if passing is None or to.rows or not torch.is_grad_enabled() or not serves_rounding(x, to, None):
        return None
    return x if native.round_over(x, to, passing) else None


def serves_rounding(x: Tensor, to: Rounding, factor: Tensor | None) -> bool:
    """Whether C rounds ``x``, or ``x·factor``, to these."""
    if not (x.dtype is torch.float32 and x.numel() and native.serves(x)) or (to.rows and not x.dim()):
        return False
    count = len(x) if to.rows else 1
    if to.zero_point.dtype is not torch.int32 or to.zero_point.numel() != count or not _numbers(to.scale, count):
        return False
    if to.running is not None and not (_numbers(to.running.low, count) and _numbers(to.running.high, count)):
        return False
    return factor is None or _numbers(factor, count)


def _numbers(x: Tensor, count: int) -> bool:
    return x.dtype is torch.float32 and x.numel() == count and x.is_cpu and x.is_contiguous()


def keep(ctx: Any, passing: Passing, *saved: Tensor | None) -> None:
    """Keep what a backward pass takes: where somebody else keeps it for us, as when a forward pass is made again, the
    bits too, which are then of the same pass as all else, and which rounding the result must not change."""
    ctx.rows = passing.rows
    if is_alone():
        ctx.passing = passing
        ctx.save_for_backward(*saved, None)
    else:
        ctx.save_for_backward(*saved, passing.bits)


def kept(ctx: Any) -> tuple[list[Any], Tensor | None]:
    """What :func:`keep` kept, and the bits."""
    *saved, bits = ctx.saved_tensors
    passing = getattr(ctx, "passing", None)
    return saved, bits if passing is None else passing.bits


def _masked(grad: Tensor, bits: Tensor) -> Tensor:
    return grad * bit_flags(bits, grad, 1) if torch.is_grad_enabled() else native.masked(grad, bits)


class _Rectified(torch.autograd.Function):
    """ReLU in place, keeping a bit for each value."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.strides = y.stride()
        keep(ctx, Passing(native.rectify_(y)))
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        _, bits = kept(ctx)
        assert bits is not None
        return _masked(in_order(grads[0], ctx.strides), bits)


def relu_(y: Tensor) -> Tensor | None:
    """ReLU of what nobody else looks at, in place; None, with nothing changed, where C does not serve."""
    if not (y.dtype is torch.float32 and native.serves(y)) or (y.is_leaf and y.requires_grad) or y._is_view():
        return None
    rectified: Tensor = _Rectified.apply(y)
    return rectified


class _Sum(torch.autograd.Function):
    """``x + y``, perhaps with ReLU, keeping a bit for each value."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, relu: bool, graded: bool) -> Tensor:
        ctx.strides = x.stride()
        out, passing = native.sum_of(x, y, relu, graded)
        keep(ctx, passing)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        grad, (_, bits) = grads[0], kept(ctx)
        if bits is not None:
            grad = _masked(in_order(grad, ctx.strides), bits)
        return grad, grad, None, None


def sum_in_c(x: Tensor, y: Tensor, relu: bool = False) -> Tensor | None:
    """``x + y``, or ``relu(x + y)``; None where C does not serve, as for tensors of different shapes or layouts."""
    alike = x.shape == y.shape and x.stride() == y.stride() and x.dtype is y.dtype is torch.float32 and x.numel()
    if not alike or not native.serves(x) or not native.serves(y):
        return None
    total: Tensor = _Sum.apply(x, y, relu, torch.is_grad_enabled() and (x.requires_grad or y.requires_grad))
    return total
