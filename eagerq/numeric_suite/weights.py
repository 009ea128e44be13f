"""Float and quantized weights beside each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from eagerq.kernels import unpack_halves
from eagerq.qtensor import QTensor

__all__ = ["compare_weights", "compute_error", "float_key"]


def compute_error(x: Tensor, y: Tensor) -> Tensor:
    """Signal-to-noise ratio of ``y`` as a copy of ``x``, in decibels: ``20·log10(‖x‖ / ‖x - y‖)``.

    Example:
        >>> compute_error(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.1]))
        tensor(20.)
    """
    return 20 * torch.log10(torch.linalg.vector_norm(x) / torch.linalg.vector_norm(x - y))


def float_key(key: str, names: Mapping[str, Any]) -> str | None:
    """The entry of a float state_dict that ``key`` of a quantized one comes from; it may lie in a fused module."""
    path, _, name = key.rpartition(".")
    dot = f"{path}." if path else ""
    candidates = [key, f"{dot}0.{name}"]
    return next((candidate for candidate in candidates if candidate in names), None)


def _quantized(integers: Tensor, scale: Tensor, zero_point: Tensor, real: Tensor) -> QTensor | None:
    """A weight of a state_dict, whose axis and width only its float twin tells; None where nothing fits."""
    if integers.shape != real.shape and integers.shape == (*real.shape[:-1], (real.shape[-1] + 1) // 2):
        integers = unpack_halves(integers, real.shape[-1])
    if integers.shape != real.shape:
        return None
    if scale.numel() == 1:
        parameters: Any = (scale.item(), zero_point.item())
        return QTensor(integers, *parameters)
    axes = (axis for axis, size in enumerate(integers.shape) if size == scale.numel())
    fitting = (QTensor(integers, scale, zero_point, axis) for axis in axes)
    return min(fitting, key=lambda q: float((q.dequantize() - real).norm()), default=None)


def compare_weights(float_dict: Mapping[str, Any], quantized_dict: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Pairs of float and quantized weights.

    Args:
        float_dict: state_dict of the float model (fused or not).
        quantized_dict: state_dict of the model converted from it.

    Returns:
        By name in ``quantized_dict``: ``{"float": Tensor, "quantized": QTensor}``.

    Example:
        >>> import torch, eagerq
        >>> from torch import nn
        >>> net = eagerq.QuantWrapper(nn.Linear(2, 2))
        >>> net.qconfig = eagerq.default_qconfig
        >>> prepared = eagerq.prepare(net)
        >>> _ = prepared(torch.randn(4, 2))
        >>> pairs = compare_weights(net.state_dict(), eagerq.convert(prepared).state_dict())
        >>> pair = pairs["module.weight"]
        >>> bool(compute_error(pair["float"], pair["quantized"].dequantize()) > 30)
        True
    """
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, integers in quantized_dict.items():
        scale, zero_point = (quantized_dict.get(f"{key}_{part}") for part in ("scale", "zero_point"))
        if scale is None or zero_point is None:
            continue
        match = float_key(key, float_dict)
        quantized = None if match is None else _quantized(integers, scale, zero_point, float_dict[match])
        if match is not None and quantized is not None:
            pairs[key] = {"float": float_dict[match], "quantized": quantized}
    return pairs
