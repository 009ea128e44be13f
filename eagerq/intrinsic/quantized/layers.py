"""int8 layers with a fused ReLU."""

from __future__ import annotations

from eagerq.intrinsic import fused
from eagerq.nn import quantized as nnq

__all__ = ["BNReLU2d", "BNReLU3d", "ConvReLU1d", "ConvReLU2d", "ConvReLU3d", "LinearReLU"]


class BNReLU2d(nnq.BatchNorm2d):
    """BatchNorm2d and ReLU in int8; arguments and errors as for :class:`eagerq.nn.quantized.BatchNorm2d`."""

    post_op = "relu"
    _FLOAT_MODULE = fused.BNReLU2d


class BNReLU3d(nnq.BatchNorm3d):
    """BatchNorm3d and ReLU in int8; arguments and errors as for :class:`eagerq.nn.quantized.BatchNorm3d`."""

    post_op = "relu"
    _FLOAT_MODULE = fused.BNReLU3d


class ConvReLU1d(nnq.Conv1d):
    """Conv1d and ReLU in int8; arguments and errors as for :class:`eagerq.nn.quantized.Conv1d`."""

    post_op = "relu"
    _FLOAT_MODULE = fused.ConvReLU1d


class ConvReLU2d(nnq.Conv2d):
    """Conv2d and ReLU in int8; arguments and errors as for :class:`eagerq.nn.quantized.Conv2d`."""

    post_op = "relu"
    _FLOAT_MODULE = fused.ConvReLU2d


class ConvReLU3d(nnq.Conv3d):
    """Conv3d and ReLU in int8; arguments and errors as for :class:`eagerq.nn.quantized.Conv3d`."""

    post_op = "relu"
    _FLOAT_MODULE = fused.ConvReLU3d


class LinearReLU(nnq.Linear):
    """Linear and ReLU in int8; arguments and errors as for :class:`eagerq.nn.quantized.Linear`."""

    post_op = "relu"
    _FLOAT_MODULE = fused.LinearReLU
