"""A residual network of eight blocks, as thin as it gets."""

from __future__ import annotations

import torch
from torch import nn
from torch.ao.quantization import (
    DeQuantStub,
    QuantStub,
    fuse_modules,
    fuse_modules_qat,  # batch norms stay
)

SHAPE = (3, 32, 32)


def _fuse(model: nn.Module, names: list, is_qat: bool) -> None:
    (fuse_modules_qat if is_qat else fuse_modules)(model, names, inplace=True)


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False),
                nn.BatchNorm2d(outputs),
            )
        self.add_relu = torch.ao.nn.quantized.FloatFunctional()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.add_relu.add_relu(y, x if self.downsample is None else self.downsample(x))

    def fuse_model(self, is_qat: bool) -> None:
        _fuse(self, [["conv1", "bn1", "relu"], ["conv2", "bn2"]], is_qat)
        if self.downsample is not None:
            _fuse(self.downsample, ["0", "1"], is_qat)


class ResNet(nn.Module):
    def __init__(self, widths: tuple = (8, 12, 16, 24), classes: int = 10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        inputs = [widths[0], *widths]
        for number, width in enumerate(widths):
            blocks = [Block(inputs[number], width, 1 if number == 0 else 2), Block(width, width)]
            setattr(self, f"layer{number + 1}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(widths[-1], classes)
        self.quant = QuantStub()
        self.dequant = DeQuantStub()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(self.quant(x)))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.dequant(self.fc(torch.flatten(self.avgpool(x), 1)))

    def fuse_model(self, is_qat: bool = False) -> None:
        _fuse(self, ["conv1", "bn1", "relu"], is_qat)
        for module in self.modules():
            if type(module) is Block:
                module.fuse_model(is_qat)


def build() -> nn.Module:
    return ResNet()


def prepare(model: nn.Module) -> nn.Module:
    model.train()
    model.fuse_model(is_qat=True)
    model.qconfig = torch.ao.quantization.get_default_qat_qconfig("onednn")
    return torch.ao.quantization.prepare_qat(model, inplace=True)


def convert(model: nn.Module) -> nn.Module:
    return torch.ao.quantization.convert(model.eval())
