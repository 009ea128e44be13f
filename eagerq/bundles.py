"""All entries of a module as one, so that loading a model looks at each of them once."""

from __future__ import annotations

from collections.abc import Container, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Unit", "bundle", "is_ours", "unbundle"]


class Unit(nn.Module):
    """Base of the modules that may be handed all their entries, and those of the modules in them, as one.

    nn.Module seeks the entries of each child among all those of its parent, which takes a model of a thousand
    layers a million looks at each of a layer's entries.  Where they come as one, it is one look; and whoever
    makes one of them has checked them, so that they only have to be copied.
    """

    def _load_from_state_dict(
        self, state_dict: MutableMapping[str, Any], prefix: str, local_metadata: Mapping[str, Any], *args: Any
    ) -> None:
        own = self._open(state_dict, prefix)
        self._before_loading(state_dict, prefix, local_metadata, own is not None)
        if own is None or not self._copied(own, state_dict, prefix, local_metadata):
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def _before_loading(
        self, state: MutableMapping[str, Any], prefix: str, local_metadata: Mapping[str, Any], checked: bool
    ) -> None:
        """Make the module and its entries ready for each other, in place."""

    def _open(self, state: MutableMapping[str, Any], prefix: str) -> list[str] | None:
        """Lay out what came as one, those of units within as one each; the keys that no module within has.

        None where it did not, or where a hook may change it yet.
        """
        if self._load_state_dict_pre_hooks:
            unbundle(state, prefix)
            return None
        entries = state.pop(prefix + _ALL, None)
        if entries is None:
            return None
        own, start = [], len(prefix)
        for key, value in entries.items():
            end = key.find(".", start)
            child = self._modules.get(key[start:end]) if end > 0 else None
            if child is None:
                own.append(key)
                state[key] = value
            elif isinstance(child, Unit) and is_ours(child):
                state.setdefault(key[: end + 1] + _ALL, {})[key] = value
            else:
                state[key] = value
        return own

    def _copied(
        self, keys: list[str], state: Mapping[str, Any], prefix: str, local_metadata: Mapping[str, Any]
    ) -> bool:
        """Copy one's own entries, as nn.Module does with more care; whether that is all that it would have done."""
        if (
            local_metadata.get("assign_to_params_buffers")
            or torch.__future__.get_swap_module_params_on_conversion()
            or type(self).set_extra_state is not nn.Module.set_extra_state
        ):
            return False
        pairs: list[tuple[Tensor, Any]] = []
        for values, others in ((self._parameters, ()), (self._buffers, self._non_persistent_buffers_set)):
            for name, mine in values.items():
                if mine is not None and name not in others:
                    value = state.get(prefix + name)
                    if type(value) not in _PLAIN or value.shape != mine.shape or mine.is_meta:  # type: ignore[union-attr]
                        return False
                    pairs.append((mine, value))
        if len(pairs) != len(keys):
            return False
        try:
            with torch.no_grad():
                for mine, value in pairs:
                    mine.copy_(value)
        except RuntimeError:  # nn.Module says which one and why
            return False
        return True


_PLAIN = (Tensor, nn.Parameter)


def is_ours(module: nn.Module) -> bool:
    """Whether a module takes its entries as eagerq wrote it: somebody's own way sees them one by one."""
    return type(module)._load_from_state_dict.__module__.startswith("eagerq.")


_ALL = "(all)"


def bundle(state: MutableMapping[str, Any], units: Container[str]) -> None:
    """Put all entries of a :class:`Unit` into one, in place.

    Args:
        units: what the entries of each begin with, such as ``layer1.conv.``.
    """
    bundles: dict[str, dict[str, Any]] = {}
    for key in [key for key in state if isinstance(key, str)]:
        end = key.find(".") + 1
        while end and key[:end] not in units:
            end = key.find(".", end) + 1
        if end:
            entries = bundles.get(key[:end])
            if entries is None:
                entries = bundles[key[:end]] = state[key[:end] + _ALL] = {}
            entries[key] = state.pop(key)


def unbundle(state: MutableMapping[str, Any], prefix: str) -> bool:
    """Undo :func:`bundle` for one module, in place; whether there was anything to undo."""
    entries = state.pop(prefix + _ALL, {})
    state.update(entries)
    return bool(entries)
