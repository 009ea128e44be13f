"""Normalizations of integers: sums are exact, then float32 steps in the order in which torch.ao takes them.

``fused`` below is one rounding for a product and a sum, as processors do it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from eagerq import native
from eagerq.functional import channel_shape
from eagerq.kernels import onednn
from eagerq.kernels.dispatch import Kernel
from eagerq.kernels.reference import MEMORY_FORMATS, channels_last, reciprocal, requantized, single

__all__ = ["batch_norm", "group_norm", "layer_norm"]

_X = "Tensor x, float x_scale, int x_zero_point"
_AFFINE = "Tensor? weight, Tensor? bias"
_OUTPUT = "float scale, int zero_point, ScalarType dtype, int low, int high"

# A variance taken as mean of squares less square of mean keeps few digits of float32 where the mean is this much
# larger; past it torch.ao is off by up to 60 steps, and float64 is used here.
_CANCELLED = 2.0**14


_BLOCK = 2**18  # values


def _in_blocks(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Go through the first axis a block at a time, so that what lies between the steps stays in the cache."""

    @wraps(function)
    def run(x: Tensor, *arguments: Any) -> Tensor:
        step = max(1, _BLOCK // max(1, x[:1].numel()))
        formats = {torch.contiguous_format, MEMORY_FORMATS.get(x.dim(), torch.contiguous_format)}
        if len(x) <= step or not any(x.is_contiguous(memory_format=one) for one in formats):
            return function(x, *arguments)
        return torch.cat([function(part, *arguments) for part in x.split(step)])

    return run


def _fused(a: Tensor, b: Tensor | None, c: Tensor | None) -> Tensor:
    """``a·b + c`` in float32, rounded once; consumes ``a``."""
    if b is None and c is None:
        return a
    wide = a.double()
    if b is not None:
        wide.mul_(b)
    if c is not None:
        wide.add_(c)
    return wide.to(torch.float32)


def _sums(x: Tensor, dims: list[int]) -> tuple[Tensor, Tensor]:
    """Sum and sum of squares, exact in float64."""
    wide = x.double()
    if not dims:
        return wide, wide.square()
    return wide.sum(dims, keepdim=True), wide.square_().sum(dims, keepdim=True)


def _parameters(
    total: Tensor, squares: Tensor, count: int, x_scale: float, x_zero_point: int, eps: float
) -> tuple[Tensor, Tensor]:
    """What to take off ``x - x_zero_point``, and what to multiply by then, in float32."""
    size, x_scale = single(float(count)), single(x_scale)
    mean = (total.float().double() / size).float()
    square = (squares.float().double() / size).float().double()
    variance = (square - mean.double().square()).float().clamp_(min=0)
    scaled = variance.mul(x_scale).mul_(x_scale).double()
    exact = (squares / count - (total / count).square()).clamp_(min=0) * x_scale**2
    cancelled = square * x_scale**2 > _CANCELLED * (exact + eps)
    deviation = torch.where(cancelled, exact, scaled).add_(eps).sqrt_()
    return mean.sub_(x_zero_point), (x_scale / deviation).float()


@_in_blocks
def _lines(
    x: Tensor, x_scale: float, x_zero_point: int, weight: Tensor | None, bias: Tensor | None, eps: float, *output: Any
) -> Tensor:
    """Layer norm over all axes but the first."""
    count = x.shape[1:].numel()
    mean, factor = _parameters(*_sums(x, list(range(1, x.dim()))), count, x_scale, x_zero_point, eps)
    y = x.to(torch.float32).sub_(x_zero_point).sub_(mean).mul_(factor)
    scale, *rest = output
    return requantized(_fused(y, weight, bias), reciprocal(scale), *rest)


def _layer_norm(
    x: Tensor,
    x_scale: float,
    x_zero_point: int,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: float,
    zero_point: int,
    dtype: torch.dtype,
    low: int,
    high: int,
) -> Tensor:
    """Layer norm of integers over their last axes, requantized; the result is contiguous.

    Args:
        x: integers ``[…, *normalized_shape]``.
        weight, bias: float, ``normalized_shape``, or None.
        eps: added to the variance.
    """
    outer = x.shape[: x.dim() - len(normalized_shape)].numel()
    lines = x.reshape(outer, *normalized_shape).contiguous()
    y = _lines(lines, x_scale, x_zero_point, weight, bias, eps, scale, zero_point, dtype, low, high)
    return y.reshape(x.shape)


@_in_blocks
def _group_norm(
    x: Tensor,
    x_scale: float,
    x_zero_point: int,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: float,
    zero_point: int,
    dtype: torch.dtype,
    low: int,
    high: int,
) -> Tensor:
    """Group norm of integers ``[N, C, …]``, requantized; instance norm when there are ``C`` groups.

    The result lies in memory as ``x`` does.

    Args:
        weight, bias: float, ``[C]``, or None.
        eps: added to the variance.
    """
    batch, channels, *space = x.shape
    each = channels // num_groups
    total, squares = (sums.reshape(batch, num_groups, each).sum(2) for sums in _sums(x, list(range(2, x.dim()))))
    count = each * torch.Size(space).numel()
    mean, factor = (
        values.repeat_interleave(each, 1) for values in _parameters(total, squares, count, x_scale, x_zero_point, eps)
    )
    if weight is not None:
        factor.mul_(weight)
    shape = (batch, channels, *(1 for _ in space))
    y = x.to(torch.float32).sub_(x_zero_point).sub_(mean.reshape(shape))
    shift = None if bias is None else bias.reshape(shape[1:])
    return requantized(_fused(y, factor.reshape(shape), shift), reciprocal(scale), zero_point, dtype, low, high)


def _batch_norm(
    x: Tensor,
    x_scale: float,
    x_zero_point: int,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    scale: float,
    zero_point: int,
    dtype: torch.dtype,
    low: int,
    high: int,
) -> Tensor:
    """Batch norm of integers ``[N, C, …]`` by known statistics, requantized; channels last in memory.

    Args:
        weight, bias: float, ``[C]``, or None.
        mean, var: float, ``[C]``.
        eps: added to the variance.
    """
    # by way of float64, since some of torch's float32 square roots are off in the last bit
    deviation = var.float().add(single(eps)).double().sqrt_().float()
    factor = (1.0 / deviation.double()).float()
    shift = mean.float() * factor
    if weight is not None:
        factor, shift = factor * weight, shift * weight
    shift = shift.neg_() if bias is None else bias - shift
    shape = channel_shape(x.dim(), 1)
    alpha = (factor.double() * (x_scale / scale)).float().reshape(shape)
    beta = (shift.double() / scale).float().reshape(shape)
    y = _fused(x.to(torch.float32).sub_(x_zero_point), alpha, beta)
    return channels_last(requantized(y, 1.0, zero_point, dtype, low, high))


def _fake_layer_norm(
    x: Tensor,
    x_scale: float,
    x_zero_point: int,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: float,
    zero_point: int,
    dtype: torch.dtype,
    low: int,
    high: int,
) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


def _fake_batch_norm(
    x: Tensor,
    x_scale: float,
    x_zero_point: int,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    scale: float,
    zero_point: int,
    dtype: torch.dtype,
    low: int,
    high: int,
) -> Tensor:
    return channels_last(torch.empty_like(x, dtype=dtype))


layer_norm = Kernel(
    f"layer_norm({_X}, int[] normalized_shape, {_AFFINE}, float eps, {_OUTPUT}) -> Tensor",
    _layer_norm,
    _fake_layer_norm,
)
group_norm = Kernel(f"group_norm({_X}, int num_groups, {_AFFINE}, float eps, {_OUTPUT}) -> Tensor", _group_norm)
batch_norm = Kernel(
    f"batch_norm({_X}, {_AFFINE}, Tensor mean, Tensor var, float eps, {_OUTPUT}) -> Tensor",
    _batch_norm,
    _fake_batch_norm,
)


if native.available:
    layer_norm.register("cpu", native.layer_norm)


def _onednn_batch_norm(
    x: Tensor,
    x_scale: float,
    x_zero_point: int,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    scale: float,
    zero_point: int,
    dtype: torch.dtype,
    low: int,
    high: int,
) -> Tensor:
    """:func:`batch_norm` by torch's operator on plain tensors, which knows uint8 and two axes of space."""
    if x.dtype is not torch.uint8 or dtype is not torch.uint8 or x.dim() < 3 or x.numel() == 0:
        return NotImplemented
    flat = channels_last(x).flatten(2).unsqueeze(-1)
    factor = torch.ones_like(mean) if weight is None else weight
    shift = torch.zeros_like(mean) if bias is None else bias
    y = torch.ops.onednn.qbatch_norm2d.default(
        flat, x_scale, x_zero_point, factor, shift, mean, var, eps, scale, zero_point, dtype
    )
    if (low, high) != (0, 255):
        y.clamp_(low, high)
    return channels_last(y.reshape(x.shape))


# without AVX2 it would round a product before the sum
if (
    onednn.available()
    and hasattr(torch.ops.onednn, "qbatch_norm2d")
    and "AVX" in torch.backends.cpu.get_cpu_capability()
):
    batch_norm.register("cpu", _onednn_batch_norm)
