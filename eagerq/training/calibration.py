"""Showing data to a prepared model, so that its observers learn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from eagerq.errors import InvalidConfigError
from eagerq.fake_quantize import FakeQuantizeBase
from eagerq.observer import ObserverBase
from eagerq.training.batches import (
    Forward,
    check_count,
    check_data,
    count_samples,
    device_of,
    length_of,
    no_batches,
    run_batch,
    to_device,
)

__all__ = ["Calibration", "calibrate", "default_eval_fn", "looking"]


class Calibration(NamedTuple):
    """What :func:`calibrate` has shown to the model."""

    batches: int
    samples: int


@contextmanager
def looking(model: nn.Module, observe: bool) -> Iterator[None]:
    """Evaluation mode with every observer on or off; afterwards everything is as it was."""
    switches = [module for module in model.modules() if isinstance(module, FakeQuantizeBase)]
    before = [bool(module.observer_enabled.item()) for module in switches]
    modes = [(module, module.training) for module in model.modules()]
    was_training = model.training
    try:
        model.eval()
        for switch in switches:
            switch.enable_observer(observe)
        with torch.no_grad():
            # not inference_mode: buffers that observers replace there could not be trained on later
            yield
    finally:
        for switch, enabled in zip(switches, before, strict=True):
            switch.enable_observer(enabled)
        model.train(was_training)
        for module, training in modes:  # a model may have parts in another mode than its root
            module.training = training


def calibrate(
    model: nn.Module,
    data: Iterable[Any],
    *,
    device: torch.device | str | None = None,
    steps: int | None = None,
    progress: bool = True,
    forward: Forward | None = None,
) -> Calibration:
    """Show data to a prepared model, so that its observers learn the ranges of its activations.

    The model runs in evaluation mode without gradients, observers on; afterwards its modes and
    switches are what they were.

    Args:
        model: prepared, by ``prepare_qat`` for instance.
        data: batches, each a tensor, a tuple or list that begins with the input (or with a tuple or
            dict of inputs), or a dict of the model's arguments.
        device: where to run; the model is moved there.  By default it stays, and batches follow it.
        steps: the most batches to use.
        progress: show a progress bar on stderr.
        forward: runs the model on a batch of any other kind: ``forward(model, batch)``.

    Returns:
        How many batches, and samples in them, the model has seen.

    Raises:
        InvalidConfigError: for a model that has no observers.
        InvalidArgumentError: for empty data, or batches that cannot be used.

    Example:
        >>> import eagerq
        >>> model = eagerq.QuantWrapper(nn.Linear(3, 2)).train()
        >>> model.qconfig = eagerq.get_default_qat_qconfig("onednn")
        >>> model = eagerq.prepare_qat(model)
        >>> calibrate(model, [torch.rand(8, 3), torch.rand(4, 3)], progress=False)
        Calibration(batches=2, samples=12)
    """
    if not any(isinstance(module, (ObserverBase, FakeQuantizeBase)) for module in model.modules()):
        raise InvalidConfigError(
            "there is nothing to calibrate: the model has no observers",
            module=model,
            remedy="prepare it first (prepare_qat), and calibrate before convert",
        )
    check_data(data)
    if steps is not None:
        check_count("steps", steps, 1)
    if device is not None:
        model.to(device)
    target = device_of(model) if device is None else device
    total = min((count for count in (length_of(data), steps) if count is not None), default=None)
    batches = samples = 0
    with (
        looking(model, observe=True),
        tqdm(islice(data, steps), total=total, desc="calibrating", disable=not progress) as bar,
    ):
        for batch in bar:
            (forward or run_batch)(model, to_device(batch, target))
            batches += 1
            samples += count_samples(batch)
    if not batches:
        raise no_batches("calibrate")
    return Calibration(batches, samples)


def default_eval_fn(model: nn.Module, calib_data: Iterable[tuple[Any, Any]]) -> None:
    """Run a model on the inputs of ``(input, target)`` pairs: a ``run_fn`` for :func:`eagerq.quantize`.

    :func:`calibrate` does more: devices, progress, nested inputs.
    """
    for data, _ in calib_data:
        model(data)
