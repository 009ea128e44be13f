"""int8 convolutions in two dimensions by our own C code, whatever their weights' zero points."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from eagerq import native
from eagerq.kernels.packing import kept, version
from eagerq.kernels.reference import channels_last

__all__ = ["BYTES", "LONGEST_SUM", "conv", "tiles"]

BYTES = (torch.uint8, torch.int8)
# products of two differences of bytes that an int32 sum can take
LONGEST_SUM = (2**31 - 1) // (255 * 255)


# products from which on those of whole tiles pay for the way into oneDNN, where the processor has them
_TILED_PRODUCTS = 25_000_000


@lru_cache(maxsize=1)
def tiles() -> bool:
    """Whether the processor multiplies tiles (AMX), which oneDNN uses."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return supported is not None and bool(supported())


def _plain(zero_point: Tensor) -> bool:
    """Whether oneDNN knows weights of such zero points."""
    return kept(zero_point, zero_point, "plain", lambda: not bool(zero_point.any()))


def conv(
    x: Tensor,
    x_scale: float,
    x_zero_point: int,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    scale: float,
    zero_point: int,
    dtype: torch.dtype,
    low: int,
    high: int,
) -> Any:
    """See :func:`eagerq.kernels.reference.conv`."""
    outputs, inside, *taps = weight.shape
    depthwise = groups > 1 and inside == 1 and groups == outputs
    if (
        x.dim() != 4
        or x.dtype not in BYTES
        or dtype not in BYTES
        or weight.dtype is not torch.int8
        or type(weight) is not Tensor
        or (groups > 1 and not depthwise)
        or (dilation[1] > 1 and taps[1] > 1 and not depthwise)
        or inside * groups != x.shape[1]
        or weight.numel() > LONGEST_SUM * outputs
        or weight_scale.numel() not in (1, outputs)
    ):
        return NotImplemented
    height, width = x.shape[2:]
    rows = (height + 2 * padding[0] - dilation[0] * (taps[0] - 1) - 1) // stride[0] + 1
    columns = (width + 2 * padding[1] - dilation[1] * (taps[1] - 1) - 1) // stride[1] + 1
    x = channels_last(x)
    if rows < 1 or columns < 1 or x.numel() == 0 or weight.numel() == 0 or not native.serves(x):
        return NotImplemented
    if (
        tiles()
        and not depthwise
        and x.shape[0] * rows * columns * weight.numel() > _TILED_PRODUCTS
        and _plain(weight_zero_point)
    ):
        return NotImplemented
    packed = kept(
        weight,
        weight_zero_point,
        ("native", depthwise, version(weight_scale), version(bias)),
        lambda: native.PackedConv(weight, weight_scale, weight_zero_point, bias, depthwise),
    )
    sizes, how = (x.shape[0], outputs, rows, columns), (*taps, *stride, *padding, *dilation)
    return native.conv(x, x_scale, x_zero_point, packed, sizes, how, scale, zero_point, dtype, low, high)
