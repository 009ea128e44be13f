"""int8 Linear."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from eagerq import kernels
from eagerq.errors import InvalidInputError
from eagerq.nn.quantized.base import Output, WeightAndBias, WeightedQuantizedModule, expect_quantized
from eagerq.qtensor import QTensor

__all__ = ["Linear", "LinearShape"]


class LinearShape(WeightAndBias):
    """The constructor of a Linear, and what depends on its shape."""

    _BIAS: ClassVar[str] = "bias_"  # the constructor's name for it

    def __init__(
        self, in_features: int, out_features: int, bias_: bool = True, dtype: torch.dtype = torch.int8
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self._allocate((out_features, in_features), out_features if bias_ else None, dtype=dtype)

    @classmethod
    def _arguments(cls, module: Any) -> dict[str, Any]:
        return {
            "in_features": module.in_features,
            "out_features": module.out_features,
            cls._BIAS: module.bias is not None,
        }

    def _check_width(self, x: Tensor) -> None:
        if x.shape[-1:] != (self.in_features,):
            raise InvalidInputError(
                f"expected shape […, {self.in_features}], got {tuple(x.shape)}",
                module=self,
                remedy="check in_features, or flatten the tensor before",
            )

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {super().extra_repr()}"


class Linear(LinearShape, WeightedQuantizedModule):
    """``y = x Wᵀ + b`` on integers: QTensor ``[…, in_features]`` to QTensor ``[…, out_features]``.

    Args:
        in_features, out_features: as for :class:`torch.nn.Linear`.
        bias_: whether there is a bias.
        dtype: dtype of the weight; int8.

    Raises:
        InvalidInputError: in ``forward``, for a float tensor, or one of another shape.

    Example:
        >>> import torch, eagerq
        >>> x = eagerq.quantize_per_tensor(torch.randn(2, 20), 0.1, 128, torch.uint8)
        >>> Linear(20, 30)(x).shape
        torch.Size([2, 30])
    """

    _FLOAT_MODULE: ClassVar[Any] = nn.Linear

    def _multiply(self, x: Any, output: Output) -> Tensor:
        """Product and bias, requantized to ``output``, or left real in its float dtype."""
        x = expect_quantized(self, x)
        self._check_width(x.integers)
        parameters = (self._weight, self._weight_scale, self._weight_zero_point, self._bias)
        return kernels.linear(x.integers, x.scale, x.zero_point, *parameters, *output)

    def forward(self, x: QTensor) -> QTensor:
        output = self._clamped_output
        return QTensor(self._multiply(x, output), output.scale, output.zero_point)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, qscheme={self.weight().qscheme()}"
