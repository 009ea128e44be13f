"""Twins of float models for torch.ao and eagerq, as the tests of LSTM and attention compare them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import eagerq


class Between(nn.Module):
    """A module with its inputs quantized and its results, nested as they may be, dequantized."""

    def __init__(self, inner: nn.Module, package: Any) -> None:
        super().__init__()
        self.quant, self.inner, self.dequant = package.QuantStub(), inner, package.DeQuantStub()

    def forward(self, *inputs: Any, **options: Any) -> Any:
        return self._real(self.inner(*map(self._quantized, inputs), **options))

    def _quantized(self, x: Any) -> Any:
        return tuple(map(self.quant, x)) if isinstance(x, tuple) else self.quant(x)

    def _real(self, result: Any) -> Any:
        if isinstance(result, tuple):
            return tuple(self._real(part) for part in result)
        return None if result is None else self.dequant(result)


def flat(result: Any) -> list[Tensor]:
    """The tensors of a nested result, in order."""
    if isinstance(result, tuple):
        return [tensor for part in result for tensor in flat(part)]
    return [] if result is None else [result]


def close(got: Any, wanted: Any, tolerance: float = 1e-6) -> None:
    for a, b in zip(flat(got), flat(wanted), strict=True):
        assert a.shape == b.shape
        assert (a - b).norm() <= tolerance * b.norm() + 1e-9


def equal(got: Any, wanted: Any) -> None:
    for a, b in zip(flat(got), flat(wanted), strict=True):
        assert torch.equal(a, b), f"{int((a != b).sum())} of {a.numel()} differ"


def prepared_pair(
    ao: Any, inner: nn.Module, training: bool = False, minmax: bool = False
) -> tuple[nn.Module, nn.Module]:
    """The same float module prepared by torch.ao and by eagerq, for training or for calibration.

    Args:
        minmax: calibrate by least and greatest value rather than by histograms, which are slow.
    """
    models = []
    for package in (ao.quantization, eagerq):
        model = Between(copy.deepcopy(inner), package).train(training)
        kind = "get_default_qat_qconfig" if training else "get_default_qconfig"
        model.qconfig = getattr(package, kind)("onednn")
        if minmax and not training:
            model.qconfig = package.QConfig(package.MinMaxObserver, package.default_per_channel_weight_observer)
        models.append((package.prepare_qat if training else package.prepare)(model))
    return models[0], models[1]


def cross(theirs: nn.Module, ours: nn.Module) -> None:
    """Checkpoints of two prepared models load in each other, strictly, and say the same."""
    state = {name: value.clone() for name, value in theirs.state_dict().items()}
    mine = ours.state_dict()
    assert {name: (value.shape, value.dtype) for name, value in state.items()} == {
        name: (value.shape, value.dtype) for name, value in mine.items()
    }
    theirs.load_state_dict(copy.deepcopy(mine), strict=True)
    ours.load_state_dict(state, strict=True)
