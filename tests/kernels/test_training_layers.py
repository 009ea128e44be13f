"""The operators that a layer is in compiled training: what the plain formulas give, in any layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from eagerq import native
from eagerq.functional import fake_quantize
from eagerq.observer import MovingAveragePerChannelMinMaxObserver

pytestmark = pytest.mark.skipif(not native.available, reason="these operators are the C library's")

operators = torch.ops.eagerq
LAST = torch.channels_last
NUMBERS = -128, 127


def close(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape
    assert (found - wanted).norm() <= 1e-5 * wanted.norm() + 1e-9


def layer(generator: torch.Generator, size: int, taps: int, groups: int) -> tuple[Tensor, ...]:
    """Images, weight, factor (one is zero), bias, scale and zero point."""
    inputs, outputs = 2 * groups, 3 * groups
    x = torch.randn(2, inputs, size + taps, size + 1, generator=generator)
    weight = torch.randn(outputs, inputs // groups, taps, taps, generator=generator)
    factor = torch.rand(outputs, generator=generator) - 0.5
    factor[1] = 0
    scale = torch.rand(outputs, generator=generator) / 128 + 1e-3
    bias = torch.randn(outputs, generator=generator)
    return x, weight, factor, bias, scale, torch.zeros(outputs, dtype=torch.int32)


def plain(values: tuple[Any, ...], geometry: tuple[Any, ...], relu: bool) -> Tensor:
    x, weight, factor, bias, scale, zero_point = values
    if factor is None:
        factor = torch.ones(len(weight))
    used = torch.where(factor == 0, 1.0, factor).reshape(-1, 1, 1, 1)
    rounded = fake_quantize(weight * used, scale, zero_point, *NUMBERS, 0)
    y = F.conv2d(x, rounded * (factor.reshape(-1, 1, 1, 1) / used), bias, *geometry)
    return y.relu() if relu else y


@given(
    st.integers(3, 7),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([1, 3]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([((1, 1), (0, 0), (1, 1)), ((2, 1), (1, 1), (1, 2))]),
    st.sampled_from([(False, False), (True, False), (False, True), (True, True)]),
    st.integers(0, 2**16),
)
def test_convolves_as_the_formulas_do(
    size: int,
    taps: int,
    groups: int,
    scaled: bool,
    biased: bool,
    relu: bool,
    window: Any,
    last: tuple[bool, bool],
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, weight, factor, bias, scale, zero_point = layer(generator, size, taps, groups)
    x, weight = (one.contiguous(memory_format=LAST) if so else one for one, so in zip((x, weight), last, strict=True))
    inputs: list[Any] = [x, weight, factor if scaled else None, bias if biased else None]
    inputs = [None if one is None else one.requires_grad_() for one in inputs]
    wanted = plain((*inputs, scale, zero_point), (*window, groups), relu)
    settings = *NUMBERS, *window, groups, relu
    plain_inputs = [None if one is None else one.detach() for one in inputs]
    y, above, *copies = operators.convolved(*plain_inputs, scale, zero_point, *settings)
    close(y, wanted.detach())
    assert y.is_contiguous(memory_format=LAST if last[0] else torch.contiguous_format)
    assert torch.equal(copies[0], scale)
    grad = torch.randn(y.shape, generator=generator)
    present = [one for one in inputs if one is not None]
    expected = iter(torch.autograd.grad(wanted, present, grad))
    saved = above, *plain_inputs[:3], scale, zero_point
    found = operators.convolved_backward(grad, *saved, *settings, [True, True, biased])
    for one, given_one in zip(found, inputs, strict=True):
        if given_one is None:
            assert not one.numel()
        else:
            close(one, next(expected))


def test_observes_rounds_and_convolves_at_once() -> None:
    x, weight, factor, _, scale, zero_point = layer(torch.Generator().manual_seed(3), 5, 3, 1)
    factor[1] = -0.3
    for seen in (weight * 9, torch.full_like(weight, torch.nan)):
        observer = MovingAveragePerChannelMinMaxObserver(ch_axis=0, qscheme=torch.per_channel_symmetric)
        observer(weight)
        buffers = observer.min_val.clone(), observer.max_val.clone(), observer.nonfinite_batches.clone()
        numbers = *NUMBERS, [1, 1], [1, 1], [1, 1], 1, False
        settings = (*numbers, *buffers, observer.averaging_constant, True)
        arguments = x, seen, factor, None, scale.clone(), zero_point.clone(), *settings
        y, _, scale_then, zero_then = operators.observed_convolved(*arguments)
        observer(seen * factor.reshape(-1, 1, 1, 1))
        torch.testing.assert_close(buffers[0], observer.min_val, rtol=1e-6, atol=0)
        assert torch.equal(buffers[2], observer.nonfinite_batches)
        assert torch.equal(scale_then, arguments[4])
        assert scale_then.data_ptr() != arguments[4].data_ptr()
        wanted = plain((x, seen, factor, None, scale_then, zero_then), ([1, 1], [1, 1], [1, 1], 1), False)
        torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5, equal_nan=True)
        if seen.isfinite().all():
            torch.library.opcheck(operators.observed_convolved.default, arguments)


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 6, 4, 3), (1, 4, 2, 3, 2)])
def test_layers_are_sound_operators(shape: tuple[int, ...]) -> None:
    window = len(shape) - 2
    x, weight = torch.randn(shape), torch.randn(4, shape[1], *[2] * window)
    scale, zero_point = torch.rand(4) / 64 + 1e-3, torch.zeros(4, dtype=torch.int32)
    settings = *NUMBERS, [1] * window, [1] * window, [1] * window, 1, True
    values = x, weight, torch.rand(4), torch.randn(4), scale, zero_point, *settings
    torch.library.opcheck(operators.convolved.default, values)
    y, above, *_ = operators.convolved(*values)
    saved = y, above, *values[:3], scale, zero_point, *settings
    torch.library.opcheck(operators.convolved_backward.default, (*saved, [True, True, True]))
    torch.library.opcheck(operators.convolved_backward.default, (*saved, [False, True, False]))
    vectors = [torch.rand(4) + 0.5 for _ in range(5)]
    for relu in (False, True):
        arguments = y, *vectors, 1e-5, 0.1, relu
        torch.library.opcheck(operators.batch_norm_of_scaled.default, arguments)
        _, *batch = operators.batch_norm_of_scaled(*arguments)
        torch.library.opcheck(
            operators.batch_norm_of_scaled_backward.default, (y, y, vectors[0], vectors[1], *batch, 1e-5)
        )


@given(
    st.integers(1, 4),
    st.integers(1, 40),
    st.integers(1, 9),
    st.integers(2, 9),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1.0, 1e-4, 3e4]),
    st.integers(0, 2**16),
)
def test_normalises_as_the_formulas_do(
    batch: int, channels: int, height: int, width: int, relu: bool, last: bool, level: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(batch, channels, height, width, generator=generator) * 3 + level
    y = y.contiguous(memory_format=LAST) if last else y
    factor, weight, bias, mean, var = (torch.rand(channels, generator=generator) + 0.5 for _ in range(5))
    factor[::2] *= -1
    inputs = [one.double().requires_grad_() for one in (y, factor, weight, bias)]
    running = mean.double(), var.double()
    quotient = inputs[0] / inputs[1].reshape(-1, 1, 1)
    wanted = F.batch_norm(quotient, *running, *inputs[2:], True, 0.1, 1e-5)
    out, *saved = operators.batch_norm_of_scaled(y, factor, weight, bias, mean, var, 1e-5, 0.1, relu)
    assert out.is_contiguous(memory_format=LAST if last else torch.contiguous_format)
    precision = 1e-6 * max(1.0, level)  # of float32
    torch.testing.assert_close(out, (wanted.relu() if relu else wanted).float(), rtol=1e-5, atol=10 * precision)
    torch.testing.assert_close(mean, running[0].float(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(var, running[1].float(), rtol=1e-5 * max(1.0, level), atol=1e-6)
    grad = torch.randn(out.shape, generator=generator)
    passed = grad * (out > 0) if relu else grad
    expected = torch.autograd.grad(wanted, inputs, passed.double())
    found = operators.batch_norm_of_scaled_backward(grad, y, factor, weight, *saved, 1e-5)
    scale = sum(one.norm() for one in expected[2:]) + 1
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-5 * max(1.0, level) * (other.norm() + scale)
