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
from eagerq.kernels.training_norm import batch_norm_in_graph, round_over_in_graph
from eagerq.observer import MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver

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
        out, *batch, ends = operators.batch_norm_of_scaled(*arguments)
        saved = y, y, vectors[0], vectors[1], *batch, relu, 1e-5
        torch.library.opcheck(operators.batch_norm_of_scaled_backward.default, saved)
        bits = torch.zeros_like(batch[-1])  # without a ReLU there are none yet
        one = torch.ones(1), torch.zeros(1, dtype=torch.int32), 0, 255
        torch.library.opcheck(operators.round_over.default, (out, bits, ends, relu, *one))
        running = torch.tensor(-1.0), torch.tensor(1.0), torch.tensor(0), 0.1, False
        torch.library.opcheck(operators.observe_over.default, (out, bits, ends, relu, *one, *running))


def turned(x: Tensor) -> Tensor:
    """The same values, in memory with the last axis first."""
    axes = range(x.dim())
    return x.permute(-1, *axes[:-1]).contiguous().permute(*axes[1:], 0)


def last_3d(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize(
    ("order", "shape"), [(last_3d, (2, 3, 2, 4, 3)), (turned, (2, 3, 2, 4, 3)), (turned, (2, 6, 4, 3))]
)
def test_results_lie_as_was_foretold(order: Any, shape: tuple[int, ...]) -> None:
    window = len(shape) - 2
    x, weight = order(torch.randn(shape)), torch.randn(4, shape[1], *[2] * window)
    scale, zero_point = torch.rand(4) / 64 + 1e-3, torch.zeros(4, dtype=torch.int32)
    settings = *NUMBERS, [1] * window, [1] * window, [1] * window, 1, True
    values = x, weight, torch.rand(4), torch.randn(4), scale, zero_point, *settings
    torch.library.opcheck(operators.convolved.default, values)
    y, above, *_ = operators.convolved(*values)
    saved = order(y), above, *values[:3], scale, zero_point, *settings
    torch.library.opcheck(operators.convolved_backward.default, (*saved, [True, True, True]))
    vectors = [torch.rand(4) + 0.5 for _ in range(5)]
    arguments = order(y), *vectors, 1e-5, 0.1, True
    torch.library.opcheck(operators.batch_norm_of_scaled.default, arguments)
    _, *batch, _ = operators.batch_norm_of_scaled(*arguments)
    saved = y, order(y), vectors[0], vectors[1], *batch, True, 1e-5
    torch.library.opcheck(operators.batch_norm_of_scaled_backward.default, saved)


@given(
    st.integers(2, 4),  # of two or three values next to no gradient is left
    st.integers(1, 40),
    st.integers(2, 9),
    st.integers(2, 9),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0.0, 1.0, 30.0]),
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
    norm = native.Norm(mean.clone(), var.clone(), 1e-5, 0.1)
    plain_y = y.contiguous()  # of which eager training makes what torch does
    wanted, found, passing = native.batch_norm(plain_y, factor, weight, bias, norm, relu, mask=True)
    out, *saved, ends = operators.batch_norm_of_scaled(y, factor, weight, bias, mean, var, 1e-5, 0.1, relu)
    assert out.is_contiguous(memory_format=LAST if last else torch.contiguous_format)
    assert torch.equal(ends, torch.stack([out.min(), out.max()]))
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mean, norm.running_mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(var, norm.running_var, rtol=1e-6, atol=0)
    grad = torch.randn(out.shape, generator=generator)
    expected = native.batch_norm_backward(grad, plain_y, factor, weight, found, passing.bits, 1e-5)
    of_y, *others = operators.batch_norm_of_scaled_backward(grad, y, factor, weight, *saved, relu, 1e-5)
    close(of_y, expected[0])
    level = sum(one.norm() for one in expected[1:])  # a factor's gradient is next to nothing
    for one, other in zip(others, expected[1:], strict=True):
        assert (one - other).norm() <= 1e-5 * level + 1e-6


@pytest.mark.parametrize("shape", [(3, 5, 4, 3), (2, 16, 5, 5), (2, 3, 7)])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("observing", ["not", "finite", "not finite"])
def test_rounds_what_a_batch_norm_gave(shape: tuple[int, ...], last: bool, relu: bool, observing: str) -> None:
    y = torch.randn(shape, generator=torch.Generator().manual_seed(5)) * 3
    if last and len(shape) == 4:
        y = y.contiguous(memory_format=LAST)
    if observing == "not finite":
        y.view(-1)[3:4].fill_(torch.inf) if y.is_contiguous() else y[0, 0, 0, :1].fill_(torch.inf)
    channels = shape[1]
    factor, weight, bias, mean, var = (torch.rand(channels) + 0.5 for _ in range(5))
    out, *batch, ends = operators.batch_norm_of_scaled(y, factor, weight, bias, mean, var, 1e-5, 0.1, relu)
    before, layout = out.clone(), out.stride()
    observer = MovingAverageMinMaxObserver(averaging_constant=0.3)
    observer(torch.tensor([-0.4, 0.5]))
    scale, zero_point = torch.full((1,), 0.004), torch.full((1,), 90, dtype=torch.int32)
    buffers = observer.min_val.clone(), observer.max_val.clone(), observer.nonfinite_batches.clone()
    values = out, batch[-1], ends, relu, scale, zero_point, 0, 255
    if observing == "not":
        operators.round_over(*values)
    else:
        operators.observe_over(*values, *buffers, observer.averaging_constant, False)
        observer(before)
        torch.testing.assert_close(buffers[0], observer.min_val, rtol=1e-6, atol=0)
        torch.testing.assert_close(buffers[1], observer.max_val, rtol=1e-6, atol=0)
        assert torch.equal(buffers[2], observer.nonfinite_batches)
    assert out.stride() == layout
    wanted = fake_quantize(before, scale, zero_point, 0, 255)
    torch.testing.assert_close(out, wanted, rtol=0, atol=0, equal_nan=True)
    if observing == "not finite":
        return
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(6))
    inside = (before / scale).round() + zero_point
    passed = grad * ((inside >= 0) & (inside <= 255) & ((before > 0) | torch.tensor(not relu)))
    assert 0 < (passed == 0).sum() < passed.numel()
    found, expected = (
        operators.batch_norm_of_scaled_backward(one, y, factor, weight, *batch, masked, 1e-5)
        for one, masked in ((grad, True), (passed, False))
    )
    for one, other in zip(found, expected, strict=True):
        close(one, other)


@pytest.mark.parametrize("relu", [False, True])
def test_no_gradient_passes_where_rounding_clamps(relu: bool) -> None:
    y = torch.randn(2, 5, 6, 6, requires_grad=True)
    vectors = [torch.rand(5) + 0.5 for _ in range(3)]
    to = native.Rounding(torch.full((1,), 0.004), torch.full((1,), 90, dtype=torch.int32), 0, 255)
    makings = [
        batch_norm_in_graph(y, *vectors, native.Norm(torch.zeros(5), torch.ones(5), 1e-5, 0.1), relu) for _ in range(2)
    ]
    before, rounded = makings[0].attached(relu), round_over_in_graph(makings[1], to, None)
    inside = (before / to.scale).round() + to.zero_point
    grad = torch.randn(y.shape)
    (expected,) = torch.autograd.grad(before, y, grad * ((inside >= 0) & (inside <= 255)))
    close(torch.autograd.grad(rounded, y, grad)[0], expected)
