"""Exported programs as ONNX models: how torch's exporter shall write the Q/DQ operators."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from eagerq.errors import MissingExtraError
from eagerq.pt2e import operators

__all__ = ["translations"]

_Translation = Callable[..., Any]


def translations() -> dict[Callable[..., Any], _Translation]:
    """How to write the Q/DQ operators in ONNX, for ``torch.onnx.export(…, custom_translation_table=…)``.

    Quantizing becomes QuantizeLinear, then Clip of the integers where the range is narrower than the dtype (torch's
    own translation leaves it out); dequantizing becomes DequantizeLinear.  What they have no form for is written in
    plain arithmetic: parameters found at run time, float zero points, more than 8 bits.

    Returns:
        each operator, and the function that writes it with onnxscript.

    Raises:
        MissingExtraError: when onnxscript is not installed.

    Example::

        program = eagerq.pt2e.export(model, (images,))
        torch.onnx.export(program, (), "model.onnx", dynamo=True, custom_translation_table=translations())
    """
    if importlib.util.find_spec("onnxscript") is None:
        raise MissingExtraError("writing ONNX needs onnxscript", remedy="pip install 'eagerq[onnx]'")
    return dict(_TRANSLATIONS)


# torch's exporter reads the annotations of what it calls: Any takes tensors and numbers as they come.


def _opset() -> Any:
    return importlib.import_module("onnxscript.onnx_opset").opset18


def _type(name: str) -> Any:
    return importlib.import_module("onnxscript").ir.DataType[name.upper()]


def _scalar(value: Any) -> Any:
    return value if isinstance(value, (int, float)) else _opset().Squeeze(value)


def _beside(x: Any, values: Any, axis: int | None) -> Any:
    """A vector's values shaped so that they meet ``x`` along its axis."""
    others = [i for i in range(len(x.shape)) if i != axis]
    return values if axis is None or not others else _opset().Unsqueeze(values, others)


def _limits(dtype: Any) -> tuple[int, int]:
    kind = torch.iinfo(getattr(torch, dtype.name.lower()))
    return kind.min, kind.max


def _in_arithmetic(zero_point: Any, dtype: Any) -> bool:
    """Whether QuantizeLinear and DequantizeLinear (of opset 18) have no form for these."""
    given = getattr(zero_point, "dtype", None)
    return dtype.bitwidth > 8 or (given is not None and given.is_floating_point())


def _number(value: Any, dtype: Any) -> Any:
    """``value`` as a constant or a tensor of that dtype."""
    op = _opset()
    if isinstance(value, (int, float)):
        return op.Constant(value=importlib.import_module("onnxscript").ir.tensor(value, dtype=dtype))
    return op.Cast(value, to=dtype)


def _quantize(x: Any, scale: Any, zero_point: Any, low: int, high: int, dtype: Any, axis: int | None) -> Any:
    op = _opset()
    if _in_arithmetic(zero_point, dtype):
        scale, zero_point = (_beside(x, _number(one, x.dtype), axis) for one in (scale, zero_point))
        steps = op.Add(op.Round(op.Div(x, scale)), zero_point)
        return op.Cast(op.Clip(steps, _number(low, x.dtype), _number(high, x.dtype)), to=dtype)
    q = op.QuantizeLinear(x, _number(scale, x.dtype), _number(zero_point, dtype), **_along(axis))
    if (low, high) != _limits(dtype):
        q = op.Clip(q, _number(low, dtype), _number(high, dtype))
    return q


def _dequantize(q: Any, scale: Any, zero_point: Any, dtype: Any, out_dtype: Any, axis: int | None) -> Any:
    op, real = _opset(), _type("float")
    if _in_arithmetic(zero_point, dtype):
        scale, zero_point = (_beside(q, _number(one, real), axis) for one in (scale, zero_point))
        x = op.Mul(op.Sub(op.Cast(q, to=real), zero_point), scale)
    else:
        zero_point = None if zero_point is None else _number(zero_point, dtype)
        x = op.DequantizeLinear(q, _number(scale, real), zero_point, **_along(axis))
    return x if out_dtype in (None, real) else op.Cast(x, to=out_dtype)


