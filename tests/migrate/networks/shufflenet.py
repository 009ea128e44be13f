"""Channels split, shuffled and put together again."""

from __future__ import annotations

import torch
import torch.ao.nn.quantized as nnq
import torch.nn as nn
import torch.quantization as tq
from torch.ao.quantization.fuse_modules import fuse_modules, fuse_modules_qat

SHAPE = (3, 32, 32)


def shuffle(x: torch.Tensor, groups: int = 2) -> torch.Tensor:
    batch, channels, height, width = x.size()
    x = x.view(batch, groups, channels // groups, height, width)
    x = torch.transpose(x, 1, 2).contiguous()
    return x.view(batch, channels, height, width)


def depthwise(channels: int, stride: int) -> list:
    return [nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False), nn.BatchNorm2d(channels)]


def pointwise(inputs: int, outputs: int) -> list:
    return [nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


class Unit(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        half = outputs // 2
        self.stride = stride
        self.branch1 = nn.Sequential(*(depthwise(inputs, 2) + pointwise(inputs, half) if stride > 1 else []))
        start = inputs if stride > 1 else half
        self.branch2 = nn.Sequential(*pointwise(start, half), *depthwise(half, stride), *pointwise(half, half))
        self.cat = nnq.FloatFunctional()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.stride == 1:
            x1, x2 = x.chunk(2, dim=1)
            joined = self.cat.cat([x1, self.branch2(x2)], dim=1)
        else:
            joined = self.cat.cat([self.branch1(x), self.branch2(x)], dim=1)
        return shuffle(joined)


class ShuffleNet(nn.Module):
    def __init__(self, classes: int = 10):
        super().__init__()
        self.quant, self.dequant = tq.QuantStub(), tq.DeQuantStub()
        self.conv1 = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.stage2 = nn.Sequential(Unit(8, 16, 2), Unit(16, 16, 1), Unit(16, 16, 1))
        self.stage3 = nn.Sequential(Unit(16, 32, 2), Unit(32, 32, 1))
        self.conv5 = nn.Sequential(*pointwise(32, 48))
        self.fc = nn.Linear(48, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(self.conv1(self.quant(x)))
        x = self.conv5(self.stage3(self.stage2(x)))
        return self.dequant(self.fc(x.mean([2, 3])))

    def fuse_model(self, is_qat: bool = False) -> None:
        fuse = fuse_modules_qat if is_qat else fuse_modules
        for name, module in self._modules.items():
            if name in ("conv1", "conv5"):
                fuse(module, ["0", "1", "2"], inplace=True)
        for module in self.modules():
            if type(module) is Unit:
                if len(module.branch1) > 0:
                    fuse(module.branch1, [["0", "1"], ["2", "3", "4"]], inplace=True)
                fuse(module.branch2, [["0", "1", "2"], ["3", "4"], ["5", "6", "7"]], inplace=True)


def build() -> nn.Module:
    return ShuffleNet()


def prepare(model: nn.Module) -> nn.Module:
    model.train().fuse_model(True)
    model.qconfig = tq.get_default_qat_qconfig("onednn")
    tq.prepare_qat(model, inplace=True)
    return model


def convert(model: nn.Module) -> nn.Module:
    return tq.convert(model.eval())
