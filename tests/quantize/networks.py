"""Small networks with the forwards of the usual large ones, built from either library's stubs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import eagerq
from eagerq.nn.quantized import FloatFunctional


@dataclass(frozen=True)
class Library:
    """Where a network takes its stubs, and its user the functions, from."""

    api: Any
    functional: Callable[[], Any]

    def stubs(self) -> tuple[nn.Module, nn.Module]:
        return self.api.QuantStub(), self.api.DeQuantStub()


OURS = Library(eagerq, FloatFunctional)


def oracle(ao: Any) -> Library:
    return Library(ao.quantization, ao.quantized.FloatFunctional)


def conv_bn(inputs: int, outputs: int, kernel: int = 3, relu: bool = True, **options: Any) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(inputs, outputs, kernel, bias=False, **options), nn.BatchNorm2d(outputs)]
    return nn.Sequential(*layers, *([nn.ReLU(inplace=True)] if relu else []))


class Network(nn.Module):
    """Quantizes, runs ``body``, dequantizes."""

    shape: tuple[int, ...] = (3, 14, 14)

    def __init__(self, library: Library) -> None:
        super().__init__()
        self.quant, self.dequant = library.stubs()

    def body(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.dequant(self.body(self.quant(x)))


class Residual(Network):
    """ResNet: a stem with max pooling, residual additions with and without a projection."""

    def __init__(self, library: Library) -> None:
        super().__init__(library)
        self.stem = conv_bn(3, 8, 7, stride=2, padding=3)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.conv1, self.conv2 = conv_bn(8, 8, padding=1), conv_bn(8, 8, relu=False, padding=1)
        self.conv3, self.conv4 = conv_bn(8, 16, padding=1), conv_bn(16, 16, 1, relu=False)
        self.downsample = conv_bn(8, 16, 1, relu=False)
        self.add1, self.add2 = library.functional(), library.functional()
        self.avgpool = nn.AvgPool2d(3)
        self.fc = nn.Linear(16, 10)

    def body(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.stem(x))
        x = self.add1.add_relu(self.conv2(self.conv1(x)), x)
        x = self.add2.add_relu(self.conv4(self.conv3(x)), self.downsample(x))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class Inverted(Network):
    """MobileNetV2: expansion, depthwise convolution, projection, addition."""

    shape = (3, 9, 9)

    def __init__(self, library: Library) -> None:
        super().__init__(library)
        self.stem = conv_bn(3, 8, stride=1, padding=1)
        self.expand = conv_bn(8, 24, 1)
        self.depthwise = conv_bn(24, 24, groups=24, padding=1)
        self.project = conv_bn(24, 8, 1, relu=False)
        self.skip_add = library.functional()
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(8, 5))

    def body(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.skip_add.add(x, self.project(self.depthwise(self.expand(x))))
        x = F.adaptive_avg_pool2d(x, (1, 1))
        return self.classifier(torch.flatten(x, 1))


class Shuffled(Network):
    """ShuffleNetV2: channels split, concatenated and shuffled by hand; a global mean."""

    shape = (3, 9, 9)

    def __init__(self, library: Library) -> None:
        super().__init__(library)
        self.stem = conv_bn(3, 8, padding=1)
        self.branch = nn.Sequential(conv_bn(4, 4, 1), conv_bn(4, 4, relu=False, groups=4, padding=1), conv_bn(4, 4, 1))
        self.cat = library.functional()
        self.fc = nn.Linear(8, 5)

    def shuffle(self, x: Tensor, groups: int) -> Tensor:
        batch, channels, height, width = x.size()
        x = x.view(batch, groups, channels // groups, height, width)
        x = torch.transpose(x, 1, 2).contiguous()
        return x.view(batch, channels, height, width)

    def body(self, x: Tensor) -> Tensor:
        x1, x2 = self.stem(x).chunk(2, dim=1)
        x = self.shuffle(self.cat.cat((x1, self.branch(x2)), dim=1), 2)
        return self.fc(x.mean([2, 3]))


class Inception(Network):
    """GoogLeNet and Inception: parallel branches, poolings among them, concatenated."""

    shape = (3, 15, 15)

    def __init__(self, library: Library) -> None:
        super().__init__(library)
        self.one = conv_bn(3, 4, 1)
        self.asymmetric = nn.Sequential(conv_bn(3, 4, 1), conv_bn(4, 4, (1, 7), padding=(0, 3)))
        self.pooled = conv_bn(3, 4, 1)
        self.maxpool = nn.MaxPool2d(3, stride=1, padding=1, ceil_mode=True)
        self.cat1, self.cat2 = library.functional(), library.functional()
        self.reduce = conv_bn(15, 6, 3, stride=2)
        self.fc = nn.Linear(21, 4)

    def body(self, x: Tensor) -> Tensor:
        pooled = self.pooled(F.avg_pool2d(x, kernel_size=3, stride=1, padding=1))
        x = self.cat1.cat([self.one(x), self.asymmetric(x), pooled, self.maxpool(x)], 1)
        x = self.cat2.cat([self.reduce(x), F.max_pool2d(x, kernel_size=3, stride=2)], 1)
        return self.fc(F.adaptive_avg_pool2d(x, (1, 1)).flatten(1))


class Gated(Network):
    """Squeeze and excitation, with upsampling and padding between: multiplication broadcasts."""

    shape = (3, 9, 9)

    def __init__(self, library: Library) -> None:
        super().__init__(library)
        self.stem = conv_bn(3, 8, stride=3)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.act = nn.ReLU()
        self.skip_mul = library.functional()
        self.scaled = library.functional()
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.out = nn.Conv2d(8, 2, 3)

    def body(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        gate = F.relu(self.excite(self.act(self.squeeze(F.adaptive_avg_pool2d(x, 1)))))
        x = self.up(self.skip_mul.mul(gate, x))
        x = self.scaled.mul_scalar(F.pad(x, (1, 1, 1, 1)), 0.5)
        return self.out(x[:, :, 1:])


class Speech(Network):
    """One dimension: convolutions over time, two fully connected layers."""

    shape = (4, 27)

    def __init__(self, library: Library) -> None:
        super().__init__(library)
        self.conv1 = nn.Sequential(nn.Conv1d(4, 8, 5, padding=2), nn.BatchNorm1d(8), nn.ReLU())
        self.conv2 = nn.Sequential(nn.Conv1d(8, 8, 3, dilation=2), nn.ReLU())
        self.pool = nn.MaxPool1d(2)
        self.fc1 = nn.Sequential(nn.Linear(8, 16), nn.ReLU())
        self.fc2 = nn.Linear(16, 3)

    def body(self, x: Tensor) -> Tensor:
        x = self.conv2(self.pool(self.conv1(x)))
        x = self.fc1(x.mean(-1))
        return self.fc2(x)


class Video(Network):
    """Three dimensions."""

    shape = (2, 5, 7, 7)

    def __init__(self, library: Library) -> None:
        super().__init__(library)
        self.conv1 = nn.Sequential(nn.Conv3d(2, 6, 3, padding=1), nn.BatchNorm3d(6), nn.ReLU())
        self.conv2 = nn.Sequential(nn.Conv3d(6, 4, (1, 3, 3)), nn.BatchNorm3d(4))
        self.pool = nn.MaxPool3d(2, 1)
        self.fc = nn.Linear(4 * 4 * 4 * 4, 3)

    def body(self, x: Tensor) -> Tensor:
        x = self.pool(self.conv2(self.conv1(x)))
        return self.fc(x.reshape(x.size(0), -1))


NETWORKS: list[type[Network]] = [Residual, Inverted, Shuffled, Inception, Gated, Speech, Video]
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
AFTER = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.ReLU)


def to_fuse(model: nn.Module) -> list[list[str]]:
    """In each Sequential, the layer with what follows it."""
    groups = []
    for path, parent in model.named_modules():
        if type(parent) is nn.Sequential:
            kinds = list(parent)
            for index, layer in enumerate(kinds):
                run = [index]
                while isinstance(layer, LAYERS) and run[-1] + 1 < len(kinds) and isinstance(kinds[run[-1] + 1], AFTER):
                    run.append(run[-1] + 1)
                if len(run) > 1:
                    groups.append([f"{path}.{one}" for one in run])
    return groups


def prepared(
    kind: type[Network], library: Library = OURS, engine: str = "onednn", seed: int = 0, mapping: Any = None
) -> nn.Module:
    """Fused and prepared for training; equal weights for equal seeds."""
    torch.manual_seed(seed)
    model = kind(library).train()
    model.qconfig = library.api.get_default_qat_qconfig(engine)
    library.api.fuse_modules_qat(model, to_fuse(model), inplace=True)
    return library.api.prepare_qat(model, mapping, inplace=True)


def completed(ao: Any) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """torch.ao's maps (to QAT and to int8) with the classes that it has, but left out of them."""
    added = {nn.Conv1d: getattr(ao.qat, "Conv1d", None)}
    added[ao.intrinsic.ConvReLU1d] = getattr(ao.intrinsic_qat, "ConvReLU1d", None)
    int8 = {added[nn.Conv1d]: ao.quantized.Conv1d, added[ao.intrinsic.ConvReLU1d]: ao.intrinsic_quantized.ConvReLU1d}
    api = ao.quantization
    training = {**api.get_default_qat_module_mappings(), **{key: value for key, value in added.items() if value}}
    return training, {**api.get_default_static_quant_module_mappings(), **int8}


def prepared_oracle(ao: Any, kind: type[Network], engine: str = "onednn", seed: int = 0) -> nn.Module:
    """As :func:`prepared`, by torch.ao."""
    return prepared(kind, oracle(ao), engine, seed, completed(ao)[0])


def train(model: nn.Module, kind: type[Network], steps: int = 3) -> None:
    generator = torch.Generator().manual_seed(7)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, *kind.shape, generator=generator)).square().mean().backward()
        optimizer.step()


def images(kind: type[Network], batch: int = 3) -> Tensor:
    return torch.randn(batch, *kind.shape, generator=torch.Generator().manual_seed(11))
