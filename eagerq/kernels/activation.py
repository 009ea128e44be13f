"""Functions of one activation, integers to integers: a table of 256 answers, then a look-up.

The table is the formula's own result for each integer, computed once in float32 on the CPU, so that every
device gives the same integers.  Wider integers go through the formula itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from eagerq import native
from eagerq.functional import channel_shape
from eagerq.kernels.dispatch import Kernel
from eagerq.kernels.reference import reciprocal, requantized, scaled, single

__all__ = ["FUNCTIONS", "pointwise", "prelu"]

_OUTPUT = "float scale, int zero_point, ScalarType dtype, int low, int high"


def _elu(x: Tensor, alpha: float, input_scale: float) -> Tensor:
    return torch.where(x > 0, x, torch.expm1(x * input_scale) * alpha)


def _hardsigmoid(x: Tensor) -> Tensor:
    return (x + 3).clamp_(0, 6) / 6


def _hardswish(x: Tensor) -> Tensor:
    return x * (x + 3).clamp_(0, 6) / 6


def _leaky_relu(x: Tensor, negative_slope: float) -> Tensor:
    return torch.where(x > 0, x, x * negative_slope)


def _sigmoid(x: Tensor) -> Tensor:
    return ((-x).exp() + 1).reciprocal()


def _threshold(x: Tensor, threshold: float, value: float) -> Tensor:
    return torch.where(x > threshold, x, value)


# name -> function of real numbers, whose further arguments are numbers
FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "elu": _elu,
    "hardsigmoid": _hardsigmoid,
    "hardswish": _hardswish,
    "leaky_relu": _leaky_relu,
    "sigmoid": _sigmoid,
    "tanh": torch.tanh,
    "threshold": _threshold,
}

# those that torch has always divided by the scale as a Python number, not as a float32
_INVERTED_IN_DOUBLE = ("hardswish", "sigmoid")


def _formula(
    x: Tensor,
    function: str,
    arguments: Sequence[float],
    x_scale: float,
    x_zero_point: int,
    scale: float,
    zero_point: int,
    dtype: torch.dtype,
    low: int,
    high: int,
) -> Tensor:
    real = FUNCTIONS[function](scaled(x, x_scale, x_zero_point), *arguments)
    inverse = single(1.0 / scale) if function in _INVERTED_IN_DOUBLE else reciprocal(scale)
    return requantized(real, inverse, zero_point, dtype, low, high)


@lru_cache(maxsize=512)
def _table(device: torch.device, x_dtype: torch.dtype, *call: Any) -> Tensor:
    every = torch.arange(256, dtype=torch.uint8, device="cpu").view(x_dtype)
    return _formula(every, *call).to(device)


def _pointwise(
    x: Tensor,
    function: str,
    arguments: Sequence[float],
    x_scale: float,
    x_zero_point: int,
    scale: float,
    zero_point: int,
    dtype: torch.dtype,
    low: int,
    high: int,
) -> Tensor:
    """A function of :data:`FUNCTIONS` of a quantized tensor, requantized; it lies in memory as ``x`` does."""
    call = (function, tuple(arguments), x_scale, x_zero_point, scale, zero_point, dtype, low, high)
    if x.element_size() > 1 or type(x) is not Tensor:  # a fake tensor's table must not stay
        return _formula(x, *call)
    return look_up(x, _table(x.device, x.dtype, *call))


def look_up(x: Tensor, table: Tensor) -> Tensor:
    """The answer for each integer of 8 bits, of which ``table`` has 256, the first for the byte 0."""
    found = native.look_up(x, table) if table.element_size() == 1 else NotImplemented
    if found is not NotImplemented:
        answers: Tensor = found
        return answers
    index = x.view(torch.uint8).to(torch.int32)  # dense, so that it can be read in the order of its memory
    answers = table.index_select(0, index.as_strided((index.numel(),), (1,)))
    return answers.as_strided(index.shape, index.stride())


def _prelu(
    x: Tensor,
    x_scale: float,
    x_zero_point: int,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor,
    scale: float,
    zero_point: int,
    dtype: torch.dtype,
    low: int,
    high: int,
) -> Tensor:
    """``x`` where positive, elsewhere times its channel's slope (axis 1), requantized; slopes are integers too."""
    slope = weight.to(torch.float32).sub_(weight_zero_point).mul_(weight_scale)
    if x.dim() > 1:
        slope = slope.reshape(channel_shape(x.dim(), 1))
    real = scaled(x, x_scale, x_zero_point)
    return requantized(torch.where(real > 0, real, real * slope), reciprocal(scale), zero_point, dtype, low, high)


pointwise = Kernel(
    f"pointwise(Tensor x, str function, float[] arguments, float x_scale, int x_zero_point, {_OUTPUT}) -> Tensor",
    _pointwise,
)
prelu = Kernel(
    "prelu(Tensor x, float x_scale, int x_zero_point, Tensor weight, Tensor weight_scale, Tensor weight_zero_point, "
    f"{_OUTPUT}) -> Tensor",
    _prelu,
)
