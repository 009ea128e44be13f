"""What torch's activation functions do with QTensors.

Those with a known range (sigmoid, tanh …) give their result the parameters of that range; the others keep
the tensor's own.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eagerq import kernels, native
from eagerq.kernels.dispatch import dialect
from eagerq.qtensor import QTensor
from eagerq.qtensor_ops import _handle, _named, _per_tensor
from eagerq.scheme import integer_type

__all__ = ["pointwise", "softmax"]


def pointwise(
    x: QTensor, function: str, arguments: tuple[float, ...] = (), scale: Any = None, zero_point: Any = None
) -> QTensor:
    """A function of :data:`eagerq.kernels.activation.FUNCTIONS` of each value.

    Args:
        x: QTensor with one scale and zero point.
        function, arguments: its name there, and what it takes besides ``x``.
        scale, zero_point: parameters of the result; ``x``'s where None.

    Returns:
        QTensor of ``x``'s shape and dtype.
    """
    kind = integer_type(x.integers.dtype)
    scale = x.scale if scale is None else float(scale)
    zero_point = x.zero_point if zero_point is None else int(zero_point)
    output = (scale, zero_point, kind.storage, kind.minimum, kind.maximum)
    integers = kernels.pointwise(x.integers, function, list(map(float, arguments)), x.scale, x.zero_point, *output)
    return QTensor(integers, scale, zero_point)


def _unit_interval(x: QTensor) -> tuple[float, int]:
    """The parameters that cover [0, 1) with every integer."""
    kind = integer_type(x.integers.dtype)
    return 1.0 / (kind.maximum - kind.minimum + 1), kind.minimum


@_handle(*_named("sigmoid"))
def _sigmoid(x: QTensor) -> QTensor:
    _per_tensor(x, torch.sigmoid)
    return pointwise(x, "sigmoid", (), *_unit_interval(x))


@_handle(*_named("tanh"))
def _tanh(x: QTensor) -> QTensor:
    _per_tensor(x, torch.tanh)
    scale, least = _unit_interval(x)
    return pointwise(x, "tanh", (), 2 * scale, least + round(0.5 / scale))


@_handle(F.hardsigmoid)
def _hardsigmoid(x: QTensor, inplace: bool = False) -> QTensor:
    _per_tensor(x, F.hardsigmoid)
    y = pointwise(x, "hardsigmoid", (), *_unit_interval(x))
    return x.overwrite(y) if inplace else y


def softmax(x: QTensor, dim: int, scale: float, zero_point: int, dtype: torch.dtype, low: int, high: int) -> QTensor:
    """Softmax along ``dim``, computed in float32 and quantized with the parameters given."""
    real = torch.softmax(x.dequantize(), dim)
    return QTensor(kernels.quantize(real, scale, zero_point, dtype, low, high), scale, zero_point)


@_handle(F.softmax, *_named("softmax"))
def _softmax(x: QTensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> QTensor:
    _per_tensor(x, F.softmax)
    if dim is None:
        dim = F._get_softmax_dim("softmax", x.dim(), _stacklevel + 2)  # type: ignore[attr-defined]
    kind = integer_type(x.integers.dtype)
    return softmax(x, dim, *_unit_interval(x), kind.storage, kind.minimum, kind.maximum)


@_handle(F.leaky_relu)
def _leaky_relu(x: QTensor, negative_slope: float = 0.01, inplace: bool = False) -> QTensor:
    _per_tensor(x, F.leaky_relu)
    y = pointwise(x, "leaky_relu", (negative_slope,))
    return x.overwrite(y) if inplace else y


@_handle(F.leaky_relu_)
def _leaky_relu_(x: QTensor, negative_slope: float = 0.01) -> QTensor:
    return _leaky_relu(x, negative_slope, True)


@_handle(F.threshold, torch.threshold)
def _threshold(x: QTensor, threshold: float, value: float, inplace: bool = False) -> QTensor:
    _per_tensor(x, F.threshold)
    y = pointwise(x, "threshold", (threshold, value))
    return x.overwrite(y) if inplace else y


@_handle(torch.threshold_)
def _threshold_(x: QTensor, threshold: float, value: float) -> QTensor:
    return _threshold(x, threshold, value, True)


# computed on the real values, and rounded back to the tensor's own parameters
def _requantized(func: Any) -> Any:
    def handler(x: QTensor, *args: Any, **kwargs: Any) -> QTensor:
        _per_tensor(x, func)
        real: Tensor = func(x.dequantize(), *args, **kwargs)
        kind = integer_type(x.integers.dtype)
        return x.like(kernels.quantize(real, x.scale, x.zero_point, kind.storage, kind.minimum, kind.maximum))

    return handler


for _func in _named("std"):
    _handle(_func)(_requantized(_func))

_computed_gelu = _requantized(F.gelu)


@lru_cache(maxsize=256)
def _gelu_table(dtype: torch.dtype, scale: float, zero_point: int, approximate: str) -> Tensor:
    every = torch.arange(256, dtype=torch.uint8, device="cpu").view(dtype)
    table: Tensor = _computed_gelu(QTensor(every, scale, zero_point), approximate=approximate).integers
    return table


@_handle(F.gelu)
def _gelu(x: QTensor, approximate: str = "none") -> QTensor:
    _per_tensor(x, F.gelu)
    integers = x.integers
    if dialect() or not (integers.element_size() == 1 and native.serves(integers)):
        computed: QTensor = _computed_gelu(x, approximate=approximate)
        return computed
    table = _gelu_table(integers.dtype, x.scale, x.zero_point, approximate)
    return x.like(native.look_up(integers, table))
