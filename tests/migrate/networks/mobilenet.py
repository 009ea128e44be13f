"""Inverted residuals with squeeze-excitation; Hardswish and Hardsigmoid."""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor
from torch.ao.quantization import DeQuantStub as Leave
from torch.ao.quantization import QuantStub as Enter

SHAPE = (3, 32, 32)


class ConvBNActivation(nn.Sequential):
    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, act=None):
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(outputs, eps=0.001, momentum=0.01),
            *([act(inplace=True)] if act else []),
        )


class SqueezeExcitation(nn.Module):
    def __init__(self, channels: int, squeezed: int):
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.activation = nn.ReLU(inplace=True)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)
        self.scale_activation = nn.Hardsigmoid(inplace=True)
        self.skip_mul = nn.quantized.FloatFunctional()

    def forward(self, x: Tensor) -> Tensor:
        scale = self.activation(self.fc1(self.avgpool(x)))
        return self.skip_mul.mul(self.scale_activation(self.fc2(scale)), x)

    def fuse_model(self, is_qat: bool | None = None) -> None:
        _fuse(self, ["fc1", "activation"], is_qat)


class InvertedResidual(nn.Module):
    def __init__(self, inputs, expanded, outputs, kernel, stride, excite, act):
        super().__init__()
        layers = [] if expanded == inputs else [ConvBNActivation(inputs, expanded, 1, act=act)]
        layers.append(ConvBNActivation(expanded, expanded, kernel, stride, groups=expanded, act=act))
        if excite:
            layers.append(SqueezeExcitation(expanded, max(4, expanded // 4)))
        layers.append(ConvBNActivation(expanded, outputs, 1))
        self.block = nn.Sequential(*layers)
        self.use_res_connect = stride == 1 and inputs == outputs
        self.skip_add = nn.quantized.FloatFunctional()

    def forward(self, x: Tensor) -> Tensor:
        if self.use_res_connect:
            return self.skip_add.add(x, self.block(x))
        return self.block(x)


class MobileNet(nn.Module):
    def __init__(self, classes: int = 10):
        super().__init__()
        swish, relu = nn.Hardswish, nn.ReLU
        self.features = nn.Sequential(
            ConvBNActivation(3, 8, 3, stride=2, act=swish),
            InvertedResidual(8, 8, 8, 3, 1, True, relu),
            InvertedResidual(8, 24, 12, 3, 2, False, relu),
            InvertedResidual(12, 36, 12, 3, 1, False, relu),
            InvertedResidual(12, 36, 16, 5, 2, True, swish),
            InvertedResidual(16, 48, 16, 5, 1, True, swish),
            ConvBNActivation(16, 48, 1, act=swish),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            nn.Linear(48, 64), nn.Hardswish(inplace=True), nn.Dropout(p=0.0, inplace=True), nn.Linear(64, classes)
        )
        self.quant = Enter()
        self.dequant = Leave()

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(self.quant(x)))
        return self.dequant(self.classifier(torch.flatten(x, 1)))

    def fuse_model(self, is_qat: bool | None = None) -> None:
        for module in self.modules():
            if type(module) is ConvBNActivation:
                names = ["0", "1"]
                if len(module) == 3 and type(module[2]) is nn.ReLU:
                    names.append("2")
                _fuse(module, names, is_qat)
            elif type(module) is SqueezeExcitation:
                module.fuse_model(is_qat)


def _fuse(model: nn.Module, names: list[str], is_qat: bool | None) -> None:
    if is_qat:
        torch.ao.quantization.fuse_modules_qat(model, names, inplace=True)
    else:
        torch.ao.quantization.fuse_modules(model, names, inplace=True)


def build() -> nn.Module:
    return MobileNet()


def prepare(model: nn.Module) -> nn.Module:
    model.train()
    model.fuse_model(is_qat=True)
    model.qconfig = torch.quantization.get_default_qat_qconfig("onednn")
    return torch.quantization.prepare_qat(model, inplace=True)


def convert(model: nn.Module) -> nn.Module:
    return torch.quantization.convert(model.eval())
