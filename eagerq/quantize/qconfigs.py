"""Spreading qconfigs over a module tree."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from eagerq.errors import InvalidArgumentError, InvalidConfigError, nearest
from eagerq.qconfig import QConfig
from eagerq.qconfig_mapping import QConfigMapping
from eagerq.stubs import QuantWrapper
from eagerq.tree import is_leaf

__all__ = ["add_quant_dequant", "propagate_qconfig_", "require_qconfig"]


def propagate_qconfig_(
    module: nn.Module,
    qconfig_dict: dict[Any, QConfig | None] | QConfigMapping | None = None,
    prepare_custom_config_dict: dict[str, Any] | None = None,
) -> None:
    """Set ``qconfig`` on every submodule, in place.

    A module keeps a qconfig of its own; else it takes the one for its qualified name, else for its
    class, else its parent's.

    Args:
        qconfig_dict: qconfigs by qualified name (``""`` is the root) or module class; or a
            :class:`~eagerq.QConfigMapping`.
        prepare_custom_config_dict: ``non_traceable_module_name`` and ``non_traceable_module_class``
            list children that get none.

    Raises:
        InvalidArgumentError: for a key that matches no module, or a value that is not a qconfig.

    Example:
        >>> import eagerq
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> propagate_qconfig_(net, {"1": eagerq.default_qat_qconfig})
        >>> net[0].qconfig is None, net[1].qconfig is None
        (True, False)
    """
    find = _finder(module, qconfig_dict or {})
    custom = prepare_custom_config_dict or {}
    skipped_names = set(custom.get("non_traceable_module_name", ()))
    skipped_classes = tuple(custom.get("non_traceable_module_class", ()))
    plan: dict[nn.Module, Any] = {}

    def visit(current: nn.Module, inherited: Any, path: str) -> None:
        if current in plan:  # in two places: the first counts
            return
        config = find(path, type_before_parametrizations(current), inherited)
        config = plan[current] = getattr(current, "qconfig", config)
        for name, child in current.named_children():
            if name not in skipped_names and type(child) not in skipped_classes:
                visit(child, config, f"{path}.{name}" if path else name)

    visit(module, None, "")
    for current, config in plan.items():
        if config is not None and not (hasattr(config, "activation") and hasattr(config, "weight")):
            raise InvalidArgumentError(
                f"its qconfig is a {type(config).__name__}, not a QConfig",
                module=current,
                remedy="set it to QConfig(activation=…, weight=…), or None to leave the module in float",
            )
    for current, config in plan.items():
        current.qconfig = config


def _finder(root: nn.Module, given: dict[Any, Any] | QConfigMapping) -> Callable[[str, type[nn.Module], Any], Any]:
    """What tells a module's qconfig from its name, class and its parent's qconfig."""
    if isinstance(given, QConfigMapping):
        _check_keys(root, given.module_name_qconfigs)  # its classes and patterns may be meant for many models
        return given.find
    _check_keys(root, given)
    return lambda name, kind, inherited: given.get(name, given.get(kind, inherited))


def _check_keys(root: nn.Module, keys: Iterable[Any]) -> None:
    modules = dict(root.named_modules(remove_duplicate=False))
    kinds = {type_before_parametrizations(module) for module in modules.values()}
    for key in keys:
        if isinstance(key, str) and key not in modules:
            raise InvalidArgumentError(
                f"no module is named {key!r}; nearest names: {nearest(key, modules)}",
                module=root,
                remedy="use names as model.named_modules() gives them, after fusing",
            )
        if not isinstance(key, str) and key not in kinds:
            here = ", ".join(sorted(kind.__name__ for kind in kinds))
            raise InvalidArgumentError(
                f"no module is of class {getattr(key, '__name__', key)}; the model has {here}",
                module=root,
                remedy="drop the key, or use a class that the model has",
            )


def require_qconfig(model: nn.Module, caller: str) -> None:
    """Refuse a model without any qconfig."""
    if not any(getattr(module, "qconfig", None) for module in model.modules()):
        raise InvalidConfigError(
            f"{caller} found no qconfig on the model or any of its {len(list(model.modules())) - 1} submodules, "
            "so nothing would be quantized",
            module=model,
            remedy=f"set one before: model.qconfig = eagerq.get_default_qat_qconfig('onednn'), then {caller}(model)",
        )


def add_quant_dequant(module: nn.Module) -> nn.Module:
    """Wrap each leaf that has a qconfig in a :class:`~eagerq.QuantWrapper`, in place.

    Returns:
        ``module``, or its wrapper when it is itself such a leaf.
    """
    done: dict[nn.Module, nn.Module] = {}  # a module in two places gets one wrapper

    def visit(current: nn.Module) -> nn.Module:
        if current not in done:
            wraps = is_leaf(current) and getattr(current, "qconfig", None)
            done[current] = QuantWrapper(current) if wraps else current
            for name, child in current._modules.items():
                if child is not None:
                    current._modules[name] = visit(child)
        return done[current]

    return visit(module)
