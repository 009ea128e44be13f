"""Small networks of the kinds that go to phones and servers, quantized as the quickstart does it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import eagerq
from eagerq.nn.quantized import FloatFunctional

__all__ = ["NETS", "Classifier", "Mobile", "Residual", "agree", "int8"]


class ConvBN(nn.Sequential):
    def __init__(self, inputs: int, outputs: int, *more: nn.Module, kernel: int = 3, stride: int = 1, groups: int = 1):
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(outputs), *more)


class Inverted(nn.Module):
    """A MobileNet block: wider, depthwise, narrow again, and added to its input."""

    def __init__(self, channels: int):
        super().__init__()
        self.wide = ConvBN(channels, 2 * channels, nn.ReLU(), kernel=1)
        self.depthwise = ConvBN(2 * channels, 2 * channels, nn.ReLU(), groups=2 * channels)
        self.narrow = ConvBN(2 * channels, channels, kernel=1)
        self.sum = FloatFunctional()

    def forward(self, x: Tensor) -> Tensor:
        return self.sum.add(x, self.narrow(self.depthwise(self.wide(x))))


class Basic(nn.Module):
    """A ResNet block, its shortcut through a convolution."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.first = ConvBN(inputs, outputs, nn.ReLU(), stride=2)
        self.second = ConvBN(outputs, outputs)
        self.shortcut = ConvBN(inputs, outputs, kernel=1, stride=2)
        self.sum = FloatFunctional()

    def forward(self, x: Tensor) -> Tensor:
        return self.sum.add_relu(self.second(self.first(x)), self.shortcut(x))


class Classifier(nn.Module):
    """Images (N, 3, 16, 16) in, ten scores (N, 10) out."""

    def __init__(self, channels: int, *features: nn.Module):
        super().__init__()
        self.quant, self.dequant = eagerq.QuantStub(), eagerq.DeQuantStub()
        self.features = nn.Sequential(*features, nn.AdaptiveAvgPool2d(1))
        self.classify = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.dequant(self.classify(self.features(self.quant(x)).flatten(1)))
        return out


class Mobile(Classifier):
    weighted, added = 5, 1

    def __init__(self) -> None:
        super().__init__(16, ConvBN(3, 16, nn.ReLU(), stride=2), Inverted(16))


class Residual(Classifier):
    weighted, added = 5, 1

    def __init__(self) -> None:
        super().__init__(16, ConvBN(3, 8, nn.ReLU()), nn.MaxPool2d(3, 2, 1), Basic(8, 16))


NETS = (Mobile, Residual)


def int8(net: type[Classifier], engine: str = "onednn") -> tuple[Classifier, Tensor]:
    """The int8 model after some training on noise, and images to try it with."""
    torch.manual_seed(0)
    model = net().train()
    parts = [[f"{name}.{i}" for i in range(len(one))] for name, one in model.named_modules() if isinstance(one, ConvBN)]
    eagerq.fuse_modules_qat(model, parts, inplace=True)
    model.qconfig = eagerq.get_default_qat_qconfig(engine)  # type: ignore[assignment]
    eagerq.prepare_qat(model, inplace=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(10):
        optimizer.zero_grad()
        scores = model(torch.randn(32, 3, 16, 16))
        nn.functional.cross_entropy(scores, torch.randint(10, (32,))).backward()
        optimizer.step()
    return eagerq.convert(model.eval(), as_trained=True), torch.randn(12, 3, 16, 16)


def agree(outputs: Tensor, model: Classifier, images: Tensor) -> bool:
    """Whether ``outputs`` are the eager model's, most of them exactly.

    The mean of 64 integers is often halfway between two, where everyone rounds another way, and a step aside there
    is up to three in the sums of the last layer.
    """
    with torch.no_grad():
        steps = ((outputs - model(images)) / model.classify.scale).round().int().abs()
    return bool((steps <= 3).all()) and (steps == 0).float().mean().item() > 0.8
