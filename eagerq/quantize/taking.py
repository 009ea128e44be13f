"""Loading all at once: what fits is copied before nn.Module goes from child to child looking for it."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from eagerq.bundles import Taken, is_ours, loader
from eagerq.checkpoint import UpgradingModule
from eagerq.nn.quantized.state import QuantizedModule

__all__ = ["Inventory", "as_torch_loads"]

_BATCH_NORM = _NormBase._load_from_state_dict  # gives old files what they lack, and then does as usual
_PLAIN = (Tensor, nn.Parameter)

_Grown = tuple[nn.Module, str, Tensor]


@cache
def _saves(kind: type[nn.Module]) -> tuple[bool, bool, bool]:
    """Whether a class of modules saves no others' entries as it likes; its own as any module; or as int8 ones do."""
    how, nothing_else = kind._save_to_state_dict, kind.get_extra_state is nn.Module.get_extra_state
    as_int8 = how is QuantizedModule._save_to_state_dict
    return (
        kind.state_dict is nn.Module.state_dict,
        nothing_else and how is nn.Module._save_to_state_dict,
        nothing_else and as_int8,
    )


def as_torch_loads(module: nn.Module) -> bool:
    """Whether a module takes its entries as nn.Module does, and looks at none of its children's."""
    return loader(module) is nn.Module._load_from_state_dict


def _loads_as_usual(module: nn.Module) -> bool:
    known = as_torch_loads(module) or loader(module) is _BATCH_NORM or is_ours(module)
    return known and type(module).set_extra_state is nn.Module.set_extra_state


class Inventory:
    """What a model holds of what is saved.

    Args:
        root: the model.
        prefix: what its entries begin with.

    Attributes:
        upgrading: the modules that have a say about their entries, and what these begin with.
        own: the entries.
        saved_as_usual: whether that is what ``state_dict`` tells; a hook may tell another thing.
        loaded_as_usual: whether nobody below the root looks at entries in a way of his own.
    """

    def __init__(self, root: nn.Module, prefix: str) -> None:
        self.upgrading: list[tuple[str, UpgradingModule]] = []
        self.own: dict[str, Any] = {}
        self.saved_as_usual = self.loaded_as_usual = True
        self._root, self._prefix = root, prefix
        self._int8: list[tuple[QuantizedModule, dict[str, str]]] = []
        self._look(root, prefix)

    def _look(self, module: nn.Module, prefix: str) -> None:
        if isinstance(module, UpgradingModule):
            self.upgrading.append((prefix, module))
        as_usual, plainly, as_int8 = _saves(type(module))  # type: ignore[arg-type]
        if not as_usual or module._state_dict_hooks or module._state_dict_pre_hooks:
            self.saved_as_usual = False
        hooked = module._load_state_dict_pre_hooks or module._load_state_dict_post_hooks
        if (hooked and module is not self._root) or not _loads_as_usual(module):
            self.loaded_as_usual = False
        unsaved = module._non_persistent_buffers_set
        if plainly:
            for name, value in module._parameters.items():
                if value is not None:
                    self.own[prefix + name] = value
            for name, buffer in module._buffers.items():
                if buffer is not None and name not in unsaved:
                    self.own[prefix + name] = buffer
        elif as_int8 and not module._parameters and module._buffers.keys() <= unsaved:
            values = module._tensors()  # type: ignore[operator]
            keys = {name: prefix + name for name in values}
            self._int8.append((module, keys))  # type: ignore[arg-type]
            self.own.update(zip(keys.values(), values.values(), strict=True))
        else:
            self.loaded_as_usual = False
            module._save_to_state_dict(self.own, prefix, True)
        for name, child in module._modules.items():
            if child is not None:
                self._look(child, f"{prefix}{name}.")

    def take(self, state: MutableMapping[str, Any], odd: Iterable[str], missing_keys: list[str]) -> None:
        """Copy all entries of ``state``, if nn.Module would do just that, and leave none for it to look at.

        Args:
            state: what was checked.
            odd: the keys whose values are not of the very shape and dtype that the model has.
            missing_keys: the list that nn.Module keeps of them.
        """
        if not self.loaded_as_usual or state.keys() != self.own.keys():
            return
        mine = dict(self.own)
        for _, keys in self._int8:
            for key in keys.values():
                del mine[key]
        grown = self._grown(state, [key for key in odd if key in mine])
        if grown is None or any(type(one) not in _PLAIN or one.is_meta for one in mine.values()):
            return
        mine.update((key, fresh) for key, (_, _, fresh) in grown.items())
        try:
            with torch.no_grad():
                for key, one in mine.items():
                    one.copy_(state[key])
        except RuntimeError:  # nn.Module says which one and why
            return
        for module, name, fresh in grown.values():
            module._buffers[name] = fresh
        for quantized, keys in self._int8:
            quantized._take_tensors({name: state[key] for name, key in keys.items()}, assign=False)
        state.clear()
        missing_keys[:] = [Taken(self._prefix, missing_keys)]

    def _grown(self, state: MutableMapping[str, Any], odd: Iterable[str]) -> dict[str, _Grown] | None:
        """New buffers of the file's shape, where a module lets them have it; None where one may not."""
        if not odd:
            return {}
        resizable = {dot + name: (module, name) for dot, module in self.upgrading for name in module._resizable}
        grown: dict[str, _Grown] = {}
        for key in odd:
            value, mine = state[key], self.own[key]
            if type(value) not in _PLAIN:
                return None
            if value.shape != mine.shape:
                module, name = resizable.get(key, (None, ""))
                buffer = None if module is None else module._buffers.get(name)
                if module is None or buffer is None:
                    return None
                grown[key] = module, name, buffer.new_empty(value.shape)
        return grown
