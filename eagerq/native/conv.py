"""Convolutions in C, for processors that multiply bytes four at a time (AVX-512 VNNI)."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from functools import lru_cache, partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from eagerq.native.library import LIBRARY, Conv, Layer
from eagerq.native.recording import Bound, bound, recorded

__all__ = ["PackedConv", "conv", "conv_ready", "dynamic_numbers", "linear", "linear_dynamic", "linear_numbers"]

_POINT = (1, 1, 1, 1, 0, 0, 1, 1)  # a window of one
_LANES, _WIDEST = 16, 4  # int32 sums to a vector; vectors to a block of outputs


@lru_cache(maxsize=1)
def conv_ready() -> bool:
    """Whether the library is there and the processor has the instructions."""
    return LIBRARY is not None and bool(LIBRARY.eagerq_conv_ready())


def _dense(weight: Tensor) -> Tensor:
    """``[out, in, y, x]`` as blocks of outputs; in each, four bytes of a row of the window for each output."""
    rows = weight.permute(0, 2, 3, 1).flatten(2)
    vectors = -(-len(weight) // _LANES)
    whole = F.pad(rows, (0, -rows.shape[2] % 4, 0, 0, 0, vectors * _LANES - len(weight)))
    fours = whole.reshape(vectors, _LANES, -1, 4).transpose(1, 2)  # [vectors, fours, lanes, 4]
    return torch.cat([fours[a:b].transpose(0, 1).flatten() for a, b in _blocks(vectors)])


def _blocks(vectors: int) -> Iterator[tuple[int, int]]:
    """Where each block of vectors begins and ends."""
    blocks = -(-vectors // _WIDEST)
    return pairwise(number * vectors // blocks for number in range(blocks + 1))


def _from_dense(packed: Tensor, shape: torch.Size) -> Tensor:
    """What :func:`_dense` packed."""
    outputs, inputs, rows, columns = shape
    vectors, row = -(-outputs // _LANES), columns * inputs
    each = packed.numel() // vectors
    fours = [packed[a * each : b * each].view(-1, b - a, _LANES, 4).transpose(0, 1) for a, b in _blocks(vectors)]
    whole = torch.cat(fours).transpose(1, 2).reshape(vectors * _LANES, rows, -1)
    return whole[:outputs, :, :row].unflatten(2, (columns, inputs)).permute(0, 3, 1, 2)


def _depthwise(weight: Tensor) -> Tensor:
    """``[channels, 1, y, x]`` by sixteens; of each, four rows of a column of the window for each channel."""
    taps = F.pad(weight[:, 0], (0, 0, 0, -weight.shape[2] % 4, 0, -len(weight) % _LANES))
    return taps.unflatten(1, (-1, 4)).unflatten(0, (-1, _LANES)).permute(0, 2, 4, 1, 3)


def _from_depthwise(packed: Tensor, shape: torch.Size) -> Tensor:
    """What :func:`_depthwise` packed."""
    rows = packed.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    return rows[: shape[0], None, : shape[2]]


def _vectors(values: Tensor) -> Tensor:
    return F.pad(values, (0, -len(values) % _LANES))


class PackedConv:
    """A layer's parameters as the C code reads them, kept alive with what they were made from.

    Args:
        weight: int8 ``[out, in, y, x]``.
        scale, zero_point: ``[1]`` or ``[out]``.
        bias: ``[out]`` or None.
        depthwise: whether each output sees the input of its number alone.

    Attributes:
        size: bytes of the packed weight.
    """

    def __init__(self, weight: Tensor, scale: Tensor, zero_point: Tensor, bias: Tensor | None, depthwise: bool) -> None:
        outputs = len(weight)
        self.shape = weight.shape
        self.source = (scale, bias)
        self.depthwise = depthwise
        packed = _depthwise(weight) if depthwise else _dense(weight)
        sums = _vectors(weight.sum((1, 2, 3), dtype=torch.int32))
        zeros = _vectors(zero_point.expand(outputs)) if bool(zero_point.any()) else None
        real = [_vectors(scale.expand(outputs)), _vectors(torch.zeros(outputs) if bias is None else bias)]
        self.size = packed.numel()
        self._kept = [None if one is None else one.contiguous() for one in (packed, sums, zeros, *real)]
        self.layer = Layer(*(None if one is None else one.data_ptr() for one in self._kept))
        self.address = ctypes.addressof(self.layer)

    def unpack(self) -> Tensor:
        """The weight that was packed."""
        packed = self._kept[0]
        assert packed is not None
        return (_from_depthwise if self.depthwise else _from_dense)(packed, self.shape)


@lru_cache(maxsize=1024)
def _numbers(*numbers: float) -> Conv:
    return Conv(*numbers)


@bound
def conv(
    x: Tensor,
    x_scale: float,
    x_zero_point: int,
    packed: PackedConv,
    sizes: tuple[int, ...],
    how: tuple[int, ...],
    scale: float,
    zero_point: int,
    dtype: torch.dtype,
    low: int,
    high: int,
) -> Bound:
    """The convolution of :func:`eagerq.kernels.reference.conv`, of dense ``[N, C, H, W]`` with the channels last.

    Args:
        sizes: of the result, ``[N, out, H, W]``.
        how: taps, strides, padding and dilation, vertical and horizontal.
    """
    signed = x.dtype is torch.int8
    numbers = _numbers(
        *(*x.shape, *sizes[1:], *how),
        *(x_zero_point + 128 if signed else x_zero_point, signed, dtype is torch.int8, False),
        *(x_scale, 1.0 / ctypes.c_float(scale).value, zero_point, low, high),
    )
    call = LIBRARY.eagerq_depthwise if packed.depthwise else LIBRARY.eagerq_conv
    result = partial(torch.empty, sizes, dtype=dtype, memory_format=torch.channels_last)
    return Bound((x,), call, (packed.address, ctypes.byref(numbers)), result, packed.size)


def linear_numbers(
    rows: int,
    inputs: int,
    outputs: int,
    x_scale: float,
    x_zero_point: int,
    dtype: torch.dtype,
    scale: float,
    zero_point: int,
    low: int,
    high: int,
) -> Conv:
    """The sizes and numbers of a product of uint8 ``[rows, inputs]``; of a real one's output, none counts."""
    real = dtype is torch.float32
    make = Conv if real else _numbers  # the scale of real results is that of the moment
    made: Conv = make(
        *(rows, inputs, 1, 1, outputs, 1, 1, *_POINT),
        *(x_zero_point, False, dtype is torch.int8, real, x_scale),
        *((0, 0, 0, 0) if real else (1.0 / ctypes.c_float(scale).value, zero_point, low, high)),
    )
    return made


