"""Statistics taken out of one prepared model and put into another."""

from __future__ import annotations

import pytest
import torch
from conftest import Oracle
from torch import Tensor, nn

import eagerq
from eagerq.errors import CheckpointError


def prepared(qconfig: eagerq.QConfig = eagerq.default_per_channel_qconfig) -> nn.Module:
    model = eagerq.QuantWrapper(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)))
    model.qconfig = qconfig
    return eagerq.prepare(model.eval())


def trained() -> nn.Module:
    model = eagerq.QuantWrapper(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))).train()
    model.qconfig = eagerq.get_default_qat_qconfig("onednn")
    return eagerq.prepare_qat(model)


def copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in state.items()}


@pytest.mark.parametrize("make", [prepared, trained])
def test_there_and_back(make: object) -> None:
    assert callable(make)
    source, target = make(), make()
    source(torch.randn(8, 4))
    target(10 * torch.randn(8, 4))
    statistics = eagerq.get_observer_state_dict(source)
    assert statistics
    assert all("activation_post_process" in name for name in statistics)
    before = copied(target.state_dict())
    eagerq.load_observer_state_dict(target, statistics)
    after = target.state_dict()
    assert all(torch.equal(after[name], value) for name, value in statistics.items())
    assert all(torch.equal(after[name], before[name]) for name in after if name not in statistics)


def test_names_are_torchs(ao: Oracle) -> None:
    theirs = ao.quantization.QuantWrapper(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)))
    theirs.qconfig = ao.quantization.default_per_channel_qconfig
    theirs = ao.quantization.prepare(theirs.eval())
    theirs(torch.randn(8, 4))
    statistics = ao.quantization.get_observer_state_dict(theirs)
    ours = prepared()
    assert list(eagerq.get_observer_state_dict(ours)) == list(statistics)
    eagerq.load_observer_state_dict(ours, statistics)
    ours(torch.zeros(1, 4))
    assert torch.equal(ours.quant.activation_post_process.max_val, theirs.quant.activation_post_process.max_val)


def test_what_does_not_fit_changes_nothing() -> None:
    source, target = prepared(), prepared()
    source(torch.randn(8, 4))
    statistics = eagerq.get_observer_state_dict(source)
    before = copied(target.state_dict())
    name = "module.0.activation_post_process.max_val"
    for misfit, problem in (
        ({key: value for key, value in statistics.items() if key != name}, f"Missing keys for observer {name}"),
        ({**statistics, name.replace("0", "7"): torch.ones(())}, "Unexpected keys for observer module.7"),
        ({**statistics, name: torch.ones(3)}, name),
    ):
        with pytest.raises(CheckpointError, match=problem):
            eagerq.load_observer_state_dict(target, misfit)
        assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())
