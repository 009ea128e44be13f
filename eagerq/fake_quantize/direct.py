"""What may be had past a fake quantizer's ``forward``, with the same result, where nobody can tell."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook as has_global_hook

from eagerq.fake_quantize.modules import FakeQuantize, FusedMovingAvgObsFakeQuantize
from eagerq.functional import channel_shape

__all__ = ["is_ordinary", "is_plain", "is_rounding", "rounded_over", "rounded_scaled"]


def is_plain(module: nn.Module, *classes: type[nn.Module]) -> bool:
    """Whether calling ``module`` does just what one of the classes says, so that the same may be had another way."""
    return (
        type(module) in classes
        and not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
        and not (module._backward_pre_hooks or has_global_hook() or "forward" in module.__dict__)
    )


def is_ordinary(rounding: Any) -> bool:
    """Whether this is a fake quantizer that the functions below take another way."""
    return is_plain(rounding, FakeQuantize, FusedMovingAvgObsFakeQuantize)


def is_rounding(rounding: Any) -> bool:
    """Whether it is one that is switched on."""
    return is_ordinary(rounding) and rounding._fake_quant_on


def rounded_scaled(rounding: Any, x: Tensor, factor: Tensor) -> Tensor:
    """``rounding(x·factor)``, with a factor for each index of axis 0."""
    if is_ordinary(rounding):
        rounded: Tensor = rounding.scaled(x, factor)
    else:
        rounded = rounding(x * factor.reshape(channel_shape(x.dim(), 0)))
    return rounded


def rounded_over(rounding: Any, x: Tensor) -> Tensor:
    """``rounding(x)``, for an ``x`` that nobody else looks at: its memory may take the result."""
    rounded: Tensor = rounding.over(x) if is_ordinary(rounding) else rounding(x)
    return rounded
