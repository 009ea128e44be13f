"""Observing, rounding, ReLU and batch norm in C: the plain formulas' numbers, and gradients against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from eagerq import native
from eagerq.functional import (
    Norm,
    Rounding,
    Running,
    batch_norm_of_scaled,
    channel_shape,
    moving_average,
    relu_,
    round_in_c,
    training_qparams,
)

pytestmark = pytest.mark.skipif(not native.available, reason="the C library was not built: no compiler at installation")

LIMITS = st.sampled_from([(-128, 127), (-127, 127), (0, 255), (0, 127), (-8, 7)])


def unseen(count: int) -> tuple[Tensor, Tensor]:
    return torch.full((count,), float("inf")), torch.full((count,), float("-inf"))


def rounding(count: int, limits: tuple[int, int], symmetric: bool, rows: bool) -> Rounding:
    running = Running(*unseen(count), 0.01, symmetric)
    return Rounding(torch.ones(count), torch.zeros(count, dtype=torch.int32), *limits, rows, running)


def expected(x: Tensor, factor: Tensor | None, to: Rounding) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """By the plain formulas: the running range, scale, zero point, and the rounded values."""
    assert to.running is not None
    if factor is not None:
        x = x * factor.reshape(channel_shape(x.dim(), 0))
    flat = x.flatten(1) if to.rows else x.reshape(1, -1)
    low = moving_average(to.running.low, flat.amin(1), to.running.constant)
    high = moving_average(to.running.high, flat.amax(1), to.running.constant)
    scale, zero_point = training_qparams(low, high, to.quant_min, to.quant_max, to.running.symmetric)
    shape = channel_shape(x.dim(), 0) if to.rows else [1] * x.dim()
    s, z = scale.reshape(shape), zero_point.reshape(shape)
    steps = (torch.round(x * (1.0 / s)) + z).clamp(to.quant_min, to.quant_max)
    return low, high, scale, zero_point, (steps - z) * s


@given(
    st.tuples(st.integers(1, 9), st.integers(1, 70), st.integers(1, 3)),
    LIMITS,
    st.booleans(),
    st.booleans(),
    st.sampled_from(["normal", "positive", "negative", "tiny", "huge", "zero", "one value"]),
    st.integers(0, 3),
)
def test_observes_and_rounds_as_the_formulas_do(
    shape: tuple[int, ...], limits: tuple[int, int], symmetric: bool, rows: bool, kind: str, seed: int
) -> None:
    torch.manual_seed(seed)
    count = shape[0] if rows else 1
    to = rounding(count, limits, symmetric, rows)
    for _ in range(3):  # the first sets the range, the others move it
        x = torch.randn(shape)
        x = {
            "normal": x,
            "positive": x.abs(),
            "negative": -x.abs(),
            "tiny": x * 1e-30,
            "huge": x * 1e30,
            "zero": x * 0,
            "one value": torch.full(shape, 0.7),
        }[kind]
        factor = torch.randn(count) if rows else None
        *state, values = expected(x, factor, to)
        out = round_in_c(x, to, factor)
        assert out is not None
        assert to.running is not None
        for mine, theirs in zip((to.running.low, to.running.high, to.scale, to.zero_point), state, strict=True):
            assert torch.equal(mine, theirs.to(mine.dtype))
        assert torch.equal(out, values)


@pytest.mark.parametrize("limits", [(-128, 127), (0, 127), (-8, 7)])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("half", [0.0065, 0.0071, 0.7])
def test_halves_of_a_step(half: float, rows: bool, limits: tuple[int, int]) -> None:
    """The last bit decides where they are rounded to."""
    span = limits[1] - limits[0]
    x = torch.arange(-span, span + 1).repeat(2, 1) * half
    to = rounding(2 if rows else 1, limits, False, rows)
    values = expected(x, None, to)[-1]
    out = round_in_c(x, to)
    assert out is not None
    assert torch.equal(out, values)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("upstream", [torch.contiguous_format, torch.channels_last])
def test_gradients_of_a_scaled_weight(layout: torch.memory_format, upstream: torch.memory_format) -> None:
    weight = torch.randn(5, 7, 3, 3).to(memory_format=layout).requires_grad_()
    factor = torch.randn(5).requires_grad_()
    scale, zero_point = torch.full((5,), 0.01), torch.arange(5, dtype=torch.int32)
    grad = torch.randn(5, 7, 3, 3).to(memory_format=upstream)
    out = round_in_c(weight, Rounding(scale, zero_point, -128, 127, rows=True), factor)
    assert out is not None
    assert out.stride() == weight.stride()
    out.backward(grad)
    product = (weight * factor.reshape(-1, 1, 1, 1)).detach()
    steps = torch.round(product * (1.0 / scale).reshape(-1, 1, 1, 1)) + zero_point.reshape(-1, 1, 1, 1)
    kept = torch.where((steps >= -128) & (steps <= 127), grad, 0.0)
    assert 0 < (kept == 0).sum() < kept.numel()
    assert weight.grad is not None
    assert factor.grad is not None
    assert torch.equal(weight.grad, kept * factor.detach().reshape(-1, 1, 1, 1))
    wanted = (kept.double() * weight.detach().double()).sum((1, 2, 3))
    torch.testing.assert_close(factor.grad.double(), wanted, rtol=1e-5, atol=1e-6)


def test_gradients_can_be_differentiated() -> None:
    x = torch.randn(4, 9, requires_grad=True)
    factor = torch.rand(4).add(0.5).requires_grad_()
    out = round_in_c(x, Rounding(torch.full((4,), 0.01), torch.zeros(4, dtype=torch.int32), -128, 127, True), factor)
    assert out is not None
    (of_x,) = torch.autograd.grad(out.square().sum() / 2, x, create_graph=True)
    (of_factor,) = torch.autograd.grad(of_x.sum(), factor)
    inside = (out.detach().abs() < 1.27).float()
    # d/df of Σ out·f·inside, with d out/d f = x·inside
    wanted = ((x.detach() * inside) * factor.detach()[:, None] + out.detach() * inside).sum(1)
    torch.testing.assert_close(of_factor, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("rows", [False, True])
def test_nothing_changes_for_values_that_are_not_finite(value: float, rows: bool) -> None:
    x = torch.randn(3, 40_000)
    to = rounding(3 if rows else 1, (0, 255), False, rows)
    assert round_in_c(x, to) is not None
    assert to.running is not None
    state = [one.clone() for one in (to.scale, to.zero_point, *to.running[:2])]
    x[1, 30_000] = value
    assert round_in_c(x, to) is None
    assert all(map(torch.equal, state, (to.scale, to.zero_point, *to.running[:2])))


def test_writing_the_buffers_counts_as_a_change() -> None:
    to = rounding(1, (0, 255), False, False)
    before = to.scale._version
    round_in_c(torch.rand(10), to)
    assert to.scale._version > before


def test_declines_what_it_does_not_serve() -> None:
    to = Rounding(torch.ones(1), torch.zeros(1, dtype=torch.int32), 0, 255)
    assert round_in_c(torch.ones(3), to) is not None
    assert round_in_c(torch.ones(3).double(), to) is None
    assert round_in_c(torch.ones(3, 3)[:, ::2], to) is None
    assert round_in_c(torch.ones(0), to) is None
    assert round_in_c(torch.ones(3), to._replace(scale=torch.ones(2))) is None
    assert round_in_c(torch.ones(3), to._replace(zero_point=torch.zeros(1))) is None
    assert round_in_c(torch.ones(3), to._replace(rows=True)) is None
    assert round_in_c(torch.ones(()), to._replace(rows=True)) is None
    norm, ones = Norm(torch.zeros(3), torch.ones(3), 1e-3, 0.1), torch.ones(3)
    for y in (torch.rand(2, 3), torch.rand(2, 3, 4).double(), torch.rand(2, 3, 8)[..., ::2], torch.rand(0, 3, 4)):
        assert batch_norm_of_scaled(y, ones, ones, ones, norm) is None
    assert batch_norm_of_scaled(torch.rand(3, 5, 8), ones, ones, ones, norm) is None  # of another number of channels
    assert norm.running_mean.tolist() == [0, 0, 0]
    assert relu_(torch.ones(3, requires_grad=True)) is None
    assert relu_(torch.ones(4)[1:]) is None


@given(st.integers(1, 20_000), st.integers(0, 3))
def test_relu(count: int, seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(count)
    x[::5] = 0
    grad, leaf = torch.randn(count), x.clone().requires_grad_()
    y = relu_(leaf * 1)
    assert y is not None
    assert torch.equal(y, F.relu(x))
    y.backward(grad)
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, torch.where(x > 0, grad, 0.0))
    assert relu_(torch.tensor([float("nan")])).isnan().all()  # type: ignore[union-attr]


def normalized(y: Tensor, factor: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
    """In float64, by the book."""
    quotient = y / factor.reshape(channel_shape(y.dim(), 1))
    out = F.batch_norm(quotient, None, None, weight, bias, True, 0.0, 1e-3)
    return F.relu(out) if relu else out


@given(
    st.tuples(st.integers(1, 4), st.integers(1, 20), st.integers(1, 9), st.integers(1, 60)),
    st.booleans(),
    st.booleans(),
    st.integers(0, 3),
)
def test_batch_norm_of_scaled(shape: tuple[int, ...], last: bool, relu: bool, seed: int) -> None:
    """Contiguous, or with channels last in memory."""
    torch.manual_seed(seed)
    channels, count = shape[1], shape[0] * shape[2] * shape[3]
    if count < 2:
        return
    factor = torch.randn(channels)
    factor = torch.where(factor.abs() < 0.1, 0.5, factor)
    y = torch.randn(shape) * factor.reshape(-1, 1, 1) * 2 + 0.3
    if last:
        y = y.contiguous(memory_format=torch.channels_last)
    weight, bias, grad = torch.randn(channels), torch.randn(channels), torch.randn(shape)
    inputs = [one.clone().requires_grad_() for one in (y, factor, weight, bias)]
    exact = [one.double().requires_grad_() for one in (y, factor, weight, bias)]
    running = Norm(torch.zeros(channels), torch.ones(channels), 1e-3, 0.1)
    out = batch_norm_of_scaled(*inputs, running, relu)
    assert out is not None
    assert out.stride() == y.stride()
    wanted = normalized(*exact, relu)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)
    sure = (wanted.abs() > 1e-4).double()  # elsewhere rounding decides on which side of zero a value lies
    out.backward(grad * sure.float())
    wanted.backward(grad.double() * sure)
    for mine, theirs in zip(inputs, exact, strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        scale = max(theirs.grad.norm().item(), grad.norm().item())
        assert (mine.grad - theirs.grad).norm() <= 1e-5 * scale
    seen = y.double() / factor.double().reshape(-1, 1, 1)
    mean, variance = seen.mean((0, 2, 3)), seen.var((0, 2, 3))
    torch.testing.assert_close(running.running_mean.double(), 0.1 * mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(running.running_var.double(), 0.9 + 0.1 * variance, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("left", [0.0, 3e-42])
def test_a_channel_scaled_by_next_to_nothing(left: float) -> None:
    """Its weights round to zero, so that nothing is left to divide, or nearly nothing."""
    y, factor = torch.zeros(2, 1, 3, 4), torch.full((1,), 1e-42)
    y[0] = left
    y.requires_grad_()
    weight = factor.clone().requires_grad_()
    out = batch_norm_of_scaled(y, factor, weight, torch.ones(1), Norm(torch.zeros(1), torch.ones(1), 1e-3, 0.1))
    assert out is not None
    out.backward(torch.randn(2, 1, 3, 4))
    assert y.grad is not None
    assert weight.grad is not None
    assert y.grad.isfinite().all()
    assert weight.grad.isfinite().all()
    assert left or weight.grad.tolist() == [0]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_at_zero_a_relu_lets_nothing_pass(layout: torch.memory_format) -> None:
    y, bias = torch.randn(2, 3, 4, 5).contiguous(memory_format=layout), torch.zeros(3, requires_grad=True)
    out = batch_norm_of_scaled(
        y, torch.ones(3), torch.zeros(3), bias, Norm(torch.zeros(3), torch.ones(3), 1e-3, 0.1), relu=True
    )
    assert out is not None
    out.sum().backward()
    assert bias.grad is not None
    assert bias.grad.tolist() == [0, 0, 0]


def test_the_order_in_memory_and_the_threads_do_not_matter() -> None:
    """Statistics are rounded once, from sums in double."""
    torch.manual_seed(0)
    y, factor, weight = torch.randn(6, 24, 40, 50) * 3 + 1, torch.rand(24) + 0.5, torch.randn(24)
    last = y.contiguous(memory_format=torch.channels_last)
    found, threads = [], torch.get_num_threads()
    try:
        for one, count in ((y, 1), (last, 1), (y, 2), (last, 2)):
            torch.set_num_threads(count)
            norm = Norm(torch.zeros(24), torch.ones(24), 1e-3, 0.1)
            out = batch_norm_of_scaled(one, factor, weight, weight, norm, True)
            assert out is not None
            found.append((out, norm.running_mean, norm.running_var))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        for mine, theirs in zip(found[0], other, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
    assert all(map(torch.equal, found[0], found[2]))
    assert all(map(torch.equal, found[1], found[3]))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("relu", [False, True])
def test_second_derivatives_of_batch_norm(relu: bool, layout: torch.memory_format) -> None:
    torch.manual_seed(1)
    values = (
        torch.randn(2, 3, 4, 5).contiguous(memory_format=layout),
        torch.rand(3) + 0.5,
        torch.randn(3),
        torch.randn(3),
    )

    def penalty(dtype: torch.dtype) -> list[Any]:
        inputs = [one.to(dtype).requires_grad_() for one in values]
        if dtype is torch.float32:
            normed = batch_norm_of_scaled(*inputs, Norm(torch.zeros(3), torch.ones(3), 1e-3, 0.1), relu)
            assert normed is not None
            out = normed
        else:
            out = normalized(*inputs, relu)
        (of_y,) = torch.autograd.grad(out.pow(3).sum(), inputs[0], create_graph=True)
        return list(torch.autograd.grad(of_y.square().sum(), inputs))

    for mine, theirs in zip(penalty(torch.float32), penalty(torch.float64), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-3, atol=1e-3)


def test_under_inference_mode() -> None:
    """Tensors made there have no version, and nothing there is for a gradient."""
    with torch.inference_mode():
        weight, factor = torch.nn.Parameter(torch.randn(3, 5)), torch.rand(3)
        to = rounding(3, (-128, 127), True, rows=True)
        out = round_in_c(weight, to, factor)
        assert out is not None
        assert torch.equal(out, expected(weight, factor, rounding(3, (-128, 127), True, rows=True))[-1])
