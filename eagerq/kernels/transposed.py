"""Transposed convolution on x86 as one ordinary convolution through oneDNN, whose integers are exact.

oneDNN's own transposed convolutions are not used: torch.ao runs them, and where a layer has other numbers
of inputs than of outputs they give wrong sums.

With stride ``s``, output ``o`` along an axis gets input ``i`` by the tap ``j`` for which
``o + padding = i·s + j·dilation``.  So the outputs of one phase ``(o + padding) mod s`` are an ordinary
convolution with every s-th tap, and all phases together are one convolution with ``s`` times as many
outputs, which then take their places side by side (a pixel shuffle).  Nothing is multiplied by the zeros
between the inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from eagerq.kernels.onednn import BYTES, LONGEST_SUM, RESULTS, as_bytes, convolve, mistaken
from eagerq.kernels.packing import pack
from eagerq.kernels.reference import channels_last

__all__ = ["conv_transpose", "output_size"]


class _Axis(NamedTuple):
    """One spatial axis of the ordinary convolution."""

    stride: int  # phases
    taps: int
    step: int  # its dilation
    first: int  # the first output that is wanted
    near: int  # padding, negative where inputs are of no use
    far: int


def output_size(
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """Spatial size of a transposed convolution's result."""
    axes = zip(size, kernel, stride, padding, output_padding, dilation, strict=True)
    return [
        (length - 1) * every - 2 * pad + step * (taps - 1) + more + 1 for length, taps, every, pad, more, step in axes
    ]


def _axis(length: int, wanted: int, taps: int, stride: int, pad: int, dilation: int) -> _Axis:
    reach = dilation * (taps - 1) // stride
    near, far = reach - pad // stride, (wanted - 1 + pad) // stride - (length - 1)
    # without phases the taps stay as far apart as they are
    kept, step = (taps, dilation) if stride == 1 else (reach + 1, 1)
    return _Axis(stride, kept, step, pad % stride, near, far)


def _by_phases(weight: Tensor, axes: Sequence[_Axis], dilation: Sequence[int], groups: int) -> Tensor:
    """``[in, out / groups, …]`` to the ordinary ``[groups·phases·out / groups, in / groups, …]``."""
    inside, outside, *kernel = weight.shape
    strides = [axis.stride for axis in axes]
    shape = (groups, *strides, outside, inside // groups, *(axis.taps for axis in axes))
    ordinary = weight.new_zeros(shape)
    grouped = weight.unflatten(0, (groups, -1)).transpose(1, 2)
    for taps in product(*map(range, kernel)):
        phases: list[Any] = []
        places: list[Any] = []
        for tap, axis, apart in zip(taps, axes, dilation, strict=True):
            place, phase = (tap, 0) if axis.stride == 1 else divmod(tap * apart, axis.stride)
            phases.append(phase)
            places.append(axis.taps - 1 - place)  # a convolution runs over them the other way round
        here: Any = (slice(None), *phases, ..., *places)
        there: Any = (..., *taps)
        ordinary[here] = grouped[there]
    return ordinary.flatten(0, len(strides) + 1)


def _side_by_side(y: Tensor, axes: Sequence[_Axis], groups: int, wanted: Sequence[int]) -> Tensor:
    """The phases' results ``[N, groups·phases·out, …]`` at their places, ``[N, groups·out, …]``."""
    dim = len(axes)
    strides = [axis.stride for axis in axes]
    if prod(strides) > 1:
        apart = y.unflatten(1, (groups, *strides, -1))
        # N, then each axis with its phases, then groups and channels
        pairs = [place for axis in range(dim) for place in (dim + 3 + axis, 2 + axis)]
        apart = apart.permute(0, *pairs, 1, dim + 2)
        merged = [size * stride for size, stride in zip(y.shape[2:], strides, strict=True)]
        y = apart.reshape(y.shape[0], *merged, -1).movedim(-1, 1)
    for number, (axis, length) in enumerate(zip(axes, wanted, strict=True)):
        y = y.narrow(number + 2, axis.first, length)
    return channels_last(y)


def conv_transpose(
    x: Tensor,
    x_scale: float,
    x_zero_point: int,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    scale: float,
    zero_point: int,
    dtype: torch.dtype,
    low: int,
    high: int,
) -> Any:
    """See :func:`eagerq.kernels.reference.conv_transpose`."""
    kernel = weight.shape[2:]
    wanted = output_size(x.shape[2:], kernel, stride, padding, output_padding, dilation)
    if (
        x.dtype not in BYTES
        or dtype not in RESULTS
        or weight.dtype is not torch.int8
        or x.numel() == 0
        or weight.numel() == 0
        or weight.shape[0] != x.shape[1]
        or weight.shape[0] % groups
        or weight_scale.numel() not in (1, weight.shape[1])
        or prod(kernel) * weight.shape[0] > LONGEST_SUM * groups
        or min(wanted) <= 0
        or any(more >= max(every, step) for more, every, step in zip(output_padding, stride, dilation, strict=True))
    ):
        return NotImplemented
    bytes_ = as_bytes(x, x_zero_point)
    if bytes_ is None:
        return NotImplemented
    x, x_zero_point = bytes_
    axes = [_axis(*one) for one in zip(x.shape[2:], wanted, kernel, stride, padding, dilation, strict=True)]
    around = [axis.near for axis in axes]
    if any(axis.near != axis.far or axis.near < 0 for axis in axes):
        sides = [side for axis in reversed(axes) for side in (axis.near, axis.far)]
        x, around = channels_last(F.pad(x, sides, value=x_zero_point)), [0] * len(axes)
    phases = prod(stride)
    if mistaken(x.shape[2:], around, groups, weight.shape[0] // groups, weight.shape[1] * phases):
        return NotImplemented
    ones, steps, copies = [1] * len(axes), [axis.step for axis in axes], groups * phases

    def copied(values: Tensor) -> Tensor:
        return values if values.numel() == 1 else values.repeat(copies)

    shifted = int(x_zero_point != 0)  # all of the input's parameters that a layout depends on
    scales, shape = copied(weight_scale), list(x.shape) if x.shape[0] == 1 else None
    packed = pack(
        weight,
        weight_zero_point,
        ("transposed", shifted, shape, stride, around, dilation, groups),
        lambda: torch.ops.onednn.qconv_prepack.default(
            _by_phases(weight, axes, dilation, groups),
            *(scales, 1.0, shifted, ones, around, steps, groups, shape),
        ),
    )
    if packed is None or packed.odd is not None:
        return NotImplemented
    if bias is not None:
        bias = bias.unflatten(0, (groups, 1, -1)).repeat(1, phases, 1).flatten()
    y = convolve(
        *(x, x_scale, x_zero_point, packed.weight, scales, copied(packed.zero), bias, ones, around, steps, groups),
        *(scale, zero_point, dtype, low, high),
    )
    return _side_by_side(y, axes, groups, wanted)
