"""What the helpers need to know about data: how to take a batch apart, move it and count it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from eagerq.errors import InvalidArgumentError

__all__ = [
    "Forward",
    "check_count",
    "check_data",
    "count_samples",
    "device_of",
    "length_of",
    "no_batches",
    "run_batch",
    "to_device",
]

Forward = Callable[[nn.Module, Any], Any]
"""Runs a model on one batch, for batches that the helpers cannot take apart: ``forward(model, batch)``."""


def device_of(model: nn.Module) -> torch.device | None:
    """Where the model is, judged by its first parameter (or buffer)."""
    first: Tensor | None = next(model.parameters(), next(model.buffers(), None))
    return None if first is None else first.device


def to_device(value: Any, device: torch.device | str | None) -> Any:
    """``value`` with every tensor in it on ``device``; None leaves them where they are."""
    if device is None:
        return value
    if callable(getattr(value, "to", None)):  # tensors, packed sequences, tokenizers' batches
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [to_device(item, device) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def run_batch(model: nn.Module, batch: Any) -> Any:
    """Call the model on a batch: a tensor, a dict of arguments, or a tuple that begins with either."""
    if isinstance(batch, (tuple, list)) and len(batch):
        batch = batch[0]
        if isinstance(batch, (tuple, list)):  # ((x, y), target): a model of several inputs
            return model(*batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, Tensor):
        return model(batch)
    raise InvalidArgumentError(
        f"a batch is a {type(batch).__name__}, which holds no input for the model that could be recognised",
        remedy="yield a tensor, an (input, target) pair or a dict of the model's arguments, or pass "
        "forward=lambda model, batch: …",
    )


def count_samples(batch: Any) -> int:
    """The length of the first tensor in a batch."""
    while isinstance(batch, (Mapping, tuple, list)) and len(batch):
        batch = next(iter(batch.values())) if isinstance(batch, Mapping) else batch[0]
    return batch.shape[0] if isinstance(batch, Tensor) and batch.dim() else 1


def check_data(data: Any) -> None:
    """Refuse one batch where batches are wanted."""
    if isinstance(data, (Tensor, Mapping)) or (not isinstance(data, Iterable) and not hasattr(data, "__getitem__")):
        raise InvalidArgumentError(
            f"data is one {type(data).__name__}, wanted batches to go through",
            remedy="pass a DataLoader, or a list of batches such as [images]",
        )


def no_batches(name: str) -> InvalidArgumentError:
    """The error of a helper that has gone through its data and seen nothing."""
    return InvalidArgumentError(
        f"{name} got no batches: data is empty, or an iterator that has been used up",
        remedy="pass a DataLoader or a list, and check its length",
    )


def check_count(name: str, value: Any, least: int) -> None:
    """Refuse anything but an integer of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InvalidArgumentError(f"{name} must be an integer of at least {least}, got {value!r}")


def length_of(data: Any) -> int | None:
    """How many batches there will be, if it is known."""
    try:
        return len(data)
    except TypeError:
        return None
