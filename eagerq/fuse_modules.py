"""Fusing layers that follow one another, by name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from eagerq.errors import InvalidArgumentError, InvalidConfigError, UnsupportedError, nearest
from eagerq.fuser_method_mappings import (
    FuserMethod,
    fuse_conv_bn,
    fuse_conv_bn_relu,
    get_fuser_method,
)
from eagerq.quantize.swapping import check_unprepared
from eagerq.tree import copy_hooks, unchanged_on_error

__all__ = [
    "fuse_conv_bn",
    "fuse_conv_bn_relu",
    "fuse_known_modules",
    "fuse_modules",
    "fuse_modules_qat",
    "get_fuser_method",
]

FuserFunction = Callable[..., list[nn.Module]]


def fuse_known_modules(
    mod_list: Sequence[nn.Module],
    is_qat: bool,
    additional_fuser_method_mapping: dict[Any, FuserMethod] | None = None,
) -> list[nn.Module]:
    """The fused module in the first place, and an Identity for each of the others.

    Pre-hooks of the first module and forward hooks of the last move to the fused one.

    Args:
        mod_list: modules in the order they run.
        is_qat: fuse for quantization-aware training.
        additional_fuser_method_mapping: sequences of classes to methods of your own.

    Raises:
        InvalidConfigError: when they cannot be fused.
    """
    kinds = tuple(type_before_parametrizations(module) for module in mod_list)
    fused = get_fuser_method(kinds, additional_fuser_method_mapping)(is_qat, *mod_list)
    first, last = mod_list[0], mod_list[-1]
    fused.training = first.training
    copy_hooks(first, fused, post=False)
    copy_hooks(last, fused, pre=False)
    before, after = list(first._forward_pre_hooks), list(last._forward_hooks)
    for part in set(fused.modules()) - {fused}:  # the layers themselves, or copies of them
        for number in before:
            part._forward_pre_hooks.pop(number, None)
        for number in after:
            part._forward_hooks.pop(number, None)
    return [fused, *(nn.Identity().train(first.training) for _ in mod_list[1:])]


def _find(model: nn.Module, name: str, modules: dict[str, nn.Module]) -> nn.Module:
    if name in modules:
        return modules[name]
    raise InvalidArgumentError(
        f"the model has no module named {name!r} to fuse; nearest names: {nearest(name, modules)}",
        module=model,
        remedy="list names as model.named_modules() gives them",
    )


def _check_adjacent(model: nn.Module, names: Sequence[str], modules: dict[str, nn.Module]) -> None:
    """Inside a Sequential the order of running is known: nothing else may lie between."""
    parents = {name.rpartition(".")[0] for name in names}
    parent = modules[parents.pop()] if len(parents) == 1 else None
    if not isinstance(parent, nn.Sequential) or type(parent).forward is not nn.Sequential.forward:
        return
    wanted = [name.rpartition(".")[2] for name in names]
    order = [name for name, child in parent._modules.items() if name in wanted or not isinstance(child, nn.Identity)]
    places = [order.index(name) for name in wanted]
    if places != list(range(places[0], places[0] + len(places))):
        raise InvalidArgumentError(
            f"{', '.join(map(repr, names))} do not follow one another in their Sequential, whose order is "
            f"{', '.join(order)}",
            module=model,
            remedy="fuse only modules that run directly one after the other",
        )


def _fuse(
    model: nn.Module,
    modules_to_fuse: Sequence[Any],
    is_qat: bool,
    inplace: bool,
    fuser_func: FuserFunction,
    fuse_custom_config_dict: dict[str, Any] | None,
) -> nn.Module:
    check_unprepared(model, "fuse_modules_qat" if is_qat else "fuse_modules")
    if not inplace:
        model = copy.deepcopy(model)
    methods = (fuse_custom_config_dict or {}).get("additional_fuser_method_mapping", {})
    groups = [modules_to_fuse] if all(isinstance(name, str) for name in modules_to_fuse) else modules_to_fuse
    for group in groups:
        if not isinstance(group, (list, tuple)) or not all(isinstance(name, str) for name in group):
            raise InvalidArgumentError(
                f"modules_to_fuse has {group!r} in it",
                module=model,
                remedy="pass a list of names, or a list of such lists",
            )
    groups = [list(group) for group in groups if len(group)]
    modules = dict(model.named_modules(remove_duplicate=False))
    seen: set[str] = set()
    for group in groups:
        for name in group:
            _find(model, name, modules)
            if name in seen:
                raise InvalidArgumentError(f"{name!r} is listed twice", module=model, remedy="list it once")
            seen.add(name)
        _check_adjacent(model, group, modules)
    with unchanged_on_error(model):
        for group in groups:
            try:
                replacements = fuser_func([modules[name] for name in group], is_qat, methods)
            except (InvalidConfigError, UnsupportedError) as error:
                raise type(error)(f"cannot fuse {', '.join(map(repr, group))}: {error}") from error
            for name, replacement in zip(group, replacements, strict=True):
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, replacement)
    return model


def fuse_modules(
    model: nn.Module,
    modules_to_fuse: Sequence[Any],
    inplace: bool = False,
    fuser_func: FuserFunction = fuse_known_modules,
    fuse_custom_config_dict: dict[str, Any] | None = None,
) -> nn.Module:
    """Fuse layers for inference: batch norms are folded away.

    Sequences: Conv, BN; Conv, BN, ReLU; Conv, ReLU (each 1d, 2d, 3d); Linear, BN; Linear, ReLU; BN, ReLU;
    ConvTranspose, BN.  The first module becomes the fused one, the others Identity.

    Args:
        model: in eval mode where there are batch norms.
        modules_to_fuse: a list of names, or a list of such lists, each in the order of running.
        inplace: change ``model`` itself rather than a copy.
        fuser_func: replaces :func:`fuse_known_modules`.
        fuse_custom_config_dict: ``{"additional_fuser_method_mapping": {(Class, …): method}}``.

    Returns:
        The model with fused modules.

    Raises:
        InvalidArgumentError: for a name that does not exist (the nearest are shown), stands twice, or
            does not follow its neighbour in a Sequential.
        InvalidConfigError: for modules that cannot be fused, or a model that is prepared or converted.
            The model is then as it was.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> [type(m).__name__ for m in fuse_modules(net, ["0", "1", "2"])]
        ['ConvReLU2d', 'Identity', 'Identity']
    """
    return _fuse(model, modules_to_fuse, False, inplace, fuser_func, fuse_custom_config_dict)


def fuse_modules_qat(
    model: nn.Module,
    modules_to_fuse: Sequence[Any],
    inplace: bool = False,
    fuser_func: FuserFunction = fuse_known_modules,
    fuse_custom_config_dict: dict[str, Any] | None = None,
) -> nn.Module:
    """Fuse layers for quantization-aware training: batch norms stay, and are folded while training.

    Arguments, result and errors as for :func:`fuse_modules`.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> [type(m).__name__ for m in fuse_modules_qat(net, ["0", "1", "2"])]
        ['ConvBnReLU2d', 'Identity', 'Identity']
    """
    return _fuse(model, modules_to_fuse, True, inplace, fuser_func, fuse_custom_config_dict)
