"""Loading that is all or nothing: a check of the whole state_dict before any module takes from it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from eagerq.checkpoint import Unit, UpgradingModule, bundle, misfit, restate
from eagerq.errors import CheckpointError, nearest

__all__ = ["StateCheck", "has_state_check", "install_state_check"]

_SHOWN = 5
_CALLER = 7  # frames from the warning up to who called load_state_dict


def _upgrading(root: nn.Module, prefix: str) -> Iterator[tuple[str, UpgradingModule]]:
    """The modules that have a say about their entries, with what these begin with."""
    for path, module in root.named_modules(remove_duplicate=False):
        if isinstance(module, UpgradingModule):
            yield f"{prefix}{path}." if path else prefix, module


def _as_torch_loads(module: nn.Module) -> bool:
    return type(module)._load_from_state_dict is nn.Module._load_from_state_dict


def _units(root: nn.Module, prefix: str) -> Iterator[str]:
    """What the entries begin with of each outermost module of ours, where nobody above looks at them."""
    for name, child in root._modules.items():
        path = f"{prefix}{name}."
        if isinstance(child, Unit):
            if type(child)._load_from_state_dict.__module__.startswith("eagerq."):
                yield path
        elif child is not None and not child._load_state_dict_pre_hooks and _as_torch_loads(child):
            yield from _units(child, path)


def _listed(keys: list[str]) -> str:
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(keys[:_SHOWN]) + more


def _running(name: str, otherwise: Any) -> Any:
    """A local variable of the running ``load_state_dict``, which tells its hooks too little.

    They hear that ``strict`` is True whatever it is, and only the root's see the versions.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is nn.Module.load_state_dict.__code__:
            return frame.f_locals.get(name, otherwise)
        frame = frame.f_back  # type: ignore[assignment]
    return otherwise


class StateCheck:
    """A load_state_dict pre-hook of a model's root, which refuses a file that does not fit.

    nn.Module loads child by child, so that a file that fits only partly would leave a model that is
    neither the old nor the new.
    """

    def upgrade(self, root: nn.Module, state_dict: dict[str, Any], prefix: str, versions: Mapping[str, Any]) -> None:
        """Bring the entries to today's form, in place.

        Args:
            versions: metadata of each module, by its path.
        """
        restate(state_dict, prefix)
        for dot, module in _upgrading(root, prefix):
            module._upgrade_state(state_dict, dot, versions.get(dot[:-1], {}).get("version"))

    def problems(self, root: nn.Module, state_dict: Mapping[str, Any], prefix: str, strict: bool) -> list[str]:
        """What does not fit, in words; nothing is changed."""
        own = {prefix + key: value for key, value in root.state_dict().items()}
        found = []
        modules = dict(_upgrading(root, prefix))
        optional = {dot + name for dot, module in modules.items() for name in module._optional_state}
        kept = {dot + name for dot, module in modules.items() for name in module._kept_state}
        resizable = {dot + name for dot, module in modules.items() for name in module._resizable}
        needless, known = optional | kept, own.keys() | optional
        missing = [key for key in own if key not in state_dict and key not in needless]
        extra = [key for key in map(str, state_dict) if key.startswith(prefix) and key not in known]
        if strict and missing:
            found.append(f"it lacks {_listed(missing)}")
        if strict and extra:
            found.append(f"it has {_listed(extra)} besides (nearest to the first: {nearest(extra[0], own)})")
        for key, mine in own.items():
            if key in state_dict and isinstance(mine, Tensor):
                wrong = misfit(key, state_dict[key], mine, key in resizable)
                found += [wrong] if wrong else []
        for dot, module in modules.items():
            found += module._state_problems(state_dict, dot)
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
        self.upgrade(module, state_dict, prefix, _running("metadata", None) or {})
        strict = _running("strict", strict)
        found = self.problems(module, state_dict, prefix, strict)
        if found:
            more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            raise CheckpointError(
                f"this state_dict does not fit the model: {'; '.join(found[:_SHOWN])}{more}. The model is unchanged",
                module=module,
                remedy="build the model as it was when the file was saved: same fuse list, qconfig and mapping, "
                "then prepare (and convert, for an int8 file) before load_state_dict",
            )
        if strict:
            _tell_what_stays(module, state_dict, prefix)
        last = next(reversed(module._load_state_dict_pre_hooks.values()))
        if getattr(last, "hook", last) is self and _as_torch_loads(module):
            bundle(state_dict, set(_units(module, prefix)))


def _tell_what_stays(root: nn.Module, state_dict: Mapping[str, Any], prefix: str) -> None:
    kept = {
        dot[:-1]: [name for name in module._kept_state if dot + name not in state_dict]
        for dot, module in _upgrading(root, prefix)
    }
    missing = [f"{path!r} ({', '.join(names)})" for path, names in kept.items() if names]
    if missing:
        warnings.warn(
            f"this state_dict lacks parameters that torch.ao never saves: of {_listed(missing)}. They stay as they "
            "are: load it into a model that was calibrated on the same data, or set them.",
            stacklevel=_CALLER,
        )


def has_state_check(root: nn.Module) -> bool:
    """Whether ``root`` has been prepared or converted."""
    hooks = (getattr(hook, "hook", hook) for hook in root._load_state_dict_pre_hooks.values())
    return any(isinstance(hook, StateCheck) for hook in hooks)


def install_state_check(root: nn.Module) -> None:
    """Let ``root.load_state_dict`` refuse what does not fit, once."""
    if not has_state_check(root):
        root.register_load_state_dict_pre_hook(StateCheck())
