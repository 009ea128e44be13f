"""Dropout in an int8 model: nothing, in training mode too."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["Dropout"]


class Dropout(nn.Dropout):
    """Gives what it gets, so that a model with dropout runs on QTensors in any mode.

    Args:
        p, inplace: as for :class:`torch.nn.Dropout`; without effect.

    Example:
        >>> import torch
        >>> Dropout(0.9).train()(torch.ones(3))
        tensor([1., 1., 1.])
    """

    def forward(self, input: Tensor) -> Tensor:
        return input

    def _get_name(self) -> str:
        return "QuantizedDropout"

    @classmethod
    def from_float(cls, mod: Any, use_precomputed_fake_quant: bool = False) -> Dropout:
        """The Dropout that a float one becomes."""
        return cls(mod.p, mod.inplace)
