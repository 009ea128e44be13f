"""Loading that is all or nothing: a check of the whole state_dict before any module takes from it."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from eagerq.errors import CheckpointError, nearest
from eagerq.scheme import integer_type

__all__ = ["StateCheck", "install_state_check"]

_SHOWN = 5


def _owner(root: nn.Module, key: str) -> tuple[nn.Module, str]:
    path, _, name = key.rpartition(".")
    return root.get_submodule(path), name


def _listed(keys: list[str]) -> str:
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(keys[:_SHOWN]) + more


def _misfit(key: str, value: Any, own: Tensor, resizable: bool) -> str | None:
    """What is wrong with one entry, or None."""
    if not isinstance(value, Tensor):
        return f"{key} is a {type(value).__name__}, not a tensor"
    if value.shape != own.shape and not (resizable and min(value.numel(), own.numel()) <= 1):
        return f"{key} has shape {tuple(value.shape)}, the model's {tuple(own.shape)}"
    if own.dtype == value.dtype or (own.is_floating_point() and value.is_floating_point()):
        return None
    if own.is_floating_point() != value.is_floating_point():
        return f"{key} is of {value.dtype}, the model's of {own.dtype}"
    # integers of another width may hold the same values (old files keep zero points as int64)
    if value.dtype is torch.int64 or own.numel() == 0:
        kind = integer_type(own.dtype) if own.dtype not in (torch.int64, torch.bool) else None
        if kind is None or bool(((value >= kind.minimum) & (value <= kind.maximum)).all()):
            return None
    return f"{key} is of {value.dtype}, the model's of {own.dtype}: another bit width"


def _strict(given: bool) -> bool:
    """The ``strict`` of the running ``load_state_dict``, which tells its hooks True whatever it is."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is nn.Module.load_state_dict.__code__:
            return bool(frame.f_locals["strict"])
        frame = frame.f_back  # type: ignore[assignment]
    return given


class StateCheck:
    """A load_state_dict pre-hook of a model's root, which refuses a file that does not fit.

    nn.Module loads child by child, so that a file that fits only partly would leave a model that is
    neither the old nor the new.
    """

    def problems(self, root: nn.Module, state_dict: dict[str, Any], prefix: str, strict: bool) -> list[str]:
        """What does not fit, in words; nothing is changed."""
        own = {prefix + key: value for key, value in root.state_dict().items()}
        found = []
        optional = set()
        for path, module in root.named_modules():
            dot = f"{prefix}{path}." if path else prefix
            optional |= {dot + name for name in getattr(module, "_optional_state", ())}
        missing = [key for key in own if key not in state_dict and key not in optional]
        extra = [key for key in map(str, state_dict) if key.startswith(prefix) and key not in {*own, *optional}]
        if strict and missing:
            found.append(f"it lacks {_listed(missing)}")
        if strict and extra:
            found.append(f"it has {_listed(extra)} besides (nearest to the first: {nearest(extra[0], own)})")
        for key, mine in own.items():
            if key in state_dict and isinstance(mine, Tensor):
                module, name = _owner(root, key[len(prefix) :])
                misfit = _misfit(key, state_dict[key], mine, name in getattr(module, "_resizable", ()))
                if misfit:
                    found.append(misfit)
        return found

    def __call__(
        self,
        module: nn.Module,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        *lists: list[str],
    ) -> None:
        found = self.problems(module, state_dict, prefix, _strict(strict))
        if found:
            more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            raise CheckpointError(
                f"this state_dict does not fit the model: {'; '.join(found[:_SHOWN])}{more}. The model is unchanged",
                module=module,
                remedy="build the model as it was when the file was saved: same fuse list, qconfig and mapping, "
                "then prepare (and convert, for an int8 file) before load_state_dict",
            )


def install_state_check(root: nn.Module) -> None:
    """Let ``root.load_state_dict`` refuse what does not fit, once."""
    for hook in root._load_state_dict_pre_hooks.values():
        if isinstance(getattr(hook, "hook", hook), StateCheck):
            return
    root.register_load_state_dict_pre_hook(StateCheck())
