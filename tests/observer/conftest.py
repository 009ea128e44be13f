"""Pairs of observers, ours and torch.ao's, and how to compare them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eagerq.observer

Pair = tuple[Any, Any]


@pytest.fixture(scope="session")
def pair(ao: Any) -> Callable[..., Pair]:
    """Makes an observer of ours and one of torch.ao's by class name, from the same arguments."""

    def make(name: str, **kwargs: Any) -> Pair:
        return getattr(eagerq.observer, name)(**kwargs), getattr(ao.quantization, name)(**kwargs)

    return make


@pytest.fixture(scope="session")
def assert_same() -> Callable[[nn.Module, nn.Module], None]:
    """Fails unless two observers hold equal buffers and tell equal parameters."""

    def check(ours: Any, theirs: Any) -> None:
        expected = theirs.state_dict()
        found = ours.state_dict()
        assert list(found) == list(expected)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=lambda text, n=name: f"{n}: {text}")
        scale, zero_point = ours.calculate_qparams()
        their_scale, their_zero_point = theirs.calculate_qparams()
        torch.testing.assert_close(scale, their_scale, rtol=0, atol=0)
        # torch.ao's zero points are int32 or int64, depending on the qscheme
        torch.testing.assert_close(zero_point, their_zero_point, rtol=0, atol=0, check_dtype=False)
        integers = not their_zero_point.dtype.is_floating_point
        assert zero_point.dtype is (torch.int64 if integers else torch.float32)

    return check


@pytest.fixture(scope="session")
def feed() -> Callable[..., None]:
    """Shows batches to observers, and checks that each passes them through untouched."""

    def show(batches: list[Tensor], *observers: nn.Module) -> None:
        for batch in batches:
            for observer in observers:
                assert observer(batch) is batch

    return show
