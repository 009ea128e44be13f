"""All entries of a module as one, or of a whole model at once, so that loading looks at each of them once."""

from __future__ import annotations

from collections.abc import Container, Mapping, MutableMapping
from typing import Any

from torch import nn

__all__ = ["Taken", "Unit", "bundle", "is_ours", "loader", "unbundle"]


class Taken(str):
    """Stands in a load's list of missing keys while modules are asked for entries that they have taken already.

    nn.Module hands the one list to every module, and to the hooks that hear of a module's end.

    Args:
        prefix: what the entries begin with.
        before: the list as it was.
    """

    __slots__ = ("before",)

    before: list[str]

    def __new__(cls, prefix: str, before: list[str]) -> Taken:
        self = super().__new__(cls, prefix)
        self.before = before[:]
        return self

    @staticmethod
    def among(missing_keys: list[str]) -> Taken | None:
        """The one that stands in a list, or None."""
        first = missing_keys[0] if missing_keys else None
        return first if isinstance(first, Taken) else None


class Unit(nn.Module):
    """Base of the modules that may be handed all their entries, and those of the modules in them, as one.

    nn.Module seeks the entries of each child among all those of its parent, which takes a model of a thousand
    layers a million looks at each of a layer's entries.  Where they come as one, it is one look; where they
    have been taken at once, it is none.
    """

    def _load_from_state_dict(
        self,
        state_dict: MutableMapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        *args: Any,
    ) -> None:
        if Taken.among(missing_keys) is None:
            self._before_loading(state_dict, prefix, local_metadata, self._open(state_dict, prefix))
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *args)

    def _before_loading(
        self, state: MutableMapping[str, Any], prefix: str, local_metadata: Mapping[str, Any], checked: bool
    ) -> None:
        """Make the module and its entries ready for each other, in place."""

    def _open(self, state: MutableMapping[str, Any], prefix: str) -> bool:
        """Lay out what came as one, those of units within as one each.

        Returns:
            Whether there was anything, checked, that no hook may change yet.
        """
        if self._load_state_dict_pre_hooks:
            unbundle(state, prefix)
            return False
        entries = state.pop(prefix + _ALL, None)
        if entries is None:
            return False
        start = len(prefix)
        for key, value in entries.items():
            end = key.find(".", start)
            child = self._modules.get(key[start:end]) if end > 0 else None
            if isinstance(child, Unit) and is_ours(child):
                state.setdefault(key[: end + 1] + _ALL, {})[key] = value
            else:
                state[key] = value
        return True


def loader(module: nn.Module) -> Any:
    """What takes a module's entries, unbound if it is its class's."""
    return module.__dict__.get("_load_from_state_dict", type(module)._load_from_state_dict)


def is_ours(module: nn.Module) -> bool:
    """Whether a module takes its entries as eagerq wrote it: somebody's own way sees them one by one."""
    return str(getattr(loader(module), "__module__", "")).startswith("eagerq.")


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
