"""Converted models' files of torch.ao that do not fit, or hold what no quantized tensor can: nothing is loaded."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Oracle
from quantize.models import same_state, state
from torch import Tensor, nn

import eagerq
from eagerq.errors import CheckpointError
from eagerq.nn import quantized


class Net(nn.Module):
    def __init__(self, api: Any, width: int = 4) -> None:
        super().__init__()
        self.quant, self.dequant = api.QuantStub(), api.DeQuantStub()
        self.conv, self.fc = nn.Conv2d(3, width, 3), nn.Linear(width * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.dequant(self.fc(self.conv(self.quant(x)).flatten(1)))
        return y


def images() -> Tensor:
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(3))


def int8(api: Any, seed: int = 0, width: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    net: Any = Net(api, width).train()
    net.qconfig = api.get_default_qat_qconfig("onednn")
    net = api.prepare_qat(net)
    net(images())
    model: nn.Module = api.convert(net.eval())
    return model


@functools.cache
def their_model(ao: Oracle) -> nn.Module:
    return int8(ao.quantization, seed=1)


def theirs(ao: Oracle) -> Any:
    return their_model(ao).state_dict()


def refused(values: Any, match: str, strict: bool = True) -> None:
    model = int8(eagerq)
    outer = nn.ModuleDict({"net": model})
    inside = {f"net.{key}": value for key, value in values.items()}
    before = state(model)
    for target, given in ((model, values), (outer, inside)):
        kept = copy.copy(given)
        with pytest.raises(CheckpointError, match=match) as caught:
            target.load_state_dict(given, strict=strict)
        assert "To fix it: " in str(caught.value)
        assert same_state(state(model), before)
        assert given.keys() == kept.keys()
        assert all(given[key] is kept[key] for key in kept)


LINEAR = "fc._packed_params._packed_params"


def remade(weight: Tensor, scale: float = 1.0, point: int = 0, axis: int = 0, integers: Any = None) -> Tensor:
    """A weight for each channel with its parameters changed: scales by a factor, zero points by a summand."""
    values = weight.int_repr() if integers is None else integers
    scales = torch.full((values.shape[axis],), 0.01, dtype=torch.float64) * scale
    points = torch.full((values.shape[axis],), point)
    return torch._make_per_channel_quantized_tensor(values, scales, points, axis)


Change = Callable[[Any], Any]


def weight(make: Callable[[Tensor], Any]) -> Change:
    return lambda d: {**d, LINEAR: (make(d[LINEAR][0]), d[LINEAR][1])}


MISFITS: dict[str, tuple[Change, str]] = {
    "no weight": (lambda d: {k: v for k, v in d.items() if k != LINEAR}, r"it lacks (net\.)?fc\.weight"),
    "one more layer": (
        lambda d: {**d, "fc2._packed_params._packed_params": d[LINEAR]},
        r"it has (net\.)?fc2\.weight.* besides",
    ),
    "no bias": (lambda d: {**d, LINEAR: (d[LINEAR][0], None)}, r"it lacks (net\.)?fc\.bias"),
    "a tuple of three": (lambda d: {**d, LINEAR: (*d[LINEAR], 1)}, r"it lacks .*fc\.weight.*it has .*_packed_params"),
    "a list": (lambda d: {**d, LINEAR: list(d[LINEAR])}, r"it lacks .*fc\.weight.*it has .*_packed_params"),
    "a weight that is no tensor": (weight(lambda w: "w"), r"fc\.weight is a str, not a tensor"),
    "a bias that is no tensor": (lambda d: {**d, LINEAR: (d[LINEAR][0], 5)}, r"fc\.bias is a int, not a tensor"),
    "a float weight": (
        weight(lambda w: w.dequantize()),
        r"it lacks .*fc\.weight_scale.*fc\.weight is of torch\.float32",
    ),
    "another width": (
        weight(lambda w: remade(w, integers=w.int_repr()[:, :7].contiguous())),
        r"fc\.weight has shape \(5, 7\), the model's \(5, 16\)",
    ),
    "fewer channels": (
        weight(lambda w: remade(w, integers=w.int_repr()[:4].contiguous())),
        r"fc\.weight has shape \(4, 16\)",
    ),
    "32 bits": (
        weight(lambda w: remade(w, integers=w.int_repr().int())),
        r"fc\.weight is of torch\.int32, the model's of torch\.int8: another bit width",
    ),
    "unsigned": (
        weight(lambda w: remade(w, integers=w.int_repr().view(torch.uint8))),
        r"fc\.weight is of torch\.uint8, the model's of torch\.int8",
    ),
    "another axis": (weight(lambda w: remade(w, axis=1)), r"fc\.weight has a scale for each index of axis 1"),
    "NaN": (
        weight(lambda w: remade(w, torch.nan)),
        r"fc\.weight_scale holds nan, nan, nan …, but a scale is a positive",
    ),
    "infinite": (weight(lambda w: remade(w, torch.inf)), r"fc\.weight_scale holds inf"),
    "zero": (weight(lambda w: remade(w, 0.0)), r"fc\.weight_scale holds 0\.0"),
    "negative": (weight(lambda w: remade(w, -1.0)), r"fc\.weight_scale holds -0\.0"),
    "zero point of the weight": (
        weight(lambda w: remade(w, point=200)),
        r"fc\.weight_zero_point holds 200, 200, 200 …, but a zero point is one of -128 to 127",
    ),
    "scale of the output": (lambda d: {**d, "conv.scale": torch.tensor(0.0)}, r"conv\.scale holds 0\.0"),
    "scale of the input": (lambda d: {**d, "quant.scale": torch.tensor([torch.nan])}, r"quant\.scale holds nan"),
    "zero point of the output": (
        lambda d: {**d, "conv.zero_point": torch.tensor(300)},
        r"conv\.zero_point is of torch\.int64, the model's of torch\.uint8: another bit width",
    ),
    "zero point of signed integers": (lambda d: {**d, "conv.zero_point": torch.tensor(-5)}, r"conv\.zero_point is of"),
    "an object": (lambda d: {**d, "conv.weight": object()}, r"conv\.weight is a object"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_misfits(ao: Oracle, name: str) -> None:
    change, match = MISFITS[name]
    refused(change(dict(theirs(ao))), match)


@pytest.mark.parametrize("name", ["another width", "32 bits", "NaN", "zero point of the output"])
def test_values_are_checked_where_names_are_not(ao: Oracle, name: str) -> None:
    change, match = MISFITS[name]
    refused(change(dict(theirs(ao))), match, strict=False)


def test_another_model(ao: Oracle) -> None:
    refused(int8(ao.quantization, width=6).state_dict(), r"conv\.weight has shape \(6, 3, 3, 3\)")


def test_tables_of_four_bits(ao: Oracle) -> None:
    """torch.ao would turn the layer into one of the other width without a word."""
    table = torch.quantize_per_channel(
        torch.rand(6, 4), torch.full((6,), 0.1), torch.zeros(6), axis=0, dtype=torch.quint4x2
    )
    values = {"_packed_params.dtype": torch.quint4x2, "_packed_params._packed_weight": table}
    layer = quantized.Embedding(6, 4)
    before = state(layer)
    with pytest.raises(RuntimeError, match=r"weight has shape|bit width"):
        layer.load_state_dict(values)
    assert same_state(state(layer), before)


@pytest.mark.parametrize("name", ["NaN", "zero point of the weight", "32 bits", "another width"])
def test_a_layer_alone(ao: Oracle, name: str) -> None:
    change, match = MISFITS[name]
    layer = quantized.Linear(16, 5)
    before = state(layer)
    values = {key[3:]: value for key, value in change(dict(theirs(ao))).items() if key.startswith("fc.")}
    with pytest.raises((RuntimeError, CheckpointError), match=match.replace(r"fc\.", "")):
        layer.load_state_dict(values)
    assert same_state(state(layer), before)


def test_own_files_are_held_to_the_same(ao: Oracle) -> None:
    good = int8(eagerq, seed=1).state_dict()
    for key, wrong, match in (
        ("fc.weight_scale", torch.zeros(5), r"fc\.weight_scale holds 0\.0"),
        ("fc.weight_scale", torch.ones(3), r"fc\.weight_scale has shape \(3,\)"),
        ("fc.weight_zero_point", torch.full((5,), 1000, dtype=torch.int32), r"fc\.weight_zero_point holds 1000"),
        ("fc.weight_zero_point", torch.zeros(1, dtype=torch.int32), r"scale has 5 elements, but .*zero_point 1"),
        ("conv.quant_range", torch.tensor([200, 100]), r"conv\.quant_range holds 200, 100, but two integers in order"),
        ("conv.quant_range", torch.tensor([0, 256]), r"conv\.quant_range holds 0, 256"),
        ("conv.quant_range", torch.tensor([0.0, 127.0]), r"conv\.quant_range holds 0\.0, 127\.0"),
    ):
        refused({**good, key: wrong}, match)
