"""What a qconfig or an observer asks for: its dtypes, and whether it acts ahead of time or at run time."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import torch

from eagerq.errors import InvalidConfigError
from eagerq.observer import PlaceholderObserver
from eagerq.scheme import integer_dtype, is_per_channel, per_channel_affine, per_channel_symmetric, per_tensor_affine

__all__ = [
    "QuantType",
    "activation_dtype",
    "activation_is_dynamically_quantized",
    "activation_is_int32_quantized",
    "activation_is_int8_quantized",
    "activation_is_memoryless",
    "activation_is_statically_quantized",
    "get_qconfig_dtypes",
    "get_qparam_dict",
    "get_quant_type",
    "op_is_int8_dynamically_quantized",
    "weight_dtype",
    "weight_is_quantized",
    "weight_is_statically_quantized",
]

_BYTES = {torch.uint8, torch.int8}
_INTEGERS = {*_BYTES, torch.int16, torch.int32}
_FLOATS = {torch.float16, torch.float8_e5m2, torch.float8_e4m3fn}


class QuantType(IntEnum):
    """When values are quantized."""

    DYNAMIC = 0
    STATIC = 1
    QAT = 2
    WEIGHT_ONLY = 3


def get_qconfig_dtypes(qconfig: Any) -> tuple[torch.dtype, torch.dtype, bool]:
    """The dtypes of activation and weight, and whether activations are quantized at run time.

    Raises:
        InvalidConfigError: for None.

    Example:
        >>> import eagerq
        >>> get_qconfig_dtypes(eagerq.default_dynamic_qconfig)
        (torch.uint8, torch.int8, True)
    """
    if qconfig is None:
        raise InvalidConfigError(
            "qconfig must be provided to extract dtypes", remedy="pass a QConfig; the module given has none"
        )
    activation, weight = qconfig.activation(), qconfig.weight()
    return _dtype(activation), _dtype(weight), bool(getattr(activation, "is_dynamic", False))


def _dtype(observer: Any) -> torch.dtype:
    return integer_dtype(getattr(observer, "dtype", torch.float32))


def activation_dtype(qconfig: Any) -> torch.dtype:
    """The dtype that activations are quantized to; float32 for none."""
    return get_qconfig_dtypes(qconfig)[0]


def weight_dtype(qconfig: Any) -> torch.dtype:
    """The dtype that weights are quantized to; float32 for none."""
    return get_qconfig_dtypes(qconfig)[1]


def activation_is_dynamically_quantized(qconfig: Any) -> bool:
    """Whether activations are quantized at run time."""
    return get_qconfig_dtypes(qconfig)[2]


def activation_is_statically_quantized(qconfig: Any) -> bool:
    """Whether activations are quantized with parameters known ahead (float16 and float8 count)."""
    dtype, _, dynamic = get_qconfig_dtypes(qconfig)
    return dtype in _INTEGERS | _FLOATS and not dynamic


def activation_is_int8_quantized(qconfig: Any) -> bool:
    """Whether activations are quantized to 8-bit integers."""
    return activation_dtype(qconfig) in _BYTES


def activation_is_int32_quantized(qconfig: Any) -> bool:
    """Whether activations are quantized to int32."""
    return activation_dtype(qconfig) is torch.int32


def activation_is_memoryless(qconfig: Any) -> bool:
    """Whether the activation's range is that of the last batch alone, as dynamic quantization has it.

    Example:
        >>> import eagerq
        >>> activation_is_memoryless(eagerq.default_dynamic_qat_qconfig)
        True
    """
    return is_memoryless(qconfig.activation())


def is_memoryless(activation: Any) -> bool:
    """Whether an observer or fake quantizer knows the last batch only."""
    observer = getattr(activation, "activation_post_process", activation)
    return bool(getattr(observer, "averaging_constant", None) == 1)


def weight_is_quantized(qconfig: Any) -> bool:
    """Whether weights are quantized (float16 and float8 count)."""
    dtype = weight_dtype(qconfig)
    return dtype in _INTEGERS | _FLOATS or str(dtype) in ("torch.uint4", "torch.int4")


def weight_is_statically_quantized(qconfig: Any) -> bool:
    """Whether weights are quantized to 8-bit integers."""
    return weight_dtype(qconfig) in _BYTES


def op_is_int8_dynamically_quantized(qconfig: Any) -> bool:
    """Whether int8 weights meet activations quantized to uint8 at run time."""
    return get_qconfig_dtypes(qconfig) == (torch.uint8, torch.int8, True)


def get_quant_type(qconfig: Any) -> QuantType:
    """When a qconfig quantizes.

    Raises:
        InvalidConfigError: for None, or when the dtypes make none of the known kinds.

    Example:
        >>> import eagerq
        >>> get_quant_type(eagerq.default_qconfig).name
        'STATIC'
    """
    activation, weight, dynamic = get_qconfig_dtypes(qconfig)
    if weight_is_quantized(qconfig):
        if dynamic:
            return QuantType.DYNAMIC
        if weight is torch.float16:
            if activation is torch.float16:
                return QuantType.STATIC
        else:
            return QuantType.STATIC if activation_is_statically_quantized(qconfig) else QuantType.WEIGHT_ONLY
    raise InvalidConfigError(
        f"an activation of {activation} with a weight of {weight} is no known kind of quantization",
        remedy="quantize the weight to int8 (or float16, with a float16 activation)",
    )


def get_qparam_dict(observer_or_fake_quant: Any) -> dict[str, Any]:
    """How an observer would quantize: qscheme (affine), dtype, scale, zero_point, range, and the axis if any."""
    observer = observer_or_fake_quant
    qscheme = getattr(observer, "qscheme", None)
    if not qscheme or isinstance(observer, PlaceholderObserver):
        return {"qscheme": None, "dtype": observer.dtype}
    told: dict[str, Any] = {"qscheme": qscheme, "dtype": observer.dtype}
    if is_per_channel(qscheme):
        told["axis"] = observer.ch_axis
        if qscheme == per_channel_symmetric:
            told["qscheme"] = per_channel_affine
    else:
        told["qscheme"] = per_tensor_affine
    told["scale"], told["zero_point"] = observer.calculate_qparams()
    return {**told, "quant_min": observer.quant_min, "quant_max": observer.quant_max}
