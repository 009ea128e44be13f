"""int8 linear by our own C code: with little to say for few rows, and whatever the weights' zero points."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eagerq import native
from eagerq.kernels.native_conv import BYTES, LONGEST_SUM, tiles
from eagerq.kernels.packing import kept, version

__all__ = ["linear", "linear_dynamic", "packed_dynamic", "packed_static", "serves", "twice_inverted"]

# rows from which on the products of whole tiles pay, where the processor has them
_TILED_ROWS = 32


def twice_inverted(scale: Tensor) -> Tensor:
    """What a scale is held by in dynamic layers."""
    return scale.reciprocal().float().reciprocal_()


def serves(rows: int, inputs: int, weight: Tensor, weight_scale: Tensor) -> bool:
    """Whether a product of these sizes is done here."""
    outputs = weight.shape[0]
    return (
        weight.dtype is torch.int8
        and type(weight) is Tensor
        and inputs == weight.shape[1]
        and inputs % 4 == 0
        and 0 < inputs <= LONGEST_SUM
        and rows > 0
        and outputs > 0
        and weight_scale.numel() in (1, outputs)
        and not (rows >= _TILED_ROWS and tiles())
    )


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
    inputs = x.shape[-1]
    if (
        x.dtype not in BYTES
        or (dtype not in BYTES and dtype is not torch.float32)
        or not serves(x.numel() // max(inputs, 1), inputs, weight, weight_scale)
    ):
        return NotImplemented
    if x.dtype is torch.int8:
        x, x_zero_point = x.view(torch.uint8).bitwise_xor(128), x_zero_point + 128
    x = x.contiguous()
    if not 0 <= x_zero_point <= 255 or not native.serves(x):
        return NotImplemented
    packed = packed_static(weight, weight_scale, weight_zero_point, bias)
    return native.linear(x, x_scale, x_zero_point, packed, len(weight), scale, zero_point, dtype, low, high)


def packed_static(
    weight: Tensor, weight_scale: Tensor, weight_zero_point: Tensor, bias: Tensor | None
) -> native.PackedConv:
    """A layer's parameters as the C code reads them."""
    return kept(
        weight,
        weight_zero_point,
        ("native", version(weight_scale), version(bias)),
        lambda: native.PackedConv(weight[:, :, None, None], weight_scale, weight_zero_point, bias, False),
    )


def linear_dynamic(
    x: Tensor, weight: Tensor, weight_scale: Tensor, weight_zero_point: Tensor, bias: Tensor | None, reduce_range: bool
) -> Any:
    """See :data:`eagerq.kernels.linear_dynamic`; all in one call."""
    inputs = x.shape[-1]
    if (
        x.dtype is not torch.float32
        or not serves(x.numel() // max(inputs, 1), inputs, weight, weight_scale)
        or not x.is_contiguous()
        or not native.serves(x)
    ):
        return NotImplemented
    packed = packed_dynamic(weight, weight_scale, weight_zero_point, bias)
    y, finite = native.linear_dynamic(x, packed, len(weight), 127 if reduce_range else 255)
    return y if finite else NotImplemented


def packed_dynamic(
    weight: Tensor, weight_scale: Tensor, weight_zero_point: Tensor, bias: Tensor | None
) -> native.PackedConv:
    """A dynamic layer's parameters as the C code reads them."""

    def make() -> tuple[Tensor, native.PackedConv]:
        scale = twice_inverted(weight_scale)
        packed = native.PackedConv(weight[:, :, None, None], scale, weight_zero_point, bias, False)
        return weight_scale, packed  # no other scale gets this one's id

    return kept(weight, weight_zero_point, ("dynamic", version(weight_scale), version(bias)), make)[1]
