"""Activations through QAT: fixed ranges, leaky ReLU, ReLU, dropout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from seeds.common import ENGINES, compiles_and_exports
from torch import Tensor, nn

import eagerq
from eagerq import FixedQParamsFakeQuantize
from eagerq.nn import quantized

FIXED = ("sigmoid", "hardsigmoid", "tanh")


class FixedRanges(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sigmoid, self.hardsigmoid, self.tanh = nn.Sigmoid(), nn.Hardsigmoid(), nn.Tanh()
        self.quant, self.dequant = eagerq.QuantStub(), eagerq.DeQuantStub()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.dequant(self.tanh(self.hardsigmoid(self.sigmoid(self.quant(x)))))
        return y


class Around(nn.Module):
    """One activation between stubs."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.act, self.quant, self.dequant = act, eagerq.QuantStub(), eagerq.DeQuantStub()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.dequant(self.act(self.quant(x)))
        return y


class WithDropout(nn.Module):
    def __init__(self, engine: str) -> None:
        super().__init__()
        self.qconfig = eagerq.get_default_qat_qconfig(engine)
        self.quant, self.dequant = eagerq.QuantStub(), eagerq.DeQuantStub()
        self.fc1, self.dropout = nn.Linear(5, 1), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.dequant(self.dropout(self.fc1(self.quant(x))))
        return y


def data() -> Tensor:
    return torch.randn(1, 3, 2, 4)


def without_observer(model: Any, names: tuple[str, ...]) -> bool:
    layers = [getattr(model, name) for name in names]
    return not any(hasattr(layer, "activation_post_process") or layer._forward_hooks for layer in layers)


def test_fixed_qparam_ops() -> None:
    model: Any = FixedRanges().train()
    model.qconfig = eagerq.default_qat_qconfig
    model = eagerq.prepare_qat(model)
    for name in FIXED:
        assert type(getattr(model, name).activation_post_process) is FixedQParamsFakeQuantize
    x = data()
    before = model(x)
    model = eagerq.convert(model)
    torch.testing.assert_close(model(x), before)
    assert [type(getattr(model, name)) for name in FIXED] == [nn.Sigmoid, nn.Hardsigmoid, nn.Tanh]
    assert without_observer(model, FIXED)
    compiles_and_exports(model.eval(), x)


def test_fixed_qparam_ops_are_not_observed_in_eval_mode() -> None:
    model: Any = FixedRanges().eval()
    model.qconfig = eagerq.default_qconfig
    model = eagerq.prepare(model)
    assert without_observer(model, FIXED)
    x = data()
    wanted = model(x)
    model = eagerq.convert(model)
    assert without_observer(model, FIXED)
    assert (model(x) - wanted).abs().max() < 3 / 128


def test_leaky_relu() -> None:
    model: Any = Around(nn.LeakyReLU()).train()
    model.qconfig = eagerq.default_qat_qconfig
    model = eagerq.prepare_qat(model)
    x = data()
    before = model(x)
    model = eagerq.convert(model)
    assert type(model.act) is quantized.LeakyReLU
    torch.testing.assert_close(model(x), before)
    compiles_and_exports(model.eval(), x)


def test_relu() -> None:
    model: Any = nn.Sequential()
    model.relu = nn.ReLU()
    model.train().qconfig = eagerq.default_qconfig
    model = eagerq.prepare_qat(model)
    assert not hasattr(model.relu, "activation_post_process")
    assert not model.relu._forward_hooks
    model = eagerq.convert(model)
    assert type(model.relu) is nn.ReLU


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("in_one_go", [False, True])
def test_dropout(engine: str, in_one_go: bool) -> None:
    batches = [torch.rand(20, 5) for _ in range(2)]

    def train(model: nn.Module) -> None:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
        for x in batches:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    model: Any = WithDropout(engine).train()
    if in_one_go:
        model = eagerq.quantize_qat(model, train, [])
    else:
        model = eagerq.prepare_qat(model)
        assert hasattr(model.fc1, "activation_post_process")
        assert not hasattr(model.dropout, "activation_post_process")
        assert not torch.equal(model(batches[0]), model(batches[0]))  # values are dropped while it trains
        train(model)
        model = eagerq.convert(model)
    assert type(model.fc1) is quantized.Linear
    assert type(model.dropout) is quantized.Dropout
    assert not any(hasattr(module, "qconfig") for module in model.modules())
    model.eval()
    x = batches[0]
    assert torch.equal(model(x), model.dequant(model.fc1(model.quant(x))))
    if not in_one_go:
        compiles_and_exports(model, x)
