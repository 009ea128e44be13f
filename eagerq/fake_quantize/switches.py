"""The switches of fake quantizers, for ``nn.Module.apply``."""

from __future__ import annotations

from torch import nn

from eagerq.fake_quantize.base import FakeQuantizeBase

__all__ = ["disable_fake_quant", "disable_observer", "enable_fake_quant", "enable_observer"]


def disable_fake_quant(mod: nn.Module) -> None:
    """Stop a fake quantizer from rounding; ``model.apply(eagerq.disable_fake_quant)``."""
    if isinstance(mod, FakeQuantizeBase):
        mod.disable_fake_quant()


def enable_fake_quant(mod: nn.Module) -> None:
    """Let a fake quantizer round again; ``model.apply(eagerq.enable_fake_quant)``."""
    if isinstance(mod, FakeQuantizeBase):
        mod.enable_fake_quant()


def disable_observer(mod: nn.Module) -> None:
    """Freeze a fake quantizer's statistics; ``model.apply(eagerq.disable_observer)``."""
    if isinstance(mod, FakeQuantizeBase):
        mod.disable_observer()


def enable_observer(mod: nn.Module) -> None:
    """Let a fake quantizer update its statistics again; ``model.apply(eagerq.enable_observer)``."""
    if isinstance(mod, FakeQuantizeBase):
        mod.enable_observer()
