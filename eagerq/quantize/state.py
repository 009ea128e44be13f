"""Loading that is all or nothing: a check of the whole state_dict before any module takes from it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.__future__ import get_swap_module_params_on_conversion as _swapping

from eagerq.bundles import Taken, Unit, bundle, is_ours
from eagerq.checkpoint import UpgradingModule, misfit, restate
from eagerq.errors import CheckpointError, nearest
from eagerq.quantize.taking import Inventory, as_torch_loads

__all__ = ["StateCheck", "has_state_check", "install_state_check"]

_SHOWN = 5
_CALLER = 7  # frames from the warning up to who called load_state_dict


_Upgrading = list[tuple[str, UpgradingModule]]


def _units(root: nn.Module, prefix: str) -> Iterator[str]:
    """What the entries begin with of each outermost module of ours, where nobody above looks at them."""
    for name, child in root._modules.items():
        path = f"{prefix}{name}."
        if isinstance(child, Unit):
            if is_ours(child):
                yield path
        elif child is not None and not child._load_state_dict_pre_hooks and as_torch_loads(child):
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

    def upgrade(
        self, modules: _Upgrading, state_dict: dict[str, Any], prefix: str, versions: Mapping[str, Any]
    ) -> None:
        """Bring the entries to today's form, in place.

        Args:
            modules: those that have a say.
            versions: metadata of each module, by its path.
        """
        restate(state_dict, prefix)
        for dot, module in modules:
            module._upgrade_state(state_dict, dot, versions.get(dot[:-1], {}).get("version"))

    def problems(
        self, modules: _Upgrading, own: Mapping[str, Any], state_dict: Mapping[str, Any], prefix: str, strict: bool
    ) -> tuple[list[str], list[str]]:
        """What does not fit, in words; nothing is changed.

        Args:
            own: the model's own state.

        Returns:
            That, and the keys of all that is not just as the model has it, fitting or not.
        """
        found: list[str] = []
        odd: list[str] = []
        optional = {dot + name for dot, module in modules for name in module._optional_state}
        kept = {dot + name for dot, module in modules for name in module._kept_state}
        resizable = {dot + name for dot, module in modules for name in module._resizable}
        needless, known = optional | kept, own.keys() | optional
        missing, extra = [], []
        if state_dict.keys() != own.keys():
            missing = [key for key in own if key not in state_dict and key not in needless]
            extra = [key for key in map(str, state_dict) if key.startswith(prefix) and key not in known]
        if strict and missing:
            found.append(f"it lacks {_listed(missing)}")
        if strict and extra:
            found.append(f"it has {_listed(extra)} besides (nearest to the first: {nearest(extra[0], own)})")
        for key, mine in own.items():
            if key in state_dict and isinstance(mine, Tensor):
                value = state_dict[key]
                if type(value) is not Tensor or value.dtype is not mine.dtype or value.shape != mine.shape:
                    odd.append(key)
                    wrong = misfit(key, value, mine, key in resizable)
                    found += [wrong] if wrong else []
        for dot, module in modules:
            found += module._state_problems(state_dict, dot)
        return found, odd

    def __call__(
        self,
        module: nn.Module,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        *lists: list[str],
    ) -> None:
        inventory = Inventory(module, prefix)
        modules, own = inventory.upgrading, inventory.own
        if not inventory.saved_as_usual:
            own = module.state_dict(prefix=prefix, keep_vars=True) if prefix else module.state_dict()
        self.upgrade(modules, state_dict, prefix, _running("metadata", None) or {})
        strict = _running("strict", strict)
        found, odd = self.problems(modules, own, state_dict, prefix, strict)
        if found:
            more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            raise CheckpointError(
                f"this state_dict does not fit the model: {'; '.join(found[:_SHOWN])}{more}. The model is unchanged",
                module=module,
                remedy="build the model as it was when the file was saved: same fuse list, qconfig and mapping, "
                "then prepare (and convert, for an int8 file) before load_state_dict",
            )
        if strict:
            _tell_what_stays(modules, state_dict)
        last = next(reversed(module._load_state_dict_pre_hooks.values()))
        if getattr(last, "hook", last) is self and as_torch_loads(module):
            if inventory.saved_as_usual and self._may_copy(module, local_metadata, lists[0]):
                inventory.take(state_dict, odd, lists[0])
            if state_dict:
                bundle(state_dict, set(_units(module, prefix)))

    def _may_copy(self, root: nn.Module, local_metadata: Mapping[str, Any], missing_keys: list[str]) -> bool:
        """Whether values are copied, and nobody hears of missing keys before :meth:`loaded` has put them right."""
        if local_metadata.get("assign_to_params_buffers") or _swapping():
            return False
        if _running("missing_keys", None) is not missing_keys:  # who goes from module to module himself calls no hook
            return False
        listening = root._load_state_dict_post_hooks.values()
        return bool(listening) and next(iter(listening)) == self.loaded

    def loaded(self, module: nn.Module, incompatible_keys: Any) -> None:
        """All modules have been asked for their entries."""
        taken = Taken.among(incompatible_keys.missing_keys)
        if taken is not None:
            incompatible_keys.missing_keys[:] = taken.before


def _tell_what_stays(modules: _Upgrading, state_dict: Mapping[str, Any]) -> None:
    kept = {
        dot[:-1]: [name for name in module._kept_state if dot + name not in state_dict]
        for dot, module in modules
        if module._kept_state
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
        check = StateCheck()
        root.register_load_state_dict_pre_hook(check)
        root.register_load_state_dict_post_hook(check.loaded)
