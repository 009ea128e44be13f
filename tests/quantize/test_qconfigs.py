"""Spreading qconfigs by name and class; wrapping leaves in stubs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import Oracle
from quantize.models import PTQ, QAT, small
from torch import Tensor, nn

import eagerq
from eagerq.errors import InvalidArgumentError, InvalidConfigError

OTHER = eagerq.default_qat_qconfig


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)
        self.head = nn.Sequential(nn.Linear(1, 1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv2(self.conv1(x)))


def spread(given: dict[Any, Any], **own: Any) -> dict[str, Any]:
    model = Two()
    for name, config in own.items():
        model.get_submodule(name).qconfig = config
    eagerq.propagate_qconfig_(model, given)
    return {name: module.qconfig for name, module in model.named_modules()}


def test_name_comes_before_class_comes_before_parent() -> None:
    got = spread({"": QAT, "conv2": None, nn.Linear: OTHER, "head": PTQ})
    assert got == {
        "": QAT,
        "conv1": QAT,
        "conv2": None,
        "head": PTQ,
        "head.0": OTHER,
        "head.1": PTQ,
    }
    assert spread({nn.Conv2d: OTHER, "conv1": QAT})["conv1"] == QAT


def test_an_own_qconfig_stays() -> None:
    got = spread({"": QAT, "conv1": OTHER, nn.Conv2d: OTHER}, conv1=PTQ, head=None)
    assert got["conv1"] == PTQ
    assert got["conv2"] == OTHER
    assert got["head"] is got["head.0"] is None


def test_nothing_given_nothing_spread() -> None:
    assert set(spread({}).values()) == {None}


def test_a_module_in_two_places_takes_its_first() -> None:
    shared = nn.Linear(1, 1)
    model = nn.Sequential(nn.Sequential(shared), nn.Sequential(shared))
    model[0].qconfig, model[1].qconfig = QAT, PTQ
    eagerq.propagate_qconfig_(model)
    assert shared.qconfig == QAT


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"conv3": QAT}, r"no module is named 'conv3'; nearest names: 'conv[12]', 'conv[12]'.*named_modules"),
        ({"head.o": QAT}, r"no module is named 'head\.o'; nearest names: 'head"),
        ({nn.Conv3d: QAT}, "no module is of class Conv3d; the model has Conv2d, Linear, ReLU, Sequential, Two"),
        ({7: QAT}, "no module is of class 7"),
        ({nn.Linear: QAT, "conv1": "x86"}, "its qconfig is a str, not a QConfig"),
    ],
)
def test_keys_that_match_nothing_are_refused_with_the_nearest(given: dict[Any, Any], match: str) -> None:
    model = Two()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    with pytest.raises(InvalidArgumentError, match=match):
        eagerq.propagate_qconfig_(model, given)
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before


def test_modules_not_to_be_looked_into() -> None:
    for table in ({"non_traceable_module_name": ["head"]}, {"non_traceable_module_class": [nn.Sequential]}):
        model = Two()
        eagerq.propagate_qconfig_(model, {"": QAT}, prepare_custom_config_dict=table)
        assert model.conv1.qconfig == QAT
        assert not hasattr(model.head, "qconfig")
        assert not hasattr(model.head[0], "qconfig")


@pytest.mark.parametrize("keys", [{""}, {"", "conv1"}, {nn.Conv2d, "head"}, {"", nn.Linear, "head.0"}])
def test_spread_as_by_the_oracle(ao: Oracle, keys: set[Any]) -> None:
    ours, theirs = Two(), Two()
    given = {key: eagerq.QConfig(torch.nn.Identity, index) for index, key in enumerate(sorted(keys, key=str))}
    eagerq.propagate_qconfig_(ours, given)
    ao.quantization.propagate_qconfig_(theirs, given)
    for name, module in ours.named_modules():
        assert module.qconfig == theirs.get_submodule(name).qconfig


def test_the_dict_decides_what_prepare_quantizes() -> None:
    model = small(None)
    eagerq.propagate_qconfig_(model, {"quant": QAT, nn.Conv2d: QAT})
    model = eagerq.prepare_qat(model)
    kinds = [type(module).__module__.partition(".")[0] for module in (model.module[0], model.module[4])]
    assert kinds == ["eagerq", "torch"]


# --- add_quant_dequant ------------------------------------------------------------------------------------


def test_leaves_with_a_qconfig_are_wrapped() -> None:
    model = Two()
    eagerq.propagate_qconfig_(model, {"": QAT, "conv2": None})
    wrapped = eagerq.add_quant_dequant(model)
    assert wrapped is model
    kinds = {name: type(module) for name, module in model.named_children()}
    assert kinds == {"conv1": eagerq.QuantWrapper, "conv2": nn.Conv2d, "head": nn.Sequential}
    assert [type(module) for module in model.head] == [eagerq.QuantWrapper] * 2
    assert model.conv1.quant.qconfig == QAT


def test_a_leaf_itself_comes_back_wrapped() -> None:
    layer = nn.Linear(2, 2)
    assert eagerq.add_quant_dequant(layer) is layer  # no qconfig
    layer.qconfig = QAT
    wrapper = eagerq.add_quant_dequant(layer)
    assert type(wrapper) is eagerq.QuantWrapper
    assert wrapper.module is layer


def test_a_leaf_in_two_places_gets_one_wrapper() -> None:
    shared = nn.Linear(2, 2)
    model = nn.Sequential(shared, nn.Sequential(shared), nn.ReLU())
    model.qconfig = QAT
    eagerq.propagate_qconfig_(model)
    eagerq.add_quant_dequant(model)
    assert model[0] is model[1][0]
    assert type(model[0].module) is nn.Linear


def test_wrapped_leaves_go_down_the_road() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    model.qconfig = QAT
    model[1].qconfig = None
    eagerq.propagate_qconfig_(model)
    model = eagerq.prepare_qat(eagerq.add_quant_dequant(model).train())
    x = torch.randn(5, 3)
    y = model(x)
    model.eval().apply(eagerq.disable_observer)
    int8 = eagerq.convert(model, as_trained=True)
    assert isinstance(int8[0].module, eagerq.nn.quantized.Linear)
    assert (int8(x) - y).abs().max() < 0.1


def test_no_qconfig_is_an_error_of_prepare() -> None:
    with pytest.raises(InvalidConfigError, match="no qconfig"):
        eagerq.prepare_qat(copy.deepcopy(Two()))
