"""Normalizations of quantized tensors, told the parameters of their result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from eagerq import kernels
from eagerq.errors import InvalidInputError
from eagerq.nn.quantized.functional.inputs import quantized
from eagerq.qtensor import QTensor
from eagerq.scheme import integer_type

__all__ = ["group_norm", "instance_norm", "layer_norm"]


def _applied(kernel: Any, x: QTensor, *arguments: Any) -> QTensor:
    """A kernel on a QTensor; the last two arguments are the result's parameters, its dtype is the input's."""
    kind = integer_type(x.integers.dtype)
    *others, scale, zero_point = arguments
    scale, zero_point = float(scale), int(zero_point)
    output = (scale, zero_point, kind.storage, kind.minimum, kind.maximum)
    return QTensor(kernel(x.integers, x.scale, x.zero_point, *others, *output), scale, zero_point)


def _check_channels(x: QTensor, name: str, num_groups: int, *values: Tensor | None) -> None:
    channels = x.shape[1] if x.dim() > 1 else 0
    if not channels or channels % num_groups or any(one is not None and len(one) != channels for one in values):
        raise InvalidInputError(
            f"'quantized.{name}' got {tuple(x.shape)} with {num_groups} groups and weights of "
            f"{[None if one is None else len(one) for one in values]}",
            remedy="pass [N, C, …], where the groups divide C, and weights of C",
        )


def layer_norm(
    input: QTensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    output_scale: float,
    output_zero_point: int,
) -> QTensor:
    """:func:`torch.nn.functional.layer_norm` of a QTensor ``[…, *normalized_shape]``.

    Args:
        weight, bias: float, of shape ``normalized_shape``, or None.
        output_scale, output_zero_point: of the result, whose dtype is the input's.

    Raises:
        NotQuantizedError: for a float tensor.
        InvalidInputError: for one of another shape.

    Example:
        >>> import torch, eagerq
        >>> x = eagerq.quantize_per_tensor(torch.tensor([[-1.0, 0.0, 1.0]]), 0.1, 128, torch.uint8)
        >>> layer_norm(x, [3], None, None, 1e-5, 0.5, 2).int_repr()
        tensor([[0, 2, 4]], dtype=torch.uint8)
    """
    x, shape = quantized(input, "layer_norm"), list(normalized_shape)
    shapes = [list(x.shape[-len(shape) :]), *(list(one.shape) for one in (weight, bias) if one is not None)]
    if any(one != shape for one in shapes):
        raise InvalidInputError(
            f"'quantized.layer_norm' got {tuple(x.shape)} and weights of {shapes[1:]} to normalize over {shape}",
            remedy="pass a normalized_shape that the input ends in and the weights have",
        )
    return _applied(kernels.layer_norm, x, shape, weight, bias, eps, output_scale, output_zero_point)


def group_norm(
    input: QTensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    output_scale: float,
    output_zero_point: int,
) -> QTensor:
    """:func:`torch.nn.functional.group_norm` of a QTensor ``[N, C, …]``.

    Args:
        weight, bias: float, ``[C]``, or None.
        output_scale, output_zero_point: of the result, whose dtype is the input's.

    Raises:
        NotQuantizedError: for a float tensor.
        InvalidInputError: for one of another shape.
    """
    x = quantized(input, "group_norm")
    _check_channels(x, "group_norm", num_groups, weight, bias)
    return _applied(kernels.group_norm, x, num_groups, weight, bias, eps, output_scale, output_zero_point)


def instance_norm(
    input: QTensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    output_scale: float,
    output_zero_point: int,
) -> QTensor:
    """:func:`torch.nn.functional.instance_norm` of a QTensor ``[N, C, …]``, by its own statistics.

    Args:
        weight, bias: float, ``[C]``, or None.
        output_scale, output_zero_point: of the result, whose dtype is the input's.

    Raises:
        NotQuantizedError: for a float tensor.
        InvalidInputError: for one of another shape.
    """
    x = quantized(input, "instance_norm")
    groups = x.shape[1] if x.dim() > 1 else 1
    _check_channels(x, "instance_norm", groups, weight, bias)
    return _applied(kernels.group_norm, x, groups, weight, bias, eps, output_scale, output_zero_point)
