"""What a quantized value is: its integer type, its range, and how parameters are shared.

Old programs say ``torch.quint8`` or ``torch.qint8``; torch is deleting those dtypes, so they are
recognised here by their *name* and mean the plain integer dtype of the same width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from eagerq.errors import InvalidConfigError

__all__ = [
    "IntegerType",
    "QScheme",
    "Sharing",
    "int4",
    "integer_dtype",
    "integer_type",
    "is_per_channel",
    "is_per_tensor",
    "per_channel_affine",
    "per_channel_affine_float_qparams",
    "per_channel_symmetric",
    "per_tensor_affine",
    "per_tensor_symmetric",
    "quantization_range",
    "sharing",
    "to_underlying_dtype",
    "uint4",
    "value_type",
]


@dataclass(frozen=True)
class QScheme:
    """Stands in for ``torch.qscheme`` once torch has dropped it."""

    name: str

    def __repr__(self) -> str:
        return f"eagerq.scheme.{self.name}"


@dataclass(frozen=True)
class Sharing:
    """How quantization parameters are shared and computed under a qscheme."""

    per_channel: bool
    symmetric: bool
    float_zero_point: bool = False


@dataclass(frozen=True)
class IntegerType:
    """An integer type that values can be quantized to, and the dtype that stores it."""

    dtype: torch.dtype
    storage: torch.dtype
    minimum: int
    maximum: int

    @property
    def signed(self) -> bool:
        return self.minimum < 0


def _constant(name: str) -> Any:
    return getattr(torch, name, None) or QScheme(name)


# torch's type stubs lack the sub-byte dtypes
int4: torch.dtype = _constant("int4")
uint4: torch.dtype = _constant("uint4")

per_tensor_affine = _constant("per_tensor_affine")
per_tensor_symmetric = _constant("per_tensor_symmetric")
per_channel_affine = _constant("per_channel_affine")
per_channel_symmetric = _constant("per_channel_symmetric")
per_channel_affine_float_qparams = _constant("per_channel_affine_float_qparams")

_SHARING = {
    per_tensor_affine: Sharing(per_channel=False, symmetric=False),
    per_tensor_symmetric: Sharing(per_channel=False, symmetric=True),
    per_channel_affine: Sharing(per_channel=True, symmetric=False),
    per_channel_symmetric: Sharing(per_channel=True, symmetric=True),
    per_channel_affine_float_qparams: Sharing(per_channel=True, symmetric=False, float_zero_point=True),
}

_INTEGER_TYPES = {
    str(kind.dtype): kind
    for kind in (
        IntegerType(torch.uint8, torch.uint8, 0, 255),
        IntegerType(torch.int8, torch.int8, -128, 127),
        IntegerType(torch.uint16, torch.uint16, 0, 2**16 - 1),
        IntegerType(torch.int16, torch.int16, -(2**15), 2**15 - 1),
        IntegerType(torch.int32, torch.int32, -(2**31), 2**31 - 1),
        IntegerType(uint4, torch.uint8, 0, 15),
        IntegerType(int4, torch.int8, -8, 7),
    )
}
# what float8 holds of the integers; between two of them it holds more near zero, fewer far from it
_FLOAT8_TYPES = {
    str(dtype): IntegerType(dtype, dtype, -greatest, greatest)
    for dtype, greatest in ((torch.float8_e5m2, 57344), (torch.float8_e4m3fn, 448))
}
_OLD_NAMES = {
    "torch.quint8": "torch.uint8",
    "torch.qint8": "torch.int8",
    "torch.qint32": "torch.int32",
    "torch.quint4x2": "torch.uint4",
}


def integer_dtype(dtype: torch.dtype) -> torch.dtype:
    """The plain dtype that ``dtype`` means: old quantized dtypes become integers, others stay.

    Example:
        >>> integer_dtype(torch.int8)
        torch.int8
    """
    name = _OLD_NAMES.get(str(dtype))
    return _INTEGER_TYPES[name].dtype if name else dtype


def integer_type(dtype: torch.dtype) -> IntegerType:
    """Range and storage of an integer dtype.

    Raises:
        InvalidConfigError: for a dtype that values cannot be quantized to.
    """
    name = str(dtype)
    kind = _INTEGER_TYPES.get(_OLD_NAMES.get(name, name))
    if kind is None:
        known = ", ".join(_INTEGER_TYPES)
        raise InvalidConfigError(f"values cannot be quantized to {dtype}", remedy=f"use one of {known}")
    return kind


def value_type(dtype: torch.dtype) -> IntegerType:
    """As :func:`integer_type`, and for float8: graphs can be quantized to that, modules cannot.

    Example:
        >>> value_type(torch.float8_e4m3fn).maximum
        448
    """
    return _FLOAT8_TYPES.get(str(dtype)) or integer_type(dtype)


def sharing(qscheme: Any) -> Sharing:
    """How a qscheme shares parameters.

    Raises:
        InvalidConfigError: for anything that is not a known qscheme.
    """
    found = _SHARING.get(qscheme)
    if found is None:
        known = ", ".join(str(known_scheme) for known_scheme in _SHARING)
        raise InvalidConfigError(f"unknown qscheme {qscheme!r}", remedy=f"use one of {known}")
    return found


def is_per_tensor(qscheme: Any) -> bool:
    """Whether a qscheme shares one scale among all values."""
    return qscheme in _SHARING and not _SHARING[qscheme].per_channel


def is_per_channel(qscheme: Any) -> bool:
    """Whether a qscheme has a scale for each channel."""
    return qscheme in _SHARING and _SHARING[qscheme].per_channel


def to_underlying_dtype(qdtype: torch.dtype) -> torch.dtype:
    """The dtype that stores a quantized dtype's values; float8 stands for itself.

    Raises:
        InvalidConfigError: for a dtype that values cannot be quantized to.

    Example:
        >>> to_underlying_dtype(torch.uint4)
        torch.uint8
    """
    return qdtype if str(qdtype).startswith("torch.float8_") else integer_type(qdtype).storage


def quantization_range(
    dtype: torch.dtype, quant_min: int | None, quant_max: int | None, reduce_range: bool
) -> tuple[int, int]:
    """The integers ``[quant_min, quant_max]`` in use: given ones, or all of ``dtype``.

    ``reduce_range`` gives up one bit of a given range, or of an 8-bit type, for processors whose 8-bit
    products saturate; all of another type is left as it is.

    Raises:
        InvalidConfigError: for a range that lacks zero, is empty, or does not fit ``dtype``.
    """
    kind = value_type(dtype)
    if quant_min is None or quant_max is None:
        low, high = kind.minimum, kind.maximum
        reduce_range = reduce_range and high - low == 255
    else:
        low, high = quant_min, quant_max
        if not low <= 0 <= high:
            raise InvalidConfigError(
                f"the quantization range [{low}, {high}] must include 0",
                remedy="widen quant_min or quant_max",
            )
        if low >= high:
            raise InvalidConfigError(
                f"quant_min ({low}) must be less than quant_max ({high})", remedy="swap or widen them"
            )
        if high - low > kind.maximum - kind.minimum:
            raise InvalidConfigError(
                f"the quantization range [{low}, {high}] is wider than {dtype}",
                remedy=f"stay within {kind.maximum - kind.minimum + 1} values",
            )
    if not reduce_range:
        return low, high
    return low // 2, high // 2
