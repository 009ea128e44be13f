"""The operators of compiled training: what the plain formulas give, and what torch asks of operators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from eagerq import native
from eagerq.functional import fake_quantize, training_qparams
from eagerq.observer import MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver

averaged_qparams = torch.ops.eagerq.averaged_qparams.default
SYMMETRIC, AFFINE = (-128, 127, True), (0, 255, False)


def observed(x: Tensor, axis: int | None, numbers: tuple[int, int, bool]) -> tuple[Any, tuple[Tensor, ...]]:
    """An observer that has seen ``x``, and the parameters that follow."""
    dtype = torch.int8 if numbers[2] else torch.uint8
    if axis is None:
        observer: Any = MovingAverageMinMaxObserver(dtype=dtype)
    else:
        scheme = torch.per_channel_symmetric if numbers[2] else torch.per_channel_affine
        observer = MovingAveragePerChannelMinMaxObserver(ch_axis=axis, dtype=dtype, qscheme=scheme)
    observer(x)
    return observer, training_qparams(observer.min_val, observer.max_val, *numbers)


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.sampled_from([None, 0, -1]),
    st.sampled_from([SYMMETRIC, AFFINE]),
    st.sampled_from([1.0, -3.0, 0.0, 1e-9, 1e6]),
    st.sampled_from([None, torch.nan, torch.inf]),
    st.integers(0, 2**16),
)
def test_updates_as_the_observer_does(
    shape: list[int],
    axis: int | None,
    numbers: tuple[int, int, bool],
    factor: float,
    broken: float | None,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.rand(shape, generator=generator) - share for share in (0.3, 0.6))
    second = second * factor
    if broken is not None:
        second.view(-1)[0] = broken
    observer, (scale, zero_point) = observed(first, axis, numbers)
    buffers = [value.clone() for value in (observer.min_val, observer.max_val)]
    buffers += [scale, zero_point.int(), observer.nonfinite_batches.clone()]
    returned: Any = averaged_qparams(second, *buffers, observer.averaging_constant, *numbers, axis)
    observer(second)
    expected = training_qparams(observer.min_val, observer.max_val, *numbers)
    for value, wanted in zip(buffers[:2], (observer.min_val, observer.max_val), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-6, atol=0)
    for value, copied, wanted in zip(buffers[2:4], returned, expected, strict=True):
        assert torch.equal(value, copied)
        assert value.data_ptr() != copied.data_ptr()
        torch.testing.assert_close(value, wanted.to(value), rtol=1e-6, atol=0)
    assert torch.equal(buffers[4], observer.nonfinite_batches)


def test_leaves_an_empty_batch_out() -> None:
    observer, (scale, zero_point) = observed(torch.rand(3, 4), None, AFFINE)
    buffers = [observer.min_val, observer.max_val, scale, zero_point.int(), observer.nonfinite_batches]
    before = [value.clone() for value in buffers]
    averaged_qparams(torch.empty(0, 4), *buffers, 0.01, *AFFINE, None)
    assert all(map(torch.equal, buffers, before))


@pytest.mark.parametrize("axis", [None, 0])
def test_is_a_sound_operator(axis: int | None) -> None:
    numbers = AFFINE if axis is None else SYMMETRIC
    observer, (scale, zero_point) = observed(torch.rand(3, 4) - 0.4, axis, numbers)
    buffers = observer.min_val, observer.max_val, scale, zero_point.int(), observer.nonfinite_batches
    arguments = torch.randn(3, 4), *buffers, observer.averaging_constant, *numbers, axis
    for operator in (torch.ops.eagerq.averaged_qparams, torch.ops.eagerq.averaged_qparams_of_channels):
        torch.library.opcheck(operator.default, arguments)


def test_takes_any_layout() -> None:
    x, start = torch.randn(3, 4, 5, 6), torch.rand(3, 4)
    for each in (x, x.contiguous(memory_format=torch.channels_last), x.expand(2, 3, 4, 5, 6), x[:, ::2], x[0, 0, 0, 0]):
        observer, (scale, zero_point) = observed(start, None, AFFINE)
        buffers = observer.min_val, observer.max_val, scale, zero_point.int(), observer.nonfinite_batches
        averaged_qparams(each, *buffers, 0.5, *AFFINE, None)
        plain, _ = observed(start, None, AFFINE)
        plain.averaging_constant = 0.5
        plain(each)
        torch.testing.assert_close(observer.min_val, plain.min_val, rtol=1e-6, atol=0)
        torch.testing.assert_close(observer.max_val, plain.max_val, rtol=1e-6, atol=0)


needs_c = pytest.mark.skipif(not native.available, reason="these operators are the C library's")


@needs_c
@given(st.lists(st.integers(1, 9), min_size=2, max_size=4), st.booleans(), st.booleans(), st.integers(0, 2**16))
def test_rounds_as_the_formulas_do(shape: list[int], rows: bool, scaled: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape[0] += 1  # of one row the operator is the other one
    count = shape[0] if rows else 1
    x = (torch.randn(shape, generator=generator) * 3).requires_grad_()
    numbers = SYMMETRIC if rows else AFFINE
    scale = torch.rand(count, generator=generator) / 64 + 1e-3
    zero_point = torch.randint(numbers[0], numbers[1], (count,), generator=generator, dtype=torch.int32)
    factor = torch.rand(count, generator=generator) - 0.5 if rows and scaled else None
    given_x = x if factor is None else x * factor.reshape(-1, *[1] * (len(shape) - 1))
    wanted = fake_quantize(given_x, scale, zero_point, *numbers[:2], 0 if rows else None)
    operators = torch.ops.eagerq
    operator = operators.rounded_rows if rows else operators.rounded
    rounded, inside = operator(x.detach(), factor, scale, zero_point, *numbers[:2])
    assert torch.equal(rounded, wanted)
    grad = torch.randn(shape, generator=generator)
    (expected,) = torch.autograd.grad(wanted, x, grad)
    of_x = operators.masked_rows(grad, inside, x.detach(), factor)[0] if rows else grad * inside
    torch.testing.assert_close(of_x, expected, rtol=1e-6, atol=0)


@needs_c
@pytest.mark.parametrize("rows", [False, True])
def test_observes_and_rounds_at_once(rows: bool) -> None:
    numbers = SYMMETRIC if rows else AFFINE
    axis = 0 if rows else None
    for second in (torch.randn(3, 4, 5, 6) * 9, torch.full((3, 4, 5, 6), torch.nan)):
        observer, (scale, zero_point) = observed(torch.rand(3, 4) - 0.4, axis, numbers)
        zero_point = zero_point.int()
        buffers = observer.min_val.clone(), observer.max_val.clone(), observer.nonfinite_batches.clone()
        operator = torch.ops.eagerq.observed_rows if rows else torch.ops.eagerq.observed
        arguments = second, None, scale, zero_point, *numbers[:2], *buffers, observer.averaging_constant, numbers[2]
        rounded, _ = operator(*arguments)
        observer(second)
        wanted, wanted_zero = training_qparams(observer.min_val, observer.max_val, *numbers)
        torch.testing.assert_close(scale, wanted, rtol=1e-6, atol=0)
        assert torch.equal(zero_point, wanted_zero.int())
        assert torch.equal(buffers[2], observer.nonfinite_batches)
        formula = fake_quantize(second, scale, zero_point, *numbers[:2], axis)
        torch.testing.assert_close(rounded, formula, rtol=0, atol=0, equal_nan=True)
        if second.isfinite().all():  # it compares results, and NaN is not itself
            torch.library.opcheck(operator.default, arguments)
