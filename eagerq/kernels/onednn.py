"""int8 linear and convolution on x86 through oneDNN's operators, which take plain integer tensors.

What they cannot do exactly is refused here (``NotImplemented``) and goes to the reference: outputs of
other types than 8-bit integers and float32, weights most of whose zero points are not zero, sums that could leave
int32 (or int16, on processors without VNNI), and the convolutions of thin groups that oneDNN gets wrong:
those with a window wholly in padding, and others of one input to a group.  So are shapes that do not fit
each other, which it would not always
notice.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from eagerq.kernels import reference
from eagerq.kernels.packing import pack
from eagerq.kernels.reference import channels_last

__all__ = ["BYTES", "LONGEST_SUM", "RESULTS", "as_bytes", "available", "conv", "convolve", "linear", "mistaken"]

_NAMES = ("qlinear_prepack", "qlinear_pointwise", "qconv_prepack", "qconv_pointwise")
BYTES = (torch.uint8, torch.int8)
RESULTS = (*BYTES, torch.float32)
# products of a byte and a signed byte that an int32 sum can take
LONGEST_SUM = (2**31 - 1) // (255 * 128)


def available() -> bool:
    """Whether this build and processor have the operators."""
    return (
        platform.machine().lower() in ("x86_64", "amd64")
        and torch.backends.mkldnn.is_available()
        and all(hasattr(torch.ops.onednn, name) for name in _NAMES)
    )


@lru_cache(maxsize=1)
def _saturates() -> bool:
    """Whether the processor cuts sums of two products at 16 bits, as those without VNNI do: tried out."""
    x = torch.full((1, 64), 255, dtype=torch.uint8)
    weight = torch.ops.onednn.qlinear_prepack.default(torch.full((64, 64), 127, dtype=torch.int8), None)
    one, zero = torch.ones(1), torch.zeros(1, dtype=torch.int32)
    y = torch.ops.onednn.qlinear_pointwise.default(
        x, 1.0, 0, weight, one, zero, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return bool((y != 255 * 127 * 64).any())


def _too_big(x: Tensor) -> bool:
    """Whether products of these bytes could saturate; 7 bits (a reduced range) never do."""
    return _saturates() and bool((x > 127).any())


def _unsigned(x: Tensor, zero_point: int) -> tuple[Tensor, int]:
    """The same numbers in uint8: data and zero point are moved alike."""
    return (x, zero_point) if x.dtype is torch.uint8 else (x.view(torch.uint8).bitwise_xor(128), zero_point + 128)


# the clamps that the operators take as post-ops, by the dimension of their input
_POST_OPS = {2: ("relu", "hardtanh"), 3: ("relu",), 4: ("relu", "hardtanh"), 5: ()}


def _post_op(
    dim: int, scale: float, zero_point: int, dtype: torch.dtype, low: int, high: int
) -> tuple[str, list[float], bool]:
    """oneDNN's name and arguments for clamping to ``[low, high]``, and whether the integers are still to clamp."""
    if dtype is torch.float32:
        return "none", [], False
    least, most = (0, 255) if dtype is torch.uint8 else (-128, 127)
    if low <= least and high >= most:
        return "none", [], False
    if low == zero_point and high >= most and "relu" in _POST_OPS[dim]:
        return "relu", [], False
    if "hardtanh" in _POST_OPS[dim]:
        return "hardtanh", [(low - zero_point) * scale, (high - zero_point) * scale], False
    return "none", [], True


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
    rows = x.numel() // max(x.shape[-1], 1)
    if (
        x.dtype not in BYTES
        or dtype not in RESULTS
        or weight.dtype is not torch.int8
        or weight.shape[1] > LONGEST_SUM
        or weight.shape[1] != x.shape[-1]
        or weight_scale.numel() not in (1, weight.shape[0])
        or rows == 0
        or weight.numel() == 0
    ):
        return NotImplemented
    x, x_zero_point = _unsigned(x, x_zero_point)  # processors without AMX have no fast code for signed ones
    if _too_big(x):
        return NotImplemented
    packed = pack(weight, weight_zero_point, "linear", lambda: torch.ops.onednn.qlinear_prepack.default(weight, None))
    if packed is None:
        return NotImplemented
    attr, scalars, _ = _post_op(2, scale, zero_point, dtype, low, high)
    y = torch.ops.onednn.qlinear_pointwise.default(
        x.reshape(rows, x.shape[-1]).contiguous(),
        x_scale,
        x_zero_point,
        packed.weight,
        weight_scale.contiguous(),
        packed.zero,
        None if bias is None else bias.contiguous(),
        scale,
        zero_point,
        dtype,
        attr,
        scalars,
        "",
    )
    y = y.reshape(*x.shape[:-1], y.shape[-1])
    if packed.odd is not None:
        some = packed.rows(weight, weight_scale, weight_zero_point, bias)
        y[..., packed.odd] = reference.linear(x, x_scale, x_zero_point, *some, scale, zero_point, dtype, low, high)
    return y


