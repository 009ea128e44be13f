"""Models whose layers quantize their inputs as they come: no data is needed."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from eagerq.errors import InvalidArgumentError, InvalidConfigError, UnsupportedError
from eagerq.qconfig import (
    QConfig,
    default_dynamic_qconfig,
    float16_dynamic_qconfig,
    float_qparams_weight_only_qconfig,
    float_qparams_weight_only_qconfig_4bit,
)
from eagerq.qconfig_mapping import QConfigMapping
from eagerq.quantization_mappings import ModuleMap, get_default_dynamic_quant_module_mappings
from eagerq.quantize.converting import convert
from eagerq.quantize.qconfigs import propagate_qconfig_
from eagerq.quantize.swapping import check_root
from eagerq.scheme import integer_dtype, uint4
from eagerq.tree import unchanged_on_error

__all__ = ["quantize_dynamic"]

_HEAVY = (nn.Linear, nn.LSTM, nn.GRU, nn.LSTMCell, nn.RNNCell, nn.GRUCell)
# by dtype of the weight: the qconfig, and the classes that it is for when none are named
_DEFAULTS: dict[torch.dtype, tuple[QConfig, tuple[type[nn.Module], ...]]] = {
    torch.int8: (default_dynamic_qconfig, _HEAVY),
    torch.float16: (float16_dynamic_qconfig, _HEAVY),
    torch.uint8: (float_qparams_weight_only_qconfig, (nn.EmbeddingBag, nn.Embedding)),
    uint4: (float_qparams_weight_only_qconfig_4bit, (nn.EmbeddingBag,)),
}

Spec = dict[Any, QConfig | None] | QConfigMapping


def _full_spec(spec: Spec | Iterable[Any] | None, dtype: torch.dtype) -> Spec:
    """The qconfig of each name and class asked for."""
    if isinstance(spec, (dict, QConfigMapping)):
        return spec
    known = ", ".join(map(str, _DEFAULTS))
    stored = integer_dtype(dtype)
    if spec is None:
        if stored not in _DEFAULTS:
            raise InvalidArgumentError(
                f"Don't know how to quantize with default settings for {dtype}. Provide full qconfig please",
                remedy=f"pass qconfig_spec={{nn.Linear: qconfig}}, or a dtype out of {known}",
            )
        return dict.fromkeys(_DEFAULTS[stored][1], _DEFAULTS[stored][0])
    if stored not in _DEFAULTS:
        raise UnsupportedError(
            f"Unknown dtype specified for quantize_dynamic: {dtype}", remedy=f"pass one of {known}, or qconfigs"
        )
    return dict.fromkeys(spec, _DEFAULTS[stored][0])


def _found_in(model: nn.Module, spec: Spec) -> Spec:
    """The spec without classes that the model lacks: sets of classes are meant for many models."""
    if isinstance(spec, QConfigMapping):
        return spec
    kinds = {type_before_parametrizations(module) for module in model.modules()}
    return {key: config for key, config in spec.items() if isinstance(key, str) or key in kinds}


def _check_swaps(model: nn.Module, spec: Spec, mapping: ModuleMap) -> None:
    """Refuse to quantize nothing, and say what was asked for in vain.

    Args:
        model: with its qconfigs.
        spec: what was asked for.
    """
    swapped = {
        module
        for module in model.modules()
        if getattr(module, "qconfig", None) is not None and type_before_parametrizations(module) in mapping
    }
    if not swapped:
        asked = [] if isinstance(spec, QConfigMapping) else [getattr(key, "__name__", repr(key)) for key in spec]
        kinds = sorted({type_before_parametrizations(module).__name__ for module in model.modules()})
        raise InvalidConfigError(
            f"quantize_dynamic found nothing to quantize: it looked for {', '.join(asked) or 'qconfigs'}, "
            f"the model has {', '.join(kinds)}",
            module=model,
            remedy="name layers or classes of the model in qconfig_spec, and classes without a dynamic form "
            "in the default map in mapping",
        )
    if isinstance(spec, QConfigMapping):
        return
    idle = []
    for name, module in model.named_modules():
        kind = type_before_parametrizations(module)
        asked_for = spec.get(name, spec.get(kind)) is not None and module.qconfig is not None
        if asked_for and not swapped.intersection(module.modules()):
            idle.append(f"{name!r} ({kind.__name__})")
    if idle:
        warnings.warn(
            f"quantize_dynamic leaves {', '.join(idle)} in float: the mapping has no dynamic form of their classes. "
            "Convolutions have one in eagerq.nn.quantized.dynamic: add it to the mapping to use it.",
            stacklevel=3,
        )


def quantize_dynamic(
    model: nn.Module,
    qconfig_spec: Spec | Iterable[Any] | None = None,
    dtype: torch.dtype = torch.int8,
    mapping: ModuleMap | None = None,
    inplace: bool = False,
) -> nn.Module:
    """Store the weights of a float model's heavy layers in few bits; their inputs are quantized as they come.

    Args:
        model: float model.
        qconfig_spec: which layers: a set of classes and qualified names, or a dictionary of such keys to
            qconfigs (a parent's is its children's, unless they have their own; None leaves them in
            float), or a :class:`~eagerq.QConfigMapping`.  By default Linear and recurrent layers, or
            embeddings for ``uint8`` and ``uint4``.  Classes that the model lacks are ignored if others
            are found.
        dtype: of the weights, where ``qconfig_spec`` has no qconfigs: int8, float16, uint8 or uint4.
        mapping: float class to dynamic class, instead of
            :func:`~eagerq.quantization_mappings.get_default_dynamic_quant_module_mappings`.
        inplace: change ``model`` itself rather than a copy.

    Returns:
        The quantized model in eval mode.  It takes and gives what the float one did.

    Raises:
        InvalidArgumentError: for a name that no module has, or a dtype without defaults.
        InvalidConfigError: when nothing would be quantized, when the model is itself a layer, or for a
            qconfig that a layer cannot take.  The model is then as it was.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> quantize_dynamic(net, {nn.Linear})[0]
        DynamicQuantizedLinear(in_features=4, out_features=8, dtype=torch.int8, qscheme=torch.per_tensor_affine)
    """
    chosen = get_default_dynamic_quant_module_mappings() if mapping is None else mapping
    check_root(model, "quantize_dynamic", chosen)
    spec = _full_spec(qconfig_spec, dtype)
    if not inplace:
        model = copy.deepcopy(model)
    with unchanged_on_error(model):
        found = _found_in(model, spec)
        propagate_qconfig_(model, found)
        _check_swaps(model, spec, chosen)
        convert(model, chosen, inplace=True)
    return model.eval()
