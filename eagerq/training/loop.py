"""A plain training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from tqdm import tqdm

from eagerq.errors import EagerqError, InvalidArgumentError, InvalidConfigError
from eagerq.training.batches import (
    Forward,
    check_count,
    check_data,
    device_of,
    length_of,
    no_batches,
    run_batch,
    to_device,
)
from eagerq.training.calibration import looking
from eagerq.training.schedule import QATSchedule

__all__ = ["History", "fine_tune"]


@dataclass
class History:
    """What happened during :func:`fine_tune`.

    Attributes:
        step_losses: the loss of each step.
        losses: its mean over each epoch.
        metrics: what ``evaluate`` returned after each epoch, empty without it.
        seconds: what each epoch took, evaluation included.
    """

    step_losses: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def _check_loss(loss: Any, step: int, epoch: int, batch: int) -> float:
    """The loss as a number, once it is certain that training on it makes sense."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise InvalidArgumentError(f"loss_fn returned {got}, wanted a tensor with one element")
    value = float(loss.detach())  # one wait for the device a step: the price of stopping in time
    if not math.isfinite(value):
        raise EagerqError(
            f"the loss is {value} at step {step} (epoch {epoch}, batch {batch}); no update was made from it",
            remedy="lower the learning rate, clip gradients, or look for NaN and infinity in that batch",
        )
    if not loss.requires_grad:
        raise InvalidConfigError(
            "the loss does not depend on any parameter that can be trained",
            remedy="train before convert (int8 layers have no gradients), outside torch.no_grad()",
        )
    return value


def fine_tune(
    model: nn.Module,
    data: Iterable[Any],
    *,
    optimizer: Optimizer,
    loss_fn: Callable[[Any, Any], Tensor],
    epochs: int,
    schedule: QATSchedule | None = None,
    scheduler: Any = None,
    device: torch.device | str | None = None,
    evaluate: Callable[[nn.Module], Mapping[str, float] | float] | None = None,
    progress: bool = True,
    forward: Forward | None = None,
) -> History:
    """Train a model, prepared or float, with a plain loop; it is left in training mode.

    Args:
        model: the model; put into training mode at the start of each epoch.
        data: batches that can be gone through once an epoch, each an ``(input, target)`` pair
            (further items are ignored) or a dict of the model's arguments.
        optimizer: over this model's parameters.
        loss_fn: called as ``loss_fn(output, target)``, or ``loss_fn(output, batch)`` for batches
            that are no pairs; returns a tensor with one element.
        epochs: how often to go through ``data``.
        schedule: stepped each epoch or step, as its ``unit`` says.
        scheduler: a learning rate scheduler of torch's, stepped each epoch.
        device: where to train; the model is moved there.  By default it stays, and batches follow it.
        evaluate: called after each epoch with the model in evaluation mode, without gradients and
            with observers off (what it is shown must not shift the ranges); returns a number, or a
            dict of them.
        progress: show a progress bar per epoch on stderr.
        forward: runs the model on a batch of any other kind: ``forward(model, batch)``.

    Returns:
        Losses, metrics and times.

    Raises:
        EagerqError: when the loss is NaN or infinite, naming the step; parameters keep the values
            of the step before.
        InvalidArgumentError: for data, an optimizer or a loss that cannot be used.
        InvalidConfigError: for a model that cannot be trained, such as a converted one.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> batches = [(torch.rand(8, 3), torch.randint(2, (8,))) for _ in range(5)]
        >>> history = fine_tune(
        ...     model,
        ...     batches,
        ...     optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        ...     loss_fn=nn.functional.cross_entropy,
        ...     epochs=2,
        ...     progress=False,
        ... )
        >>> len(history.losses), len(history.step_losses)
        (2, 10)
    """
    check_data(data)
    check_count("epochs", epochs, 1)
    if epochs > 1 and isinstance(data, Iterator):
        raise InvalidArgumentError(
            f"data is an iterator, used up after the first of {epochs} epochs",
            remedy="pass a DataLoader or a list, which can be gone through again",
        )
    own = {id(parameter) for parameter in model.parameters()}
    if own.isdisjoint(id(parameter) for group in optimizer.param_groups for parameter in group["params"]):
        raise InvalidArgumentError(
            "the optimizer holds none of this model's parameters",
            remedy="make it from the prepared model: prepare_qat returns a copy unless inplace=True",
        )
    if device is not None:
        model.to(device)
    target = device_of(model) if device is None else device
    history = History()
    for epoch in range(1, epochs + 1):
        start = time.perf_counter()
        losses: list[float] = []
        model.train()
        with tqdm(total=length_of(data), desc=f"epoch {epoch}/{epochs}", disable=not progress) as bar:
            for number, batch in enumerate(data, 1):
                batch = to_device(batch, target)
                output = (forward or run_batch)(model, batch)
                pair = isinstance(batch, (tuple, list)) and len(batch) > 1
                loss = loss_fn(output, batch[1] if pair else batch)
                losses.append(_check_loss(loss, len(history.step_losses) + number, epoch, number))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if schedule is not None and schedule.unit == "step":
                    schedule.step()
                bar.set_postfix(loss=f"{losses[-1]:.4f}", refresh=False)
                bar.update()
            if not losses:
                raise no_batches("fine_tune")
            mean = sum(losses) / len(losses)
            if scheduler is not None:
                scheduler.step(*([mean] if isinstance(scheduler, ReduceLROnPlateau) else []))
            if schedule is not None and schedule.unit == "epoch":
                schedule.step()
            metrics: Mapping[str, float] = {}
            if evaluate is not None:
                with looking(model, observe=False):
                    found = evaluate(model)
                metrics = found if isinstance(found, Mapping) else {"metric": float(found)}
            bar.set_postfix({"loss": f"{mean:.4f}", **{name: f"{value:.4f}" for name, value in metrics.items()}})
        history.step_losses += losses
        history.losses.append(mean)
        history.metrics.append(dict(metrics))
        history.seconds.append(time.perf_counter() - start)
    return history