@lru_cache(maxsize=1024)
def _every_window_sees_input(
    size: tuple[int, ...], kernel: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...]
) -> bool:
    """Whether there is a window, and none can lie wholly in padding (sufficient, not necessary)."""
    return all(
        step * (taps - 1) < length + 2 * pad and (pad == 0 or (pad <= step * (taps - 1) and step <= length))
        for length, taps, pad, step in zip(size, kernel, padding, dilation, strict=True)
    )


def as_bytes(x: Tensor, zero_point: int) -> tuple[Tensor, int] | None:
    """The same numbers as the convolutions want them: uint8, channels last; None where products could saturate."""
    x, zero_point = _unsigned(x, zero_point)
    return None if _too_big(x) else (channels_last(x), zero_point)


def mistaken(size: Sequence[int], padding: Sequence[int], groups: int, inside: int, outside: int) -> bool:
    """Whether oneDNN gets such a convolution wrong: groups of one input, with many outputs or in a flat, padded volume.

    Args:
        size, padding: of the spatial axes.
        inside, outside: inputs and outputs of each group.
    """
    flat = len(size) == 3 and size[0] == 1 and padding[0] > 0
    return groups > 1 and inside == 1 and (outside > 16 or flat)


def convolve(
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
) -> Tensor:
    """The operator itself, on an input of :func:`as_bytes` and a packed weight, with the clamp that it needs."""
    attr, scalars, unclamped = _post_op(x.dim(), scale, zero_point, dtype, low, high)
    y: Tensor = torch.ops.onednn.qconv_pointwise.default(
        x,
        x_scale,
        x_zero_point,
        weight,
        weight_scale.contiguous(),  # strides are not looked at
        weight_zero_point,
        None if bias is None else bias.contiguous(),
        stride,
        padding,
        dilation,
        groups,
        scale,
        zero_point,
        dtype,
        attr,
        scalars,
        "",
    )
    return y.clamp_(low, high) if unclamped else y


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
    kernel = weight.shape[2:]
    if (
        x.dtype not in BYTES
        or dtype not in RESULTS
        or weight.dtype is not torch.int8
        or weight.numel() > LONGEST_SUM * weight.shape[0]
        or weight.shape[1] * groups != x.shape[1]
        or weight.shape[0] % groups
        or weight_scale.numel() not in (1, weight.shape[0])
        or mistaken(x.shape[2:], padding, groups, weight.shape[1], weight.shape[0] // groups)
        or x.numel() == 0
        or weight.numel() == 0
        or not _every_window_sees_input(x.shape[2:], kernel, tuple(padding), tuple(dilation))
    ):
        return NotImplemented
    bytes_ = as_bytes(x, x_zero_point)
    if bytes_ is None:
        return NotImplemented
    x, x_zero_point = bytes_
    # the layout depends on whether there is a zero point, not on its value nor on the scale
    shifted = int(x_zero_point != 0)
    # a single image is worth packing for its very shape
    shape = list(x.shape) if x.shape[0] == 1 else None
    packed = pack(
        weight,
        weight_zero_point,
        (shifted, shape, stride, padding, dilation, groups),
        lambda: torch.ops.onednn.qconv_prepack.default(
            weight, weight_scale, 1.0, shifted, stride, padding, dilation, groups, shape
        ),
    )
    if packed is None:
        return NotImplemented
    how, output = (stride, padding, dilation), (scale, zero_point, dtype, low, high)
    common: Any = (packed.weight, weight_scale, packed.zero, bias, *how, groups, *output)
    y = convolve(x, x_scale, x_zero_point, *common)
    if packed.odd is not None:
        # each of them becomes a group of its own, with the inputs that it sees
        seen = torch.div(packed.odd, weight.shape[0] // groups, rounding_mode="floor")
        inputs = x if groups == 1 else x.unflatten(1, (groups, -1))[:, seen].flatten(1, 2)
        rows = packed.rows(weight, weight_scale, weight_zero_point, bias)
        odd: Any = (*rows, *how, 1 if groups == 1 else len(seen), *output)
        y[:, packed.odd] = reference.conv(inputs, x_scale, x_zero_point, *odd)
    return y
