"""The road as users of eager-mode quantization walk it, end to end."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eagerq
from eagerq import QTensor
from eagerq.intrinsic import quantized as intrinsic_quantized
from eagerq.nn import quantized
from eagerq.nn.quantized import FloatFunctional

ENGINES = ["onednn", "x86", "fbgemm", "qnnpack"]


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(5, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x))


def wrapped(engine: str, training: bool = True) -> nn.Module:
    model = eagerq.QuantWrapper(TwoLayers())
    get = eagerq.get_default_qat_qconfig if training else eagerq.get_default_qconfig
    model.qconfig = get(engine)
    return model.train(training)


def train(model: nn.Module, steps: int = 5) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(steps):
        x = torch.rand(10, 5)
        loss = nn.functional.cross_entropy(model(x), torch.randint(0, 2, (10,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("engine", ENGINES)
def test_train_convert_save_rebuild_load_evaluate(engine: str) -> None:
    model = eagerq.prepare_qat(wrapped(engine))
    keys = set(model.state_dict())
    train(model)
    model = eagerq.convert(model)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    x = torch.rand(2, 5)
    expected = model(x)

    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    fresh = wrapped(engine)
    eagerq.prepare_qat(fresh, inplace=True)
    assert set(fresh.state_dict()) == keys
    eagerq.convert(fresh, inplace=True)
    fresh.eval()
    fresh.load_state_dict(saved)
    assert torch.equal(fresh(x), expected)

    # a model prepared for calibration has the same int8 form
    calibrated = wrapped(engine, training=False)
    eagerq.prepare(calibrated, inplace=True)
    eagerq.convert(calibrated, inplace=True)
    assert set(calibrated.state_dict()) == set(saved)
    calibrated.load_state_dict(saved)
    assert torch.equal(calibrated(x), expected)


def test_fake_quantized_models_are_evaluated_too() -> None:
    model = eagerq.prepare_qat(wrapped("onednn"))
    train(model)
    model.eval().apply(eagerq.disable_observer)
    x = torch.rand(4, 5)
    y = model(x)
    assert torch.equal(model(x), y)
    step = float(model.module.fc2.activation_post_process.scale)
    steps = y / step
    assert (steps - steps.round()).abs().max() < 1e-3  # on the grid of its last layer


@pytest.mark.parametrize("engine", ENGINES)
def test_linear_with_batch_norm(engine: str) -> None:
    bn = nn.BatchNorm1d(4, momentum=0.5)
    model = nn.Sequential(eagerq.QuantStub(), nn.Linear(4, 4), bn, eagerq.DeQuantStub())
    model.qconfig = eagerq.get_default_qat_qconfig(engine)
    model = eagerq.prepare_qat(eagerq.fuse_modules_qat(model, [["1", "2"]]))
    x = torch.randn(16, 4)
    for _ in range(20):  # the running statistics come to those of this batch
        model(x)
    model.eval().apply(eagerq.disable_observer)
    int8 = eagerq.convert(model, as_trained=True)
    assert type(int8[1]) is quantized.Linear
    assert type(int8[2]) is nn.Identity
    step = int8[1].scale
    assert step > 0
    assert (int8(x) - model(x)).abs().max() <= 1.001 * step
    assert int8(x).mean(0).abs().max() < 0.2  # normalised


class Numbers(nn.Module):
    def __init__(self, operation: str, number: float) -> None:
        super().__init__()
        self.quant, self.ff = eagerq.QuantStub(), FloatFunctional()
        self.operation, self.number = operation, number

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self.ff, self.operation)(self.quant(x), self.number)


@pytest.mark.parametrize(("operation", "number", "factor"), [("add_scalar", 1.0, 1), ("mul_scalar", 2.0, 2)])
@pytest.mark.parametrize("qconfig", [eagerq.default_qconfig, eagerq.default_qat_qconfig])
def test_numbers_leave_the_parameters_of_the_input(operation: str, number: float, factor: int, qconfig: Any) -> None:
    model = Numbers(operation, number).train()
    model.qconfig = qconfig
    model = eagerq.prepare_qat(model)
    x = torch.randn(4, 4)
    model(x)
    int8 = eagerq.convert(model)
    result = int8(x)
    assert isinstance(result, QTensor)
    assert result.q_scale() == pytest.approx(factor * int8.quant.scale, rel=1e-6)
    expected = int8.quant(x).dequantize()
    expected = expected + number if operation == "add_scalar" else expected * number
    assert (result.dequantize() - expected).abs().max() <= result.q_scale() / 2 + 1e-6


def test_a_lone_relu_is_left_alone() -> None:
    class Activation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(x)

    model = Activation().train()
    model.qconfig = eagerq.default_qconfig
    prepared = eagerq.prepare_qat(model)
    assert not hasattr(prepared, "activation_post_process")
    assert not hasattr(prepared.relu, "activation_post_process")
    assert type(prepared.relu) is nn.ReLU
    q = eagerq.quantize_per_tensor(torch.randn(5), 0.1, 50, torch.uint8)
    assert isinstance(prepared(q), QTensor)
    assert prepared(q).dequantize().min() == 0


def test_post_training_quantization_of_a_folded_model() -> None:
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 4))
    float_model = eagerq.QuantWrapper(layers).eval()
    x = torch.randn(8, 3, 5, 5)
    expected = float_model(x)
    model = eagerq.fuse_modules(float_model, ["module.0", "module.1", "module.2"])
    torch.testing.assert_close(model(x), expected)
    model.qconfig = eagerq.get_default_qconfig("onednn")
    model = eagerq.prepare(model)
    model(x)
    int8 = eagerq.convert(model)
    assert type(int8.module[0]) is intrinsic_quantized.ConvReLU2d
    assert (int8(x) - expected).norm() < 0.05 * expected.norm()


def test_the_int8_file_is_a_quarter_of_the_float_one() -> None:
    def size(model: nn.Module) -> int:
        return sum(value.numel() * value.element_size() for value in model.state_dict().values())

    float_model = eagerq.QuantWrapper(nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256)))
    before = size(float_model)
    float_model.qconfig = eagerq.get_default_qat_qconfig("onednn")
    model = eagerq.prepare_qat(float_model.train())
    model(torch.randn(2, 256))
    assert size(eagerq.convert(model.eval())) < 0.3 * before
