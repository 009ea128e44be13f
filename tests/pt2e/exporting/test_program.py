"""An eager model's Q/DQ program: the same integers, and nothing but torch's operators."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import eagerq
from eagerq.nn.quantized import FloatFunctional
from eagerq.pt2e import export


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = eagerq.QuantStub(), eagerq.DeQuantStub()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pool, self.sum, self.classify = nn.MaxPool2d(2), FloatFunctional(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.conv(self.quant(x))))
        x = self.sum.add(x, self.depthwise(x))
        out: Tensor = self.dequant(self.classify(self.pool(x).mean([2, 3])))
        return out


@pytest.fixture
def prepared() -> nn.Module:
    torch.manual_seed(0)
    model = Residual().train()
    model.qconfig = eagerq.get_default_qat_qconfig("onednn")  # type: ignore[assignment]
    model = eagerq.prepare_qat(eagerq.fuse_modules_qat(model, ["conv", "bn", "relu"]))
    model(torch.randn(8, 3, 16, 16))
    return model.eval()


@pytest.mark.parametrize("converted", [False, True])
def test_a_model_becomes_a_graph_of_the_same_integers(prepared: nn.Module, converted: bool) -> None:
    int8 = eagerq.convert(prepared, as_trained=True)
    x = torch.randn(4, 3, 16, 16)
    program = export(int8 if converted else prepared, (x,))
    assert not [node for node in program.graph.nodes if "eagerq" in str(node.target)]
    assert ((program.module()(x) - int8(x)) / int8.classify.scale).abs().max().round() <= 1
