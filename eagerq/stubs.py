"""Markers of where a model's int8 part begins and ends."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["DeQuantStub", "QuantStub", "QuantWrapper"]


class _Stub(nn.Module):
    def __init__(self, qconfig: Any = None) -> None:
        super().__init__()
        if qconfig:
            self.qconfig = qconfig

    def forward(self, x: Tensor) -> Tensor:
        return x


class QuantStub(_Stub):
    """Where float becomes int8: passes its input on until ``convert`` makes it quantize.

    Args:
        qconfig: its ``activation`` observes the input; the parent's when left out.
    """


class DeQuantStub(_Stub):
    """Where int8 becomes float: passes its input on until ``convert`` makes it dequantize.

    Args:
        qconfig: kept for symmetry; nothing is observed here.
    """


class QuantWrapper(nn.Module):
    """A module between a :class:`QuantStub` and a :class:`DeQuantStub`.

    Args:
        module: takes one tensor and returns one; its ``qconfig`` serves the stubs too.

    Example:
        >>> import torch
        >>> QuantWrapper(nn.Linear(3, 2))(torch.zeros(1, 3)).shape
        torch.Size([1, 2])
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        qconfig = getattr(module, "qconfig", None)
        self.quant = QuantStub(qconfig)
        self.dequant = DeQuantStub(qconfig)
        self.module = module
        self.train(module.training)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.dequant(self.module(self.quant(x)))
        return y
