"""Dynamic layers with what is fused to them."""

from __future__ import annotations

import torch

from eagerq.intrinsic import fused
from eagerq.nn.quantized import dynamic

__all__ = ["LinearReLU"]


class LinearReLU(dynamic.Linear):
    """Linear and ReLU with a small weight; arguments and errors as for :class:`eagerq.nn.quantized.dynamic.Linear`."""

    post_op = "relu"
    _FLOAT_MODULE = fused.LinearReLU
    _BIAS = "bias"
    _reduced_since = 0

    def __init__(self, in_features: int, out_features: int, bias: bool = True, dtype: torch.dtype = torch.int8) -> None:
        super().__init__(in_features, out_features, bias, dtype)
