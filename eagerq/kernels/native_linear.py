"""int8 linear by our own C code: with little to say for few rows, and whatever the weights' zero points."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eagerq import native
from eagerq.kernels.native_conv import BYTES, LONGEST_SUM, tiles
from eagerq.kernels.packing import kept, version

__all__ = ["linear"]

# rows from which on the products of whole tiles pay, where the processor has them
_TILED_ROWS = 32


def linear(
    x: Tensor,
    x_scale: float,
    x_zero_point: int,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor,
    bias: Tensor | None,
    scale: float,
    zero_point: int,
    dtype: torch.dtype,
    low: int,
    high: int,
) -> Any:
    """See :func:`eagerq.kernels.reference.linear`."""
    outputs, inputs = weight.shape
    if (
        x.dtype not in BYTES
        or (dtype not in BYTES and dtype is not torch.float32)
        or weight.dtype is not torch.int8
        or type(weight) is not Tensor
        or inputs != x.shape[-1]
        or inputs % 4
        or inputs > LONGEST_SUM
        or x.numel() == 0
        or outputs == 0
        or weight_scale.numel() not in (1, outputs)
        or (tiles() and x.numel() >= _TILED_ROWS * inputs)
    ):
        return NotImplemented
    if x.dtype is torch.int8:
        x, x_zero_point = x.view(torch.uint8).bitwise_xor(128), x_zero_point + 128
    x = x.contiguous()
    if not 0 <= x_zero_point <= 255 or not native.serves(x):
        return NotImplemented
    packed = kept(
        weight,
        weight_zero_point,
        ("native", version(weight_scale), version(bias)),
        lambda: native.PackedConv(weight[:, :, None, None], weight_scale, weight_zero_point, bias, False),
    )
    return native.linear(x, x_scale, x_zero_point, packed, outputs, scale, zero_point, dtype, low, high)
