"""Normalization layers in each library's forms, as their tests need them."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from kernels.calls import Call
from torch import Tensor, nn

import eagerq
from eagerq import QTensor, intrinsic
from eagerq.intrinsic import quantized as intrinsic_quantized
from eagerq.nn import quantized

BATCH_NORMS = ("BatchNorm2d", "BatchNorm3d", "BNReLU2d", "BNReLU3d")
INSTANCE_NORMS = ("InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d")
NAMES = ("LayerNorm", "GroupNorm", *INSTANCE_NORMS, *BATCH_NORMS)


def dimension(name: str) -> int:
    """How many axes follow the channels'."""
    return int(name[-2]) if name.endswith("d") else 2


def int8_class(name: str, package: Any = quantized, fused: Any = intrinsic_quantized) -> Any:
    return getattr(fused if name.startswith("BNReLU") else package, name)


def float_layer(name: str, affine: bool = True, fused: ModuleType = intrinsic) -> Any:
    """With six channels and nothing that is as by default, in eval mode."""
    arguments: tuple[Any, ...] = {"LayerNorm": ([6, 5],), "GroupNorm": (3, 6)}.get(name, (6,))
    option = "elementwise_affine" if name == "LayerNorm" else "affine"
    if name.startswith("BNReLU"):
        inner: Any = getattr(nn, f"BatchNorm{name[-2:]}")(6, eps=1e-3, affine=affine)
        layer: Any = getattr(fused, name)(inner, nn.ReLU())
    else:
        layer = inner = getattr(nn, name)(*arguments, eps=1e-3, **{option: affine})
    generator = torch.Generator().manual_seed(1)
    if affine:
        inner.weight.data = torch.rand(inner.weight.shape, generator=generator) * 2 - 0.5
        inner.bias.data = torch.randn(inner.bias.shape, generator=generator)
    if name in BATCH_NORMS:
        inner.running_mean = torch.randn(6, generator=generator)
        inner.running_var = torch.rand(6, generator=generator) + 0.5
    return layer.eval()


def real_input(name: str, batch: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    shape = (batch, 4, 6, 5) if name == "LayerNorm" else (batch, 6, 5, 4, 3)[: dimension(name) + 2]
    return torch.randn(shape, generator=generator) * 2 + 0.5


def some_input(name: str, batch: int = 3) -> QTensor:
    return eagerq.quantize_per_tensor(real_input(name, batch), 0.05, 110, torch.uint8)


def build(kind: Any, name: str, call: Call) -> Any:
    """An int8 layer of either library with a call's parameters."""
    wrap = nn.Parameter if kind.__module__.startswith("torch") else Tensor.clone
    weight, bias = (None if call[one] is None else wrap(call[one]) for one in ("weight", "bias"))
    if name in BATCH_NORMS:
        layer = kind(len(call["mean"]), call["eps"])
        values = {"weight": weight, "bias": bias, "running_mean": call["mean"], "running_var": call["var"]}
        if kind.__module__.startswith("torch"):
            for one, value in values.items():
                setattr(layer, one, value)
            layer.scale, layer.zero_point = torch.tensor([call["scale"]]), torch.tensor([call["zero_point"]])
            return layer
        layer.load_state_dict({**layer.state_dict(), **values})
        layer.scale, layer.zero_point = call["scale"], call["zero_point"]
        return layer
    if name == "LayerNorm":
        sizes: tuple[Any, ...] = (call["normalized_shape"],)
    else:
        sizes = (call["num_groups"], call["x"].shape[1]) if name == "GroupNorm" else (call["x"].shape[1],)
    return kind(*sizes, weight, bias, call["scale"], call["zero_point"], call["eps"])


class Network(nn.Module):
    """Every normalization of images once, with torch's own stubs or eagerq's."""

    def __init__(self, stubs: Any = eagerq) -> None:
        super().__init__()
        self.quant, self.dequant = stubs.QuantStub(), stubs.DeQuantStub()
        self.bn = nn.BatchNorm2d(6)
        self.bn_relu, self.relu = nn.BatchNorm2d(6), nn.ReLU()
        self.group = nn.GroupNorm(2, 6)
        self.instance = nn.InstanceNorm2d(6, affine=True)
        self.lines = nn.InstanceNorm1d(6)
        self.bn3d = nn.BatchNorm3d(6)
        self.bn_relu3d, self.relu3d = nn.BatchNorm3d(6), nn.ReLU()
        self.solid = nn.InstanceNorm3d(6)
        self.layer = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.quant(x))
        x = self.group(self.relu(self.bn_relu(x)))
        x = self.lines(self.instance(x).flatten(2)).unflatten(2, (4, 2, 8))
        x = self.relu3d(self.bn_relu3d(self.bn3d(x)))
        y: Tensor = self.dequant(self.layer(self.solid(x)))
        return y


FUSED = [["bn_relu", "relu"], ["bn_relu3d", "relu3d"]]


def images(batch: int = 4) -> Tensor:
    return torch.randn(batch, 6, 8, 8, generator=torch.Generator().manual_seed(batch)) * 3 - 1


def twin_tensor(q: QTensor) -> Tensor:
    """torch's quantized tensor of the same integers, contiguous."""
    return torch._make_per_tensor_quantized_tensor(q.integers.contiguous(), q.scale, q.zero_point)


def prepared(layer: Any, name: str, qconfig: Any = None) -> Any:
    """A float layer that has seen data."""
    model = nn.Sequential(layer).eval()
    model.qconfig = qconfig or eagerq.get_default_qconfig("onednn")
    model = eagerq.prepare(model)
    model(some_input(name).dequantize())
    return model


def converted(name: str, **options: Any) -> Any:
    return eagerq.convert(prepared(float_layer(name, **options), name))[0]


def trained_network(ranges: str = "onednn", qat: bool = False) -> Any:
    """A prepared network that has seen data."""
    torch.manual_seed(3)
    net = Network()
    for module in net.modules():
        if (
            isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase))
            and module.weight is not None
        ):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    net = eagerq.fuse_modules_qat(net.train(), FUSED)
    if qat:
        net.qconfig = eagerq.get_default_qat_qconfig(ranges)
        net = eagerq.prepare_qat(net)
    else:
        net.qconfig = eagerq.get_default_qconfig(ranges)
        net = eagerq.prepare(net)
    for batch in (8, 9):
        net(images(batch))
    return net.eval()
