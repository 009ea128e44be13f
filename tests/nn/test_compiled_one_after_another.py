"""int8 models of one class, compiled in one process: each keeps its own scales, and none is compiled twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import eagerq
from eagerq.nn.quantized import FloatFunctional

pytestmark = pytest.mark.usefixtures("fresh_compiler")

MODELS = 3


class Layers(nn.Module):
    """Layers that requantize, and functions that pass a scale on."""

    shape = (2, 3, 6, 6)

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant, self.sum = eagerq.QuantStub(), eagerq.DeQuantStub(), FloatFunctional()
        self.conv, self.norm, self.leaky = nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.LeakyReLU(0.1)
        self.swish, self.head = nn.Hardswish(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.leaky(self.norm(self.conv(self.quant(x))))
        x = self.sum.cat([self.swish(x), self.sum.mul_scalar(x, 0.5)], 1)[:, 2:6]
        return self.dequant(self.head(F.max_pool2d(x, 4).flatten(1)))


class Recurrent(nn.Module):
    shape = (2, 2, 3)

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant, self.lstm = eagerq.QuantStub(), eagerq.DeQuantStub(), nn.LSTM(3, 4)

    def forward(self, x: Tensor) -> Any:
        return self.dequant(self.lstm(self.quant(x))[0])


def converted(kind: Any, number: int) -> tuple[nn.Module, Tensor]:
    """One of several models of a class: other weights, scales and zero points in each."""
    torch.manual_seed(number)
    model = kind().eval()
    model.qconfig = eagerq.QConfig(eagerq.MinMaxObserver, eagerq.default_per_channel_weight_observer)
    model = eagerq.prepare(model)
    x = torch.randn(kind.shape) * (1 + number) + number
    model(x)
    return eagerq.convert(model), x


@pytest.mark.parametrize("kind", [Layers, Recurrent])
def test_models_with_scales_of_their_own(kind: Any) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    models = [converted(kind, number) for number in range(MODELS)]
    for _ in range(2):
        for model, x in models:
            assert torch.equal(torch.compile(model, fullgraph=True, backend=counter)(x), model(x))
    assert counter.frame_count == MODELS
    exported = torch.export.export(models[-1][0], (models[-1][1],))
    assert torch.equal(exported.module()(models[-1][1]), models[-1][0](models[-1][1]))


def test_a_model_that_gets_other_scales() -> None:
    (model, x), (other, _) = converted(Layers, 1), converted(Layers, 1 + MODELS)
    call = torch.compile(model, fullgraph=True, backend="aot_eager")
    call(x)
    model.load_state_dict(other.state_dict())
    assert torch.equal(call(x), other(x))
    model.head.scale, other.head.scale = 0.3, 0.3
    model.head.zero_point = other.head.zero_point = 7
    assert torch.equal(call(x), other(x))


def test_a_layer_that_is_given_other_scales() -> None:
    layer = converted(Layers, 0)[0].head
    call = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for number in range(MODELS):
        x = eagerq.quantize_per_tensor(torch.randn(2, 4), 0.02 * (1 + number), 100 + number, torch.uint8)
        found, wanted = call(x), layer(x)
        assert torch.equal(found.int_repr(), wanted.int_repr())
        assert (found.scale, found.zero_point) == (wanted.scale, wanted.zero_point)
