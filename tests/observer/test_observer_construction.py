"""Factories, arguments that are refused, copies, pickles and state_dicts."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eagerq.observer
from eagerq.errors import EagerqError, InvalidConfigError
from eagerq.observer import (
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    ObserverBase,
    PerChannelMinMaxObserver,
    UniformQuantizationObserverBase,
)
from eagerq.scheme import integer_dtype

RANGE_OBSERVERS = [
    "MinMaxObserver",
    "MovingAverageMinMaxObserver",
    "PerChannelMinMaxObserver",
    "MovingAveragePerChannelMinMaxObserver",
    "HistogramObserver",
]
READY_MADE = [name for name in eagerq.observer.__all__ if name.startswith(("default_", "weight_", "per_"))]


def observer_class(name: str) -> Any:
    return getattr(eagerq.observer, name)


# --- factories ----------------------------------------------------------------------------------


def test_with_args_chains_and_the_last_word_wins() -> None:
    factory = MinMaxObserver.with_args(dtype=torch.int8, quant_min=-8, quant_max=7)
    finer = factory.with_args(quant_min=-127, quant_max=127)
    assert (factory().quant_min, factory().dtype) == (-8, torch.int8)
    assert (finer().quant_min, finer().dtype) == (-127, torch.int8)
    assert finer(quant_max=5).quant_max == 5
    assert factory() is not factory()


def test_with_callable_args_are_computed_for_each_instance() -> None:
    class Numbered(MinMaxObserver):
        def __init__(self, number: int, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.number = number

    numbers = iter(range(10))
    factory = Numbered.with_callable_args(number=lambda: next(numbers)).with_args(dtype=torch.int8)
    assert [factory().number for _ in range(3)] == [0, 1, 2]
    assert factory(number=7).number == 7
    assert factory().number == 3  # the callable was not asked when the argument was given
    assert factory().dtype is torch.int8
    other = factory.with_callable_args(number=lambda: -1)
    assert (other().number, factory().number) == (-1, 5)


def test_factories_can_be_pickled() -> None:
    factory = HistogramObserver.with_args(bins=16, dtype=torch.int8)
    again = pickle.loads(pickle.dumps(factory))
    assert (again().bins, again().dtype) == (16, torch.int8)
    assert repr(factory) == repr(again)


@pytest.mark.parametrize("name", READY_MADE)
def test_ready_made_observers_are_configured_as_in_torch_ao(name: str, ao: Any) -> None:
    ours, theirs = getattr(eagerq.observer, name)(), getattr(ao.quantization.observer, name)()
    assert type(ours).__name__ == type(theirs).__name__
    expected_dtype = torch.float32 if theirs.dtype is torch.float else integer_dtype(theirs.dtype)
    assert ours.dtype is expected_dtype
    assert ours.is_dynamic == theirs.is_dynamic
    for attribute in ("qscheme", "quant_min", "quant_max", "ch_axis", "bins", "reduce_range"):
        assert getattr(ours, attribute, None) == getattr(theirs, attribute, None), attribute
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, rtol=0, atol=0)


def test_every_ready_made_observer_of_torch_ao_is_here(ao: Any) -> None:
    theirs = {name for name in ao.quantization.observer.__all__ if "default_" in name or "range_neg" in name}
    assert theirs == set(READY_MADE)


# --- arguments that are refused -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("MinMaxObserver", {"qscheme": torch.per_channel_affine}, "per-tensor qscheme.*not torch.per_channel"),
        ("HistogramObserver", {"qscheme": torch.per_channel_symmetric}, "HistogramObserver works with a per-t"),
        ("PerChannelMinMaxObserver", {"qscheme": torch.per_tensor_affine}, "choose a per-channel qscheme"),
        ("PerChannelMinMaxObserver", {"is_dynamic": True}, "does not support dynamic"),
        ("HistogramObserver", {"is_dynamic": True}, "HistogramObserver does not support dynamic"),
        ("FixedQParamsObserver", {"scale": 1.0, "zero_point": 0, "is_dynamic": True}, "does not support dynamic"),
        ("MovingAverageMinMaxObserver", {"is_dynamic": True}, r"is 0\.01.*pass averaging_constant=1"),
        (
            "MinMaxObserver",
            {"qscheme": torch.per_tensor_symmetric, "reduce_range": True},
            r"Cannot reduce range for symmetric quantization to torch\.uint8.*signed dtype",
        ),
    ],
)
def test_what_an_observer_cannot_do(name: str, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(NotImplementedError, match=message) as caught:
        observer_class(name)(**kwargs)
    assert isinstance(caught.value, EagerqError)


@pytest.mark.parametrize("name", RANGE_OBSERVERS)
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"quant_min": 1, "quant_max": 5}, "must include 0"),
        ({"quant_min": 0, "quant_max": 256}, "wider than torch.uint8"),
        ({"dtype": torch.float32}, "cannot be quantized to torch.float32"),
        ({"qscheme": "affine"}, "unknown qscheme 'affine'"),
    ],
)
def test_a_configuration_that_makes_no_sense(name: str, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidConfigError, match=message):
        observer_class(name)(**kwargs)


def test_dynamic_needs_no_memory() -> None:
    observer = MovingAverageMinMaxObserver(averaging_constant=1, is_dynamic=True)
    assert observer.is_dynamic
    observer(torch.tensor([-9.0, 9.0]))
    observer(torch.tensor([-1.0, 1.0]))
    assert (observer.min_val, observer.max_val) == (-1.0, 1.0)


def test_the_bases_are_abstract() -> None:
    with pytest.raises(TypeError, match="abstract"):
        ObserverBase(torch.uint8)  # type: ignore[abstract]

    class Watcher(UniformQuantizationObserverBase):
        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(NotImplementedError, match="Watcher keeps no minimum and maximum"):
        Watcher().reset_min_max_vals()


# --- copies ---------------------------------------------------------------------------------------


def pickled(observer: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(observer))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
@pytest.mark.parametrize("name", RANGE_OBSERVERS)
def test_copies_are_equal_and_independent(name: str, duplicate: Callable[[nn.Module], Any]) -> None:
    x = torch.randn(3, 40)
    observer = observer_class(name)(dtype=torch.int8)
    observer(x)
    expected = observer.calculate_qparams()
    twin = duplicate(observer)
    twin(100 * x)
    assert all(torch.equal(*values) for values in zip(observer.calculate_qparams(), expected, strict=True))
    assert (twin.calculate_qparams()[0] > expected[0]).all()
    observer(100 * x)
    assert torch.equal(observer.calculate_qparams()[0], twin.calculate_qparams()[0])


# --- state_dicts ----------------------------------------------------------------------------------


def through_a_file(state: dict[str, Tensor]) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("observed", [False, True])
@pytest.mark.parametrize("name", RANGE_OBSERVERS)
@pytest.mark.parametrize("direction", ["to torch.ao", "from torch.ao"])
def test_state_dicts_cross_both_ways(
    name: str, direction: str, observed: bool, pair: Callable, feed: Callable, assert_same: Callable
) -> None:
    ours, theirs = pair(name)
    source, target = (ours, theirs) if direction == "to torch.ao" else (theirs, ours)
    if observed:
        feed([torch.randn(3, 50), torch.randn(3, 50)], source)
    target.load_state_dict(through_a_file(source.state_dict()), strict=True)
    feed([torch.randn(3, 50) * 7], ours, theirs)  # and both go on from there alike
    assert_same(ours, theirs)


def test_the_count_of_skipped_batches_stays_out_of_the_state_dict() -> None:
    observer = MinMaxObserver()
    observer(torch.tensor([torch.nan]))
    assert list(observer.state_dict()) == ["eps", "min_val", "max_val"]


def test_channels_are_resized_by_a_load_within_a_model() -> None:
    model = nn.Sequential(PerChannelMinMaxObserver(), nn.Linear(2, 3))
    model[0](torch.randn(6, 2))
    fresh = nn.Sequential(PerChannelMinMaxObserver(), nn.Linear(2, 3))
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(fresh[0].min_val, model[0].min_val)
    assert fresh[0].min_val is not model[0].min_val


@pytest.mark.parametrize("missing", ["eps", "min_val", "max_val"])
@pytest.mark.parametrize("name", RANGE_OBSERVERS)
def test_a_truncated_state_dict_is_refused(name: str, missing: str) -> None:
    state = observer_class(name)().state_dict()
    del state[missing]
    with pytest.raises(RuntimeError, match=rf"Missing key.*{missing}"):
        observer_class(name)().load_state_dict(state)


def test_the_first_format_had_no_eps() -> None:
    source = MinMaxObserver()
    source(torch.tensor([-1.0, 2.0]))
    state = dict(source.state_dict())  # without its version
    del state["eps"]
    observer = MinMaxObserver(eps=2**-12)
    observer.load_state_dict(state, strict=True)
    assert (observer.max_val, observer.eps) == (2.0, 2**-12)
