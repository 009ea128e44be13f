"""QAT for dynamic quantization, from float to a compiled model."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Oracle
from torch import Tensor, nn

import eagerq
from eagerq.nn import qat
from eagerq.nn.qat import dynamic as qat_dynamic
from eagerq.nn.quantized import dynamic
from eagerq.observer import ObserverBase

FOR_TRAINING = {nn.Linear: qat_dynamic.Linear}
FOR_INFERENCE = {qat_dynamic.Linear: dynamic.Linear}


class TwoLinears(nn.Module):
    """No stubs: a dynamic layer takes and gives floats."""

    def __init__(self, qconfig: Any) -> None:
        super().__init__()
        self.qconfig = qconfig
        self.fc1, self.fc2 = nn.Linear(5, 1), nn.Linear(1, 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(self.fc1(x))
        return y


def model(qconfig: Any = eagerq.default_dynamic_qat_qconfig) -> TwoLinears:
    torch.manual_seed(3)
    return TwoLinears(qconfig).train()


def train(one: nn.Module) -> list[float]:
    generator = torch.Generator().manual_seed(5)
    optimizer = torch.optim.Adam(one.parameters(), lr=0.001)
    losses = []
    for _ in range(10):
        x, target = torch.rand(2, 5, generator=generator), torch.randint(0, 10, (2,), generator=generator)
        optimizer.zero_grad()
        loss = F.cross_entropy(one(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_dynamic_qat_linear(ao: Oracle) -> None:
    wrong = model(eagerq.default_qat_qconfig)
    with pytest.raises(ValueError, match=r"Dynamic QAT requires a memoryless observer\.This means a MovingAverage"):
        eagerq.prepare_qat(wrong, mapping=FOR_TRAINING)
    assert type(wrong.fc1) is nn.Linear
    with pytest.raises(AssertionError, match="prepare_qat only works on models in training mode"):
        eagerq.prepare_qat(model().eval(), mapping=FOR_TRAINING)

    prepared: Any = eagerq.prepare_qat(model(), mapping=FOR_TRAINING)
    before = prepared.fc1.weight.detach().clone()
    for layer in (prepared.fc1, prepared.fc2):
        assert type(layer) is qat_dynamic.Linear
        assert isinstance(layer.activation_post_process, eagerq.FakeQuantize)
        assert isinstance(layer.activation_post_process.activation_post_process, ObserverBase)
    losses = train(prepared)
    assert not torch.equal(prepared.fc1.weight, before)
    # what is fake-quantized is the input, by the range of the last batch alone
    x, observer = torch.randn(4, 5), prepared.fc1.activation_post_process.activation_post_process
    prepared(1000 * x)
    prepared(x)
    seen = torch.stack([observer.min_val, observer.max_val])
    torch.testing.assert_close(seen, torch.stack(torch.aminmax(x)), rtol=1e-3, atol=0)

    converted: Any = eagerq.convert(prepared.eval(), mapping=FOR_INFERENCE)
    assert [type(layer) for layer in converted.children()] == [dynamic.Linear, dynamic.Linear]
    for module in converted.modules():
        assert not hasattr(module, "qconfig")
        assert not hasattr(module, "activation_post_process")
    wanted = converted(x)
    assert wanted.dtype is torch.float32
    assert torch.equal(torch.compile(converted, fullgraph=True, backend="aot_eager")(x), wanted)
    assert torch.equal(torch.export.export(converted, (x,)).module()(x), wanted)

    theirs: Any = model(ao.quantization.default_dynamic_qat_qconfig)
    their_qat = importlib.import_module("torch.ao.nn.qat.dynamic")
    theirs = ao.quantization.prepare_qat(theirs, mapping={nn.Linear: their_qat.Linear})
    assert theirs.state_dict().keys() == prepared.state_dict().keys()
    assert losses == pytest.approx(train(theirs), rel=1e-3)
    theirs.load_state_dict(prepared.state_dict())
    theirs = ao.quantization.convert(theirs.eval(), mapping={their_qat.Linear: ao.dynamic.Linear})
    assert torch.equal(wanted, theirs(x))


def test_no_hook_is_left_behind() -> None:
    prepared, x = eagerq.prepare_qat(model(), mapping=FOR_TRAINING), torch.randn(4, 5)
    prepared(x)
    wanted = eagerq.convert(prepared.eval(), mapping=FOR_INFERENCE)(x)
    assert torch.equal(eagerq.convert(prepared, mapping=FOR_INFERENCE, remove_qconfig=False)(x), wanted)
    untouched: Any = eagerq.convert(prepared, mapping={nn.Conv2d: dynamic.Linear})
    assert type(untouched.fc1) is qat_dynamic.Linear
    untouched(x)


def test_the_default_maps(ao: Oracle) -> None:
    """Without a map, layers are trained for static int8; the default dynamic one converts both ways of training."""
    assert type(eagerq.prepare_qat(model()).fc1) is qat.Linear
    prepared = eagerq.prepare_qat(model(), mapping=FOR_TRAINING).eval()
    mapping = eagerq.get_default_dynamic_quant_module_mappings()
    assert type(eagerq.convert(prepared, mapping=mapping).fc1) is dynamic.Linear
    assert mapping[qat_dynamic.Linear] is eagerq.get_dynamic_quant_module_class(nn.Linear) is dynamic.Linear
    theirs = ao.quantization.get_default_dynamic_quant_module_mappings()
    recurrent = {"LSTM", "GRU", "LSTMCell", "GRUCell", "RNNCell"}
    names = [(key.__name__, value.__name__) for key, value in mapping.items() if key.__name__ not in recurrent]
    wanted = [(key.__name__, value.__name__) for key, value in theirs.items() if key.__name__ not in recurrent]
    assert sorted(names) == sorted(wanted)
    with pytest.raises(AssertionError, match="does not have a corresponding quantized module class"):
        eagerq.get_dynamic_quant_module_class(nn.Conv2d)
    own = {nn.Conv2d: dynamic.Linear}
    assert eagerq.get_dynamic_quant_module_class(nn.Conv2d, own) is dynamic.Linear
