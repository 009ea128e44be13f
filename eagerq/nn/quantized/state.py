"""How int8 modules keep and save what they compute with: as plain tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from eagerq.bundles import Taken
from eagerq.checkpoint import UpgradingModule, bad_qparams, misfit, restate
from eagerq.qtensor import QTensor
from eagerq.scheme import integer_type

__all__ = ["QuantizedModule", "StoredTensors", "qtensor_parts", "stored_qtensor"]

_Stored = TypeVar("_Stored", bound="StoredTensors")


def qtensor_parts(w: QTensor) -> tuple[Tensor, Tensor, Tensor]:
    """A weight as it is stored: integers, scales (float32) and zero points (int32), ``[1]`` or ``[channels]``."""
    device = w.integers.device
    scale = torch.as_tensor(w.scale, dtype=torch.float32).reshape(-1).to(device)
    return w.integers, scale, torch.as_tensor(w.zero_point).to(device, torch.int32).reshape(-1)


def stored_qtensor(integers: Tensor, scale: Tensor, zero_point: Tensor, *, axis: int = 0) -> QTensor:
    """The weight that :func:`qtensor_parts` took apart."""
    if scale.numel() == 1 != integers.shape[axis]:
        return QTensor(integers, float(scale), int(zero_point))
    return QTensor(integers, scale, zero_point, axis)


def _countable(value: Any) -> Any:
    """A tensor whose changes torch counts, as those made in inference mode have not: packed weights are kept by it."""
    if not isinstance(value, Tensor) or not value.is_inference():
        return value
    with torch.inference_mode(False):
        return value.clone()


class QuantizedModule(UpgradingModule):
    """Base of the int8 modules: whatever ``forward`` keeps its values in, they are saved as plain tensors."""

    def _tensors(self) -> dict[str, Tensor]:
        """What the state_dict holds, by name."""
        return {}

    def _take_tensors(self, state: Mapping[str, Tensor], assign: bool) -> None:
        """Adopt values of :meth:`_tensors`, the very tensors to ``assign`` them; what is missing stays."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, value in self._tensors().items():
            destination[prefix + name] = value

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As of any module, but that one which is refused, for its keys too, leaves everything as it was."""
        before = self._tensors()
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except BaseException:
            self._take_tensors(before, assign=True)
            raise

    def _load_from_state_dict(
        self,
        state_dict: MutableMapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if Taken.among(missing_keys) is not None:
            return
        checked = self._open(state_dict, prefix)
        if not checked:
            restate(state_dict, prefix)
        others: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, others, error_msgs)
        known = self._tensors()
        names = (*known, *self._optional_state)
        unexpected_keys += [key for key in others if key[len(prefix) :] not in names]
        given = {name: state_dict[prefix + name] for name in names if prefix + name in state_dict}
        if strict:
            needless = {*given, *self._optional_state, *self._kept_state}
            missing_keys += [prefix + name for name in known if name not in needless]
        if not checked:
            checks = (
                misfit(prefix + name, value, known[name], name in self._resizable)
                for name, value in given.items()
                if name in known
            )
            error_msgs += filter(None, (*checks, *self._state_problems(state_dict, prefix)))
        if not error_msgs:
            self._take_tensors(given, assign=local_metadata.get("assign_to_params_buffers", False))


@cache
def _tables(names: tuple[str, ...]) -> tuple[str, ...]:
    """Those with a scale and a zero point beside them."""
    return tuple(name for name in names if {f"{name}_scale", f"{name}_zero_point"} <= {*names})


class StoredTensors(QuantizedModule):
    """Base of those with tensors to save: buffers of the state's names, each behind an underscore.

    Where there are ``x``, ``x_scale`` and ``x_zero_point``, they are a table of integers with one scale,
    or one for each index of its axis ``_axis``; files of either kind are taken.
    """

    _STORED: tuple[str, ...]
    _axis: int = 0

    @property
    def _resizable(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(f"{name}_{what}" for name in self._tables() for what in ("scale", "zero_point"))

    def _tables(self) -> tuple[str, ...]:
        return _tables(self._STORED)

    def _state_problems(self, state: Mapping[str, Any], prefix: str) -> Iterator[str]:
        yield from super()._state_problems(state, prefix)
        for name in self._tables():
            table, zero_point = self._buffers[f"_{name}"], self._buffers[f"_{name}_zero_point"]
            assert table is not None
            assert zero_point is not None
            kind = None if zero_point.is_floating_point() else integer_type(table.dtype)
            yield from bad_qparams(f"{prefix}{name}_", state, (1, table.shape[self._axis]), kind)

    def _store(self, *values: Tensor | None) -> None:
        """Register the buffers; all after the last value given are left out."""
        for name, value in zip(self._STORED, values, strict=False):
            self.register_buffer(f"_{name}", _countable(value), persistent=False)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, _countable(value) if name in self.__dict__.get("_buffers", ()) else value)

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
                moved = value.to(moved.device)
            self._buffers[name] = _countable(moved)
        return self

    def _take_tensors(self, state: Mapping[str, Tensor], assign: bool) -> None:
        super()._take_tensors(state, assign)
        for name in self._STORED:
            if name in state:
                mine, value = self._buffers[f"_{name}"], state[name].detach()
                assert mine is not None
                device = value.device if assign else mine.device
                # a new tensor, so that nothing packed from the old one is taken for it
                self._buffers[f"_{name}"] = _countable(value.to(device, mine.dtype, copy=not assign))
