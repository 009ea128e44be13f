"""Activation functions of quantized tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from eagerq.errors import InvalidArgumentError, InvalidConfigError
from eagerq.nn.quantized.functional.inputs import quantized
from eagerq.qtensor import QTensor
from eagerq.qtensor_activations import pointwise

__all__ = ["celu", "clamp", "dropout", "elu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "threshold"]


def celu(input: QTensor, scale: float, zero_point: int, alpha: float = 1.0) -> QTensor:
    """``x`` where positive, elsewhere ``alpha·(exp(x/alpha) - 1)``, with the parameters given.

    Raises:
        InvalidArgumentError: for an ``alpha`` of 0.
    """
    x = quantized(input, "celu")
    if alpha == 0:
        raise InvalidArgumentError("celu with an alpha of 0", remedy="use relu")
    return pointwise(x, "elu", (alpha, 1 / alpha), scale, zero_point)


def elu(input: QTensor, scale: float, zero_point: int, alpha: float = 1.0) -> QTensor:
    """``x`` where positive, elsewhere ``alpha·(exp(x) - 1)``, with the parameters given."""
    return pointwise(quantized(input, "elu"), "elu", (alpha, 1.0), scale, zero_point)


def hardswish(input: QTensor, scale: float, zero_point: int) -> QTensor:
    """``x·min(max(x + 3, 0), 6)/6``, with the parameters given.

    Example:
        >>> import eagerq
        >>> x = eagerq.quantize_per_tensor(torch.tensor([-4.0, 4.0]), 0.1, 50, torch.uint8)
        >>> hardswish(x, 0.125, 10).int_repr()
        tensor([10, 42], dtype=torch.uint8)
    """
    return pointwise(quantized(input, "hardswish"), "hardswish", (), scale, zero_point)


def leaky_relu(
    input: QTensor,
    negative_slope: float = 0.01,
    inplace: bool = False,
    scale: float | None = None,
    zero_point: int | None = None,
) -> Tensor:
    """``x`` where positive, elsewhere ``negative_slope·x``.

    Args:
        inplace: write the result into ``input``.
        scale, zero_point: parameters of the result; ``input``'s unless both are given.

    Raises:
        InvalidConfigError: for new parameters in place.
    """
    x = quantized(input, "leaky_relu")
    if scale is None or zero_point is None:
        return F.leaky_relu(x, negative_slope, inplace)
    if inplace:
        raise InvalidConfigError("Cannot rescale with `inplace`", remedy="leave out inplace, or the parameters")
    return pointwise(x, "leaky_relu", (negative_slope,), scale, zero_point)


def hardtanh(input: QTensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Tensor:
    """``min(max(x, min_val), max_val)``; the parameters stay."""
    return F.hardtanh(quantized(input, "hardtanh"), min_val, max_val, inplace)


def hardsigmoid(input: QTensor, inplace: bool = False) -> Tensor:
    """``min(max(x + 3, 0), 6)/6``, with the parameters that cover 0 to 1: a scale of 1/256 for 8 bits."""
    return F.hardsigmoid(quantized(input, "hardsigmoid"), inplace)


def threshold(input: QTensor, threshold: float, value: float) -> Tensor:
    """``x`` where above ``threshold``, elsewhere ``value``; the parameters stay.

    Raises:
        InvalidArgumentError: when one of the two is None.
    """
    x = quantized(input, "threshold")
    for name, given in (("threshold", threshold), ("value", value)):
        if given is None:
            raise InvalidArgumentError(f"Input to '{name}' must be specified!")
    return F.threshold(x, threshold, value)


def clamp(input: QTensor, min_: float, max_: float) -> Tensor:
    """``min(max(x, min_), max_)``; the parameters stay."""
    return torch.clamp(quantized(input, "clamp"), min_, max_)


def dropout(
    input: QTensor, output_scale: float = 1.0, output_zero_point: int = 0, p: float = 0.5, training: bool = False
) -> Tensor:
    """``input`` itself: integers are not trained on.  The other arguments are without effect."""
    return quantized(input, "dropout")
