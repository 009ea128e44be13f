"""Models for the tests of the walks, and ways to tell whether one has changed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import eagerq

QAT = eagerq.get_default_qat_qconfig("onednn")
PTQ = eagerq.get_default_qconfig("onednn")


def small(qconfig: Any = QAT, width: int = 4) -> eagerq.QuantWrapper:
    """Convolution, batch norm, ReLU, linear: between stubs, in training mode, not yet fused."""
    layers = nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), nn.Linear(width * 16, 5)
    )
    model = eagerq.QuantWrapper(layers).train()
    model.qconfig = qconfig
    return model


def fused(qconfig: Any = QAT, width: int = 4) -> nn.Module:
    return eagerq.fuse_modules_qat(small(qconfig, width), ["module.0", "module.1", "module.2"])


def batch(seed: int = 0, size: int = 2) -> Tensor:
    return torch.randn(size, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def prepared(seed: int = 0, width: int = 4, qconfig: Any = QAT) -> nn.Module:
    """Prepared for training, and run once so that all has been observed."""
    torch.manual_seed(seed)
    model = eagerq.prepare_qat(fused(qconfig, width), inplace=True)
    model(batch(seed))
    return model


def converted(seed: int = 0, width: int = 4, qconfig: Any = QAT) -> nn.Module:
    return eagerq.convert(prepared(seed, width, qconfig).eval(), inplace=True)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_state(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].dtype is b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def anatomy(model: nn.Module) -> dict[str, Any]:
    """All that a walk could change: identity of modules and parameters, hooks, modes, qconfigs."""
    parts: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        parts[name] = (
            id(module),
            [(key, id(child)) for key, child in module._modules.items()],
            [(key, id(value)) for key, value in module._parameters.items()],
            [(key, id(value)) for key, value in module._buffers.items()],
            {key: dict(table) for key, table in vars(module).items() if "hook" in key and isinstance(table, dict)},
            module.training,
            module.__dict__.get("qconfig", "none"),
        )
    return parts
