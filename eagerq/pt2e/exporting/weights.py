"""Weights as graph compilers take them: int8, around zero, a scale for each channel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from eagerq.functional import channel_shape, min_max
from eagerq.nn.quantized.embedding import Embedding
from eagerq.nn.quantized.state import StoredTensors
from eagerq.scheme import integer_type

__all__ = ["centre_weights", "spread_scales"]


def centre_weights(model: nn.Module) -> None:
    """Give every int8 weight of ``model`` the zero point 0, in place.

    Training leaves a channel whose weights all have one sign with a zero point at the end of the range, and so with
    up to twice the resolution of the others.  Inductor's and XNNPACK's kernels know no zero point of weights, and
    leave it out without a word.  Such a channel is rounded to the least scale that holds it in int8 around zero.
    """
    for module in model.modules():
        if isinstance(module, StoredTensors):
            for name in module._tables():
                parts = tuple(f"_{name}{part}" for part in ("", "_scale", "_zero_point"))
                weight, scale, zero_point = (getattr(module, part) for part in parts)
                if weight.dtype is torch.int8 and zero_point.any():
                    for part, value in zip(parts, _centred(weight, scale, zero_point, module._axis), strict=True):
                        setattr(module, part, value)


def _centred(weight: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    kind, shape = integer_type(weight.dtype), channel_shape(weight.dim(), axis)
    steps = weight.int() - zero_point.reshape(shape)
    low, high = min_max(steps, axis if scale.numel() > 1 else None)
    wider = torch.maximum(low / kind.minimum, high / kind.maximum).clamp_min(1).reshape(-1)
    integers = (steps / wider.reshape(shape)).round().to(weight.dtype)
    return integers, scale * wider, torch.zeros_like(zero_point)


def spread_scales(model: nn.Module) -> None:
    """Give every channel a scale and zero point of its own, though all may be equal, and every value a byte; in place.

    Backends lower weights dequantized per channel, and not all of them others.  Integer zero points become int64, as
    the graph flow has them.
    """
    for module in model.modules():
        if isinstance(module, Embedding):
            module._weight = module.weight().integers
        elif isinstance(module, StoredTensors):
            for name in module._tables():
                channels = getattr(module, f"_{name}").shape[module._axis]
                scale, zero_point = getattr(module, f"_{name}_scale"), getattr(module, f"_{name}_zero_point")
                if not zero_point.is_floating_point():
                    zero_point = zero_point.long()
                setattr(module, f"_{name}_scale", scale.expand(channels).clone())
                setattr(module, f"_{name}_zero_point", zero_point.expand(channels).clone())
