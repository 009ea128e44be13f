"""Scales and zero points from ranges, as pure functions of tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from eagerq.errors import InvalidInputError

__all__ = [
    "affine_qparams",
    "channel_shape",
    "dynamic_qparams",
    "float_qparams",
    "min_max",
    "moving_average",
    "symmetric_qparams",
    "training_qparams",
]

# The smallest scale that the training-time formula gives: fp16's least normal number, rounded up
# (ChooseQuantizationParams of FBGEMM).
SMALLEST_TRAINING_SCALE = torch.tensor(6.1e-5, dtype=torch.float32).item()


def channel_shape(dim: int, axis: int) -> list[int]:
    """Shape that lines a per-channel vector up with ``axis`` of a ``dim``-dimensional tensor.

    Example:
        >>> channel_shape(4, 1)
        [1, -1, 1, 1]
    """
    shape = [1] * dim
    shape[axis] = -1
    return shape


def min_max(x: Tensor, axis: int | None = None) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of ``x``: 0-d, or ``[x.shape[axis]]`` when an axis is given."""
    if axis is None:
        low, high = torch.aminmax(x)
        return low, high
    if not -x.dim() <= axis < x.dim():
        raise InvalidInputError(f"a tensor of shape {tuple(x.shape)} has no axis {axis}", remedy="check ch_axis")
    axis %= x.dim()
    if axis != 0:
        x = x.transpose(0, axis)
    low, high = torch.aminmax(x.flatten(1) if x.dim() > 1 else x[:, None], dim=1)
    return low, high


def moving_average(old: Tensor, new: Tensor, constant: float) -> Tensor:
    """``old + constant * (new - old)``; ``new`` where ``old`` is infinite, that is, not yet set."""
    return torch.where(torch.isinf(old), new, old + constant * (new - old))


