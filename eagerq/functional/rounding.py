"""Rounding while training: values that integers could hold, with gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eagerq.functional.in_c import Rounding, round_in_c
from eagerq.functional.qparams import channel_shape

__all__ = ["fake_quantize", "fake_quantize_learnable", "training_integers"]


def training_integers(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, axis: int | None = None
) -> Tensor:
    """``clamp(round(x·(1/scale)) + zero_point)``: the integers that :func:`fake_quantize` stands for.

    Arguments as there; the result is float, of ``x``'s shape.
    """
    if axis is not None:
        shape = channel_shape(x.dim(), axis)
        scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
    if zero_point.is_floating_point():
        return torch.addcmul(zero_point, x, 1.0 / scale).round_().clamp_(quant_min, quant_max)
    return torch.round(x * (1.0 / scale)).add_(zero_point).clamp_(quant_min, quant_max)


class _FakeQuantize(torch.autograd.Function):
    """Quantize and dequantize, with the straight-through gradient inside the range."""

    @staticmethod
    def forward(
        x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, float_zero_point: bool
    ) -> tuple[Tensor, Tensor]:
        inverse = 1.0 / scale
        if float_zero_point:
            steps = torch.addcmul(zero_point, x, inverse).round_()
        else:
            steps = (x * inverse).round_().add_(zero_point)
        clamped = steps.clamp(quant_min, quant_max)
        inside = clamped == steps
        return clamped.sub_(zero_point) * scale, inside

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (inside,) = ctx.saved_tensors
        return grad * inside, None, None, None, None, None


_NATIVE_PER_TENSOR = getattr(torch, "fake_quantize_per_tensor_affine", None)


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
) -> Tensor:
    """``(clamp(round(x / scale) + zero_point, quant_min, quant_max) - zero_point) * scale``.

    The gradient with respect to ``x`` passes where the value lies within the range and is zero
    elsewhere (straight-through estimator, Bengio et al. 2013, arXiv:1308.3432).

    Args:
        x: float tensor of any shape.
        scale: float32, ``[1]``, or ``[x.shape[axis]]`` when an axis is given.
        zero_point: integers, or float32 for the embedding scheme; shape as ``scale``.
        axis: channel axis, or None for one set of parameters.

    Returns:
        Tensor like ``x``.

    Example:
        >>> fake_quantize(torch.tensor([0.26, 9.0]), torch.tensor([0.5]), torch.tensor([0]), -8, 7)
        tensor([0.5000, 3.5000])
    """
    # torch's CPU kernel works value by value: several vectorized passes take a tenth of its time
    if axis is None and _NATIVE_PER_TENSOR is not None and x.dtype is torch.float32 and x.device.type != "cpu":
        out: Tensor = _NATIVE_PER_TENSOR(x, scale, zero_point, quant_min, quant_max)
        return out
    if axis is None or axis == 0:
        rounded = round_in_c(x, Rounding(scale, zero_point, quant_min, quant_max, rows=axis == 0))
        if rounded is not None:
            return rounded
    if axis is not None:
        shape = channel_shape(x.dim(), axis)
        scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
    out, _ = _FakeQuantize.apply(x, scale, zero_point, quant_min, quant_max, zero_point.dtype.is_floating_point)
    if x.dim() == 0:
        out = out.reshape(())
    return out.to(x.dtype)


def _with_gradient_of(value: Tensor, x: Tensor) -> Tensor:
    """``value`` itself, with the gradient of ``x`` (adding zero is exact)."""
    return value.detach() + (x - x.detach())


def fake_quantize_learnable(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    pace: float = 1.0,
) -> Tensor:
    """:func:`fake_quantize` with gradients for ``scale`` and ``zero_point`` too.

    Per value, inside the range ``d out/d scale = (out - x)/scale`` and ``d out/d zero_point = 0``;
    outside ``quant_min - zero_point`` (or ``quant_max - zero_point``) and ``-scale`` (Esser et al. 2020,
    arXiv:1902.08153, equation 3; Bhalgat et al. 2020, arXiv:2004.09576).

    Args:
        x: float tensor of any shape.
        scale, zero_point: float32, ``[1]`` or ``[x.shape[axis]]``; the zero point counts rounded and
            clamped to the range.
        axis: channel axis, or None for one set of parameters.
        pace: multiplies the gradients of ``scale`` and ``zero_point``.

    Returns:
        Tensor like ``x``.
    """
    if axis is not None:
        shape = channel_shape(x.dim(), axis)
        scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
    elif x.dim() == 0:
        scale, zero_point = scale.reshape(()), zero_point.reshape(())
    if pace != 1.0:
        scale, zero_point = _with_gradient_of(scale, scale * pace), _with_gradient_of(zero_point, zero_point * pace)
    zero_point = _with_gradient_of(zero_point.round().clamp(quant_min, quant_max), zero_point)
    steps = x * (1.0 / scale)
    steps = _with_gradient_of(steps.round(), steps) + zero_point
    # releases of torch differ in clamp's gradient at the ends of the range
    inside = (steps >= quant_min) & (steps <= quant_max)
    steps = torch.where(inside, steps, steps.detach().clamp(quant_min, quant_max))
    return ((steps - zero_point) * scale).to(x.dtype)
