"""Observers of smallest and largest values: the same numbers as torch.ao, batch after batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from eagerq.errors import InvalidInputError
from eagerq.observer import (
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelMinMaxObserver,
)

PER_TENSOR = ["MinMaxObserver", "MovingAverageMinMaxObserver"]
PER_CHANNEL = ["PerChannelMinMaxObserver", "MovingAveragePerChannelMinMaxObserver"]
CLASSES = {
    cls.__name__: cls
    for cls in (
        MinMaxObserver,
        MovingAverageMinMaxObserver,
        PerChannelMinMaxObserver,
        MovingAveragePerChannelMinMaxObserver,
    )
}
ALL = list(CLASSES)

CUSTOM_RANGES = {
    torch.uint8: [(0, 127), (0, 15)],
    torch.int8: [(-127, 127), (-8, 7), (0, 255)],
    torch.int16: [(-2048, 2047)],
    torch.uint16: [],
}


@st.composite
def configurations(draw: st.DrawFn, name: str) -> dict[str, Any]:
    """Arguments that both libraries take, for a class."""
    dtype = draw(st.sampled_from(list(CUSTOM_RANGES)))
    kwargs: dict[str, Any] = {"dtype": dtype}
    if "PerChannel" in name:
        schemes = ["per_channel_affine", "per_channel_symmetric", "per_channel_affine_float_qparams"]
    else:
        schemes = ["per_tensor_affine", "per_tensor_symmetric"]
    kwargs["qscheme"] = getattr(torch, draw(st.sampled_from(schemes)))
    if CUSTOM_RANGES[dtype] and draw(st.booleans()):
        kwargs["quant_min"], kwargs["quant_max"] = draw(st.sampled_from(CUSTOM_RANGES[dtype]))
    unsigned_symmetric = "symmetric" in str(kwargs["qscheme"]) and dtype in (torch.uint8, torch.uint16)
    if not unsigned_symmetric:
        kwargs["reduce_range"] = draw(st.booleans())
    if draw(st.booleans()):
        kwargs["eps"] = draw(st.sampled_from([2.0**-12, 1e-30]))
    if name.startswith("Moving"):
        kwargs["averaging_constant"] = draw(st.sampled_from([0.01, 0.3, 1.0]))
    return kwargs


@st.composite
def batch_lists(draw: st.DrawFn, min_dim: int = 0) -> list[Tensor]:
    """One to four batches of one shape, each with its own decade, offset and kind of values."""
    shape = draw(st.lists(st.integers(1, 5), min_size=min_dim, max_size=4))
    batches = []
    for _ in range(draw(st.integers(1, 4))):
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        x = torch.randn(shape, generator=generator)
        kind = draw(st.sampled_from(["normal", "relu", "shifted", "constant", "powers"]))
        if kind == "relu":
            x = x.relu()
        elif kind == "shifted":
            x = x + draw(st.sampled_from([-10.0, 10.0]))
        elif kind == "constant":
            x = torch.full(shape, draw(st.sampled_from([0.0, -1.0, 2.5])))
        elif kind == "powers":
            x = x.sign() * torch.exp2(torch.round(4 * x))
        batches.append(x * 10 ** draw(st.floats(-10, 10)))
    return batches


@pytest.mark.parametrize("name", PER_TENSOR)
@given(data=st.data())
def test_per_tensor_equals_torch_ao(
    name: str, data: st.DataObject, pair: Callable, feed: Callable, assert_same: Callable
) -> None:
    ours, theirs = pair(name, **data.draw(configurations(name)))
    feed(data.draw(batch_lists()), ours, theirs)
    assume((ours.min_val <= ours.max_val).all())  # torch.ao refuses bounds that crossed, see below
    assert_same(ours, theirs)
    assert ours.nonfinite_batches == 0


@pytest.mark.parametrize("name", PER_CHANNEL)
@given(data=st.data())
def test_per_channel_equals_torch_ao(
    name: str, data: st.DataObject, pair: Callable, feed: Callable, assert_same: Callable
) -> None:
    batches = data.draw(batch_lists(min_dim=2))  # torch.ao cannot take vectors
    axis = data.draw(st.integers(0, batches[0].dim() - 1))
    ours, theirs = pair(name, ch_axis=axis, **data.draw(configurations(name)))
    feed(batches, ours, theirs)
    assume((ours.min_val <= ours.max_val).all())
    assert_same(ours, theirs)
    assert ours.nonfinite_batches == 0


@pytest.mark.parametrize("axis", [-1, -3])
def test_channels_counted_from_the_end(axis: int) -> None:
    x = torch.randn(2, 3, 4)
    counted, direct = PerChannelMinMaxObserver(ch_axis=axis), PerChannelMinMaxObserver(ch_axis=axis + 3)
    counted(x)
    direct(x)
    assert counted.min_val.shape == (x.shape[axis],)
    assert torch.equal(counted.min_val, direct.min_val)


@pytest.mark.parametrize("name", [*PER_TENSOR, *PER_CHANNEL])
def test_four_bits(name: str, ao: Any, feed: Callable, assert_same: Callable) -> None:
    old = getattr(torch, "quint4x2", None)
    if old is None:
        pytest.skip("torch has dropped quint4x2")
    ours, theirs = CLASSES[name](dtype=torch.uint4), getattr(ao.quantization, name)(dtype=old)
    assert (ours.quant_min, ours.quant_max) == (theirs.quant_min, theirs.quant_max) == (0, 15)
    feed([torch.randn(3, 4), torch.randn(3, 4) * 5], ours, theirs)
    assert_same(ours, theirs)


def test_signed_four_bits_are_a_part_of_int8(pair: Callable, feed: Callable) -> None:
    _, theirs = pair("MinMaxObserver", dtype=torch.int8, quant_min=-8, quant_max=7)
    ours = MinMaxObserver(dtype=torch.int4)
    feed([torch.randn(20)], ours, theirs)
    assert torch.equal(ours.calculate_qparams()[0], theirs.calculate_qparams()[0])
    assert torch.equal(ours.calculate_qparams()[1], theirs.calculate_qparams()[1].long())


@pytest.mark.parametrize(
    ("kwargs", "zero_point"),
    [
        ({"dtype": torch.int8}, 0),
        ({"dtype": torch.uint8}, 128),
        ({"dtype": torch.uint8, "quant_min": 0, "quant_max": 127}, 63),
        ({"dtype": torch.uint4}, 8),
        ({"dtype": torch.uint16}, 2**15),
    ],
)
def test_symmetric_zero_point(kwargs: dict[str, Any], zero_point: int) -> None:
    observer = MinMaxObserver(qscheme=torch.per_tensor_symmetric, **kwargs)
    observer(torch.tensor([-1.0, 3.0]))
    assert observer.calculate_qparams()[1].tolist() == [zero_point]


def test_int32_affine() -> None:
    # 2**32 steps: torch.ao's int32 arithmetic overflows on the way to the zero point
    observer = MinMaxObserver(dtype=torch.int32, eps=1e-30)
    observer(torch.tensor([-1.0, 0.0]))
    scale, zero_point = observer.calculate_qparams()
    torch.testing.assert_close(scale, torch.tensor([2.0**-32]))
    assert zero_point.tolist() == [2**31 - 1]


@pytest.mark.parametrize("old", ["quint8", "qint8"])
def test_old_dtypes(old: str, pair: Callable, feed: Callable, assert_same: Callable) -> None:
    dtype = getattr(torch, old, None)
    if dtype is None:
        pytest.skip(f"torch has dropped {old}")
    ours, theirs = pair("MinMaxObserver", dtype=dtype, reduce_range=True)
    assert ours.dtype is {"quint8": torch.uint8, "qint8": torch.int8}[old]
    feed([torch.randn(9)], ours, theirs)
    assert_same(ours, theirs)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types(
    name: str, dtype: torch.dtype, pair: Callable, feed: Callable, assert_same: Callable
) -> None:
    ours, theirs = pair(name)
    feed([torch.randn(3, 5).to(dtype), torch.randn(3, 5).to(dtype)], ours, theirs)
    assert_same(ours, theirs)


@pytest.mark.parametrize("name", ALL)
def test_on_a_device(name: str, device: torch.device, pair: Callable, assert_same: Callable) -> None:
    _, theirs = pair(name)
    ours = CLASSES[name](factory_kwargs={"device": device})
    for batch in torch.randn(3, 4, 5).unbind():
        theirs(batch)
        ours(batch.to(device))
    assert {buffer.device.type for buffer in ours.buffers()} == {device.type}
    assert {value.device.type for value in ours.calculate_qparams()} == {device.type}
    assert_same(ours.cpu(), theirs)


@pytest.mark.parametrize("name", ALL)
def test_nothing_is_read_from_the_device(name: str) -> None:
    # tensors of the meta device have no values: reading one raises
    observer = CLASSES[name](factory_kwargs={"device": "meta"})
    for _ in range(2):
        observer(torch.empty(3, 4, device="meta"))
    scale, zero_point = observer.qparams()
    assert scale.shape == zero_point.shape == ((3,) if "PerChannel" in name else (1,))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
def test_empty_batches_count_for_nothing(name: str, shape: tuple[int, ...]) -> None:
    observer = CLASSES[name]()
    observer(torch.empty(shape))
    assert not observer.observed
    observer(torch.tensor([[-1.0], [1.0], [2.0]]))
    before = {key: value.clone() for key, value in observer.state_dict().items()}
    observer(torch.empty(shape))
    assert all(torch.equal(value, before[key]) for key, value in observer.state_dict().items())


@pytest.mark.parametrize("name", ["MovingAverageMinMaxObserver", "MovingAveragePerChannelMinMaxObserver"])
def test_averages_that_cross_by_a_rounding(name: str) -> None:
    observer = CLASSES[name](averaging_constant=1.0)
    observer(torch.tensor([[1.541, -0.2934]]))
    observer(torch.tensor([[-0.1, -0.1]]))
    assert observer.min_val > observer.max_val
    scale, zero_point = observer.calculate_qparams()
    torch.testing.assert_close(scale, torch.tensor([0.1 / 255]))
    assert zero_point.tolist() == [255]


def test_gradients_pass_and_are_not_kept() -> None:
    observer = MinMaxObserver()
    x = torch.randn(4, requires_grad=True)
    observer(x).sum().backward()
    assert torch.equal(x.grad, torch.ones(4))
    assert not observer.min_val.requires_grad


# --- NaN and infinity ---------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", PER_TENSOR)
@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_poisoned_batch_is_skipped_and_counted(name: str, poison: float, position: int) -> None:
    batches = [torch.randn(2, 3) for _ in range(2)]
    clean, poisoned = CLASSES[name](), CLASSES[name]()
    for batch in batches:
        clean(batch)
    bad = torch.randn(2, 3)
    bad[1, 1] = poison
    for batch in [*batches[:position], bad, *batches[position:]]:
        poisoned(batch)
    assert poisoned.nonfinite_batches == 1
    assert torch.equal(poisoned.min_val, clean.min_val)
    assert torch.equal(poisoned.max_val, clean.max_val)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", PER_CHANNEL)
def test_a_poisoned_channel_is_skipped_and_the_others_go_on(name: str, poison: float) -> None:
    batches = [torch.randn(3, 4) for _ in range(3)]
    clean, poisoned = CLASSES[name](), CLASSES[name]()
    for number, batch in enumerate(batches):
        bad = batch.clone()
        if number != 1:
            bad[1, 2] = poison
        poisoned(bad)
        clean(batch)
    assert poisoned.nonfinite_batches == 2
    alone = CLASSES[name]()
    alone(batches[1])
    for buffer in ("min_val", "max_val"):
        expected = getattr(clean, buffer).clone()
        expected[1] = getattr(alone, buffer)[1]
        assert torch.equal(getattr(poisoned, buffer), expected)


def test_a_channel_never_seen_clean_keeps_scale_one() -> None:
    observer = PerChannelMinMaxObserver()
    observer(torch.tensor([[-1.0, 1.55], [torch.nan, 1.0]]))
    assert not observer.observed
    with pytest.warns(UserWarning, match="PerChannelMinMaxObserver has seen no data"):
        scale, zero_point = observer.calculate_qparams()
    torch.testing.assert_close(scale, torch.tensor([0.01, 1.0]))
    assert zero_point.tolist() == [100, 0]


@pytest.mark.parametrize("name", ALL)
def test_a_range_too_wide_for_float32_is_skipped(name: str) -> None:
    observer = CLASSES[name]()
    observer(torch.tensor([[-3e38, 3e38]]))
    assert observer.nonfinite_batches == 1
    assert not observer.observed


# --- before and after ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_before_data(name: str) -> None:
    observer = CLASSES[name]()
    assert not observer.observed
    with pytest.warns(UserWarning, match=rf"{name} has seen no data: scale 1 and zero point 0"):
        scale, zero_point = observer.calculate_qparams()
    assert (scale.tolist(), zero_point.tolist()) == ([1.0], [0])
    assert (scale.dtype, zero_point.dtype) == (torch.float32, torch.int64)


@pytest.mark.parametrize("name", ALL)
def test_reset(name: str) -> None:
    used, fresh = CLASSES[name](), CLASSES[name]()
    used(torch.randn(3, 4) * 100)
    used.reset_min_max_vals()
    assert not used.observed
    # another number of channels may follow
    x = torch.randn(5, 2)
    used(x)
    fresh(x)
    assert torch.equal(used.min_val, fresh.min_val)
    assert torch.equal(used.max_val, fresh.max_val)


@pytest.mark.parametrize("name", PER_CHANNEL)
def test_another_number_of_channels_is_refused(name: str) -> None:
    observer = CLASSES[name]()
    observer(torch.randn(3, 4))
    before = observer.min_val.clone()
    with pytest.raises(InvalidInputError, match=r"got 5 channels, but 3 were observed before.*ch_axis"):
        observer(torch.randn(5, 4))
    assert torch.equal(observer.min_val, before)


def test_per_channel_takes_vectors() -> None:
    observer = PerChannelMinMaxObserver()
    observer(torch.tensor([-1.0, 3.0]))
    assert observer.min_val.tolist() == observer.max_val.tolist() == [-1.0, 3.0]


@pytest.mark.parametrize("name", ["MinMaxObserver", "PerChannelMinMaxObserver"])
def test_repr_shows_the_range(name: str) -> None:
    observer = CLASSES[name]()
    observer(torch.tensor([[-1.25], [2.5], [0.0]]))
    assert "-1.25" in repr(observer)
    assert "2.5" in repr(observer)
