"""Branches side by side, their results put next to each other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.ao import quantization
from torch.ao.nn.quantized import FloatFunctional
from torch.ao.quantization import observer as observers
from torch.ao.quantization.fake_quantize import FakeQuantize
from torch.quantization.qconfig import QConfig

SHAPE = (3, 40, 40)

# eight bits for activations, signed ones for weights, channel by channel
QCONFIG = QConfig(
    activation=FakeQuantize.with_args(
        observer=observers.MovingAverageMinMaxObserver, quant_min=0, quant_max=255, dtype=torch.quint8
    ),
    weight=FakeQuantize.with_args(
        observer=observers.MovingAveragePerChannelMinMaxObserver,
        quant_min=-128,
        quant_max=127,
        dtype=torch.qint8,
        qscheme=torch.per_channel_symmetric,
    ),
)


class BasicConv(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel, **options):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, bias=False, **options)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(self.bn(self.conv(x)))

    def fuse_model(self, is_qat: bool | None = None) -> None:
        fuse = quantization.fuse_modules_qat if is_qat else quantization.fuse_modules
        fuse(self, ["conv", "bn", "relu"], inplace=True)


class Wide(nn.Module):
    """1×1, factorized 7×7, double 3×3 and a pooled branch."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.branch1x1 = BasicConv(inputs, width, 1)
        self.branch7x7_1 = BasicConv(inputs, width, 1)
        self.branch7x7_2 = BasicConv(width, width, (1, 7), padding=(0, 3))
        self.branch7x7_3 = BasicConv(width, width, (7, 1), padding=(3, 0))
        self.branch3x3_1 = BasicConv(inputs, width, 1)
        self.branch3x3_2 = BasicConv(width, width, 3, padding=1)
        self.branch_pool = BasicConv(inputs, width, 1)
        self.cat = FloatFunctional()

    def forward(self, x):
        branches = [
            self.branch1x1(x),
            self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
            self.branch3x3_2(self.branch3x3_1(x)),
            self.branch_pool(F.avg_pool2d(x, kernel_size=3, stride=1, padding=1)),
        ]
        return self.cat.cat(branches, 1)


class Smaller(nn.Module):
    """Half the height and the width."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.branch3x3 = BasicConv(inputs, width, 3, stride=2)
        self.cat = FloatFunctional()

    def forward(self, x):
        return self.cat.cat([self.branch3x3(x), F.max_pool2d(x, kernel_size=3, stride=2)], 1)


class Inception(nn.Module):
    def __init__(self, classes: int = 10):
        super().__init__()
        self.quant = quantization.QuantStub()
        self.stem1 = BasicConv(3, 8, 3, stride=2)
        self.stem2 = BasicConv(8, 12, 3)
        self.maxpool = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.mixed1 = Wide(12, 4)
        self.reduce = Smaller(16, 8)
        self.mixed2 = Wide(24, 6)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.dropout = nn.Dropout(p=0.0)
        self.fc = nn.Linear(24, classes)
        self.dequant = quantization.DeQuantStub()

    def forward(self, x):
        x = self.maxpool(self.stem2(self.stem1(self.quant(x))))
        x = self.mixed2(self.reduce(self.mixed1(x)))
        x = torch.flatten(self.dropout(self.avgpool(x)), 1)
        return self.dequant(self.fc(x))

    def fuse_model(self, is_qat: bool | None = None) -> None:
        for module in self.modules():
            if type(module) is BasicConv:
                module.fuse_model(is_qat)


def build() -> nn.Module:
    return Inception()


def prepare(model: nn.Module) -> nn.Module:
    model.train()
    model.fuse_model(is_qat=True)
    model.qconfig = QCONFIG
    return quantization.prepare_qat(model, inplace=True)


def convert(model: nn.Module) -> nn.Module:
    return quantization.convert(model.eval())
