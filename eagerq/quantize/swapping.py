"""Swapping modules for their twins, and observing what they put out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from eagerq.errors import InvalidConfigError, describe, stamp_names
from eagerq.intrinsic import _FusedModule
from eagerq.nn.qat.base import QATMixin
from eagerq.nn.quantized import FloatFunctional, QFunctional, QuantizedModule
from eagerq.quantization_mappings import ModuleMap, get_default_qconfig_propagation_list, no_observer_set
from eagerq.tree import device_of, is_leaf, leave_fast_paths
from eagerq.twins import OBSERVER, Observing, attach_observer, fixed_range_observer, made_from

__all__ = ["attach_observers", "check_root", "check_unprepared", "swap_children"]


def _is_unit(module: nn.Module) -> bool:
    """Whether a module is swapped and observed as a whole, never its parts."""
    return isinstance(module, (_FusedModule, QATMixin, *Observing))


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
    leave_fast_paths(root, {parent for parent, _, _ in plan})


def attach_observers(
    root: nn.Module, leaves: Iterable[Any], non_leaves: Iterable[Any], custom_module_class_mapping: ModuleMap
) -> None:
    leaf_kinds, whole_kinds = set(leaves), set(non_leaves)
    in_parts = tuple(no_observer_set())
    device = device_of(root)
    seen: set[nn.Module] = set()
    twins: dict[nn.Module, nn.Module] = {}  # a custom module in two places stays one module

    def visit(module: nn.Module) -> None:
        for name, child in list(module._modules.items()):
            if child in twins:
                module._modules[name] = twins[child]
            if child is None or child in seen or type_before_parametrizations(child) is nn.Dropout:
                continue
            seen.add(child)
            kind = type_before_parametrizations(child)
            if getattr(child, "qconfig", None) is not None and kind in custom_module_class_mapping:
                new = made_from(custom_module_class_mapping[kind].from_float, child)
                module._modules[name] = twins[child] = new
                seen.add(new)
                if not isinstance(new, in_parts):
                    attach_observer(new, device)
            elif (
                isinstance(child, (FloatFunctional, _FusedModule)) or kind in whole_kinds or fixed_range_observer(child)
            ):
                attach_observer(child, device)
            elif not isinstance(child, (*Observing, QFunctional)):
                visit(child)
        kind = type_before_parametrizations(module)
        if is_leaf(module) and not isinstance(module, nn.Sequential) and kind in leaf_kinds:
            attach_observer(module, device)

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
