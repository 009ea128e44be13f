"""What every function of quantized tensors asks of its input."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from eagerq.errors import InvalidInputError, NotQuantizedError
from eagerq.qtensor import QTensor

__all__ = ["quantized"]


def quantized(x: Any, name: str) -> QTensor:
    """``x``, if it is a QTensor with one scale.

    Args:
        name: the function's, for the message.

    Raises:
        NotQuantizedError: for a float tensor, and whatever else is no QTensor.
        InvalidInputError: for a per-channel QTensor.
    """
    if not isinstance(x, QTensor):
        got = f"a tensor of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise NotQuantizedError(
            f"Input to 'quantized.{name}' must be quantized! It got {got}",
            remedy="quantize it first (QuantStub, eagerq.quantize_per_tensor)",
        )
    if x.axis is not None:
        raise InvalidInputError(
            f"'quantized.{name}' got a per-channel tensor", remedy="quantize activations per tensor"
        )
    return x
