"""Prepared models under torch.compile: they train as in eager, and their switches work."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import eagerq
from eagerq.intrinsic.qat import freeze_bn_stats, update_bn_stats

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def compiled(module: nn.Module) -> tuple[Any, CompileCounterWithBackend]:
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(module, fullgraph=True, backend=counter), counter


class Net(nn.Module):
    """Two layers, with everything observed."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = eagerq.QuantStub(), eagerq.DeQuantStub()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.linear = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.conv(self.quant(x))))
        return self.dequant(self.linear(x.mean((2, 3))))


def prepared() -> Any:
    model = eagerq.fuse_modules_qat(Net().train(), [["conv", "bn", "relu"]])
    model.qconfig = eagerq.get_default_qat_qconfig("onednn")
    return eagerq.prepare_qat(model)


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    wanted = torch.randint(0, 4, (count, 8))
    return [(torch.randn(8, 3, 6, 6) * (1 + number / 4), wanted[number]) for number in range(count)]


def test_a_model_trains_as_in_eager() -> None:
    model = prepared()
    eager = copy.deepcopy(model)
    call, counter = compiled(model)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.05, momentum=0.9) for each in (model, eager)]
    for number, (x, wanted) in enumerate(batches(6)):
        if number == 3:
            model.apply(freeze_bn_stats)
            eager.apply(freeze_bn_stats)
        losses = []
        for forward, optimizer in zip((call, eager), optimizers, strict=True):
            optimizer.zero_grad()
            loss = F.cross_entropy(forward(x), wanted)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert counter.frame_count == 3  # fresh, observed, frozen
    for (name, value), other in zip(model.state_dict().items(), eager.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_functions_and_checkpoints_switch_compiled_models() -> None:
    model = prepared()
    x = batches(1)[0][0]
    model(x)
    call, _ = compiled(model)
    saved = copy.deepcopy(model.state_dict())

    def observes() -> bool:
        observer = model.quant.activation_post_process.activation_post_process
        before = observer.max_val.clone()
        call(x * 3)
        return not torch.equal(observer.max_val, before)

    assert observes()
    model.apply(eagerq.disable_observer)
    assert not observes()
    model.load_state_dict(saved)  # which was saved with everything on
    assert observes()
    for name in saved:
        if name.endswith("observer_enabled"):
            saved[name].zero_()
    model.load_state_dict(saved)
    assert not observes()
    before = model.conv.bn.running_mean.clone()
    model.apply(freeze_bn_stats)
    call(x)
    assert torch.equal(model.conv.bn.running_mean, before)
    model.apply(update_bn_stats)
    call(x)
    assert not torch.equal(model.conv.bn.running_mean, before)
