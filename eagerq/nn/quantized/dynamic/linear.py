"""Linear with a small weight that quantizes its input as it comes."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eagerq import kernels
from eagerq.nn.quantized.dynamic.base import DynamicModule
from eagerq.nn.quantized.linear import LinearShape

__all__ = ["Linear"]


class Linear(LinearShape, DynamicModule):
    """``y = x Wᵀ + b``, float ``[…, in_features]`` to float ``[…, out_features]``, with a weight made small.

    With an int8 weight, the input is quantized by its own range for the product; with a float16 one the
    arithmetic is float32.

    Args:
        in_features, out_features: as for :class:`torch.nn.Linear`.
        bias_: whether there is a bias.
        dtype: dtype of the weight: int8 or float16.

    Raises:
        UnsupportedError: for another dtype.
        InvalidInputError: in ``forward``, for a quantized tensor, or one of another shape.

    Example:
        >>> Linear(20, 30)(torch.randn(2, 20)).shape
        torch.Size([2, 30])
    """

    _FLOAT_MODULE: ClassVar[Any] = nn.Linear
    _DTYPES = (torch.int8, torch.float16)
    _reduced_since = 4

    def forward(self, x: Tensor) -> Tensor:
        x = self._expect_float(x)
        self._check_width(x)
        if self.dtype is torch.float16:
            y = kernels.linear_dynamic_float16(x, self._weight, self._bias)
        else:
            y = kernels.linear_dynamic(
                x, self._weight, self._weight_scale, self._weight_zero_point, self._bias, self.reduce_range
            )
        return self._in_dtype_of(x, F.relu(y) if self.post_op == "relu" else y)
