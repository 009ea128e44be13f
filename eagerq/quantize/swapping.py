"""Swapping modules for their twins, and observing what they put out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from eagerq.errors import InvalidConfigError, describe, stamp_names
from eagerq.fake_quantize import FakeQuantizeBase
from eagerq.intrinsic import _FusedModule
from eagerq.nn.qat.base import QATMixin
from eagerq.nn.quantized import FloatFunctional, QFunctional, QuantizedModule
from eagerq.observer import ObserverBase
from eagerq.quantization_mappings import (
    DEFAULT_MODULE_TO_ACT_POST_PROCESS,
    ModuleMap,
    get_default_qconfig_propagation_list,
)
from eagerq.quantize.tree import copy_hooks, device_of, is_leaf
from eagerq.stubs import DeQuantStub

__all__ = [
    "OBSERVER",
    "Observing",
    "ObserverHook",
    "attach_observers",
    "check_root",
    "check_unprepared",
    "swap_children",
    "swap_module",
]

# the child that observes or fake-quantizes a module's output; checkpoints know it by this name
OBSERVER = "activation_post_process"
Observing = (ObserverBase, FakeQuantizeBase)


class ObserverHook:
    """Forward hook that shows a module's output to its ``activation_post_process``."""

    def __call__(self, module: Any, args: Any, output: Tensor) -> Tensor:
        observed: Tensor = module.activation_post_process(output)
        return observed


def _is_unit(module: nn.Module) -> bool:
    """Whether a module is swapped and observed as a whole, never its parts."""
    return isinstance(module, (_FusedModule, QATMixin, *Observing))


def swap_module(
    mod: nn.Module,
    mapping: ModuleMap,
    custom_module_class_mapping: ModuleMap | None = None,
    use_precomputed_fake_quant: bool = False,
    as_trained: bool = False,
) -> nn.Module:
    """The module that ``mapping`` gives for ``mod``, made by its ``from_float``; else ``mod`` itself.

    Only modules with a qconfig are swapped.  Hooks (but for the observer's), device and training mode
    carry over.

    Args:
        custom_module_class_mapping: observed custom class to quantized class, made by
            ``from_observed``.
        use_precomputed_fake_quant, as_trained: see :func:`convert`.
    """
    kind = type_before_parametrizations(mod)
    if getattr(mod, "qconfig", None) is None:
        return mod
    if custom_module_class_mapping and kind in custom_module_class_mapping:
        new: nn.Module = custom_module_class_mapping[kind].from_observed(mod)
    elif kind in mapping:
        make = mapping[kind].from_float
        accepted = inspect.signature(make).parameters
        options = {"use_precomputed_fake_quant": use_precomputed_fake_quant, "as_trained": as_trained}
        new = make(mod, **{name: value for name, value in options.items() if name in accepted})
    else:
        return mod
    copy_hooks(mod, new, leave=ObserverHook)
    device = device_of(mod)
    if device is not None:
        new.to(device)
    new.training = mod.training
    return new


def swap_children(root: nn.Module, swap: Callable[[nn.Module], nn.Module], whole: ModuleMap) -> None:
    """Replace descendants by what ``swap`` makes of them: planned first, applied after."""
    plan: list[tuple[nn.Module, str, nn.Module]] = []
    swapped: dict[nn.Module, nn.Module] = {}  # a module in two places stays one module

    def visit(parent: nn.Module) -> None:
        for name, child in parent._modules.items():
            if child is None:
                continue
            if child not in swapped:
                if not _is_unit(child) and type_before_parametrizations(child) not in whole:
                    visit(child)
                swapped[child] = swap(child)
            if swapped[child] is not child:
                plan.append((parent, name, swapped[child]))

    visit(root)
    for parent, name, new in plan:
        parent._modules[name] = new


def _fixed_range(module: nn.Module) -> Callable[..., Any] | None:
    """The fake quantizer of an output whose range is known beforehand; for training only."""
    return DEFAULT_MODULE_TO_ACT_POST_PROCESS.get(type_before_parametrizations(module)) if module.training else None


def _attach_observer(module: nn.Module, device: torch.device | None) -> None:
    config = getattr(module, "qconfig", None)
    if config is None or isinstance(module, DeQuantStub):
        return
    observer = (_fixed_range(module) or config.activation)()
    where = device_of(module) or device
    module.add_module(OBSERVER, observer.to(where) if where is not None else observer)
    if not isinstance(module, FloatFunctional):
        module.register_forward_hook(ObserverHook(), prepend=True)


def attach_observers(
    root: nn.Module, leaves: Iterable[Any], non_leaves: Iterable[Any], custom_module_class_mapping: ModuleMap
) -> None:
    leaf_kinds, whole_kinds = set(leaves), set(non_leaves)
    device = device_of(root)
    seen: set[nn.Module] = set()

    def visit(module: nn.Module) -> None:
        for name, child in list(module.named_children()):
            kind = type_before_parametrizations(child)
            if child in seen or kind is nn.Dropout:
                continue
            seen.add(child)
            if getattr(child, "qconfig", None) is not None and kind in custom_module_class_mapping:
                child = custom_module_class_mapping[kind].from_float(child)
                module._modules[name] = child
                _attach_observer(child, device)
            elif isinstance(child, (FloatFunctional, _FusedModule)) or kind in whole_kinds or _fixed_range(child):
                _attach_observer(child, device)
            elif not isinstance(child, (*Observing, QFunctional)):
                visit(child)
        kind = type_before_parametrizations(module)
        if is_leaf(module) and not isinstance(module, nn.Sequential) and kind in leaf_kinds:
            _attach_observer(module, device)

    visit(root)


def check_root(model: nn.Module, caller: str, *maps: Iterable[Any]) -> None:
    """Refuse a model that is itself one layer: only its parent could swap it."""
    kinds = {*get_default_qconfig_propagation_list(), *(kind for one in maps for kind in one)} - {nn.Sequential}
    kind = type_before_parametrizations(model)
    if _is_unit(model) or kind in kinds:
        raise InvalidConfigError(
            f"{caller} swaps the layers inside a model, but this {kind.__name__} is itself a layer",
            module=model,
            remedy=f"wrap it: {caller}(eagerq.QuantWrapper(model)), or in nn.Sequential if its input stays as it is",
        )


def check_unprepared(model: nn.Module, caller: str) -> None:
    """Refuse a model that has been prepared or converted."""
    for module in model.modules():
        if isinstance(module, QuantizedModule):
            stamp_names(model)
            raise InvalidConfigError(
                f"{caller} got a model that is converted already: {describe(module)} is an int8 module",
                module=model,
                remedy=f"call {caller} on the float model",
            )
        observer = getattr(module, OBSERVER, None)
        is_own = isinstance(module, Observing)
        if not is_own and isinstance(observer, Observing):
            stamp_names(model)
            raise InvalidConfigError(
                f"{caller} got a model that is prepared already: {describe(module)} has an observer",
                module=model,
                remedy=f"call {caller} once, on the float model",
            )
