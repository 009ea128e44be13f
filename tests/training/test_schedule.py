"""What a QATSchedule turns off and when, and how it resumes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from training.models import batches, conv_bn, float_model, observing, prepared, snapshot, train

from eagerq.errors import CheckpointError, InvalidArgumentError, InvalidConfigError
from eagerq.training import QATSchedule


def test_schedule_step_by_step() -> None:
    model = prepared()
    schedule = QATSchedule(model, observer_off=2, bn_freeze=3)
    seen = []
    for _ in range(4):
        schedule.step()
        model.train()  # as the next epoch will
        seen.append((observing(model), conv_bn(model).bn.training))
    assert seen == [({1}, True), ({0}, True), ({0}, False), ({0}, False)]
    assert schedule.observers_off
    assert schedule.bn_frozen


def test_schedule_shows_in_what_is_trained() -> None:
    model = prepared()
    schedule = QATSchedule(model, observer_off=1, bn_freeze=1)
    train(model, batches(), schedule=schedule)
    before = snapshot(model)
    train(model, batches(), schedule=schedule)
    after = model.state_dict()
    fixed = [name for name in before if name.rsplit(".", 1)[1] not in ("weight", "bias")]
    assert all(torch.equal(after[name], before[name]) for name in fixed)
    assert not torch.equal(after["module.0.weight"], before["module.0.weight"])


@pytest.mark.parametrize(("observer_off", "bn_freeze"), [(0, None), (None, 0), (0, 0)])
def test_schedule_that_begins_at_once(observer_off: int | None, bn_freeze: int | None) -> None:
    model = prepared()
    QATSchedule(model, observer_off=observer_off, bn_freeze=bn_freeze)
    assert observing(model) == {1 if observer_off is None else 0}
    assert conv_bn(model).bn.training is (bn_freeze is None)


def test_schedule_in_torchvisions_order() -> None:
    model = prepared()
    schedule = QATSchedule(model, observer_off=2, bn_freeze=1)
    schedule.step()
    assert observing(model) == {1}
    assert not conv_bn(model).bn.training


def test_schedule_leaves_an_evaluating_model_in_evaluation() -> None:
    model = prepared().eval()
    schedule = QATSchedule(model, bn_freeze=1)
    schedule.step()
    schedule.load_state_dict({**schedule.state_dict(), "count": 0})
    assert not any(module.training for module in model.modules())
    assert conv_bn(model.train()).bn.training


def test_schedule_resumes() -> None:
    schedule = QATSchedule(prepared(), observer_off=2, bn_freeze=3)
    for _ in range(3):
        schedule.step()
    state = schedule.state_dict()
    model = prepared()
    resumed = QATSchedule(model, observer_off=5, bn_freeze=5)
    resumed.load_state_dict(state)
    assert repr(resumed) == "QATSchedule(observer_off=2, bn_freeze=3, unit='epoch', count=3)"
    assert observing(model) == {0}
    assert not conv_bn(model.train()).bn.training


def test_schedule_goes_back() -> None:
    model = prepared()
    schedule = QATSchedule(model, observer_off=1, bn_freeze=2)
    early = schedule.state_dict()
    schedule.step()
    schedule.step()
    schedule.load_state_dict(early)
    assert observing(model) == {1}
    assert conv_bn(model).bn.training


def test_schedule_state_survives_a_file(tmp_path: Any) -> None:
    schedule = QATSchedule(prepared(), observer_off=2, unit="step")
    torch.save(schedule.state_dict(), tmp_path / "schedule.pt")
    assert torch.load(tmp_path / "schedule.pt", weights_only=True) == schedule.state_dict()


@pytest.mark.parametrize(
    "state",
    [{}, {"count": 1}, {"observer_off": 1, "bn_freeze": 2, "unit": "epoch", "count": -1}],
)
def test_schedule_refuses_another_state(state: dict[str, Any]) -> None:
    schedule = QATSchedule(prepared(), observer_off=2, bn_freeze=3)
    before = schedule.state_dict()
    with pytest.raises(CheckpointError, match="not the state of a QATSchedule"):
        schedule.load_state_dict(state)
    assert schedule.state_dict() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "does nothing"),
        ({"observer_off": -1}, "observer_off must be an integer of at least 0, got -1"),
        ({"bn_freeze": 1.5}, r"bn_freeze must be an integer of at least 0, got 1\.5"),
        ({"observer_off": True}, "observer_off must be an integer"),
        ({"observer_off": 1, "unit": "batch"}, "unit must be"),
    ],
)
def test_schedule_refuses_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        QATSchedule(prepared(), **options)


def test_schedule_refuses_an_unprepared_model() -> None:
    with pytest.raises(InvalidConfigError, match=r"not prepared.*prepare_qat"):
        QATSchedule(float_model(), observer_off=1)
