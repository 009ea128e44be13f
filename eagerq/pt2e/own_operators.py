"""The ``quantized_decomposed`` operators, for a torch that no longer brings them: same schemas, same numbers.

Loading this file registers them, so :mod:`eagerq.pt2e.operators` loads it only when nobody else has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eagerq.errors import InvalidArgumentError, InvalidInputError
from eagerq.functional import affine_qparams, channel_shape, symmetric_qparams

__all__: list[str] = []

# A fragment: whoever else adds operators to the namespace, before or after, may.
LIBRARY = torch.library.Library("quantized_decomposed", "FRAGMENT")

_FLOAT = (torch.float32, torch.float16, torch.bfloat16)
_INTEGER = (torch.uint8, torch.int8, torch.uint16, torch.int16, torch.int32)
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


# --- what is asked of arguments -----------------------------------------------------------------------------


def _check_float(x: Tensor) -> None:
    if x.dtype not in _FLOAT:
        raise InvalidInputError(f"Expecting input to have dtype torch.float32, but got dtype: {x.dtype}")


def _check_stored(x: Tensor, dtype: torch.dtype) -> None:
    if x.dtype != dtype:
        raise InvalidInputError(f"Expecting input to have dtype: {dtype}, but got dtype: {x.dtype}")


def _check_range(low: int, high: int, dtype: torch.dtype) -> None:
    if dtype not in _INTEGER + _FLOAT8:
        raise InvalidArgumentError(
            f"Unsupported dtype: {dtype}", remedy="use an integer type of 8 to 32 bits or float8"
        )
    limits = torch.iinfo(dtype) if dtype in _INTEGER else torch.finfo(dtype)
    if low < limits.min or high > limits.max:
        raise InvalidArgumentError(f"[{low}, {high}] is out of bounds for {dtype}: [{limits.min}, {limits.max}]")


def _check_single(*values: Any) -> None:
    for value in values:
        if isinstance(value, Tensor) and value.numel() != 1:
            raise InvalidInputError(f"Expecting a tensor of one element, but received: {value.numel()}")


def _check_axis(x: Tensor, axis: int) -> None:
    if axis >= x.dim():
        raise InvalidArgumentError(f"Expecting axis to be < {x.dim()}, got {axis}")


def _numbers(*values: Any) -> list[Any]:
    _check_single(*values)
    return [value.item() if isinstance(value, Tensor) else value for value in values]


# --- kernels: each serves all overloads of its operator -----------------------------------------------------


def _quantize(x: Tensor, scale: Any, zero_point: Any, low: int, high: int, dtype: torch.dtype) -> Tensor:
    _check_float(x)
    _check_range(low, high, dtype)
    return torch.clamp(torch.round(x.float() * (1.0 / scale)) + zero_point, low, high).to(dtype)


def _quantize_per_tensor(x: Tensor, scale: Any, zero_point: Any, low: Any, high: Any, dtype: torch.dtype) -> Tensor:
    scale, zero_point, low, high = _numbers(scale, zero_point, low, high)
    return _quantize(x, scale, zero_point, low, high, dtype)


def _quantize_per_channel(
    x: Tensor, scales: Tensor, zero_points: Tensor, axis: int, low: int, high: int, dtype: torch.dtype
) -> Tensor:
    _check_axis(x, axis)
    shape = channel_shape(x.dim(), axis)
    return _quantize(x, scales.view(shape), zero_points.view(shape), low, high, dtype)


def _dequantize_per_tensor(
    x: Tensor,
    scale: Any,
    zero_point: Any,
    low: Any,
    high: Any,
    dtype: torch.dtype,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    _check_stored(x, dtype)
    scale, zero_point, low, high = _numbers(scale, zero_point, low, high)
    _check_range(0, 0, dtype)  # its own range is only for matching patterns
    return (x.to(out_dtype or torch.float32) - zero_point) * scale


def _dequantize_per_channel(
    x: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    axis: int,
    low: int,
    high: int,
    dtype: torch.dtype,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    _check_stored(x, dtype)
    _check_axis(x, axis)
    _check_range(low, high, dtype)
    shape = channel_shape(x.dim(), axis)
    centred = x if zero_points is None else x - zero_points.view(shape)
    return (centred * scales.view(shape)).to(out_dtype or torch.float32)


def _choose_qparams(x: Tensor, low: int, high: int, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return _chosen(affine_qparams(*_extremes(x, low, high), low, high, torch.tensor([eps], device=x.device)))


def _choose_qparams_symmetric(x: Tensor, low: int, high: int, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    middle = 128 if dtype == torch.uint8 else 0
    return _chosen(symmetric_qparams(*_extremes(x, low, high), low, high, torch.tensor([eps], device=x.device), middle))


def _convert_element_type(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.ops.prims.convert_element_type.default(x, dtype)


def _extremes(x: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    _check_float(x)
    if not low <= 0 <= high or low == high:
        raise InvalidArgumentError(f"[{low}, {high}] is no quantization range", remedy="include 0, and more than it")
    least, greatest = torch.aminmax(x)
    return least, greatest


def _chosen(parameters: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    scale, zero_point = parameters
    return scale.double(), zero_point.to(torch.int64)


# --- shapes alone, for tracing ------------------------------------------------------------------------------


def _fake_quantize(x: Tensor, *arguments: Any) -> Tensor:
    _check_float(x)
    *_, dtype = arguments
    return torch.empty_like(x, dtype=dtype)


def _fake_dequantize(x: Tensor, *arguments: Any, out_dtype: torch.dtype | None = None) -> Tensor:
    *_, dtype = arguments
    _check_stored(x, dtype)
    return torch.empty_like(x, dtype=out_dtype or torch.float32)


def _fake_choose(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    _check_float(x)
    return x.new_empty(1, dtype=torch.float64), x.new_empty(1, dtype=torch.int64)


def _fake_convert_element_type(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype)


# --- the operators ------------------------------------------------------------------------------------------

_NUMBERS = "float scale, int zero_point, int quant_min, int quant_max"
_TENSORS = "Tensor scale, Tensor zero_point, int quant_min, int quant_max"
_ALL_TENSORS = "Tensor scale, Tensor zero_point, Tensor quant_min, Tensor quant_max"
_CHANNELS = "int axis, int quant_min, int quant_max"
_CHOICE = "(Tensor input, int quant_min, int quant_max, float eps, ScalarType dtype) -> (Tensor, Tensor)"
_OUT = "*, ScalarType? out_dtype=None"


def _define(name: str, signature: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    LIBRARY.define(name + signature)
    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    LIBRARY.impl(name, fake, "Meta")


for _overload, _parameters in (("", _NUMBERS), (".tensor", _TENSORS), (".tensor2", _ALL_TENSORS)):
    _define(
        f"quantize_per_tensor{_overload}",
        f"(Tensor input, {_parameters}, ScalarType dtype) -> Tensor",
        _quantize_per_tensor,
        _fake_quantize,
    )
    _define(
        f"dequantize_per_tensor{_overload}",
        f"(Tensor input, {_parameters}, ScalarType dtype, {_OUT}) -> Tensor",
        _dequantize_per_tensor,
        _fake_dequantize,
    )
_define(
    "quantize_per_channel",
    f"(Tensor input, Tensor scales, Tensor zero_points, {_CHANNELS}, ScalarType dtype) -> Tensor",
    _quantize_per_channel,
    _fake_quantize,
)
_define(
    "dequantize_per_channel",
    f"(Tensor input, Tensor scales, Tensor? zero_points, {_CHANNELS}, ScalarType dtype, {_OUT}) -> Tensor",
    _dequantize_per_channel,
    _fake_dequantize,
)
_define(
    "convert_element_type.no_fuse",
    "(Tensor input, ScalarType dtype) -> Tensor",
    _convert_element_type,
    _fake_convert_element_type,
)
_define("choose_qparams.tensor", _CHOICE, _choose_qparams, _fake_choose)
_define("choose_qparams_symmetric.tensor", _CHOICE, _choose_qparams_symmetric, _fake_choose)
