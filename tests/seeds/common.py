"""What the QAT flow tests share: a training and an evaluation loop, and what a model must look like."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from eagerq import DeQuantStub, get_default_qconfig_propagation_list
from eagerq.fake_quantize import FakeQuantizeBase
from eagerq.observer import ObserverBase

ENGINES = ("x86", "fbgemm", "qnnpack", "onednn")
Pairs = list[tuple[Tensor, Tensor]]


def train(model: nn.Module, data: Pairs, epochs: int = 3) -> None:
    """A few steps of Adam on the squared error (or cross entropy, for class numbers)."""
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    for _ in range(epochs):
        for x, target in data:
            y = model(x)
            loss = (
                nn.functional.mse_loss(y, target)
                if target.is_floating_point()
                else nn.functional.cross_entropy(y, target)
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def evaluate(model: nn.Module, inputs: Iterable[Tensor]) -> list[Tensor]:
    model.eval()
    return [model(x) for x in inputs]


def has_observers(model: nn.Module) -> bool:
    """Whether every leaf that is to be observed is."""
    kinds = get_default_qconfig_propagation_list()
    leaves = [
        module
        for module in model.modules()
        if getattr(module, "qconfig", None) is not None
        and not isinstance(module, (DeQuantStub, nn.Sequential, nn.Dropout))
        and type(module) in kinds
        and not [name for name, _ in module.named_children() if name != "activation_post_process"]
    ]
    observers = [getattr(leaf, "activation_post_process", None) for leaf in leaves]
    return bool(leaves) and all(isinstance(one, (ObserverBase, FakeQuantizeBase)) for one in observers)


def has_no_traces(model: nn.Module) -> bool:
    """Whether convert has taken qconfigs and observers away."""
    return not any(
        hasattr(module, "qconfig") or isinstance(module, (ObserverBase, FakeQuantizeBase)) for module in model.modules()
    )


def compiles_and_exports(model: nn.Module, x: Any) -> None:
    """The converted model is one graph to both of torch's tracers, with the same output."""
    wanted = model(x)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), wanted)
    assert torch.equal(torch.export.export(model, (x,)).module()(x), wanted)
