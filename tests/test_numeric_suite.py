"""Comparing a float model with its int8 twin: torch.ao's keys and values, and models left as they were."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from conftest import Oracle
from torch import Tensor, nn

import eagerq
from eagerq import intrinsic, numeric_suite
from eagerq.errors import InvalidArgumentError
from eagerq.nn import quantized as nnq

DATA = torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(3))


class Net(nn.Module):
    """Convolutions, one fused with a ReLU, a sum and a Linear."""

    def __init__(self, library: Any = eagerq, functional: Any = nnq) -> None:
        super().__init__()
        self.quant, self.dequant = library.QuantStub(), library.DeQuantStub()
        self.conv1, self.relu1 = nn.Conv2d(2, 4, 3, padding=1), nn.ReLU()
        self.conv2 = nn.Conv2d(2, 4, 1)
        self.sum = functional.FloatFunctional()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.quant(x)
        x = self.sum.add(self.relu1(self.conv1(x)), self.conv2(x))
        y: Tensor = self.dequant(self.fc(x.mean((2, 3))))
        return y


def pair(library: Any = eagerq, functional: Any = nnq, weights: dict[str, Tensor] | None = None) -> tuple[Any, Any]:
    """A fused float model, and the int8 one converted from it."""
    model = Net(library, functional).eval()
    if weights is not None:
        model.load_state_dict(weights)
    model = library.fuse_modules(model, ["conv1", "relu1"])
    prepared = copy.deepcopy(model)
    prepared.qconfig = library.default_qconfig
    prepared = library.prepare(prepared)
    prepared(DATA)
    return model, library.convert(prepared)


def torchs(ao: Oracle, weights: dict[str, Tensor]) -> tuple[Any, Any, Any]:
    return (
        *pair(ao.quantization, ao.quantized, weights),
        importlib.import_module("torch.ao.ns._numeric_suite"),
    )


@pytest.fixture
def weights() -> dict[str, Tensor]:
    return Net().state_dict()


def real(value: Any) -> Any:
    return value.dequantize() if value.is_quantized else value


def test_compare_weights(ao: Oracle, weights: dict[str, Tensor]) -> None:
    model, int8 = pair(weights=weights)
    found = numeric_suite.compare_weights(model.state_dict(), int8.state_dict())
    assert sorted(found) == ["conv1.weight", "conv2.weight", "fc.weight"]
    theirs_model, theirs_int8, ns = torchs(ao, weights)
    theirs = ns.compare_weights(theirs_model.state_dict(), theirs_int8.state_dict())
    for name, stats in theirs.items():
        mine = found[name.replace("_packed_params._packed_params", "weight")]
        assert torch.equal(mine["float"], stats["float"])
        assert torch.equal(mine["quantized"].int_repr(), stats["quantized"].int_repr())
        assert torch.equal(mine["quantized"].dequantize(), stats["quantized"].dequantize())
        assert numeric_suite.compute_error(mine["float"], mine["quantized"].dequantize()) > 30


def test_compare_weights_per_channel() -> None:
    model = eagerq.QuantWrapper(nn.Linear(5, 3)).eval()
    model.qconfig = eagerq.default_per_channel_qconfig
    prepared = eagerq.prepare(model)
    prepared(torch.randn(4, 5))
    found = numeric_suite.compare_weights(model.state_dict(), eagerq.convert(prepared).state_dict())
    quantized = found["module.weight"]["quantized"]
    assert isinstance(quantized, eagerq.QTensor)
    assert quantized.q_per_channel_axis() == 0


def test_compare_weights_of_other_forms() -> None:
    """Transposed convolutions have their channels on another axis, small tables two values a byte."""
    table: Any = nn.EmbeddingBag(6, 5, mode="sum")
    table.qconfig = eagerq.float_qparams_weight_only_qconfig_4bit
    up = nn.ConvTranspose2d(4, 4, 2)
    with torch.no_grad():
        up.weight.mul_(torch.logspace(-1, 1, 4).reshape(1, 4, 1, 1))
    model = nn.ModuleDict({"table": table, "up": eagerq.QuantWrapper(up)})
    model["up"].qconfig = eagerq.default_per_channel_qconfig
    prepared: Any = eagerq.prepare(model)
    prepared["up"](torch.randn(1, 4, 3, 3))
    found = numeric_suite.compare_weights(model.state_dict(), eagerq.convert(prepared).state_dict())
    assert sorted(found) == ["table.weight", "up.module.weight"]
    quantized = found["up.module.weight"]["quantized"]
    assert isinstance(quantized, eagerq.QTensor)
    assert quantized.q_per_channel_axis() == 1
    for pair_, least in ((found["up.module.weight"], 35), (found["table.weight"], 15)):
        assert numeric_suite.compute_error(pair_["float"], pair_["quantized"].dequantize()) > least


def test_a_second_comparison_starts_anew() -> None:
    model, int8 = pair()
    for _ in range(2):
        found = numeric_suite.compare_model_stub(model, int8, {nn.Linear}, DATA)
        assert {name: len(stats["float"]) for name, stats in found.items()} == {"fc.stats": 1}
    assert len([module for module in int8.modules() if isinstance(module, numeric_suite.Shadow)]) == 1


def test_compare_model_stub(ao: Oracle, weights: dict[str, Tensor]) -> None:
    model, int8 = pair(weights=weights)
    swap = {nn.Conv2d, nn.Linear, intrinsic.ConvReLU2d, nnq.FloatFunctional}
    wanted_output = int8(DATA)
    found = numeric_suite.compare_model_stub(model, int8, swap, DATA)
    theirs_model, theirs_int8, ns = torchs(ao, weights)
    swap = {nn.Conv2d, nn.Linear, ao.intrinsic.ConvReLU2d, ao.quantized.FloatFunctional}
    theirs = ns.compare_model_stub(theirs_model, theirs_int8, swap, DATA)
    assert sorted(found) == sorted(theirs) == ["conv1.stats", "conv2.stats", "fc.stats", "sum.stats"]
    for name, stats in theirs.items():
        for kind in ("float", "quantized"):
            # torch.ao's logger keeps the first sample of a batch only
            torch.testing.assert_close(real(found[name][kind][0])[0], real(stats[kind][0]), rtol=1e-5, atol=1e-6)
    assert torch.equal(int8(DATA), wanted_output)
    numeric_suite.remove_loggers(int8)
    assert not [m for m in int8.modules() if isinstance(m, (numeric_suite.Shadow, numeric_suite.Logger))]
    assert torch.equal(int8(DATA), wanted_output)


def test_compare_model_outputs(ao: Oracle, weights: dict[str, Tensor]) -> None:
    model, int8 = pair(weights=weights)
    float_output, int8_output = model(DATA), int8(DATA)
    found = numeric_suite.compare_model_outputs(model, int8, DATA)
    theirs_model, theirs_int8, ns = torchs(ao, weights)
    theirs = ns.compare_model_outputs(theirs_model, theirs_int8, DATA)
    assert set(found) - set(theirs) == {"dequant.stats"}  # the model's own output
    assert {"conv1.stats", "conv2.stats", "fc.stats", "quant.stats", "sum.stats"} <= set(found)
    for name, stats in theirs.items():
        for kind in ("float", "quantized"):
            assert len(found[name][kind]) == 1  # torch.ao's sees what fused modules give twice
            torch.testing.assert_close(real(found[name][kind][0]), real(stats[kind][0]), rtol=1e-5, atol=1e-6)
    # a second comparison starts anew, and the models still compute what they did
    again = numeric_suite.compare_model_outputs(model, int8, DATA)
    assert {name: len(stats["float"]) for name, stats in again.items()} == dict.fromkeys(found, 1)
    for one, output in ((model, float_output), (int8, int8_output)):
        numeric_suite.remove_loggers(one)
        assert torch.equal(one(DATA), output)
        assert not [m for m in one.modules() if isinstance(m, numeric_suite.Logger)]


def test_allow_list_and_custom_logger() -> None:
    class Means(numeric_suite.OutputLogger):
        def forward(self, x: Any) -> Any:
            self.stats["tensor_val"].append(real(x).mean())
            return x

    model, int8 = pair()
    found = numeric_suite.compare_model_outputs(model, int8, DATA, logger_cls=Means, allow_list=[nn.Linear, nnq.Linear])
    assert list(found) == ["fc.stats"]
    assert found["fc.stats"]["float"][0].shape == ()


def test_nothing_to_compare_is_said() -> None:
    model, int8 = pair()
    before = list(int8.modules())
    with pytest.raises(InvalidArgumentError, match=r"float twin of class Conv3d; the float model has .*Conv2d"):
        numeric_suite.compare_model_stub(model, int8, {nn.Conv3d}, DATA)
    assert list(int8.modules()) == before


def test_a_prefix_for_names() -> None:
    model, int8 = pair()
    numeric_suite.prepare_model_with_stubs(model, int8, {nn.Linear})
    int8(DATA)
    assert list(numeric_suite.get_logger_dict(int8, "int8")) == ["int8.fc.stats"]


def test_operations_of_a_shadow() -> None:
    """Each operation of a QFunctional passes through, with its float twin beside it."""
    a = eagerq.quantize_per_tensor(torch.tensor([1.0, 2.0]), 0.5, 0, torch.uint8)
    calls: list[tuple[str, tuple[Any, ...]]] = [
        ("add", (a, a)),
        ("add_relu", (a, a)),
        ("mul", (a, a)),
        ("matmul", (a, a)),
        ("cat", ([a, a], 0)),
        ("add_scalar", (a, 1.0)),
        ("mul_scalar", (a, 2.0)),
    ]
    shadow = numeric_suite.Shadow(nnq.QFunctional(), nnq.FloatFunctional(), numeric_suite.ShadowLogger)
    for name, args in calls:
        output = getattr(shadow, name)(*args)
        assert torch.equal(output.dequantize(), getattr(nnq.QFunctional(), name)(*args).dequantize())
    stats: Any = shadow.logger.stats
    assert [value.tolist() for value in stats["float"]] == [
        *([2.0, 4.0], [2.0, 4.0], [1.0, 4.0], 5.0),
        *([1.0, 2.0, 1.0, 2.0], [2.0, 3.0], [2.0, 4.0]),
    ]
    assert len(stats["quantized"]) == len(calls)
