"""int8 layers with what is fused to them: a ReLU or another activation, the addition of a second input."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from eagerq import kernels
from eagerq.errors import InvalidInputError
from eagerq.intrinsic import fused
from eagerq.nn import quantized as nnq
from eagerq.nn.quantized.base import Output, expect_quantized
from eagerq.qtensor import QTensor

__all__ = [
    "BNReLU2d",
    "BNReLU3d",
    "ConvAdd2d",
    "ConvAddReLU2d",
    "ConvReLU1d",
    "ConvReLU2d",
    "ConvReLU3d",
    "LinearLeakyReLU",
    "LinearReLU",
    "LinearTanh",
]

# what a layer gives before its last step, in real numbers
_REAL = Output(dtype=torch.float32)


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


class ConvAdd2d(nnq.Conv2d):
    """Conv2d and the addition of a second input in int8, rounded once; arguments as for Conv2d's.

    What is added is not changed.  Train the fused float module: a Conv2d and a FloatFunctional of their
    own round twice.
    """

    _FLOAT_MODULE: ClassVar[Any] = fused.ConvAdd2d

    def forward(self, x: QTensor, extra_input: QTensor) -> QTensor:  # type: ignore[override]
        """The convolution of ``x`` plus ``extra_input``.

        Args:
            x: QTensor ``[N, in_channels, H, W]``.
            extra_input: QTensor of the result's shape.

        Raises:
            InvalidInputError: for float tensors, or other shapes.
        """
        extra = expect_quantized(self, extra_input)
        y = self._convolve(x, _REAL)
        if extra.integers.shape != y.shape:
            raise InvalidInputError(
                f"what is added has shape {tuple(extra.integers.shape)}, the convolution's result {tuple(y.shape)}",
                module=self,
                remedy="check the shortcut's channels and stride",
            )
        y = y + kernels.dequantize(extra.integers, extra.scale, extra.zero_point)
        output = self._clamped_output
        return QTensor(kernels.requantize(y, *output), output.scale, output.zero_point)


class ConvAddReLU2d(ConvAdd2d):
    """As :class:`ConvAdd2d`, with a ReLU behind."""

    post_op = "relu"
    _FLOAT_MODULE = fused.ConvAddReLU2d


class _FusedLinear(nnq.Linear):
    """What a Linear with an activation is, under torch's argument names."""

    _BIAS = "bias"

    def __init__(self, in_features: int, out_features: int, bias: bool = True, dtype: torch.dtype = torch.int8) -> None:
        super().__init__(in_features, out_features, bias, dtype)

    def _activate(self, y: Tensor) -> Tensor:
        """The activation of real numbers."""
        raise NotImplementedError

    def forward(self, x: QTensor) -> QTensor:
        y = self._activate(self._multiply(x, _REAL))
        output = self.output
        return QTensor(kernels.requantize(y, *output), output.scale, output.zero_point)


class LinearReLU(_FusedLinear):
    """Linear and ReLU in int8; ``bias`` tells whether there is one, else as :class:`eagerq.nn.quantized.Linear`."""

    post_op = "relu"
    _FLOAT_MODULE = fused.LinearReLU
    forward = nnq.Linear.forward  # the ReLU is a clamp of the integers


class LinearLeakyReLU(_FusedLinear):
    """Linear and LeakyReLU in int8, rounded once.

    Args:
        in_features, out_features, bias, dtype: as for :class:`LinearReLU`.
        negative_slope: factor of negative values; not in the state_dict.
    """

    _FLOAT_MODULE = fused.LinearLeakyReLU

    def __init__(
        self,
        in_features: int,
        out_features: int,
        negative_slope: float,
        bias: bool = True,
        dtype: torch.dtype = torch.int8,
    ) -> None:
        super().__init__(in_features, out_features, bias, dtype)
        self.negative_slope = negative_slope

    @classmethod
    def _more_arguments(cls, mod: Any) -> dict[str, Any]:
        return {"negative_slope": mod[1].negative_slope}

    def _activate(self, y: Tensor) -> Tensor:
        return F.leaky_relu(y, self.negative_slope)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, negative_slope={self.negative_slope}"


class LinearTanh(_FusedLinear):
    """Linear and Tanh in int8, rounded once; arguments as for :class:`LinearReLU`."""

    _FLOAT_MODULE = fused.LinearTanh

    def _activate(self, y: Tensor) -> Tensor:
        return y.tanh()
