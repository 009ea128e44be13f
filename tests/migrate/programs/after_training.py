"""Calibrated after training, with stars, fallbacks and imports in functions."""

import importlib

import torch
import torch.nn as nn
from torch.ao.quantization.observer import *
from torch.ao.quantization.qconfig import QConfig
from torch.ao.quantization.quantize import *
from torch.quantization.stubs import *

try:
    import torch.ao.quantization as tq
except ImportError:
    tq = None


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.quant, self.dequant = QuantStub(), DeQuantStub()
        self.conv, self.bn, self.relu = nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU()
        self.body = QuantWrapper(nn.Linear(6, 4))

    def forward(self, x):
        x = self.relu(self.bn(self.conv(self.quant(x))))
        return self.body(self.dequant(x).mean([2, 3]))


def fused(model):
    from torch.ao.quantization import fuse_modules as fuse

    return fuse(model, ["conv", "bn", "relu"])


def calibrate(model, x):
    for _ in range(3):
        model(x)


def main():
    torch.manual_seed(0)
    model, x = fused(Net().eval()), torch.randn(5, 2, 7, 7)
    intrinsic = importlib.import_module("torch.ao.nn.intrinsic")
    assert type(model.conv) is intrinsic.ConvReLU2d
    if tq is not None:
        model.qconfig = tq.get_default_qconfig("onednn")
    model.body.qconfig = QConfig(
        activation=HistogramObserver.with_args(bins=64, dtype=torch.quint8),
        weight=default_per_channel_weight_observer,
    )
    prepare(model, inplace=True)
    calibrate(model, x)
    int8 = convert(model)
    return {"out": int8(x).flatten().tolist(), "step": int8.body.module.scale}
