"""Observers that only carry something: parameters, a configuration, a recording."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from eagerq.errors import EagerqError
from eagerq.observer import (
    FixedQParamsObserver,
    NoopObserver,
    PlaceholderObserver,
    RecordingObserver,
    ReuseInputObserver,
)

SILENT = [PlaceholderObserver, NoopObserver, RecordingObserver, ReuseInputObserver]


@pytest.mark.parametrize("cls", SILENT)
def test_they_have_no_parameters_to_tell(cls: Any) -> None:
    with pytest.raises(NotImplementedError, match=rf"{cls.__name__} observes nothing") as caught:
        cls().calculate_qparams()
    assert isinstance(caught.value, EagerqError)


@pytest.mark.parametrize("cls", SILENT)
def test_they_pass_anything_through(cls: Any) -> None:
    observer = cls()
    for x in (torch.randn(3), torch.empty(0), torch.tensor(torch.nan)):
        assert observer(x) is x
    assert not observer.state_dict()


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"dtype": torch.float16},
        {"dtype": torch.uint8, "quant_min": 0, "quant_max": 255, "is_dynamic": True},
        {"dtype": torch.int8, "qscheme": torch.per_tensor_symmetric, "eps": 2**-12, "custom_op_name": "op"},
    ],
)
def test_placeholder_carries_what_torch_ao_does(kwargs: dict[str, Any], pair: Callable) -> None:
    ours, theirs = pair("PlaceholderObserver", **kwargs)
    for name in ("dtype", "qscheme", "quant_min", "quant_max", "eps", "custom_op", "is_dynamic"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.extra_repr() == theirs.extra_repr()


def test_compute_dtype_is_the_old_word_for_dynamic() -> None:
    assert PlaceholderObserver(compute_dtype=torch.uint8).is_dynamic
    assert not PlaceholderObserver().is_dynamic


def test_noop_carries_what_torch_ao_does(pair: Callable) -> None:
    ours, theirs = pair("NoopObserver", custom_op_name="op")
    assert (ours.dtype, ours.custom_op) == (theirs.dtype, theirs.custom_op) == (torch.float16, "op")


def test_recording_keeps_copies_in_order() -> None:
    observer = RecordingObserver()
    first, second = torch.randn(3), torch.randn(2, 2)
    observer(first)
    observer(second)
    expected = [first.clone(), second.clone()]
    first.zero_()
    recorded = observer.get_tensor_value()
    assert all(torch.equal(*values) for values in zip(recorded, expected, strict=True))
    assert not RecordingObserver().get_tensor_value()  # each has its own


def test_fixed_parameters_equal_torch_ao(pair: Callable, feed: Callable) -> None:
    ours, theirs = pair("FixedQParamsObserver", scale=1 / 256, zero_point=3)
    x = torch.randn(5)
    feed([x], ours, theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for our_value, their_value in zip(ours.calculate_qparams(), theirs.calculate_qparams(), strict=True):
        assert our_value.dtype is their_value.dtype
        assert torch.equal(our_value, their_value)
    for name in ("qscheme", "quant_min", "quant_max", "is_dynamic"):
        assert getattr(ours, name) == getattr(theirs, name)


@pytest.mark.parametrize("direction", ["to torch.ao", "from torch.ao"])
def test_fixed_parameters_cross_both_ways(direction: str, pair: Callable) -> None:
    ours, _ = pair("FixedQParamsObserver", scale=0.5, zero_point=3)
    _, theirs = pair("FixedQParamsObserver", scale=0.25, zero_point=9)
    source, target = (ours, theirs) if direction == "to torch.ao" else (theirs, ours)
    target.load_state_dict(source.state_dict(), strict=True)
    assert torch.equal(target.calculate_qparams()[0], source.calculate_qparams()[0])
    assert torch.equal(target.calculate_qparams()[1], source.calculate_qparams()[1])


def test_fixed_parameters_on_a_device(device: torch.device) -> None:
    observer = FixedQParamsObserver(0.5, 3, factory_kwargs={"device": device})
    assert {value.device.type for value in observer.calculate_qparams()} == {device.type}
    assert observer.observed
