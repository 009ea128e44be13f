"""A layer that compiled code has run can be copied and keeps nothing alive."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eagerq
from eagerq.intrinsic.qat import ConvBnReLU2d

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def prepared() -> Any:
    layers = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()).train()
    model = eagerq.QuantWrapper(layers)
    eagerq.fuse_modules_qat(model, ["module.0", "module.1", "module.2"], inplace=True)
    model.qconfig = eagerq.get_default_qat_qconfig("onednn")  # type: ignore[assignment]
    return eagerq.prepare_qat(model, inplace=True)


def alone() -> Any:
    return ConvBnReLU2d(3, 8, 3, qconfig=eagerq.get_default_qat_qconfig("onednn"))


class Past(nn.Module):
    """Calls what is in a prepared layer past its hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.model = prepared()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.model.module[0].forward(x)
        return y


@pytest.mark.parametrize("make", [prepared, alone, Past])
def test_it_can_be_copied(make: Any) -> None:
    model, x = make(), torch.randn(2, 3, 8, 8)
    model(x)
    compiled = torch.compile(model, fullgraph=True)
    compiled(x).sum().backward()
    copied = copy.deepcopy(model).eval()
    assert torch.equal(copied(x), model.eval()(x))


@pytest.mark.parametrize("make", [prepared, alone])
def test_it_keeps_no_activation(make: Any) -> None:
    model, x = make(), torch.randn(2, 3, 31, 37)
    model(x)
    torch.compile(model, fullgraph=True)(x).sum().backward()
    gc.collect()
    assert not [one for one in gc.get_objects() if type(one) is Tensor and one.shape == (2, 8, 29, 35)]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo
@pytest.mark.parametrize("within", [False, True])
def test_an_observed_layer_compiled_by_itself(within: bool) -> None:
    """Its hook is another graph than its forward pass: what that saves must not be written over."""
    eager = prepared()
    eager(torch.randn(2, 3, 9, 7))
    compiled = copy.deepcopy(eager)
    layer = compiled.module[0]
    call = compiled if within else torch.compile(layer, backend="aot_eager")
    if within:
        compiled.module[0] = torch.compile(layer, backend="aot_eager")
    for seed in range(2):
        torch.manual_seed(seed)
        x = torch.randn(2, 3, 9, 7)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        results = [(eager if within else eager.module[0])(inputs[0]), call(inputs[1])]
        for out in results:
            out.square().sum().backward()
        torch.testing.assert_close(results[1], results[0])
        torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-5, atol=1e-5)
    assert layer._made is None


def test_a_forward_pass_compiled_past_its_hooks_leaves_nothing_for_them() -> None:
    """What it left would be another result of its graph, of which gradients know nothing."""
    layer = prepared().module[0]
    layer(torch.randn(2, 3, 9, 7))
    x = torch.randn(2, 3, 9, 7, requires_grad=True)
    torch.compile(layer.forward, backend="aot_eager")(x).square().sum().backward()
    assert layer._made is None
    assert x.grad is not None
    assert all(one.grad is not None for one in layer.parameters())
