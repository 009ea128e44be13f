"""QConfigMapping: what torch.ao's holds, and which module gets which qconfig."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import Oracle
from torch import nn

import eagerq
from eagerq import QConfigMapping
from eagerq.errors import InvalidArgumentError, InvalidConfigError
from eagerq.scheme import integer_dtype

FIRST, SECOND, THIRD = (eagerq.get_default_qat_qconfig(backend) for backend in ("onednn", "x86", "qnnpack"))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 1, 1), nn.Linear(1, 1)


def net() -> nn.Module:
    return nn.Sequential(Block(), Block(), nn.Linear(1, 1))


def qconfigs(mapping: QConfigMapping) -> dict[str, Any]:
    model = net()
    eagerq.propagate_qconfig_(model, mapping)
    return {name: module.qconfig for name, module in model.named_modules()}


def test_the_strongest_word_counts() -> None:
    mapping = QConfigMapping().set_global(FIRST)
    assert set(qconfigs(mapping).values()) == {FIRST}
    mapping.set_object_type(nn.Linear, SECOND)
    found = qconfigs(mapping)
    assert (found["0.conv"], found["0.fc"], found["2"]) == (FIRST, SECOND, SECOND)
    mapping.set_module_name_regex(r"\d+\.fc", THIRD).set_module_name_regex(r"1\.fc", FIRST)
    found = qconfigs(mapping)
    assert (found["0.fc"], found["1.fc"], found["2"]) == (THIRD, THIRD, SECOND)
    mapping.set_module_name("1", None)
    found = qconfigs(mapping)
    assert (found["1"], found["1.conv"], found["1.fc"], found["0.fc"]) == (None, None, None, THIRD)
    mapping.set_module_name("1.fc", FIRST)
    assert qconfigs(mapping)["1.fc"] is FIRST


def test_parents_hand_theirs_down() -> None:
    found = qconfigs(QConfigMapping().set_object_type(Block, FIRST))
    assert (found["0.fc"], found["2"], found[""]) == (FIRST, None, None)


def test_a_modules_own_comes_first() -> None:
    model = net()
    model[2].qconfig = THIRD
    eagerq.propagate_qconfig_(model, QConfigMapping().set_global(FIRST).set_module_name("2", SECOND))
    assert model[2].qconfig is THIRD


def test_names_that_match_nothing_are_refused() -> None:
    model = net()
    with pytest.raises(InvalidArgumentError, match=r"no module is named '0\.conf'.*'0\.conv'"):
        eagerq.propagate_qconfig_(model, QConfigMapping().set_module_name("0.conf", FIRST))
    assert not any(hasattr(module, "qconfig") for module in model.modules())
    with pytest.raises(InvalidArgumentError, match="not a regular expression"):
        QConfigMapping().set_module_name_regex("(", FIRST)


def test_to_dict_and_back() -> None:
    mapping = (
        QConfigMapping()
        .set_global(FIRST)
        .set_object_type(nn.Linear, SECOND)
        .set_object_type("reshape", None)
        .set_module_name_regex("a.*", THIRD)
        .set_module_name("b", None)
        .set_module_name_object_type_order("c", nn.functional.linear, 0, FIRST)
    )
    again = QConfigMapping.from_dict(mapping.to_dict())
    assert vars(again) == vars(mapping)
    assert again.to_dict()["module_name_object_type_order"] == [("c", nn.functional.linear, 0, FIRST)]
    assert "Linear" in repr(mapping)
    with pytest.raises(InvalidArgumentError, match="no key 'moduel_name'"):
        QConfigMapping.from_dict({"moduel_name": [("a", FIRST)]})


@pytest.mark.parametrize("backend", ["x86", "fbgemm", "qnnpack", "onednn"])
@pytest.mark.parametrize("name", ["get_default_qconfig_mapping", "get_default_qat_qconfig_mapping"])
def test_defaults_are_torchs(ao: Oracle, name: str, backend: str) -> None:
    ours, theirs = getattr(eagerq, name)(backend), getattr(ao.quantization, name)(backend)

    def told(config: Any) -> Any:
        made = [None if factory is None else factory() for factory in config]
        return [(type(one).__name__, str(getattr(one, "qscheme", "")), integer_dtype(one.dtype)) for one in made]

    assert told(ours.global_qconfig) == told(theirs.global_qconfig)
    assert ours.object_type_qconfigs.keys() == theirs.object_type_qconfigs.keys()
    for kind, config in theirs.object_type_qconfigs.items():
        assert told(ours.object_type_qconfigs[kind]) == told(config), kind
    flat = getattr(eagerq, name.replace("mapping", "dict"))(backend)
    assert [key for key, _ in flat["object_type"]] == list(ours.object_type_qconfigs)


def test_unknown_backends_are_refused() -> None:
    with pytest.raises(InvalidConfigError, match="not supported"):
        eagerq.get_default_qat_qconfig_mapping("tpu")


def test_a_model_prepared_by_mapping_trains_and_converts() -> None:
    model = eagerq.QuantWrapper(nn.Sequential(nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 2))).train()
    mapping = eagerq.get_default_qat_qconfig_mapping("onednn").set_module_name("module.2", None)
    eagerq.propagate_qconfig_(model, mapping)
    prepared = eagerq.prepare_qat(model)
    prepared(torch.randn(3, 4)).sum().backward()
    assert hasattr(prepared.module[0], "weight_fake_quant")
    assert type(prepared.module[2]) is nn.Linear