@bound
def linear(
    x: Tensor,
    x_scale: float,
    x_zero_point: int,
    packed: PackedConv,
    outputs: int,
    scale: float,
    zero_point: int,
    dtype: torch.dtype,
    low: int,
    high: int,
) -> Bound:
    """The product of :func:`eagerq.kernels.reference.linear`, of uint8 ``[…, in]``, dense, with ``in`` a multiple of 4.

    Args:
        packed: of the weight as one of ``[out, in, 1, 1]``.
        outputs: how many there are.
    """
    inputs = x.shape[-1]
    rows = x.numel() // inputs
    numbers = linear_numbers(rows, inputs, outputs, x_scale, x_zero_point, dtype, scale, zero_point, low, high)
    result = partial(torch.empty, (*x.shape[:-1], outputs), dtype=dtype)
    return Bound((x,), LIBRARY.eagerq_linear, (packed.address, ctypes.byref(numbers)), result)


@lru_cache(maxsize=1024)
def dynamic_numbers(rows: int, inputs: int, outputs: int) -> Conv:
    """The sizes of a product of reals by their own range."""
    return Conv(rows, inputs, 1, 1, outputs, 1, 1, *_POINT, 0, False, False, True)


@recorded
def linear_dynamic(x: Tensor, packed: PackedConv, outputs: int, quant_max: int) -> tuple[Tensor, bool]:
    """:func:`linear` of float32 ``[…, in]`` by its own range, and whether that is finite: else there is no result."""
    inputs = x.shape[-1]
    numbers = dynamic_numbers(x.numel() // inputs, inputs, outputs)
    out = torch.empty((*x.shape[:-1], outputs), dtype=torch.float32)
    integers = torch.empty(x.shape, dtype=torch.uint8)
    refused = LIBRARY.eagerq_linear_dynamic(
        *(x.data_ptr(), integers.data_ptr(), out.data_ptr(), quant_max, packed.address, ctypes.byref(numbers))
    )
    return out, not refused
