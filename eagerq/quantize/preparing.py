"""Float models made ready: for calibration, or for quantization-aware training."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import nn

from eagerq.errors import InvalidConfigError, stamp_names
from eagerq.quantization_mappings import (
    ModuleMap,
    get_default_qat_module_mappings,
    get_default_qconfig_propagation_list,
)
from eagerq.quantize.custom import observed_classes
from eagerq.quantize.qconfigs import propagate_qconfig_, require_qconfig
from eagerq.quantize.state import install_state_check
from eagerq.quantize.swapping import attach_observers, check_root, check_unprepared, swap_children
from eagerq.tree import unchanged_on_error
from eagerq.twins import swap_module

__all__ = ["prepare", "prepare_qat"]


def prepare(
    model: nn.Module,
    inplace: bool = False,
    allow_list: Iterable[Any] | None = None,
    observer_non_leaf_module_list: Iterable[Any] | None = None,
    prepare_custom_config_dict: dict[str, Any] | None = None,
) -> nn.Module:
    """Attach an observer to each quantizable layer's output, for post-training quantization.

    Args:
        model: float model with a ``qconfig`` on itself or on submodules.
        inplace: change ``model`` itself rather than a copy.
        allow_list: classes of leaves to observe, instead of the default ones.
        observer_non_leaf_module_list: further classes to observe as a whole.
        prepare_custom_config_dict: ``{"float_to_observed_custom_module_class": {Class: Observed}}``, instead
            of that of :func:`get_default_custom_config_dict`; ``Observed.from_float(module)`` makes the
            module to observe as a whole.

    Returns:
        The observed model.

    Raises:
        InvalidConfigError: when no module has a qconfig, or the model is prepared already, or is itself
            a layer.
    """
    custom = observed_classes(prepare_custom_config_dict)
    check_unprepared(model, "prepare")
    check_root(model, "prepare", custom)
    if not inplace:
        model = copy.deepcopy(model)
    with unchanged_on_error(model):
        propagate_qconfig_(model)
        require_qconfig(model, "prepare")
        leaves = get_default_qconfig_propagation_list() if allow_list is None else allow_list
        attach_observers(model, leaves, observer_non_leaf_module_list or (), custom)
        stamp_names(model)
        install_state_check(model)
    return model


def prepare_qat(model: nn.Module, mapping: ModuleMap | None = None, inplace: bool = False) -> nn.Module:
    """Make a float model ready for quantization-aware training.

    Layers become their QAT twins (sharing parameters), and each quantizable layer's output goes
    through the fake quantizer of its qconfig.  LSTM and attention become their quantizable twins.

    Args:
        model: in training mode, fused where wanted, with a ``qconfig`` on itself or on submodules.
        mapping: float class to QAT class, instead of
            :func:`~eagerq.quantization_mappings.get_default_qat_module_mappings`.
        inplace: change ``model`` itself rather than a copy.

    Returns:
        The prepared model; its state_dict has the keys that ``torch.ao.quantization`` gives it.

    Raises:
        InvalidConfigError: when the model is in eval mode, prepared or converted already, itself a
            layer, or no module has a qconfig.  The model is then as it was.

    Example:
        >>> import eagerq
        >>> net = eagerq.QuantWrapper(nn.Linear(2, 2)).train()
        >>> net.qconfig = eagerq.get_default_qat_qconfig("onednn")
        >>> type(prepare_qat(net).module).__module__
        'eagerq.nn.qat.linear'
    """
    if not model.training:
        raise InvalidConfigError(
            "prepare_qat only works on models in training mode",
            module=model,
            remedy="call model.train() first",
        )
    check_unprepared(model, "prepare_qat")
    mapping = get_default_qat_module_mappings() if mapping is None else mapping
    custom = observed_classes(None)
    check_root(model, "prepare_qat", mapping, custom)
    if not inplace:
        model = copy.deepcopy(model)
    with unchanged_on_error(model):
        propagate_qconfig_(model)
        require_qconfig(model, "prepare_qat")
        stamp_names(model)
        chosen = mapping
        swap_children(model, lambda module: swap_module(module, chosen), custom)
        attach_observers(model, get_default_qconfig_propagation_list(), set(mapping.values()), custom)
        stamp_names(model)
        install_state_check(model)
    return model
