"""A small model to train, and ways to look at it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import eagerq
from eagerq.fake_quantize import FakeQuantizeBase
from eagerq.intrinsic.qat import ConvBnReLU2d
from eagerq.training import fine_tune


def float_model() -> nn.Module:
    layers = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 3))
    return eagerq.QuantWrapper(layers).train()


def prepared() -> nn.Module:
    model = float_model()
    eagerq.fuse_modules_qat(model, ["module.0", "module.1", "module.2"], inplace=True)
    model.qconfig = eagerq.get_default_qat_qconfig("onednn")
    return eagerq.prepare_qat(model, inplace=True)


def batches(count: int = 4, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    """Images whose label is where they are bright: to be learned in a few steps."""
    labels = torch.arange(count * size) % 3
    images = torch.rand(count * size, 1, 6, 6)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[:, 2 * label : 2 * label + 2] += 2
    return list(zip(images.split(size), labels.split(size), strict=True))


def sgd(model: nn.Module, rate: float = 0.05) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=rate)


def train(model: nn.Module, data: Any, **options: Any) -> Any:
    defaults = {"optimizer": sgd(model), "loss_fn": cross_entropy, "epochs": 1, "progress": False}
    return fine_tune(model, data, **{**defaults, **options})


def fake_quants(model: nn.Module) -> list[FakeQuantizeBase]:
    return [module for module in model.modules() if isinstance(module, FakeQuantizeBase)]


def observing(model: nn.Module) -> set[int]:
    return {int(module.observer_enabled) for module in fake_quants(model)}


def conv_bn(model: nn.Module) -> ConvBnReLU2d:
    return next(module for module in model.modules() if isinstance(module, ConvBnReLU2d))


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
