"""Small nets for the tests of compiled training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import eagerq
from eagerq.nn.quantized import FloatFunctional


class Residual(nn.Module):
    """A convolution, a depthwise one around which a shortcut leads, and a head."""

    shape = (3, 8, 8)
    groups = (["conv", "bn", "relu"], ["depthwise", "bn2"])

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant, self.join = eagerq.QuantStub(), eagerq.DeQuantStub(), FloatFunctional()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        self.depthwise, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.conv(self.quant(x))))
        x = self.join.add_relu(x, self.bn2(self.depthwise(x)))
        return self.dequant(self.head(x.mean((2, 3))))


class Convolution(nn.Module):
    """A convolution and a head."""

    shape = (3, 6, 6)
    groups = (["conv", "bn", "relu"],)

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = eagerq.QuantStub(), eagerq.DeQuantStub()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.conv(self.quant(x))))
        return self.dequant(self.head(x.mean((2, 3))))


class Perceptron(nn.Module):
    """Linear layers, one with a batch norm and one with a ReLU."""

    shape = (10,)
    groups = (["layers.0", "layers.1"], ["layers.2", "layers.3"])

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = eagerq.QuantStub(), eagerq.DeQuantStub()
        hidden = nn.Linear(10, 12), nn.BatchNorm1d(12), nn.Linear(12, 12), nn.ReLU()
        self.layers = nn.Sequential(*hidden, nn.Linear(12, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.dequant(self.layers(self.quant(x)))


def prepared(kind: Any, qconfig: str = "onednn") -> Any:
    """A net that has seen one batch: from then on the weights' channels are known."""
    torch.manual_seed(4)
    model = eagerq.fuse_modules_qat(kind().train(), [list(group) for group in kind.groups])
    model.qconfig = eagerq.get_default_qat_qconfig(qconfig)
    model = eagerq.prepare_qat(model)
    model(torch.randn(4, *kind.shape))
    return model


def compiled(model: nn.Module, backend: str) -> tuple[Any, CompileCounterWithBackend]:
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, fullgraph=True, backend=counter), counter
