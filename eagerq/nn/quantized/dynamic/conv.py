"""Convolutions with int8 weights that quantize their input as it comes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from eagerq import kernels
from eagerq.nn.quantized.conv import ConvShape
from eagerq.nn.quantized.conv_transpose import TransposedShape
from eagerq.nn.quantized.dynamic.base import DynamicModule

__all__ = ["Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"]


class _ConvNd(ConvShape, DynamicModule):
    """What the ordinary ones share, whatever their dimension."""

    def forward(self, input: Tensor, reduce_range: bool = True) -> Tensor:
        """Float ``[N, in_channels, …]`` to float ``[N, out_channels, …]``.

        Args:
            reduce_range: False spreads the input over all of 0 to 255.
        """
        x = self._expect_float(input)
        self._check_shape(x)
        parameters = (self._weight, self._weight_scale, self._weight_zero_point, self._bias)
        how = (self._stride, self._padding, self._dilation, self.groups, self.reduce_range and reduce_range)
        return self._in_dtype_of(x, kernels.conv_dynamic(self._padded(x), *parameters, *how))


class Conv1d(_ConvNd):
    """:class:`torch.nn.Conv1d` with an int8 weight; arguments as there.

    The input is quantized by its own range for the products; the result is not.

    Args:
        reduce_range: False spreads the input over all of 0 to 255 rather than 0 to 127.

    Raises:
        InvalidInputError: in ``forward``, for a quantized tensor, or one of another shape.

    Example:
        >>> import torch
        >>> Conv1d(16, 33, 3, stride=2)(torch.randn(20, 16, 100)).shape
        torch.Size([20, 33, 49])
    """

    _dim = 1
    _FLOAT_MODULE: ClassVar[Any] = nn.Conv1d

    def __init__(self, *args: Any, reduce_range: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reduce_range = reduce_range


class Conv2d(_ConvNd):
    """:class:`torch.nn.Conv2d` with an int8 weight; see :class:`Conv1d`."""

    _dim = 2
    _FLOAT_MODULE: ClassVar[Any] = nn.Conv2d


class Conv3d(_ConvNd):
    """:class:`torch.nn.Conv3d` with an int8 weight; see :class:`Conv1d`."""

    _dim = 3
    _FLOAT_MODULE: ClassVar[Any] = nn.Conv3d


class _ConvTransposeNd(TransposedShape, DynamicModule):
    """What transposed ones share, whatever their dimension."""

    def forward(self, input: Tensor, reduce_range: bool = True, output_size: Sequence[int] | None = None) -> Tensor:
        """Float ``[N, in_channels, …]`` to float ``[N, out_channels, …]``.

        Args:
            reduce_range: False spreads the input over all of 0 to 255.
            output_size: of the result, where ``stride`` leaves a choice, as for torch's own.
        """
        x = self._expect_float(input)
        self._check_shape(x)
        parameters = (self._weight, self._weight_scale, self._weight_zero_point, self._bias)
        how = (self._stride, list(self.padding), self._output_padding(x, output_size), self._dilation, self.groups)
        reduce_range = self.reduce_range and reduce_range
        return self._in_dtype_of(x, kernels.conv_transpose_dynamic(x, *parameters, *how, reduce_range))


class ConvTranspose1d(_ConvTransposeNd):
    """:class:`torch.nn.ConvTranspose1d` with an int8 weight; arguments as there.

    The input is quantized by its own range for the products; the result is not.

    Raises:
        InvalidArgumentError: for a ``padding_mode`` other than ``"zeros"``, or groups that do not fit.
        InvalidInputError: in ``forward``, for a quantized tensor, or one of another shape.
    """

    _dim = 1
    _FLOAT_MODULE: ClassVar[Any] = nn.ConvTranspose1d


class ConvTranspose2d(_ConvTransposeNd):
    """:class:`torch.nn.ConvTranspose2d` with an int8 weight; see :class:`ConvTranspose1d`."""

    _dim = 2
    _FLOAT_MODULE: ClassVar[Any] = nn.ConvTranspose2d


class ConvTranspose3d(_ConvTransposeNd):
    """:class:`torch.nn.ConvTranspose3d` with an int8 weight; see :class:`ConvTranspose1d`."""

    _dim = 3
    _FLOAT_MODULE: ClassVar[Any] = nn.ConvTranspose3d
