"""Max pooling of integers, which torch does one value at a time (or refuses) with channels last."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.utils import _ntuple

from eagerq import native
from eagerq.kernels.reference import MEMORY_FORMATS
from eagerq.scheme import integer_type

__all__ = ["global_average", "max_pool"]


def _windows(length: int, taps: int, every: int, pad: int, step: int, ceil_mode: bool) -> int:
    """How many windows there are along an axis; a last one wholly in padding does not count."""
    reach = length + 2 * pad - step * (taps - 1) - 1
    if not ceil_mode:
        return reach // every + 1
    count = -(-reach // every) + 1
    return count - 1 if (count - 1) * every >= length + pad else count


def max_pool(
    x: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """Largest integer in each window, by whole slices of channels and one axis after the other.

    Args:
        x: integers ``[N, C, …]`` with one, two or three spatial axes.
        others: as for :func:`torch.nn.functional.max_pool2d`.

    Returns:
        Integers of ``x``'s dtype with their channels last in memory (where there are two or more axes).
    """
    dim = x.dim() - 2
    each = _ntuple(dim)
    taps, pads, steps = each(kernel_size), each(padding), each(dilation)
    strides = taps if stride is None or stride == [] else each(stride)
    counts = [_windows(*axis, ceil_mode) for axis in zip(x.shape[2:], taps, strides, pads, steps, strict=True)]
    y = x.contiguous(memory_format=MEMORY_FORMATS[x.dim()])
    if dim == 2 and x.element_size() == 1 and native.serves(y):
        return native.max_pool(y, taps, strides, pads, steps, counts)
    y = y.movedim(1, -1)
    around = [0, 0]
    for axis in reversed(range(dim)):
        end = (counts[axis] - 1) * strides[axis] + steps[axis] * (taps[axis] - 1) + 1
        around += [pads[axis], max(0, end - x.shape[axis + 2] - pads[axis])]
    if any(around):
        y = F.pad(y, around, value=integer_type(x.dtype).minimum)
    for axis in range(dim):
        last = (counts[axis] - 1) * strides[axis] + 1
        slices = [
            y.narrow(axis + 1, tap * steps[axis], last)[
                (slice(None),) * (axis + 1) + (slice(None, None, strides[axis]),)
            ]
            for tap in range(taps[axis])
        ]
        y = slices[0]
        for other in slices[1:]:
            y = torch.maximum(y, other)
    return y.movedim(-1, 1).contiguous(memory_format=MEMORY_FORMATS[x.dim()])


_MEANS = (torch.mean, Tensor.mean)
_LARGEST_EXACT = 2**24 // 255  # of how many bytes float32 holds the sum, whatever the order


def _keeps_axes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool | None:
    """Whether an average over height and width keeps these axes; None for any other average."""
    given = dict(zip(("dim", "keepdim") if func in _MEANS else ("output_size",), args, strict=False), **kwargs)
    if func is F.adaptive_avg_pool2d:
        return True if given.get("output_size") in (1, (1, 1), [1, 1]) else None
    axes = given.get("dim")
    if func not in _MEANS or set(given) - {"dim", "keepdim"} or not isinstance(axes, (tuple, list)):
        return None
    return bool(given.get("keepdim")) if sorted(axis % 4 for axis in axes) == [2, 3] else None


def global_average(func: Any, x: Tensor, zero_point: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An average over height and width of integers, rounded to them; ``NotImplemented`` for what C cannot do.

    Args:
        func: of torch, with what it takes besides ``x``.
    """
    if x.dim() != 4 or x.element_size() > 1 or not 0 < x.shape[2] * x.shape[3] <= _LARGEST_EXACT:
        return NotImplemented
    keeps = _keeps_axes(func, args, kwargs)
    if keeps is None or not native.serves(x) or not x.is_contiguous(memory_format=torch.channels_last):
        return NotImplemented
    kind = integer_type(x.dtype)
    y = native.spatial_mean(x, zero_point, kind.minimum, kind.maximum)
    return y if keeps else y.flatten(1)
