"""The ends of the int8 part of a model: float to integers, and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from eagerq import kernels
from eagerq.errors import InvalidInputError
from eagerq.nn.quantized.base import Output, RequantizingModule
from eagerq.qtensor import QTensor
from eagerq.scheme import integer_type

__all__ = ["DeQuantize", "Quantize"]


class Quantize(RequantizingModule):
    """Float tensor to QTensor of the same shape.

    Args:
        scale, zero_point: parameters of the result.
        dtype: its integer dtype.

    Raises:
        InvalidInputError: in ``forward``, for a tensor that is not float.

    Example:
        >>> Quantize(0.5, 2, torch.uint8)(torch.tensor([-1.0, 0.0, 1.0])).int_repr()
        tensor([0, 2, 4], dtype=torch.uint8)
    """

    def __init__(
        self, scale: Any, zero_point: Any, dtype: torch.dtype, factory_kwargs: dict[str, Any] | None = None
    ) -> None:
        kind = integer_type(dtype)
        super().__init__(Output(float(scale), int(zero_point), kind.storage, kind.minimum, kind.maximum))

    @property
    def dtype(self) -> torch.dtype:
        """Integer dtype of the result."""
        return self.output.dtype

    def _tensors(self) -> dict[str, Tensor]:
        state = super()._tensors()
        return {**state, "scale": state["scale"].reshape(1), "zero_point": state["zero_point"].reshape(1)}

    def forward(self, x: Tensor) -> QTensor:
        if isinstance(x, QTensor) or not x.is_floating_point():
            raise InvalidInputError(
                f"expected a float tensor, got {'a QTensor' if isinstance(x, QTensor) else x.dtype}",
                module=self,
                remedy="feed it real numbers; a second QuantStub on the same path is one too many",
            )
        output = self.output
        return QTensor(kernels.quantize(x, *output), output.scale, output.zero_point)

    @classmethod
    def from_float(cls, mod: nn.Module, use_precomputed_fake_quant: bool = False, as_trained: bool = False) -> Quantize:
        """The Quantize that a prepared QuantStub stands for."""
        output = Output.of(mod, as_trained)
        new = cls(output.scale, output.zero_point, output.dtype)
        new.output = output
        return new

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dtype={self.dtype}"


class DeQuantize(nn.Module):
    """QTensor to the float32 tensor of its real values; a float tensor passes as it is.

    Example:
        >>> q = Quantize(0.5, 2, torch.uint8)(torch.tensor([-1.0, 1.0]))
        >>> DeQuantize()(q)
        tensor([-1.,  1.])
    """

    def forward(self, x: Tensor) -> Tensor:
        return x.dequantize() if isinstance(x, QTensor) else x

    @classmethod
    def from_float(cls, mod: nn.Module, use_precomputed_fake_quant: bool = False) -> DeQuantize:
        """The DeQuantize that a DeQuantStub stands for."""
        return cls()
