"""How int8 modules keep and save what they compute with: as plain tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

__all__ = ["QuantizedModule", "StoredTensors"]

_Stored = TypeVar("_Stored", bound="StoredTensors")


class QuantizedModule(nn.Module):
    """Base of the int8 modules: whatever ``forward`` keeps its values in, they are saved as plain tensors."""

    _optional_state: ClassVar[tuple[str, ...]] = ()

    def _tensors(self) -> dict[str, Tensor]:
        """What the state_dict holds, by name."""
        return {}

    def _take_tensors(self, state: Mapping[str, Tensor], assign: bool) -> None:
        """Adopt values of :meth:`_tensors`, the very tensors to ``assign`` them; what is missing stays."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, value in self._tensors().items():
            destination[prefix + name] = value

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        known = self._tensors()
        names = (*known, *self._optional_state)
        others: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, others, error_msgs)
        unexpected_keys += [key for key in others if key[len(prefix) :] not in names]
        found = {}
        for name in names:
            value = state_dict.get(prefix + name)
            if isinstance(value, Tensor):
                found[name] = value
            elif strict and name not in self._optional_state:
                missing_keys.append(prefix + name)
            if name in known and name in found and found[name].numel() != known[name].numel():
                error_msgs.append(
                    f"size mismatch for {prefix + name}: {tuple(found[name].shape)} in the file, "
                    f"{tuple(known[name].shape)} in the model"
                )
        if not error_msgs:
            self._take_tensors(found, assign=local_metadata.get("assign_to_params_buffers", False))


class StoredTensors(QuantizedModule):
    """Base of those with tensors to save: buffers of the state's names, each behind an underscore."""

    _STORED: tuple[str, ...]

    def _store(self, *values: Tensor | None) -> None:
        """Register the buffers; all after the last value given are left out."""
        for name, value in zip(self._STORED, values, strict=False):
            self.register_buffer(f"_{name}", value, persistent=False)

    def _tensors(self) -> dict[str, Tensor]:
        stored = ((name, self._buffers.get(f"_{name}")) for name in self._STORED)
        return {**{name: value for name, value in stored if value is not None}, **super()._tensors()}

    def _apply(self: _Stored, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Stored:
        """Move as ``fn`` does, but keep the dtypes: ``half()`` and its kin are for the model's float layers."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, value in before.items():
            moved = self._buffers[name]
            if value is not None and moved is not None and moved.dtype is not value.dtype:
                self._buffers[name] = value.to(moved.device)
        return self

    def _take_tensors(self, state: Mapping[str, Tensor], assign: bool) -> None:
        super()._take_tensors(state, assign)
        for name in self._STORED:
            if name in state:
                mine, value = self._buffers[f"_{name}"], state[name].detach()
                assert mine is not None
                device = value.device if assign else mine.device
                # a new tensor, so that nothing packed from the old one is taken for it
                self._buffers[f"_{name}"] = value.to(device, mine.dtype, copy=not assign)
