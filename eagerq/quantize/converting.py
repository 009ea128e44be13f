"""Prepared models turned into int8 ones."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from eagerq.errors import InvalidConfigError, UnsupportedError, stamp_names
from eagerq.nn.quantized import FloatFunctional, QuantizedModule
from eagerq.quantization_mappings import ModuleMap, get_default_static_quant_module_mappings
from eagerq.quantize.custom import quantized_classes
from eagerq.quantize.preparing import prepare, prepare_qat
from eagerq.quantize.state import has_state_check, install_state_check
from eagerq.quantize.swapping import swap_children
from eagerq.tree import unchanged_on_error
from eagerq.twins import OBSERVER, Observing, remove_observers, swap_module

__all__ = ["convert", "quantize", "quantize_qat"]


_CALLER = 5  # frames from a forward pre-hook up to who called the module


class RunWarnings:
    """Forward pre-hook of a converted model's root: says, once each, what is amiss with running it.

    Args:
        unobserved: names of the layers that have seen no data.
        evaluated: whether the model has been in eval mode since ``convert``; to leave it again is to
            mean to train (a model converted in training mode has only kept its mode).
    """

    def __init__(self, unobserved: Sequence[str], evaluated: bool) -> None:
        self.unobserved = list(unobserved)
        self.evaluated = evaluated
        self.told_of_training = False

    def __call__(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self.tell_unobserved(_CALLER + 1)
        if not module.training:
            self.evaluated = True
        elif self.evaluated and not self.told_of_training:
            self.told_of_training = True
            warnings.warn(
                "a converted model is in training mode, but its int8 layers cannot be trained: they run as in eval "
                "mode and get no gradients. Train the prepared model, then convert it again.",
                stacklevel=_CALLER,
            )

    def tell_unobserved(self, stacklevel: int) -> None:
        """Warn, once, of layers that have seen no data."""
        if self.unobserved:
            names, self.unobserved = self.unobserved, []
            warnings.warn(
                f"{len(names)} layers were converted before they had seen any data, so they quantize with "
                f"scale 1: {', '.join(map(repr, names))}. Run the prepared model on data before convert, or load "
                "a state_dict into the converted one.",
                stacklevel=stacklevel,
            )

    def loaded(self, module: nn.Module, incompatible_keys: Any) -> None:
        """A state_dict has been loaded: the parameters are known now."""
        if not incompatible_keys.missing_keys:
            self.unobserved = []


def _observers(root: nn.Module) -> Iterator[tuple[str, nn.Module, Any]]:
    for name, module in root.named_modules():
        observer = getattr(module, OBSERVER, None)
        if isinstance(observer, Observing) and not isinstance(module, Observing):
            yield name, module, getattr(observer, OBSERVER, observer)


def _unobserved(root: nn.Module) -> list[str]:
    """Names of the layers that have seen no data."""
    found = [(name, module, getattr(one, "observed", True)) for name, module, one in _observers(root)]
    ran = any(observed for _, module, observed in found)
    # where others have seen data, a FloatFunctional without any has only added or multiplied numbers
    return [
        name for name, module, observed in found if not observed and not (ran and isinstance(module, FloatFunctional))
    ]


def _report_nonfinite(root: nn.Module) -> None:
    counts = {
        name: int(observer.nonfinite_batches)
        for name, _, observer in _observers(root)
        if hasattr(observer, "nonfinite_batches")
    }
    skipped = [f"{name!r} ({count})" for name, count in counts.items() if count]
    if skipped:
        warnings.warn(
            f"batches with NaN or infinity reached the observers of {', '.join(skipped)}; they were left out of "
            "the ranges. Look for a diverging loss or bad input data.",
            stacklevel=3,
        )


def convert(
    module: nn.Module,
    mapping: ModuleMap | None = None,
    inplace: bool = False,
    remove_qconfig: bool = True,
    is_reference: bool = False,
    convert_custom_config_dict: dict[str, Any] | None = None,
    use_precomputed_fake_quant: bool = False,
    *,
    as_trained: bool = False,
    strict: bool = False,
) -> nn.Module:
    """Turn a prepared model into int8 modules.

    Args:
        module: the prepared model, trained or calibrated.
        mapping: class to int8 class, instead of
            :func:`~eagerq.quantization_mappings.get_default_static_quant_module_mappings`.
        inplace: change ``module`` itself rather than a copy.
        remove_qconfig: take away qconfigs, observers and their hooks.
        is_reference: not supported; see ``eagerq.pt2e`` for graphs.
        convert_custom_config_dict: ``{"observed_to_quantized_custom_module_class": {Observed: Quantized}}``,
            instead of that of :func:`get_default_custom_config_dict`; ``Quantized.from_observed(module)``
            makes the int8 module.
        use_precomputed_fake_quant: keep the weight ranges seen so far, without another look.
        as_trained: keep the scales and integer ranges that the model was trained with, so that int8
            is what was trained.  By default parameters are computed anew and ranges are the dtype's,
            as ``torch.ao.quantization`` does.
        strict: refuse layers that have seen no data, instead of a warning at the first forward.

    Returns:
        The int8 model.  It takes and gives what the float one did.

    Raises:
        InvalidConfigError: for a model that is not prepared, or is converted already; with
            ``strict``, for layers without data.  The model is then as it was.

    Example:
        >>> import eagerq
        >>> net = eagerq.QuantWrapper(nn.Linear(2, 2)).train()
        >>> net.qconfig = eagerq.get_default_qat_qconfig("onednn")
        >>> net = prepare_qat(net)
        >>> _ = net(torch.randn(8, 2))
        >>> convert(net.eval(), as_trained=True)(torch.randn(1, 2)).shape
        torch.Size([1, 2])
    """
    if is_reference:
        raise UnsupportedError("convert(is_reference=True) makes modules of FX graph mode, which eagerq leaves out")
    custom = quantized_classes(convert_custom_config_dict)
    if mapping is None and (convert_custom_config_dict is None or not custom):
        _check_prepared(module)
    unobserved = _unobserved(module)
    if strict and unobserved:
        raise InvalidConfigError(
            f"these layers have seen no data: {', '.join(map(repr, unobserved))}",
            module=module,
            remedy="run the prepared model on data before convert",
        )
    _report_nonfinite(module)
    chosen = get_default_static_quant_module_mappings() if mapping is None else mapping
    if not inplace:
        module = copy.deepcopy(module)
    stamp_names(module)
    with unchanged_on_error(module), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"\w+ has seen no data")  # told at the first forward, of all at once
        swap_children(
            module,
            lambda one: swap_module(one, chosen, custom, use_precomputed_fake_quant, as_trained),
            custom,
        )
    if remove_qconfig:
        remove_observers(module)
    stamp_names(module)
    install_state_check(module)
    if any(isinstance(one, QuantizedModule) for one in module.modules()):
        hook = RunWarnings(unobserved, evaluated=not module.training)
        module.register_forward_pre_hook(hook)
        module.register_load_state_dict_post_hook(hook.loaded)
    return module


def _check_prepared(model: nn.Module) -> None:
    if any(isinstance(module, Observing) for module in model.modules()):
        return
    if any(isinstance(module, QuantizedModule) for module in model.modules()):
        raise InvalidConfigError(
            "convert got a model that is converted already",
            module=model,
            remedy="convert the prepared model once",
        )
    if has_state_check(model):  # prepared, but of layers that need no observer
        return
    raise InvalidConfigError(
        "convert got a model that is not prepared: it has no observers",
        module=model,
        remedy="call prepare_qat (or prepare) and run the model on data first",
    )


def quantize(
    model: nn.Module,
    run_fn: Callable[..., Any],
    run_args: Sequence[Any],
    mapping: ModuleMap | None = None,
    inplace: bool = False,
) -> nn.Module:
    """Post-training quantization in one go: :func:`prepare`, ``run_fn(model, *run_args)``, :func:`convert`.

    Args:
        model: float model with a qconfig.
        run_fn: runs the prepared model on data.
        mapping: see :func:`convert`.
        inplace: change ``model`` itself rather than a copy.
    """
    if not inplace:
        model = copy.deepcopy(model)
    model.eval()
    prepare(model, inplace=True)
    run_fn(model, *run_args)
    return convert(model, mapping, inplace=True)


def quantize_qat(
    model: nn.Module,
    run_fn: Callable[..., Any],
    run_args: Sequence[Any],
    inplace: bool = False,
    mapping: ModuleMap | None = None,
) -> nn.Module:
    """QAT in one go: :func:`prepare_qat`, ``run_fn(model, *run_args)`` (which trains), :func:`convert`.

    Args:
        model: float model with a qconfig.
        run_fn: trains the prepared model.
        inplace: change ``model`` itself rather than a copy.
        mapping: float class to QAT class; see :func:`prepare_qat`.
    """
    if not inplace:
        model = copy.deepcopy(model)
    model.train()
    prepare_qat(model, mapping, inplace=True)
    run_fn(model, *run_args)
    return convert(model, inplace=True)
