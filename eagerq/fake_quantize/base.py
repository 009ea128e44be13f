"""What every fake quantizer has: two switches.

They live in the buffers ``fake_quant_enabled`` and ``observer_enabled``, as checkpoints of
``torch.ao.quantization`` have them, mirrored by plain attributes so that ``forward`` never reads the
device.  A change made directly to a buffer is noticed by its version counter at the next eager call;
a compiled model follows :func:`eagerq.enable_observer` and its kin.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

from eagerq.checkpoint import UpgradingModule
from eagerq.observer.base import _WithArgs

__all__ = ["FakeQuantizeBase", "buffer_of"]


def buffer_of(module: Any, name: str) -> Any:
    """``module.name``, found sooner where it is a buffer."""
    found = module._buffers.get(name)
    return getattr(module, name) if found is None else found


class FakeQuantizeBase(_WithArgs, ABC, UpgradingModule):
    """Base of the fake quantizers: two switches, for rounding and for observing, both on at first."""

    fake_quant_enabled: Tensor
    observer_enabled: Tensor
    _switch_dtype = torch.uint8  # NCCL takes no bool

    def __init__(self) -> None:
        super().__init__()
        self._fake_quant_on = self._observer_on = True
        self._seen: dict[str, tuple[Tensor, int]] = {}
        for name in ("fake_quant_enabled", "observer_enabled"):
            self.register_buffer(name, torch.ones(1, dtype=self._switch_dtype))
            self._set_switch(name, True)

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def calculate_qparams(self) -> tuple[Tensor, Tensor]: ...

    def qparams_in_use(self) -> tuple[Tensor, Tensor]:
        """The scale and zero point that ``forward`` rounds with; what ``convert(as_trained=True)`` keeps."""
        return self.calculate_qparams()

    def enable_fake_quant(self, enabled: bool = True) -> None:
        """Round values in ``forward`` from now on."""
        self._set_switch("fake_quant_enabled", enabled)
        self._fake_quant_on = enabled

    def disable_fake_quant(self) -> None:
        """Let values pass unrounded from now on."""
        self.enable_fake_quant(False)

    def enable_observer(self, enabled: bool = True) -> None:
        """Update statistics and parameters in ``forward`` from now on."""
        self._set_switch("observer_enabled", enabled)
        self._observer_on = enabled

    def disable_observer(self) -> None:
        """Keep statistics and parameters as they are from now on."""
        self.enable_observer(False)

    def _set_switch(self, name: str, enabled: bool) -> None:
        buffer = self._buffers[name]
        assert buffer is not None
        buffer.fill_(int(enabled))
        self._remember(name, buffer)

    def _remember(self, name: str, buffer: Tensor) -> None:
        self._seen[name] = (buffer, -1 if buffer.is_inference() else buffer._version)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_seen": {}}  # the buffers of a copy count their versions anew

    def _changed(self, name: str) -> Tensor | None:
        """The switch's buffer, if somebody replaced it or wrote to it since we last looked."""
        buffer = self._buffers[name]
        seen, version = self._seen.get(name, (None, -1))
        if buffer is seen and version >= 0 and buffer is not None and buffer._version == version:
            return None
        if buffer is None or buffer.is_meta:
            return None
        self._remember(name, buffer)
        return buffer

    def _read_switches(self) -> None:
        if torch.compiler.is_compiling():
            return
        # nn.Module's own setting of an attribute takes longer than all the rest
        if (buffer := self._changed("fake_quant_enabled")) is not None:
            self.__dict__["_fake_quant_on"] = bool(buffer.item())
        if (buffer := self._changed("observer_enabled")) is not None:
            self.__dict__["_observer_on"] = bool(buffer.item())

    def _upgrade_state(self, state: MutableMapping[str, Any], prefix: str, version: int | None) -> None:
        super()._upgrade_state(state, prefix, version)
        for name in ("fake_quant_enabled", "observer_enabled"):
            value = state.get(prefix + name)
            if isinstance(value, Tensor) and value.dtype is not self._switch_dtype and not value.is_floating_point():
                state[prefix + name] = value.to(self._switch_dtype)  # classes differ in the width

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._read_switches()  # compiled code will not look at the buffers
