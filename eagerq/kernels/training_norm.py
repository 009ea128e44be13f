"""Batch norms of compiled training, one operator each way, on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eagerq import native
from eagerq.kernels.dispatch import Kernel
from eagerq.kernels.storing import ready, stored, storing
from eagerq.native import Norm

__all__ = ["batch_norm_in_graph"]


def _normalized(
    y: Tensor,
    factor: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    pace: float,
    relu: bool,
) -> Any:
    norm = Norm(running_mean, running_var, eps, pace)
    out, batch, passing = native.batch_norm(ready(y), factor, weight, bias, norm, relu, mask=True)
    above = y.new_empty(0, dtype=torch.uint8) if passing.bits is None else passing.bits
    return stored(out, y), *batch, above


def _like_normalized(y: Tensor, factor: Tensor, *rest: Any) -> Any:
    rows = y.shape[0] * y.shape[1] if ready(y).is_contiguous() else 1
    above = y.new_empty(rows * ((y.numel() // rows + 7) // 8) if rest[-1] else 0, dtype=torch.uint8)
    return torch.empty_like(y), torch.empty_like(factor), torch.empty_like(factor), above


def _normalized_backward(
    grad: Tensor,
    y: Tensor,
    factor: Tensor,
    weight: Tensor,
    mean: Tensor,
    inverse: Tensor,
    above: Tensor,
    eps: float,
) -> Any:
    bits = above if above.numel() else None
    batch = native.Batch(mean, inverse)
    of_y, *others = native.batch_norm_backward(ready(grad), ready(y), factor, weight, batch, bits, eps)
    return stored(of_y, y), *others


def _like_normalized_backward(grad: Tensor, y: Tensor, factor: Tensor, *rest: Any) -> Any:
    return torch.empty_like(y), *(torch.empty_like(factor) for _ in range(3))


_NORMALIZED = Kernel(
    "batch_norm_of_scaled(Tensor y, Tensor factor, Tensor weight, Tensor bias, Tensor(a!) running_mean, "
    "Tensor(b!) running_var, float eps, float pace, bool relu) -> (Tensor, Tensor, Tensor, Tensor)",
    _normalized,
    storing("batch_norm_of_scaled", _like_normalized, images=True),
    any_layout=True,
)
_NORMALIZED_BACKWARD = Kernel(
    "batch_norm_of_scaled_backward(Tensor grad, Tensor y, Tensor factor, Tensor weight, Tensor mean, Tensor inverse, "
    "Tensor above, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    _normalized_backward,
    storing("batch_norm_of_scaled_backward", _like_normalized_backward, images=True),
    any_layout=True,
)


class _Normalized(torch.autograd.Function):
    """Attaches the gradient to what was computed apart from autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        factor: Tensor,
        weight: Tensor,
        bias: Tensor,
        computed: tuple[Tensor, ...],
        eps: float,
    ) -> Tensor:
        out, *batch = computed
        ctx.eps = eps
        ctx.save_for_backward(y, factor, weight, *batch)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return *_NORMALIZED_BACKWARD(grads[0], *ctx.saved_tensors, ctx.eps), None, None


def batch_norm_in_graph(
    y: Tensor, factor: Tensor, weight: Tensor, bias: Tensor, norm: Norm, relu: bool
) -> Tensor | None:
    """As :func:`eagerq.functional.batch_norm_of_scaled`, in code that is being compiled."""
    vectors = factor, weight, bias, norm.running_mean, norm.running_var
    if not (native.available and y.dim() > 2 and y.dtype is torch.float32 and y.device.type == "cpu"):
        return None
    if y.numel() <= y.shape[1] or torch.compiler.is_exporting():
        return None
    if not all(one.dtype is torch.float32 and one.numel() == y.shape[1] for one in vectors):
        return None
    with torch.no_grad():
        computed = _NORMALIZED(y, *vectors, norm.eps, norm.pace, relu)
    out: Tensor = _Normalized.apply(y, factor, weight, bias, computed, norm.eps)
    return out
