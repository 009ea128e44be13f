"""The histogram observer: torch.ao's numbers where its arithmetic holds, the right ones beyond."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from eagerq.functional import fake_quantize
from eagerq.observer import HistogramObserver, MinMaxObserver

NAME = "HistogramObserver"


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "relu": torch.relu,
    "uniform": lambda x: x.erf() / 2 + 0.3,
    "one-sided": lambda x: x.abs().log1p() + 1,
    "long tail": lambda x: x**5,
    "outlier": lambda x: torch.cat([x, x[:1] * 30]),
    "constant": lambda x: x[:1].expand(len(x)),
    "integers": lambda x: (3 * x).round(),
}


@st.composite
def batch_lists(draw: st.DrawFn) -> list[Tensor]:
    """One to four batches within a decade or so, mostly of growing range."""
    scale = 10 ** draw(st.floats(-3, 6))
    batches = []
    for _ in range(draw(st.integers(1, 4))):
        x = normal(draw(st.sampled_from([1, 2, 30, 3000])), seed=draw(st.integers(0, 2**31)))
        kind = draw(st.sampled_from(list(KINDS)))
        batches.append(KINDS[kind](x) * scale)
        scale *= draw(st.sampled_from([0.5, 1, 1, 3]))
    return batches


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    dtype = draw(st.sampled_from([torch.uint8, torch.int8, torch.int16]))
    symmetric = draw(st.booleans())
    kwargs: dict[str, Any] = {
        "dtype": dtype,
        "qscheme": torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine,
        "bins": draw(st.sampled_from([2048, 2048, 4096, 999, 100, 17, 2, 1])),
        "reduce_range": draw(st.booleans()) and not (symmetric and dtype is torch.uint8),
        "eps": draw(st.sampled_from([torch.finfo(torch.float32).eps, 1e-30])),
    }
    if draw(st.booleans()):
        ranges = [(0, 15), (0, 127)] if dtype is torch.uint8 else [(-8, 7), (-127, 127)]
        kwargs["quant_min"], kwargs["quant_max"] = draw(st.sampled_from(ranges))
    return kwargs


@given(kwargs=configurations(), batches=batch_lists())
def test_equals_torch_ao(
    kwargs: dict[str, Any], batches: list[Tensor], pair: Callable, feed: Callable, assert_same: Callable
) -> None:
    ours, theirs = pair(NAME, **kwargs)
    feed(batches, ours, theirs)
    assert_same(ours, theirs)
    assert ours.nonfinite_batches == 0


@pytest.mark.parametrize("kind", list(KINDS))
def test_equals_torch_ao_on_large_batches(kind: str, pair: Callable, feed: Callable, assert_same: Callable) -> None:
    ours, theirs = pair(NAME)
    feed([KINDS[kind](normal(50_000, seed=seed)) * (seed + 1) for seed in range(3)], ours, theirs)
    assert_same(ours, theirs)


@pytest.mark.parametrize(
    "batches",
    [
        [[3.0]],
        [[0.0]],
        [[0.0], [0.0]],
        [[1.0], [1.0, 1.0]],
        [[1.0], [2.0]],
        [[1.0], [-2.0, 5.0]],
        [[1.0, 2.0], [1.5]],
        [[-1.0, 1.0], [-1.0, 1.0]],
        [[0.1], [0.1], [1e20], [-1e20]],
        [[1e-30, 2e-30], [-3.0, 4.0]],
        [[5.0], [1e-42, 3e-42], [0.0]],
        [[1e-44, 7e-43], [-1e-42, 1e-41]],
        [[1e-4] * 5 + [1.0], [1e11]],
    ],
    ids=str,
)
def test_few_values_and_odd_ranges(
    batches: list[list[float]], pair: Callable, feed: Callable, assert_same: Callable
) -> None:
    ours, theirs = pair(NAME, bins=64)
    feed([torch.tensor(batch) for batch in batches], ours, theirs)
    assert torch.equal(ours.min_val, theirs.min_val)
    assert torch.equal(ours.max_val, theirs.max_val)
    if (ours.max_val - ours.min_val) < 1e12:  # beyond, see below
        ours_qparams, theirs_qparams = ours.calculate_qparams(), theirs.calculate_qparams()
        assert torch.equal(ours_qparams[0], theirs_qparams[0])
        assert torch.equal(ours_qparams[1], theirs_qparams[1].long())
    if (ours.max_val - ours.min_val) > 1e-38 or ours.max_val == ours.min_val:
        assert_same_histograms(ours, theirs)


def assert_same_histograms(ours: Any, theirs: Any) -> None:
    assert torch.equal(ours.histogram, theirs.histogram)


@pytest.mark.parametrize("bits", [-100, -45, 45, 60, 100, 120])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16])
def test_the_unit_of_measurement_does_not_matter(bits: int, dtype: torch.dtype) -> None:
    # torch.ao's cubes over- or underflow from 1e13 and down from 1e-13, and it collapses the range
    unit = 2.0**bits
    plain, scaled = (HistogramObserver(dtype=dtype, eps=0.0) for _ in range(2))
    for seed in range(3):
        x = normal(5000, seed=seed) * (1 + seed)
        plain(x)
        scaled(x * unit)
    assert torch.equal(scaled.histogram, plain.histogram)
    scale, zero_point = scaled.calculate_qparams()
    assert torch.equal(scale, plain.calculate_qparams()[0] * unit)
    assert torch.equal(zero_point, plain.calculate_qparams()[1])


@pytest.mark.parametrize("unit", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("kind", ["normal", "relu", "one-sided"])
def test_narrowing_lowers_the_squared_error(kind: str, unit: float) -> None:
    # four bits, where it pays to give up the tails
    x = KINDS[kind](normal(20_000))
    errors = []
    for cls in (HistogramObserver, MinMaxObserver):
        observer = cls(dtype=torch.uint4, eps=0.0)
        observer(x * unit)
        scale, zero_point = observer.calculate_qparams()
        y = fake_quantize(x, scale / unit, zero_point, 0, 15)
        errors.append((y - x).square().mean().item())
    assert errors[0] < 0.9 * errors[1]


def test_four_bits_are_searched_as_four_bits() -> None:
    assert HistogramObserver(dtype=torch.uint4).dst_nbins == 16
    assert HistogramObserver(dtype=torch.int8, quant_min=-8, quant_max=7).dst_nbins == 256  # as torch.ao


# --- what comes in --------------------------------------------------------------------------------


@pytest.mark.parametrize("position", [0, 1])
def test_infinities_are_dropped_and_counted(position: int, pair: Callable, assert_same: Callable) -> None:
    ours, theirs = pair(NAME)
    for number in range(2):
        x = normal(100, seed=number)
        theirs(x)
        if number == position:
            x = torch.cat([x[:50], torch.tensor([torch.inf, -torch.inf]), x[50:]])
        ours(x)
    assert_same(ours, theirs)
    assert ours.nonfinite_batches == 1


@pytest.mark.parametrize(
    "bad",
    [
        [torch.nan, 1.0],
        [torch.nan, torch.inf, 500.0],
        [torch.inf, -torch.inf],
        [-3e38, 3e38],
        [-3e38, 3e38, torch.inf],
    ],
    ids=str,
)
@pytest.mark.parametrize("position", [0, 1, 2])
def test_hopeless_batches_are_skipped_and_counted(bad: list[float], position: int) -> None:
    batches = [normal(50, seed=seed) for seed in range(2)]
    clean, poisoned = HistogramObserver(), HistogramObserver()
    for batch in batches:
        clean(batch)
    batches.insert(position, torch.tensor(bad))
    for batch in batches:
        assert poisoned(batch) is batch
    assert poisoned.nonfinite_batches == 1
    for name, value in clean.state_dict().items():
        assert torch.equal(poisoned.state_dict()[name], value), name


def test_a_batch_that_would_make_the_range_too_wide_is_skipped() -> None:
    observer = HistogramObserver()
    observer(torch.tensor([0.0, 1.5e38]))
    observer(torch.tensor([-1.5e38, 0.0]))
    assert observer.nonfinite_batches == 1
    assert observer.min_val == 0.0
    assert observer.calculate_qparams()[0].isfinite()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int32])
def test_other_types_count_as_float32(dtype: torch.dtype) -> None:
    x = (normal(2000) * 50).to(dtype)
    typed, plain = HistogramObserver(), HistogramObserver()
    assert typed(x) is x
    plain(x.float())
    assert torch.equal(typed.histogram, plain.histogram)
    assert typed.histogram.sum() == 2000


def test_empty_batches_count_for_nothing() -> None:
    observer = HistogramObserver()
    observer(torch.empty(0, 3))
    assert not observer.observed
    with pytest.warns(UserWarning, match="HistogramObserver has seen no data"):
        scale, zero_point = observer.calculate_qparams()
    assert (scale.tolist(), zero_point.tolist()) == ([1.0], [0])


def test_more_values_than_float32_can_count() -> None:
    # torch.histc counts in float32 and stops at 2**24 a thread
    x = torch.zeros(1).expand(2**25 + 2**20)
    observer = HistogramObserver(bins=3)
    observer(x)
    assert observer.histogram.tolist() == [0.0, 2**25 + 2**20, 0.0]


def test_gradients_pass_and_are_not_kept() -> None:
    observer = HistogramObserver()
    x = torch.randn(40, requires_grad=True)
    observer(x).sum().backward()
    observer(3 * x)
    assert torch.equal(x.grad, torch.ones(40))
    assert not any(buffer.requires_grad for buffer in observer.buffers())


def test_on_a_device(device: torch.device) -> None:
    observer = HistogramObserver(factory_kwargs={"device": device})
    elsewhere = HistogramObserver()
    for seed in range(3):
        # multiples of 1/8 fall into the same bins, however a device rounds
        x = (normal(4000, seed=seed) * 20 * (seed + 1)).round().clamp(-64 * (seed + 1), 64 * (seed + 1)) / 8
        observer(x.to(device))
        elsewhere(x)
    assert {buffer.device.type for buffer in observer.buffers()} == {device.type}
    qparams = observer.calculate_qparams()
    assert {value.device.type for value in qparams} == {device.type}
    expected = elsewhere.calculate_qparams()
    torch.testing.assert_close(qparams[0].cpu(), expected[0], rtol=1e-2, atol=0)
    assert observer.histogram.sum().item() == pytest.approx(12_000)


# --- state ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("metadata", [{"version": 1}, {"version": 2}, {}])
def test_old_state_dicts_before_data(metadata: dict[str, int]) -> None:
    source = HistogramObserver(bins=8)
    state = source.state_dict()
    state._metadata[""] = metadata
    state["min_val"] = state["max_val"] = torch.tensor([])
    if metadata != {"version": 2}:
        del state["eps"]
    observer = HistogramObserver(bins=8)
    observer(torch.tensor([1.0, 2.0]))
    observer.load_state_dict(state, strict=True)
    assert (observer.min_val, observer.max_val) == (torch.inf, -torch.inf)
    assert observer.min_val.shape == ()
    assert not observer.observed


def test_another_number_of_bins_is_refused() -> None:
    with pytest.raises(RuntimeError, match="size mismatch for histogram"):
        HistogramObserver(bins=8).load_state_dict(HistogramObserver(bins=9).state_dict())


def test_reset() -> None:
    used, fresh = HistogramObserver(), HistogramObserver()
    used(normal(100) * 100)
    used.reset_min_max_vals()
    assert not used.observed
    for observer in (used, fresh):
        observer(normal(100, seed=1))
    for name, value in fresh.state_dict().items():
        assert torch.equal(used.state_dict()[name], value), name


def test_asking_changes_nothing() -> None:
    observer = HistogramObserver()
    observer(normal(1000))
    before = {name: value.clone() for name, value in observer.state_dict().items()}
    first, second = observer.calculate_qparams(), observer.calculate_qparams()
    assert all(torch.equal(*values) for values in zip(first, second, strict=True))
    assert all(torch.equal(value, before[name]) for name, value in observer.state_dict().items())


def test_the_default_dtype_does_not_matter() -> None:
    expected = HistogramObserver()
    observer = HistogramObserver(factory_kwargs={"dtype": torch.float32})
    batches = [normal(1000), normal(1000, seed=1) * 5]
    for batch in batches:
        expected(batch)
    scale, zero_point = expected.calculate_qparams()
    torch.set_default_dtype(torch.float64)
    try:
        for batch in batches:
            observer(batch)
        found = observer.calculate_qparams()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(observer.histogram, expected.histogram)
    assert torch.equal(found[0], scale)
    assert torch.equal(found[1], zero_point)
