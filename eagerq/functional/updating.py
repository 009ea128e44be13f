"""The short cut of the CPU: range, average and parameters in one call of torch's own kernel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["can_update_natively", "update_natively"]

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
    """``moving_average``, then ``training_qparams``, in one call of torch's kernel; in place.

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
