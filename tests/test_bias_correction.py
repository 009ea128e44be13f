"""Bias correction: torch.ao's biases, smaller errors, and models otherwise left as they are."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from conftest import Oracle
from torch import Tensor, nn

import eagerq
from eagerq import numeric_suite
from eagerq.bias_correction import MeanShadowLogger, bias_correction
from eagerq.errors import InvalidArgumentError
from eagerq.nn import quantized as nnq


class Net(nn.Module):
    def __init__(self, library: Any = eagerq) -> None:
        super().__init__()
        self.quant, self.dequant = library.QuantStub(), library.DeQuantStub()
        self.conv, self.relu = nn.Conv2d(2, 4, 3), nn.ReLU()
        self.fc1, self.fc2 = nn.Linear(4 * 16, 8), nn.Linear(8, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv(self.quant(x)))
        y: Tensor = self.dequant(self.fc2(self.fc1(x.flatten(1))))
        return y


def batches(count: int = 3, size: int = 8) -> list[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [(torch.randn(size, 2, 6, 6, generator=generator) + 0.3,) for _ in range(count)]


def pair(library: Any = eagerq, weights: dict[str, Tensor] | None = None) -> tuple[Any, Any]:
    model = Net(library).eval()
    if weights is not None:
        model.load_state_dict(weights)
    prepared = copy.deepcopy(model)
    prepared.qconfig = library.default_qconfig
    prepared = library.prepare(prepared)
    for (x,) in batches():
        prepared(x)
    return model, library.convert(prepared)


def test_equals_torch_ao(ao: Oracle) -> None:
    weights = Net().state_dict()
    model, int8 = pair(weights=weights)
    theirs_model, theirs = pair(ao.quantization, weights)
    bias_correction(model, int8, batches())
    importlib.import_module("torch.ao.quantization._correct_bias").bias_correction(theirs_model, theirs, batches())
    for name in ("conv", "fc1"):
        mine, wanted = getattr(int8, name).bias(), getattr(theirs, name).orig_module.bias()
        assert not torch.equal(mine, weights[f"{name}.bias"])
        if name == "conv":  # its input is the same; later ones follow from the corrected integers
            torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-6)
        else:
            torch.testing.assert_close(mine, wanted, rtol=1e-2, atol=2e-4)


def mean_error(model: Any, int8: Any, name: str, data: list[tuple[Tensor]]) -> float:
    found = numeric_suite.compare_model_stub(model, int8, {nn.Conv2d, nn.Linear}, torch.cat([x for (x,) in data]))
    numeric_suite.remove_loggers(int8)
    stats = found[f"{name}.stats"]
    error = stats["quantized"][0].dequantize() - stats["float"][0]
    return float(error.movedim(1, 0).flatten(1).mean(1).abs().mean())


def test_mean_errors_shrink() -> None:
    model, int8 = pair()
    data = [*batches(), *batches(1, size=3)]  # a last batch that is smaller
    before = {name: mean_error(model, int8, name, data) for name in ("conv", "fc1")}
    other = {key: value.clone() for key, value in int8.state_dict().items() if not key.endswith("bias")}
    kinds = [type(module) for module in int8.modules()]
    bias_correction(model, int8, data)
    for name, error in before.items():
        assert mean_error(model, int8, name, data) < 0.5 * error
    assert all(torch.equal(int8.state_dict()[key], value) for key, value in other.items())
    assert [type(module) for module in int8.modules()] == kinds


def test_linear_over_sequences() -> None:
    """The channel is the last dimension there, not the second."""
    model = eagerq.QuantWrapper(nn.Linear(4, 3)).eval()
    prepared = copy.deepcopy(model)
    prepared.qconfig = eagerq.default_qconfig
    prepared = eagerq.prepare(prepared)
    data = [(torch.rand(6, 5, 4),)]
    prepared(data[0][0])
    int8 = eagerq.convert(prepared)
    x = data[0][0]
    before = int8.module.bias().clone()
    error = (int8(x) - model.module(int8.quant(x).dequantize())).mean((0, 1))
    bias_correction(model, int8, data)
    torch.testing.assert_close(int8.module.bias(), before - error, rtol=1e-4, atol=1e-6)


def test_batches_may_be_limited() -> None:
    model, int8 = pair()
    twin = copy.deepcopy(int8)
    bias_correction(model, int8, batches(3), neval_batches=1)
    bias_correction(model, twin, batches(1))
    assert torch.equal(int8.conv.bias(), twin.conv.bias())


def test_means_over_unequal_batches() -> None:
    logger = MeanShadowLogger()
    for size in (3, 1):
        logger(torch.full((size, 2), float(size)), torch.zeros(size, 2))
    assert logger.stats["quantized"].tolist() == [2.5, 2.5]
    logger.clear()
    assert logger.stats == {"float": None, "quantized": None}


def test_what_cannot_be_corrected_is_said() -> None:
    model, int8 = pair()
    with pytest.raises(InvalidArgumentError, match="no layer of Conv3d has a bias"):
        bias_correction(model, int8, batches(), [nnq.Conv3d])
    with pytest.raises(InvalidArgumentError, match="img_data has no batches"):
        bias_correction(model, int8, [])
    assert not [m for m in int8.modules() if isinstance(m, numeric_suite.Shadow)]
