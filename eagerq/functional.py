"""The formulas of training-time quantization, as pure functions of tensors.

Nothing here reads a value back from an accelerator, so a training step never waits for one and the
whole of it can be compiled (:func:`update_natively` is the CPU's short cut).  Per-tensor parameters
have shape ``[1]``; per-channel ones ``[channels]``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_weights

from eagerq.errors import InvalidInputError

__all__ = [
    "affine_qparams",
    "can_update_natively",
    "channel_shape",
    "dynamic_qparams",
    "fake_quantize",
    "fake_quantize_learnable",
    "fold_transposed",
    "float_qparams",
    "min_max",
    "moving_average",
    "symmetric_qparams",
    "training_integers",
    "training_qparams",
    "update_natively",
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


def fold_transposed(weight: Tensor, bias: Tensor | None, *norm: Any, groups: int) -> tuple[Tensor, Tensor]:
    """Weight ``[in, out / groups, ...]`` and bias of a transposed convolution with a batch norm folded in.

    Group by group, since torch's ``fuse_conv_bn_weights`` folds transposed convolutions of one group only; ``norm``
    is what that takes: running mean, running variance, eps, weight and bias.
    """
    fuse: Any = fuse_conv_bn_weights
    split = [x.detach().chunk(groups) if isinstance(x, Tensor) else [x] * groups for x in (weight, bias, *norm)]
    weights, biases = zip(*(fuse(*part, transpose=True) for part in zip(*split, strict=True)), strict=True)
    return torch.cat(weights), torch.cat(biases)


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


_NATIVE_UPDATE = getattr(torch, "fused_moving_avg_obs_fake_quant", None)
_ON = torch.ones(1, dtype=torch.long)


def can_update_natively(x: Tensor) -> bool:
    """Whether :func:`update_natively` serves ``x``: a plain CPU tensor, seen eagerly."""
    return (
        _NATIVE_UPDATE is not None
        and x.device.type == "cpu"
        and type(x) in (Tensor, nn.Parameter)
        and not torch.compiler.is_compiling()
    )


def update_natively(
    low: Tensor,
    high: Tensor,
    running_low: Tensor,
    running_high: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    constant: float,
    quant_min: int,
    quant_max: int,
    symmetric: bool,
) -> bool:
    """:func:`moving_average`, then :func:`training_qparams`, in one call of torch's kernel; in place.

    The many small steps of the formulas cost more than the work itself where each is a call.

    Args:
        low, high: float32 range of this batch, 0-d or ``[channels]``.
        running_low, running_high, scale, zero_point: updated; resized to ``[channels]`` at first.

    Returns:
        False for a range that is not finite; nothing is then updated.
    """
    span = high - low
    if not (span.max() if span.dim() else span).item() < torch.inf:
        return False
    assert _NATIVE_UPDATE is not None
    per_channel = low.dim() == 1
    # the kernel takes the range of what it is shown; it also rounds that, which is of no use here
    _NATIVE_UPDATE(
        torch.stack([low, high], -1),
        _ON,
        _ON,
        running_low,
        running_high,
        scale,
        zero_point,
        constant,
        quant_min,
        quant_max,
        0 if per_channel else -1,
        per_channel,
        symmetric,
    )
    return True


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
