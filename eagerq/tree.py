"""Module trees: questions about them, and changes that happen wholly or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

__all__ = ["copy_hooks", "device_of", "is_leaf", "leave_fast_paths", "unchanged_on_error"]

# what prepare, convert and fuse change in a module, besides its qconfig
_TABLES = (
    "_modules",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_MISSING = object()


@contextmanager
def unchanged_on_error(root: nn.Module) -> Iterator[None]:
    """Put the tree's children, hooks and qconfigs back as they were if the block raises."""
    before: list[tuple[nn.Module, dict[str, Any], Any]] = [
        (
            module,
            {name: dict(getattr(module, name)) for name in _TABLES},
            module.__dict__.get("qconfig", _MISSING),
        )
        for module in root.modules()
    ]
    try:
        yield
    except BaseException:
        for module, tables, qconfig in before:
            for name, entries in tables.items():
                table = getattr(module, name)
                table.clear()
                table.update(entries)
            if qconfig is _MISSING:
                module.__dict__.pop("qconfig", None)
            else:
                module.qconfig = qconfig
        raise


def copy_hooks(
    source: nn.Module,
    target: nn.Module,
    *,
    pre: bool = True,
    post: bool = True,
    leave: type | tuple[type, ...] | None = None,
) -> None:
    """Give ``target`` the forward hooks of ``source``, in order, except instances of ``leave``."""
    pairs = (("_forward_pre_hooks", pre), ("_forward_hooks", post))
    for table, wanted in pairs:
        if not wanted:
            continue
        flags = [f"{table}_with_kwargs", f"{table}_always_called"]
        for number, hook in getattr(source, table).items():
            if leave is not None and isinstance(hook, leave):
                continue
            getattr(target, table)[number] = hook
            for flag in flags:
                if number in getattr(source, flag, ()):
                    getattr(target, flag)[number] = True


def is_leaf(module: nn.Module) -> bool:
    """Whether a module has no children (parametrizations apart)."""
    return not module._modules or (is_parametrized(module) and list(module._modules) == ["parametrizations"])


def device_of(module: nn.Module) -> torch.device | None:
    """Device of the first parameter or buffer, or None."""
    for values in (module.parameters(), module.buffers()):
        for value in values:
            if value.device.type != "meta":
                return value.device
    return None


def leave_fast_paths(root: nn.Module, changed: set[nn.Module]) -> None:
    """Have torch's transformer encoders call their layers, whose weights they else take past them in eval mode.

    Args:
        changed: modules with a child that has been swapped.
    """
    for module in root.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and not changed.isdisjoint(module.modules()):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder) and not changed.isdisjoint(module.modules()):
            module.use_nested_tensor = False
