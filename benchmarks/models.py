"""The nets measured: ResNet-18 and MobileNetV2 as eager models, and chains of small layers.

Each is written once for every contender: ``parts`` supplies the stubs and the functional module (the float
contender's do nothing), so that all sides train and run the same net.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

CLASSES = 1000
CHAIN_WIDTH = 16


class Functional(Protocol):
    """What the nets ask of a FloatFunctional."""

    def add(self, x: Tensor, y: Tensor) -> Tensor: ...

    def add_relu(self, x: Tensor, y: Tensor) -> Tensor: ...


class Parts(Protocol):
    """The modules that a quantization library supplies to a net."""

    QuantStub: Callable[[], nn.Module]
    DeQuantStub: Callable[[], nn.Module]
    FloatFunctional: Callable[[], Functional]


def conv_bn(
    inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, relu: bool = True
) -> nn.Sequential:
    """A convolution that keeps the size (but for its stride), batch norm, and a ReLU if wanted."""
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, nn.ReLU()) if relu else nn.Sequential(*layers)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and the shortcut around them."""

    def __init__(self, parts: Parts, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_bn(inputs, outputs, 3, stride), conv_bn(outputs, outputs, 3, relu=False))
        same = stride == 1 and inputs == outputs
        self.shortcut = None if same else conv_bn(inputs, outputs, 1, stride, relu=False)
        self.join = parts.FloatFunctional()

    def forward(self, x: Tensor) -> Tensor:
        return self.join.add_relu(self.body(x), x if self.shortcut is None else self.shortcut(x))


class InvertedResidual(nn.Module):
    """Widen by 1x1, filter each channel by 3x3, narrow by 1x1; a shortcut where the shapes allow it."""

    def __init__(self, parts: Parts, inputs: int, outputs: int, stride: int, widening: int) -> None:
        super().__init__()
        hidden = inputs * widening
        widen = [] if widening == 1 else [conv_bn(inputs, hidden)]
        self.body = nn.Sequential(
            *widen, conv_bn(hidden, hidden, 3, stride, groups=hidden), conv_bn(hidden, outputs, relu=False)
        )
        self.join = parts.FloatFunctional() if stride == 1 and inputs == outputs else None

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if self.join is None else self.join.add(x, self.body(x))


class Classifier(nn.Module):
    """Features, an average over positions, a linear head; stubs at both ends."""

    def __init__(self, parts: Parts, features: Sequence[nn.Module], head: Sequence[nn.Module]) -> None:
        super().__init__()
        self.quant = parts.QuantStub()
        self.features = nn.Sequential(*features)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Sequential(*head)
        self.dequant = parts.DeQuantStub()

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.features(self.quant(x)))
        return self.dequant(self.head(torch.flatten(x, 1)))


def resnet18(parts: Parts) -> nn.Module:
    """ResNet-18 (He et al., 2015), 11.7 million parameters."""
    features: list[nn.Module] = [conv_bn(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for outputs, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        features += [BasicBlock(parts, inputs, outputs, stride), BasicBlock(parts, outputs, outputs, 1)]
        inputs = outputs
    return Classifier(parts, features, [nn.Linear(inputs, CLASSES)])


# widening, channels, blocks, stride of the first block
_MOBILENET_V2_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def mobilenet_v2(parts: Parts) -> nn.Module:
    """MobileNetV2 (Sandler et al., 2018), 3.5 million parameters; ReLU for ReLU6, as is usual in int8."""
    features: list[nn.Module] = [conv_bn(3, 32, 3, 2)]
    inputs = 32
    for widening, outputs, blocks, stride in _MOBILENET_V2_STAGES:
        for block in range(blocks):
            features.append(InvertedResidual(parts, inputs, outputs, 1 if block else stride, widening))
            inputs = outputs
    features.append(conv_bn(inputs, 1280))
    return Classifier(parts, features, [nn.Dropout(0.2), nn.Linear(1280, CLASSES)])


def linear(parts: Parts) -> nn.Module:
    """The one Linear that is measured, behind a stub."""
    return nn.Sequential(parts.QuantStub(), nn.Linear(3072, 768))


def chain(parts: Parts, layers: int) -> nn.Module:
    """So many small Linear layers in a row: the cost is all in walking them."""
    linears = (nn.Linear(CHAIN_WIDTH, CHAIN_WIDTH) for _ in range(layers))
    return nn.Sequential(parts.QuantStub(), *linears, parts.DeQuantStub())


def conv_chain(parts: Parts, layers: int) -> nn.Module:
    """The same of small 1x1 convolutions, each with its batch norm and ReLU."""
    blocks = (conv_bn(CHAIN_WIDTH, CHAIN_WIDTH) for _ in range(layers))
    return nn.Sequential(parts.QuantStub(), *blocks, parts.DeQuantStub())


NETS: dict[str, Callable[[Parts], nn.Module]] = {"resnet18": resnet18, "mobilenet_v2": mobilenet_v2}


def fusable(model: nn.Module) -> list[list[str]]:
    """The names of each convolution and what follows it, batch norm and perhaps a ReLU, ready for fusing."""
    groups = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Sequential) and len(module) > 1 and isinstance(module[1], nn.BatchNorm2d):
            groups.append([f"{name}.{position}" for position in range(len(module))])
    return groups