def _along(axis: int | None) -> dict[str, int]:
    return {} if axis is None else {"axis": axis}


def _quantize_per_tensor(x: Any, scale: Any, zero_point: Any, low: Any, high: Any, dtype: Any) -> Any:
    return _quantize(x, _scalar(scale), _scalar(zero_point), low, high, dtype, None)


def _dequantize_per_tensor(
    q: Any, scale: Any, zero_point: Any, low: Any, high: Any, dtype: Any, out_dtype: Any = None
) -> Any:
    return _dequantize(q, _scalar(scale), _scalar(zero_point), dtype, out_dtype, None)


def _quantize_per_channel(x: Any, scales: Any, zero_points: Any, axis: Any, low: Any, high: Any, dtype: Any) -> Any:
    return _quantize(x, scales, zero_points, low, high, dtype, axis)


def _dequantize_per_channel(
    q: Any, scales: Any, zero_points: Any, axis: Any, low: Any, high: Any, dtype: Any, out_dtype: Any = None
) -> Any:
    return _dequantize(q, scales, zero_points, dtype, out_dtype, axis)


def _extremes(x: Any) -> tuple[Any, Any]:
    op = _opset()
    zero = _number(0.0, x.dtype)
    return op.Min(op.ReduceMin(x, keepdims=0), zero), op.Max(op.ReduceMax(x, keepdims=0), zero)


def _parameters(scale: Any, zero_point: Any) -> tuple[Any, Any]:
    """As the operators give them: a double and an int64, each in a vector of one."""
    op = _opset()
    scale, zero_point = _number(scale, _type("double")), _number(zero_point, _type("int64"))
    return op.Unsqueeze(scale, [0]), op.Unsqueeze(zero_point, [0])


def _choose_qparams(x: Any, low: Any, high: Any, eps: Any, dtype: Any) -> Any:
    op = _opset()
    least, greatest = _extremes(x)
    scale = op.Max(op.Div(op.Sub(greatest, least), _number(float(high - low), x.dtype)), _number(eps, x.dtype))
    first, last = (_number(float(limit), x.dtype) for limit in (low, high))
    return _parameters(scale, op.Clip(op.Sub(first, op.Round(op.Div(least, scale))), first, last))


def _choose_qparams_symmetric(x: Any, low: Any, high: Any, eps: Any, dtype: Any) -> Any:
    op = _opset()
    least, greatest = _extremes(x)
    reach = op.Div(op.Max(op.Neg(least), greatest), _number((high - low) / 2, x.dtype))
    return _parameters(op.Max(reach, _number(eps, x.dtype)), 128 if dtype == _type("uint8") else 0)


def _convert_element_type(x: Any, dtype: Any) -> Any:
    return _opset().Cast(x, to=dtype)


_TRANSLATIONS: dict[Callable[..., Any], _Translation] = {
    operators.QUANTIZE_PER_TENSOR: _quantize_per_tensor,
    operators.QUANTIZE_PER_TENSOR_DYNAMIC: _quantize_per_tensor,
    operators.QUANTIZE_PER_CHANNEL: _quantize_per_channel,
    operators.DEQUANTIZE_PER_TENSOR: _dequantize_per_tensor,
    operators.DEQUANTIZE_PER_TENSOR_DYNAMIC: _dequantize_per_tensor,
    operators.DEQUANTIZE_PER_CHANNEL: _dequantize_per_channel,
    operators.CHOOSE_QPARAMS_AFFINE: _choose_qparams,
    operators.CHOOSE_QPARAMS_SYMMETRIC: _choose_qparams_symmetric,
    operators.CONVERT_ELEMENT_TYPE: _convert_element_type,
}
