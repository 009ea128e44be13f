"""Weights rounded into channels_last, and gradients back from there: the numbers of the order that they have."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from eagerq import native
from eagerq.native import Rounding, Running

pytestmark = pytest.mark.skipif(not native.available, reason="this is the C library's work")

LAST = torch.channels_last


@given(
    st.integers(1, 5),
    st.sampled_from([1, 2, 3, 15, 16, 17, 32, 48, 160]),
    st.sampled_from([(3, 3), (1, 3), (3, 5), (1, 1), (7, 7)]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1e-3, 0.02, 3.0]),
    st.integers(0, 2**16),
)
@example(3, 17, (3, 3), True, False, True, 0.02, 5)
@example(40, 32, (3, 3), True, True, True, 0.02, 5)
def test_the_order_changes_no_bit(
    rows: int,
    channels: int,
    taps: tuple[int, int],
    scaled: bool,
    observing: bool,
    masked: bool,
    level: float,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, channels, *taps, generator=generator) * level
    factor = torch.rand(rows, generator=generator) - 0.5 if scaled else None
    results = []
    for last in (True, False):
        scale, zero_point = torch.full((rows,), 0.01), torch.arange(rows, dtype=torch.int32) * 20
        ranges = torch.full((rows,), -level), torch.full((rows,), level)
        to = Rounding(scale, zero_point, -128, 127, True, Running(*ranges, 0.3, False) if observing else None)
        result = native.fake_quantize(weight, to, factor, masked, last)
        assert result is not None
        results.append((*result, scale, zero_point, *ranges))
    assert results[0][0].is_contiguous(memory_format=LAST)
    for one, other in zip(*results, strict=True):
        assert one is other is None or torch.equal(one, other)
    if masked:
        inside, grad = results[0][1], torch.randn(weight.shape, generator=generator)
        found = native.masked_rows_(grad.clone(memory_format=LAST), inside, weight, factor)
        wanted = native.masked_rows(grad, inside, weight, factor, rows)
        for one, other in zip(found, wanted, strict=True):
            assert one is other is None or torch.equal(one, other)
        assert found[0].is_contiguous()


@pytest.mark.parametrize("strange", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite(strange: float) -> None:
    weight = torch.randn(3, 32, 3, 3)
    weight[1, 17, 2, 0] = strange
    scale, zero_point = torch.full((3,), 0.01), torch.zeros(3, dtype=torch.int32)
    to = Rounding(scale, zero_point, -128, 127, True)
    rounded, wanted = (native.fake_quantize(weight, to, None, True, last) for last in (True, False))
    assert rounded is not None
    assert wanted is not None
    torch.testing.assert_close(rounded[0], wanted[0], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(rounded[1], wanted[1])  # type: ignore[arg-type]
    running = Running(torch.full((3,), -1.0), torch.full((3,), 1.0), 0.3, True)
    assert native.fake_quantize(weight, to._replace(running=running), None, True, True) is None
    assert torch.equal(running.low, torch.full((3,), -1.0))
