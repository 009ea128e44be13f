"""Batch norm of a layer whose channels were scaled, in one pass over memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eagerq import native
from eagerq.functional.in_c import bit_flags, in_order
from eagerq.functional.qparams import channel_shape
from eagerq.native import Norm

__all__ = ["Norm", "batch_norm_of_scaled"]


class _BatchNormOfScaled(torch.autograd.Function):
    """``weight·(y/f - E[y/f])/sqrt(Var[y/f] + eps) + bias``, and ReLU."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        factor: Tensor,
        weight: Tensor,
        bias: Tensor,
        norm: Norm,
        relu: bool,
        graded: bool,
    ) -> Tensor:
        ctx.eps = norm.eps
        out, batch = native.batch_norm(y, factor, weight, bias, norm, relu and graded)
        ctx.save_for_backward(y, factor, weight, bias, *batch)
        return out.relu_() if relu and not graded else out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        y, factor, weight, bias, mean, inverse, above = ctx.saved_tensors
        if not torch.is_grad_enabled():
            batch, grad = native.Batch(mean, inverse, above), in_order(grads[0], y.stride())
            return *native.batch_norm_backward(grad, y, factor, weight, batch, ctx.eps), None, None, None
        # to be differentiated again
        grad = grads[0] if above is None else grads[0] * bit_flags(above, y, y.shape[0] * y.shape[1])
        inputs = (y, factor, weight, bias)
        quotient = y / factor.reshape(channel_shape(y.dim(), 1))
        out = F.batch_norm(quotient, None, None, weight, bias, True, 0.0, ctx.eps)
        needed = [one for one, wanted in zip(inputs, ctx.needs_input_grad, strict=False) if wanted]
        found = iter(torch.autograd.grad(out, needed, grad, create_graph=True))
        return *(next(found) if wanted else None for wanted in ctx.needs_input_grad[:4]), None, None, None


def batch_norm_of_scaled(
    y: Tensor,
    factor: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm: Norm,
    relu: bool = False,
) -> Tensor | None:
    """Batch norm in training of ``y/factor``, in C, rounded as torch rounds division, batch norm and ReLU.

    Args:
        y: float ``[N, C, …]``, at least two values in a channel.
        factor: what each channel of ``y`` was multiplied by, ``[C]``, not zero.
        weight, bias: of the batch norm, ``[C]``.
        norm: the running statistics, which are updated.
        relu: cut the result at zero.

    Returns:
        Tensor like ``y``; None, with nothing changed, where C does not serve: other dtypes, devices or layouts,
        fewer than three axes.
    """
    if not native.norms(y, [factor, weight, bias, norm.running_mean, norm.running_var]):
        return None
    graded = torch.is_grad_enabled() and any(one.requires_grad for one in (y, factor, weight, bias))
    result: Tensor = _BatchNormOfScaled.apply(y, factor, weight, bias, norm, relu, graded)
    return result
