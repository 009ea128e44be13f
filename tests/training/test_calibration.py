"""What calibrate does to a model, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from training.models import batches, conv_bn, fake_quants, float_model, observing, prepared, snapshot, train

import eagerq
from eagerq.errors import InvalidArgumentError, InvalidConfigError
from eagerq.observer import MinMaxObserver
from eagerq.training import calibrate


def test_calibrate_fills_the_observers_and_leaves_the_rest() -> None:
    model = prepared()
    before = snapshot(model)
    assert calibrate(model, batches(3), progress=False) == (3, 24)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.rsplit(".", 1)[1] for name in changed} <= {"min_val", "max_val", "scale", "zero_point"}
    for module in fake_quants(model):
        assert torch.isfinite(module.activation_post_process.min_val).all()
    assert model.training
    assert conv_bn(model).bn.training
    # what it leaves behind can be trained on
    train(model, batches())


def test_calibrate_sees_what_the_forward_sees() -> None:
    model = prepared()
    data = [torch.full((2, 1, 6, 6), 3.0), torch.full((2, 1, 6, 6), -1.0)]
    calibrate(model, data, progress=False)
    observer = model.quant.activation_post_process.activation_post_process
    assert float(observer.max_val) == pytest.approx(3 + 0.01 * (-1 - 3))  # a moving average


def test_calibrate_puts_modes_and_switches_back() -> None:
    model = prepared()
    model.apply(eagerq.disable_observer)
    conv_bn(model).freeze_bn_stats()
    model.module[3].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    scale = model.quant.activation_post_process.scale.clone()
    calibrate(model, [torch.rand(4, 1, 6, 6)], progress=False)
    assert not torch.equal(model.quant.activation_post_process.scale, scale)  # it did observe
    assert observing(model) == {0}
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert conv_bn(model).freeze_bn


def test_calibrate_puts_back_after_an_error() -> None:
    model = prepared()
    model.apply(eagerq.disable_observer)
    with pytest.raises(RuntimeError):
        calibrate(model, [torch.rand(4, 2, 6, 6)], progress=False)  # two channels
    assert observing(model) == {0}
    assert model.training
    assert torch.is_grad_enabled()


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.observer = MinMaxObserver()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.observer(x + y)


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


class Sample:
    def __init__(self, x: Tensor) -> None:
        self.x = x


ONES = torch.ones(5, 2)


@pytest.mark.parametrize(
    "batch",
    [
        {"x": ONES, "y": ONES},
        ((ONES, ONES), torch.zeros(5)),
        [{"x": ONES, "y": ONES}, torch.zeros(5)],
        (Pair(ONES, ONES),),
    ],
    ids=["dict", "inputs and target", "dict and target", "named tuple"],
)
def test_calibrate_takes_batches_apart(batch: Any) -> None:
    model = TwoInputs()
    assert calibrate(model, [batch], progress=False) == (1, 5)
    assert float(model.observer.max_val) == 2


def test_calibrate_with_a_forward_of_the_users() -> None:
    model = TwoInputs()
    data = [Sample(ONES)]
    with pytest.raises(InvalidArgumentError, match=r"a batch is a Sample.*forward=lambda"):
        calibrate(model, data, progress=False)
    found = calibrate(model, data, progress=False, forward=lambda model, batch: model(batch.x, batch.x))
    assert found == (1, 1)
    assert float(model.observer.max_val) == 2


def test_calibrate_stops_after_steps() -> None:
    def endless() -> Iterator[Tensor]:
        while True:
            yield torch.rand(2, 1, 6, 6)

    drawn = endless()
    assert calibrate(prepared(), drawn, steps=3, progress=False) == (3, 6)
    assert calibrate(prepared(), batches(2), steps=5, progress=False).batches == 2


def test_calibrate_with_a_loader() -> None:
    dataset = TensorDataset(torch.rand(10, 1, 6, 6), torch.zeros(10))
    assert calibrate(prepared(), DataLoader(dataset, batch_size=4), progress=False) == (3, 10)


@pytest.mark.parametrize("data", [[], iter(()), DataLoader(TensorDataset(torch.zeros(0, 1)), batch_size=2)])
def test_calibrate_refuses_empty_data(data: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="no batches"):
        calibrate(prepared(), data, progress=False)


@pytest.mark.parametrize("data", [torch.rand(4, 1, 6, 6), {"x": torch.rand(4, 1, 6, 6)}, 3])
def test_one_batch_is_no_data(data: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="wanted batches"):
        calibrate(prepared(), data, progress=False)
    model = prepared()
    with pytest.raises(InvalidArgumentError, match="wanted batches"):
        train(model, data)


def test_calibrate_refuses_a_model_without_observers() -> None:
    converted = eagerq.convert(prepared().eval(), as_trained=True)
    for model in (float_model(), converted):
        with pytest.raises(InvalidConfigError, match=r"no observers.*prepare_qat"):
            calibrate(model, batches(), progress=False)


@pytest.mark.parametrize("steps", [0, -1, 1.5, True])
def test_calibrate_refuses_steps(steps: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="steps must be an integer of at least 1"):
        calibrate(prepared(), batches(), steps=steps, progress=False)


def test_default_eval_fn_is_a_run_fn_for_quantize() -> None:
    model = eagerq.QuantWrapper(nn.Linear(4, 2))
    model.qconfig = eagerq.default_qconfig
    data = [(torch.full((1, 4), value), torch.zeros(1)) for value in (-1.0, 3.0)]
    quantized = eagerq.quantize(model, eagerq.default_eval_fn, [data])
    assert quantized.quant.scale == pytest.approx(4 / 127)
