"""Batch norm of a layer whose channels were scaled, in one pass over memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eagerq import native
from eagerq.functional.in_c import bit_flags, in_order, keep, kept, unmoved
from eagerq.functional.qparams import channel_shape
from eagerq.native import Norm

__all__ = ["Norm", "apart", "batch_norm_of_scaled", "normalized_again"]


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
        out, batch, passing = native.batch_norm(y, factor, weight, bias, norm, relu, graded)
        ctx.eps = norm.eps
        keep(ctx, passing, y, factor, weight, bias, *batch)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (y, factor, weight, bias, *batch), bits = kept(ctx)
        if not torch.is_grad_enabled():
            unmoved(factor, weight)
            grad = in_order(grads[0], y.stride())
            gradients = native.batch_norm_backward(*(grad, y, factor, weight, native.Batch(*batch), bits, ctx.eps))
            return *gradients, None, None, None
        inputs = apart(y, factor, weight, bias)
        return *normalized_again(ctx, grads[0], bits, inputs, inputs), None, None, None


def apart(*inputs: Tensor) -> tuple[Tensor, ...]:
    """Views, none of which comes of another, as one tensor may come of another that both are inputs of a function."""
    return tuple(one.view_as(one) for one in inputs)


def normalized_again(
    ctx: Any, grad: Tensor, bits: Tensor | None, made_of: tuple[Tensor, ...], inputs: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients for ``inputs``, where wanted, that can be differentiated; ``made_of`` is what C normalised.

    Args:
        bits: where the gradient passes, if not everywhere.
        inputs: set :func:`apart`.
    """
    y, factor, weight, bias = made_of
    if bits is not None:
        grad = grad * bit_flags(bits, y, ctx.rows)
    wanted = ctx.needs_input_grad[: len(inputs)]
    quotient = y / factor.reshape(channel_shape(y.dim(), 1))
    out = F.batch_norm(quotient, None, None, weight, bias, True, 0.0, ctx.eps)
    needed = [one for one, needs in zip(inputs, wanted, strict=True) if needs]
    found = iter(torch.autograd.grad(out, needed, grad, create_graph=True))
    return tuple(next(found) if needs else None for needs in wanted)


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
