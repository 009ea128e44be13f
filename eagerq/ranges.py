"""Ranges of integers and of values, checked and turned into quantization parameters."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from eagerq import functional
from eagerq.errors import InvalidConfigError
from eagerq.scheme import integer_type, per_tensor_affine, quantization_range, sharing

__all__ = ["calculate_qmin_qmax", "check_min_max_valid", "determine_qparams", "validate_qmin_qmax"]


def validate_qmin_qmax(quant_min: int, quant_max: int) -> None:
    """Refuse a range of integers that is empty or lacks zero.

    Raises:
        InvalidConfigError: for such a range.
    """
    quantization_range(torch.int32, quant_min, quant_max, reduce_range=False)


def calculate_qmin_qmax(
    quant_min: int | None, quant_max: int | None, has_customized_qrange: bool, dtype: torch.dtype, reduce_range: bool
) -> tuple[int, int]:
    """The integers in use: the given ones, or all of ``dtype``; one bit fewer with ``reduce_range``.

    Raises:
        InvalidConfigError: for a range that does not fit ``dtype``.

    Example:
        >>> calculate_qmin_qmax(None, None, False, torch.int8, True)
        (-64, 63)
    """
    given = (quant_min, quant_max) if has_customized_qrange else (None, None)
    return quantization_range(dtype, *given, reduce_range)


def check_min_max_valid(min_val: Tensor, max_val: Tensor) -> bool:
    """Whether there is a range; warns when there is none yet.

    Raises:
        InvalidConfigError: when a minimum lies above its maximum.
    """
    unseen = (min_val == torch.inf) & (max_val == -torch.inf)
    if min_val.numel() == 0 or max_val.numel() == 0 or bool(unseen.all()):
        warnings.warn("this range has seen no data: scale 1 and zero point 0 are used", stacklevel=2)
        return False
    if bool((min_val > max_val).any()):
        raise InvalidConfigError(
            f"min {min_val} should be less than max {max_val}", remedy="swap them, or observe the data again"
        )
    return True


def determine_qparams(
    min_val: Tensor,
    max_val: Tensor,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
    eps: Tensor,
    has_customized_qrange: bool,
    qscheme: Any = per_tensor_affine,
) -> tuple[Tensor, Tensor]:
    """Scale (float64) and zero point (int64), each ``[1]`` or ``[channels]``, for ranges of values.

    Args:
        min_val, max_val: the ranges, ``[]`` or ``[channels]``.
        quant_min, quant_max: the integers to use.
        dtype: integer dtype.
        eps: the least scale.
        has_customized_qrange: whether the integers are fewer than those of ``dtype``.

    Raises:
        InvalidConfigError: when a minimum lies above its maximum.
    """
    if not check_min_max_valid(min_val, max_val):
        return torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    shared, kind = sharing(qscheme), integer_type(dtype)
    eps = eps.to(min_val.device)
    if shared.symmetric:
        middle = (quant_min + quant_max) // 2 if has_customized_qrange else (kind.maximum + 1) // 2
        scale, zero_point = functional.symmetric_qparams(
            min_val, max_val, quant_min, quant_max, eps, 0 if kind.signed else middle
        )
    else:
        formula = functional.float_qparams if shared.float_zero_point else functional.affine_qparams
        scale, zero_point = formula(min_val, max_val, quant_min, quant_max, eps)
    return scale.reshape(-1).double(), zero_point.reshape(-1).to(torch.int64)