def _reach(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Widen ``[low, high]`` to include zero; the mask tells which ranges have been observed."""
    observed = low < torch.inf  # averaged bounds of equal values may cross by a rounding
    zero = torch.zeros_like(low)
    return (
        torch.where(observed, torch.minimum(low, zero), zero),
        torch.where(observed, torch.maximum(high, zero), zero),
        observed,
    )


def _unobserved(scale: Tensor, zero_point: Tensor, observed: Tensor) -> tuple[Tensor, Tensor]:
    return torch.where(observed, scale, 1.0).reshape(-1), torch.where(observed, zero_point, 0).reshape(-1)


def affine_qparams(low: Tensor, high: Tensor, quant_min: int, quant_max: int, eps: Tensor) -> tuple[Tensor, Tensor]:
    """Scale ``(high - low) / (quant_max - quant_min)`` and the zero point that maps 0.0 exactly.

    Krishnamoorthi 2018 (arXiv:1806.08342), section 2.1, over a range widened to include zero.

    Args:
        low, high: float32 observed range, 0-d or ``[channels]``; infinite where nothing was seen.
        eps: float32 ``[1]``, the least scale.

    Returns:
        scale: float32 and zero point: int64, each ``[1]`` or ``[channels]``; 1 and 0 where unseen.
    """
    low, high, observed = _reach(low, high)
    scale = torch.maximum((high - low) / float(quant_max - quant_min), eps)
    zero_point = torch.clamp(quant_min - torch.round(low / scale).to(torch.int64), quant_min, quant_max)
    return _unobserved(scale, zero_point, observed)


def symmetric_qparams(
    low: Tensor, high: Tensor, quant_min: int, quant_max: int, eps: Tensor, zero_point: int = 0
) -> tuple[Tensor, Tensor]:
    """Scale ``max(|low|, |high|) / ((quant_max - quant_min) / 2)`` around a fixed zero point.

    Arguments and results as for :func:`affine_qparams`.
    """
    low, high, observed = _reach(low, high)
    scale = torch.maximum(torch.maximum(-low, high) / (float(quant_max - quant_min) / 2), eps)
    return _unobserved(scale, torch.full_like(scale, zero_point, dtype=torch.int64), observed)


def float_qparams(low: Tensor, high: Tensor, quant_min: int, quant_max: int, eps: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and *float* zero point ``-low / scale``: the embedding scheme, which need not hold zero.

    Arguments as for :func:`affine_qparams`; both results are float32.
    """
    observed = low < torch.inf  # averaged bounds of equal values may cross by a rounding
    low, high = torch.where(observed, low, 0.0), torch.where(observed, high, 0.0)
    scale = (high - low) / float(quant_max - quant_min)
    scale = torch.where(scale > eps, scale, 1.0)
    return _unobserved(scale, -1 * low / scale, observed)


def _fitted(low: Tensor, high: Tensor, quant_min: int, quant_max: int, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The scale, mended where it is too small, and the zero point before it is rounded, in float64."""
    # a range of zero width, or one too narrow for a finite 1/scale, gets an arbitrary scale
    scale = torch.where(torch.isinf(1.0 / scale.float()), 0.1, scale)
    small = scale < SMALLEST_TRAINING_SCALE
    floor = torch.where(small, SMALLEST_TRAINING_SCALE, scale)
    stretch = floor.float() / scale.float()
    steps_below, steps_above = low * stretch / floor.double(), high * stretch / floor.double()
    from_low = abs(quant_min) + steps_below.abs() < abs(quant_max) + steps_above.abs()
    return floor, torch.where(from_low, quant_min - steps_below, quant_max - steps_above)


def training_qparams(
    low: Tensor, high: Tensor, quant_min: int, quant_max: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Parameters as fused observer-and-fake-quantize kernels choose them while training.

    The formula of ``ChooseQuantizationParams`` (FBGEMM, src/QuantUtils.cc), which is not that of the
    observers: a symmetric scale is ``max(|low|/128, |high|/127)`` for int8, ranges on one side of zero
    are treated as affine, scales are at least 6.1e-5, and zero points are computed in float64.

    Args:
        low, high: float32 observed range, 0-d or ``[channels]``.

    Returns:
        scale: float32 and zero point: int64, each ``[1]`` or ``[channels]``; 1 and 0 where unseen.
    """
    low, high, observed = _reach(low, high)
    span = quant_max - quant_min
    two_sided = (low < 0) & (high > 0)
    if symmetric:
        below, above = -(span // 2 + 1), span // 2
        widest = torch.maximum((low / below).abs(), (high / above).abs()).double()
        low = torch.where(two_sided, (widest * below).float(), low)
        high = torch.where(two_sided, (widest * above).float(), high)
    scale, zero_point = _fitted(low, high, quant_min, quant_max, ((high.double() - low) / span).float())
    if symmetric:
        zero_point = torch.where(two_sided, (quant_min + quant_max) / 2, zero_point)
    zero_point = torch.round(zero_point.clamp(quant_min, quant_max)).to(torch.int64)
    return _unobserved(scale, zero_point, observed)


def dynamic_qparams(low: Tensor, high: Tensor, quant_max: int) -> tuple[Tensor, Tensor]:
    """Parameters of a float input that is quantized as it comes, to integers from 0 on.

    The affine case of :func:`training_qparams`, but the scale stays float64: where the range is symmetric
    the two part by one in the zero point.

    Args:
        low, high: float32, 0-d, the input's range.

    Returns:
        scale: float64 and zero point: float32, each 0-d; the latter is NaN for a range that is not finite.

    Example:
        >>> scale, zero_point = dynamic_qparams(torch.tensor(-1.0), torch.tensor(3.0), 255)
        >>> round(scale.item(), 4), zero_point.item()
        (0.0157, 64.0)
    """
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    scale, zero_point = _fitted(low, high, 0, quant_max, (high.double() - low) / quant_max)
    return scale, zero_point.clamp(0, quant_max).round_().float()
