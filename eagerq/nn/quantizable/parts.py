"""Modules made of quantizable parts: preparing and converting the parts, and joining what they put out."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from eagerq import kernels
from eagerq.errors import InvalidConfigError
from eagerq.nn.qat.linear import Linear as TrainedLinear
from eagerq.nn.quantized.functional_modules import FloatFunctional, QFunctional
from eagerq.nn.quantized.linear import Linear
from eagerq.nn.quantized.quantize import DeQuantize, Quantize
from eagerq.qtensor import QTensor, quantize_per_tensor
from eagerq.scheme import integer_type
from eagerq.stubs import DeQuantStub, QuantStub
from eagerq.twins import attach_observer, fixed_range_observer, remove_observers, swap_module

__all__ = ["average", "cat", "prepare_parts", "qconfig_of", "quantized_parts", "stack", "zeros"]

_TRAINED: dict[Any, Any] = {nn.Linear: TrainedLinear}
_INT8: dict[Any, Any] = {
    nn.Linear: Linear,
    TrainedLinear: Linear,
    FloatFunctional: QFunctional,
    QuantStub: Quantize,
    DeQuantStub: DeQuantize,
}


def qconfig_of(mod: nn.Module, given: Any = None) -> Any:
    """The qconfig of a float module, or the one given.

    Raises:
        InvalidConfigError: when there is neither.
    """
    config = getattr(mod, "qconfig", None) or given
    if not config:
        raise InvalidConfigError(
            "the float module must have 'qconfig'",
            module=mod,
            remedy="set mod.qconfig, or call prepare on the model that it is in",
        )
    return config


def _swap_parts(root: nn.Module, mapping: dict[Any, Any], as_trained: bool = False) -> None:
    for parent in list(root.modules()):
        for name, part in parent._modules.items():
            if part is not None:
                parent._modules[name] = swap_module(part, mapping, as_trained=as_trained)


def prepare_parts(root: nn.Module, qconfig: Any) -> None:
    """Give all parts the qconfig and observers; in training mode, layers become those to train with."""
    for part in root.modules():
        part.qconfig = qconfig
    if root.training:
        _swap_parts(root, _TRAINED)
    for part in list(root.modules()):
        if type_before_parametrizations(part) in _INT8 or fixed_range_observer(part):
            attach_observer(part)


def quantized_parts(observed: nn.Module, cls: Any, as_trained: bool) -> Any:
    """A copy of a prepared module, of class ``cls``, with int8 parts and without observers.

    Raises:
        InvalidConfigError: when it is not of the class that ``cls`` is made of, or not prepared.
    """
    if not isinstance(observed, cls._FLOAT_MODULE):
        raise InvalidConfigError(
            f"Expected module type {cls._FLOAT_MODULE.__name__}, got {type(observed).__name__}", module=observed
        )
    new = copy.deepcopy(observed)
    _swap_parts(new, _INT8, as_trained)
    remove_observers(new)
    new.__class__ = cls
    return new


def cat(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """``torch.cat``; QTensors all get the first one's parameters, as there is no observer to tell better ones."""
    first = tensors[0]
    if not isinstance(first, QTensor):
        return torch.cat(list(tensors), dim)
    kind = integer_type(first.integers.dtype)
    parts: Any = tensors
    integers = kernels.cat(
        [part.integers for part in parts],
        [part.scale for part in parts],
        [part.zero_point for part in parts],
        dim,
        *(first.scale, first.zero_point, kind.storage, kind.minimum, kind.maximum),
    )
    return first.like(integers)


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """``torch.stack`` along a new first dimension, as :func:`cat` does it."""
    return cat([part.unsqueeze(0) for part in tensors], 0)


def average(x: Tensor, dim: int) -> Tensor:
    """``x.mean(dim)``; of a QTensor, the mean of the real values, quantized as they are."""
    if not isinstance(x, QTensor):
        return x.mean(dim)
    # its own mean(), on integers, parts from torch.ao on ties, of which two heads have many
    return quantize_per_tensor(x.dequantize().mean(dim), x.scale, x.zero_point, x.integers.dtype)


def zeros(like: Tensor, shape: Sequence[int], scale: float | None = None, zero_point: int | None = None) -> Tensor:
    """Zeros beside ``like``: float, or a QTensor with its parameters where none are given."""
    if not isinstance(like, QTensor):
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
    scale = like.scale if scale is None else scale
    zero_point = like.zero_point if zero_point is None else zero_point
    return quantize_per_tensor(torch.zeros(shape, device=like.device), scale, zero_point, like.integers.dtype)
