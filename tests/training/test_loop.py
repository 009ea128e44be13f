"""fine_tune learns, stops in time, and prints where it should."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from training.models import batches, conv_bn, float_model, observing, prepared, sgd, snapshot, train, unchanged

from eagerq.errors import EagerqError, InvalidArgumentError, InvalidConfigError
from eagerq.training import QATSchedule, calibrate


def test_fine_tune_learns_on_any_device(device: torch.device) -> None:
    model = prepared()
    history = train(model, batches(), epochs=15, device=device)
    assert next(model.parameters()).device.type == device.type
    assert len(history.losses) == len(history.seconds) == len(history.metrics) == 15
    assert len(history.step_losses) == 60
    assert history.losses[0] == pytest.approx(sum(history.step_losses[:4]) / 4)
    assert history.losses[-1] < history.losses[0] / 2
    assert model.training
    # batches follow a model that has been moved
    assert calibrate(model, batches(1), progress=False).batches == 1
    train(model, batches(1))


def test_fine_tune_is_the_loop_one_would_write() -> None:
    torch.manual_seed(1)
    ours = prepared()
    torch.manual_seed(1)
    theirs = prepared()
    data = batches()
    train(ours, data, epochs=2)
    optimizer = sgd(theirs)
    for _ in range(2):
        for images, labels in data:
            optimizer.zero_grad()
            cross_entropy(theirs(images), labels).backward()
            optimizer.step()
    assert unchanged(ours, snapshot(theirs))


def test_fine_tune_trains_float_models_too() -> None:
    history = train(float_model(), batches(), epochs=10)
    assert history.losses[-1] < history.losses[0]


@pytest.mark.parametrize(("unit", "count"), [("epoch", 2), ("step", 8)])
def test_fine_tune_steps_the_schedule(unit: str, count: int) -> None:
    model = prepared()
    schedule = QATSchedule(model, observer_off=count, bn_freeze=count, unit=unit)
    train(model, batches(), epochs=2, schedule=schedule)
    assert schedule.count == count
    assert observing(model) == {0}
    assert not conv_bn(model).bn.training


def test_fine_tune_steps_the_learning_rate() -> None:
    model = prepared()
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)
    train(model, batches(), epochs=2, optimizer=optimizer, scheduler=scheduler)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0005)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    history = train(model, batches(), optimizer=optimizer, scheduler=plateau)
    assert plateau.best == history.losses[0]


def test_evaluate_shifts_no_ranges() -> None:
    torch.manual_seed(1)
    plain = prepared()
    torch.manual_seed(1)
    watched = prepared()
    data = batches()
    modes = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        modes.append((model.training, torch.is_grad_enabled(), observing(model)))
        return {"mean": model(1000 * torch.rand(2, 1, 6, 6)).mean().item()}

    train(plain, data, epochs=2)
    history = train(watched, data, epochs=2, evaluate=evaluate)
    assert unchanged(watched, snapshot(plain))
    assert modes == [(False, False, {0})] * 2
    assert [set(metrics) for metrics in history.metrics] == [{"mean"}] * 2
    assert train(watched, data, evaluate=lambda model: 0.5).metrics == [{"metric": 0.5}]


def test_batches_that_are_no_pairs() -> None:
    model = prepared()
    data = [{"images": images, "labels": labels} for images, labels in batches()]
    history = train(
        model,
        data,
        forward=lambda model, batch: model(batch["images"]),
        loss_fn=lambda scores, batch: cross_entropy(scores, batch["labels"]),
        epochs=10,
    )
    assert history.losses[-1] < history.losses[0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite(bad: float) -> None:
    model = prepared()
    train(model, batches())
    weight = conv_bn(model).weight
    calls = []

    def loss_fn(scores: Tensor, labels: Tensor) -> Tensor:
        calls.append(weight.detach().clone())
        return cross_entropy(scores, labels) * (bad if len(calls) == 6 else 1.0)

    with pytest.raises(EagerqError, match=rf"the loss is {bad} at step 6 \(epoch 2, batch 2\).*learning rate"):
        train(model, batches(), epochs=2, loss_fn=loss_fn)
    assert torch.equal(weight, calls[-1])


@pytest.mark.parametrize(
    ("loss_fn", "error", "message"),
    [
        (lambda scores, labels: scores, InvalidArgumentError, r"loss_fn returned shape \(8, 3\)"),
        (lambda scores, labels: 1.0, InvalidArgumentError, "loss_fn returned a float"),
        (
            lambda scores, labels: cross_entropy(scores, labels).detach(),
            InvalidConfigError,
            "does not depend on any parameter",
        ),
    ],
)
def test_a_loss_that_cannot_be_used(loss_fn: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        train(prepared(), batches(), loss_fn=loss_fn)


def test_fine_tune_refuses_the_optimizer_of_another_model() -> None:
    with pytest.raises(InvalidArgumentError, match=r"none of this model's parameters.*inplace=True"):
        train(prepared(), batches(), optimizer=sgd(prepared()))


def test_fine_tune_refuses_data_that_runs_out() -> None:
    model = prepared()
    before = snapshot(model)
    with pytest.raises(InvalidArgumentError, match="used up after the first of 2 epochs"):
        train(model, iter(batches()), epochs=2)
    with pytest.raises(InvalidArgumentError, match="no batches"):
        train(model, [])
    with pytest.raises(InvalidArgumentError, match="epochs must be an integer of at least 1"):
        train(model, batches(), epochs=0)
    assert unchanged(model, before)
    assert len(train(model, iter(batches())).step_losses) == 4


# --- what is printed, by calibrate too


def test_progress_is_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    model = prepared()
    calibrate(model, batches())
    train(model, batches(), epochs=2, evaluate=lambda model: {"accuracy": 0.25}, progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    for word in ("calibrating: 100%", "epoch 1/2: 100%", "epoch 2/2: 100%", "loss=", "accuracy=0.2500"):
        assert word in shown.err


def test_no_progress_is_silence(capsys: pytest.CaptureFixture[str]) -> None:
    model = prepared()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate(model, batches(), progress=False)
        train(model, batches(), schedule=QATSchedule(model, observer_off=1))
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "")
