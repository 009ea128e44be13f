"""Layers that quantize their float input as it comes, by its own range, and return float32.

The arithmetic is torch's, bit for bit: every scale is held by its inverse, so it is inverted twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eagerq import native
from eagerq.functional import dynamic_qparams
from eagerq.kernels import doors, native_linear, reference
from eagerq.kernels.dispatch import Kernel, door
from eagerq.kernels.native_linear import twice_inverted
from eagerq.kernels.packing import kept, version

__all__ = ["conv_dynamic", "conv_transpose_dynamic", "linear_dynamic", "linear_dynamic_float16", "to_float16"]

_WEIGHT = "Tensor weight, Tensor weight_scale, Tensor weight_zero_point, Tensor? bias"
# what a door is told to leave its result in real numbers
_REAL = (1.0, 0, torch.float32, 0, 0)
# the same formula as dynamic_qparams, in one call
_NATIVE = getattr(torch, "_choose_qparams_per_tensor", None)


def _steps(x: Tensor, scale: float | Tensor, zero_point: int | Tensor) -> Tensor:
    inverse = scale.reciprocal() if isinstance(scale, Tensor) else reference.single(1.0 / scale)
    return (x * inverse).add_(zero_point).round_().clamp_(0, 255).to(torch.uint8)


def _kept_scale(weight: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """The weight's scale twice inverted, the same tensor each time: backends know a packed layer by it."""
    key = ("twice inverted", version(scale))
    _, inverted = kept(weight, zero_point, key, lambda: (scale, twice_inverted(scale)))
    return inverted


def _by_tensors(x: Tensor, reduce_range: bool) -> tuple[Tensor, Any, Any]:
    """``x`` in uint8, its scale and zero point, without a word from the device."""
    x = x.detach().float()
    if x.numel() == 0:
        return x.to(torch.uint8), 1.0, 0
    exact, zero_point = dynamic_qparams(*torch.aminmax(x), 127 if reduce_range else 255)
    scale = twice_inverted(exact)
    return _steps(x, scale, zero_point), scale, zero_point


def _by_numbers(x: Tensor, reduce_range: bool) -> tuple[Tensor, float, int] | None:
    """As :func:`_by_tensors`, with Python numbers for the doors; None where the range is not finite."""
    x = x.detach().float()
    if x.numel() == 0:
        return None
    if native.available:
        found = native.quantize_dynamic(x, 127 if reduce_range else 255)
        if found is not None:
            return found
    if _NATIVE is None:
        return None
    extremes = torch.stack(torch.aminmax(x))
    if not all(map(math.isfinite, extremes.tolist())):
        return None
    exact, zero_point = _NATIVE(extremes, reduce_range)
    scale = reference.single(1.0 / reference.single(1.0 / exact))
    return _steps(x, scale, zero_point), scale, zero_point


def _dynamic(door: Kernel, how: str = "", at_once: Callable[..., Any] | None = None) -> Kernel:
    """A door's dynamic form: a float input instead of a quantized one, a float32 result.

    Args:
        how: the schema of what the door takes between the bias and the parameters of its output.
        at_once: an implementation for the CPU that is asked first.
    """

    def by_reference(
        x: Tensor, weight: Tensor, weight_scale: Tensor, weight_zero_point: Tensor, bias: Tensor | None, *rest: Any
    ) -> Tensor:
        *shape, reduce_range = rest
        layer = (weight, twice_inverted(weight_scale), weight_zero_point, bias)
        return door.reference(*_by_tensors(x, reduce_range), *layer, *shape, *_REAL)

    def on_cpu(
        x: Tensor, weight: Tensor, weight_scale: Tensor, weight_zero_point: Tensor, bias: Tensor | None, *rest: Any
    ) -> Any:
        *shape, reduce_range = rest
        quantized = _by_numbers(x, reduce_range)
        if quantized is None:
            return NotImplemented
        scale = _kept_scale(weight, weight_scale, weight_zero_point)
        return door.run(*quantized, weight, scale, weight_zero_point, bias, *shape, *_REAL)

    def fake(
        x: Tensor, weight: Tensor, weight_scale: Tensor, weight_zero_point: Tensor, bias: Tensor | None, *rest: Any
    ) -> Tensor:
        layer = (weight, weight_scale, weight_zero_point, bias)
        return door.fake(x, 1.0, 0, *layer, *rest[:-1], *_REAL)

    kernel = Kernel(f"{door.name}_dynamic(Tensor x, {_WEIGHT}, {how}bool reduce_range) -> Tensor", by_reference, fake)
    for implementation in (at_once, on_cpu):
        if implementation is not None:
            kernel.register("cpu", implementation)
    return kernel


linear_dynamic = _dynamic(doors.linear, at_once=native_linear.linear_dynamic if native.conv_ready() else None)
"""``x @ weight.T + bias`` in float32, with ``x`` in uint8 for the product.

Args:
    x: float ``[…, in]``; NaN or infinity anywhere makes the whole result NaN.
    weight, weight_scale, weight_zero_point, bias: as for :func:`eagerq.kernels.linear`.
    reduce_range: spread the input's range over 0 to 127 rather than 255, for processors without VNNI.
"""

conv_dynamic = _dynamic(doors.conv, "int[] stride, int[] padding, int[] dilation, int groups, ")
conv_transpose_dynamic = _dynamic(
    doors.conv_transpose, "int[] stride, int[] padding, int[] output_padding, int[] dilation, int groups, "
)
"""Convolutions in float32, with ``x`` in uint8 for the products; arguments as for the other doors."""


@door
def linear_dynamic_float16(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias`` in float32, the weight being stored in float16.

    Args:
        x: float ``[…, in]``.
        weight: float16 ``[out, in]``.
        bias: float32 ``[out]``.
    """
    return F.linear(x.float(), weight.float(), bias)


def to_float16(weight: Tensor) -> Tensor:
    """``weight`` rounded to float16, what is out of its range to its ends.

    Example:
        >>> to_float16(torch.tensor([0.1, 1e6]))
        tensor([9.9976e-02, 6.5504e+04], dtype=torch.float16)
    """
    most = torch.finfo(torch.float16).max
    return weight.clamp(-most, most).to(torch.float16)
