"""Custom modules: float classes that are observed and quantized as a whole, by classes of one's own."""

from __future__ import annotations

from typing import Any

from torch import nn

from eagerq.nn import quantizable, quantized
from eagerq.quantization_mappings import ModuleMap

__all__ = ["get_default_custom_config_dict", "observed_classes", "quantized_classes"]

_OBSERVED = "float_to_observed_custom_module_class"
_QUANTIZED = "observed_to_quantized_custom_module_class"


def get_default_custom_config_dict() -> dict[str, ModuleMap]:
    """The custom modules that ``prepare`` and ``convert`` know when none are given; a copy.

    Returns:
        ``{"float_to_observed_custom_module_class": {float class: observed class},
        "observed_to_quantized_custom_module_class": {observed class: int8 class}}``.
    """
    return {
        _OBSERVED: {
            nn.LSTM: quantizable.LSTM,
            nn.MultiheadAttention: quantizable.MultiheadAttention,
        },
        _QUANTIZED: {
            quantizable.LSTM: quantized.LSTM,
            quantizable.MultiheadAttention: quantized.MultiheadAttention,
        },
    }


def _classes(config: dict[str, Any] | None, key: str) -> ModuleMap:
    chosen = get_default_custom_config_dict() if config is None else config
    return dict(chosen.get(key, {}))


def observed_classes(config: dict[str, Any] | None) -> ModuleMap:
    """Float to observed class, as a ``prepare_custom_config_dict`` says."""
    return _classes(config, _OBSERVED)


def quantized_classes(config: dict[str, Any] | None) -> ModuleMap:
    """Observed to int8 class, as a ``convert_custom_config_dict`` says."""
    return _classes(config, _QUANTIZED)
