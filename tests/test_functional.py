"""The formulas of training-time quantization, against torch's operators and against float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from eagerq.errors import InvalidInputError
from eagerq.functional import (
    affine_qparams,
    channel_shape,
    fake_quantize,
    float_qparams,
    min_max,
    moving_average,
    symmetric_qparams,
    training_integers,
    training_qparams,
    update_natively,
)

EPS = torch.tensor([torch.finfo(torch.float32).eps])
UNSEEN = torch.tensor(torch.inf), torch.tensor(-torch.inf)
RANGES = [(0, 255), (0, 127), (-128, 127), (-127, 127), (-64, 63), (-8, 7), (0, 15), (-32768, 32767), (-5, 100)]

native = pytest.mark.skipif(
    not hasattr(torch, "fake_quantize_per_tensor_affine"), reason="torch has dropped its fake-quantizers"
)
native_fused = pytest.mark.skipif(
    not hasattr(torch, "fused_moving_avg_obs_fake_quant"), reason="torch has dropped the fused operator"
)

seeds = st.integers(0, 2**31)
# decades from 1e-12 to 1e8, whole powers of two, and zero: where formulas part on ties and floors
bounds = st.one_of(
    st.builds(lambda sign, power: sign * 10.0**power, st.sampled_from([-1, 1]), st.floats(-12, 8)),
    st.builds(lambda sign, power: sign * 2.0**power, st.sampled_from([-1, 1]), st.integers(-40, 26)),
    st.just(0.0),
)


@st.composite
def bound_vectors(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Lows and highs of a few hundred channels, from a drawn decade or two."""
    generator = torch.Generator().manual_seed(draw(seeds))
    first, last = sorted((draw(st.floats(-12, 8)), draw(st.floats(-12, 8))))
    ends = 10 ** (torch.rand(2, 300, generator=generator) * (last - first) + first)
    ends *= torch.randint(0, 2, ends.shape, generator=generator) * 2 - 1
    ends[:, :20] = ends[:, :20].sign() * torch.exp2(ends[:, :20].abs().log2().round())
    ends[0, 20:30] = 0.0
    ends[:, 30:35] = 0.0
    return ends.amin(0), ends.amax(0)


@contextmanager
def fallback() -> Iterator[None]:
    """As if torch had dropped its per-tensor operator."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eagerq.functional.rounding._NATIVE_PER_TENSOR", None)
        yield


# --- ranges -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dim", "axis", "expected"),
    [(1, 0, [-1]), (2, 1, [1, -1]), (4, -1, [1, 1, 1, -1]), (3, -3, [-1, 1, 1])],
)
def test_channel_shape(dim: int, axis: int, expected: list[int]) -> None:
    assert channel_shape(dim, axis) == expected


@given(shape=st.lists(st.integers(1, 5), min_size=1, max_size=5), seed=seeds, data=st.data())
def test_min_max(shape: list[int], seed: int, data: st.DataObject) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    low, high = min_max(x)
    assert low.shape == high.shape == ()
    assert (low.item(), high.item()) == (x.min().item(), x.max().item())

    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    others = [dim for dim in range(len(shape)) if dim != axis % len(shape)]
    low, high = min_max(x, axis)
    assert torch.equal(low, x.amin(others) if others else x)
    assert torch.equal(high, x.amax(others) if others else x)


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_min_max_tells_of_nan(axis: int | None) -> None:
    x = torch.randn(3, 4)
    x[1, 2] = torch.nan
    low, high = min_max(x, axis)
    expected = {None: torch.tensor(True), 0: torch.arange(3) == 1, 1: torch.arange(4) == 2}[axis]
    assert torch.equal(low.isnan(), expected)
    assert torch.equal(high.isnan(), expected)


@pytest.mark.parametrize(("shape", "axis"), [((), 0), ((2,), 1), ((2, 3), 4), ((2, 3), -3)])
def test_min_max_along_an_axis_that_is_not_there(shape: tuple[int, ...], axis: int) -> None:
    with pytest.raises(InvalidInputError, match=rf"has no axis {axis}.*check ch_axis"):
        min_max(torch.zeros(shape), axis)


def test_moving_average() -> None:
    old, new = torch.tensor([torch.inf, -torch.inf, 1.0]), torch.tensor([3.0, -3.0, 2.0])
    assert torch.equal(moving_average(old, new, 0.25), torch.tensor([3.0, -3.0, 1.25]))


# --- parameters from ranges -------------------------------------------------------------------


@given(ends=bound_vectors(), limits=st.sampled_from(RANGES))
def test_affine_qparams_against_float64(ends: tuple[Tensor, Tensor], limits: tuple[int, int]) -> None:
    low, high = ends
    scale, zero_point = affine_qparams(low, high, *limits, EPS)
    span = limits[1] - limits[0]
    wide_low, wide_high = low.double().clamp(max=0), high.double().clamp(min=0)
    torch.testing.assert_close(scale.double(), ((wide_high - wide_low) / span).clamp(min=EPS.item()), rtol=3e-7, atol=0)
    assert scale.dtype is torch.float32
    assert zero_point.dtype is torch.int64
    # zero is a whole number of steps from both ends, so each end lies within half a step of the grid
    assert ((zero_point >= limits[0]) & (zero_point <= limits[1])).all()
    slack = 0.51 + span * 1e-6
    assert (wide_low / scale - (limits[0] - zero_point) >= -slack).all()
    assert (wide_high / scale - (limits[1] - zero_point) <= slack).all()


@given(ends=bound_vectors(), limits=st.sampled_from(RANGES), zero_point=st.sampled_from([0, 7, 128]))
def test_symmetric_qparams_against_float64(
    ends: tuple[Tensor, Tensor], limits: tuple[int, int], zero_point: int
) -> None:
    scale, found = symmetric_qparams(*ends, *limits, EPS, zero_point)
    reach = torch.maximum(ends[0].abs(), ends[1].abs()).double()
    # a range on one side of zero reaches from zero; both have the larger magnitude
    expected = (reach * 2 / (limits[1] - limits[0])).clamp(min=EPS.item())
    torch.testing.assert_close(scale.double(), expected, rtol=3e-7, atol=0)
    assert torch.equal(found, torch.full_like(found, zero_point))
    assert found.dtype is torch.int64


@given(ends=bound_vectors(), limits=st.sampled_from(RANGES))
def test_float_qparams_against_float64(ends: tuple[Tensor, Tensor], limits: tuple[int, int]) -> None:
    low, high = ends
    scale, zero_point = float_qparams(low, high, *limits, EPS)
    exact = (high.double() - low.double()) / (limits[1] - limits[0])
    clear = (exact / EPS - 1).abs() > 1e-5  # not right at the threshold
    expected = torch.where(exact > EPS, exact, 1.0)
    torch.testing.assert_close(scale.double()[clear], expected[clear], rtol=3e-7, atol=0)
    torch.testing.assert_close(zero_point.double(), -low.double() / scale, rtol=3e-7, atol=0)


@pytest.mark.parametrize("channels", [None, 3])
@pytest.mark.parametrize("formula", ["affine", "symmetric", "float", "training"])
def test_one_and_zero_before_data(formula: str, channels: int | None) -> None:
    ends = UNSEEN if channels is None else tuple(end.repeat(channels) for end in UNSEEN)
    scale, zero_point = {
        "affine": lambda: affine_qparams(*ends, 0, 255, EPS),
        "symmetric": lambda: symmetric_qparams(*ends, -128, 127, EPS, zero_point=5),
        "float": lambda: float_qparams(*ends, 0, 255, EPS),
        "training": lambda: training_qparams(*ends, 0, 255, symmetric=False),
    }[formula]()
    assert scale.tolist() == [1.0] * (channels or 1)
    assert zero_point.tolist() == [0] * (channels or 1)


def test_a_channel_without_data_leaves_the_others_alone() -> None:
    scale, zero_point = affine_qparams(torch.tensor([torch.inf, -1.0]), torch.tensor([-torch.inf, 1.55]), 0, 255, EPS)
    torch.testing.assert_close(scale, torch.tensor([1.0, 0.01]))
    assert zero_point.tolist() == [0, 100]


def fused(x: Tensor, limits: tuple[int, int], symmetric: bool, axis: int | None) -> tuple[Tensor, ...]:
    """Output, scale and zero point of torch's fused observer and fake-quantizer on a first batch."""
    channels = 1 if axis is None else x.shape[axis]
    low, high = torch.full((channels,), torch.inf), torch.full((channels,), -torch.inf)
    scale, zero_point = torch.ones(channels), torch.zeros(channels, dtype=torch.int32)
    on = torch.ones(1, dtype=torch.int64)
    out = torch.fused_moving_avg_obs_fake_quant(
        x,
        on,
        on,
        low,
        high,
        scale,
        zero_point,
        0.01,
        *limits,
        0 if axis is None else axis,
        axis is not None,
        symmetric,
    )
    return out, scale, zero_point.long()


@native_fused
@given(ends=bound_vectors(), limits=st.sampled_from(RANGES), symmetric=st.booleans())
def test_training_qparams_are_those_of_the_fused_operator(
    ends: tuple[Tensor, Tensor], limits: tuple[int, int], symmetric: bool
) -> None:
    _, scale, zero_point = fused(torch.stack(ends, 1), limits, symmetric, axis=0)
    ours = training_qparams(*ends, *limits, symmetric)
    assert torch.equal(ours[0], scale)
    assert torch.equal(ours[1], zero_point)


@native_fused
@given(low=bounds, high=bounds, limits=st.sampled_from(RANGES), symmetric=st.booleans())
def test_training_qparams_of_one_range(low: float, high: float, limits: tuple[int, int], symmetric: bool) -> None:
    x = torch.tensor([low, high])
    _, scale, zero_point = fused(x, limits, symmetric, axis=None)
    ours = training_qparams(x.min(), x.max(), *limits, symmetric)
    assert torch.equal(ours[0], scale)
    assert torch.equal(ours[1], zero_point)


@native_fused
@given(
    first=bound_vectors(),
    second=bound_vectors(),
    limits=st.sampled_from(RANGES),
    symmetric=st.booleans(),
    constant=st.sampled_from([0.01, 0.3]),
)
def test_native_update_equals_the_formulas(
    first: tuple[Tensor, Tensor],
    second: tuple[Tensor, Tensor],
    limits: tuple[int, int],
    symmetric: bool,
    constant: float,
) -> None:
    running = torch.full((300,), torch.inf), torch.full((300,), -torch.inf)
    scale, zero_point = torch.ones(300), torch.zeros(300, dtype=torch.int32)
    expected = running
    for ends in (first, second):
        assert update_natively(*ends, *running, scale, zero_point, constant, *limits, symmetric)
        expected = tuple(moving_average(*pair, constant) for pair in zip(expected, ends, strict=True))
    torch.testing.assert_close(running, expected, rtol=1e-6, atol=0)
    ours = training_qparams(*running, *limits, symmetric)
    assert torch.equal(ours[0], scale)
    assert torch.equal(ours[1], zero_point.long())


@native_fused
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_native_update_skips_what_is_not_finite(bad: float) -> None:
    state = torch.tensor([-1.0]), torch.tensor([1.0]), torch.ones(1), torch.zeros(1, dtype=torch.int32)
    before = [value.clone() for value in state]
    assert not update_natively(torch.tensor(-3.0), torch.tensor(bad), *state, 0.01, -128, 127, symmetric=False)
    assert all(torch.equal(*values) for values in zip(state, before, strict=True))


@native_fused
@given(
    seed=seeds,
    limits=st.sampled_from(RANGES),
    symmetric=st.booleans(),
    axis=st.sampled_from([None, 0]),
)
def test_training_chain_equals_the_fused_operator(
    seed: int, limits: tuple[int, int], symmetric: bool, axis: int | None
) -> None:
    x = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(seed)) * 3
    out, *_ = fused(x, limits, symmetric, axis)
    scale, zero_point = training_qparams(*min_max(x, axis), *limits, symmetric)
    assert torch.equal(fake_quantize(x, scale, zero_point, *limits, axis), out)


@given(ends=bound_vectors(), limits=st.sampled_from(RANGES))
def test_training_qparams_against_float64(ends: tuple[Tensor, Tensor], limits: tuple[int, int]) -> None:
    low, high = ends[0].double().clamp(max=0), ends[1].double().clamp(min=0)
    scale, zero_point = training_qparams(*ends, *limits, symmetric=False)
    exact = (high - low) / (limits[1] - limits[0])
    normal = exact > 6.2e-5
    torch.testing.assert_close(scale.double()[normal], exact[normal], rtol=1e-7, atol=0)
    tiny = (exact < 6e-5) & (exact > 1e-37)
    assert torch.equal(scale[tiny], torch.full_like(scale[tiny], 6.1e-5))
    # a range below the floor keeps its proportions: the zero point is that of the exact scale
    kept = normal | tiny
    expected = (limits[0] - low / exact).clamp(*limits)[kept]
    assert ((zero_point[kept] - expected).abs() <= 0.5 + (limits[1] - limits[0]) * 3e-7).all()


@given(ends=bound_vectors(), limits=st.sampled_from([(-128, 127), (-8, 7), (-32768, 32767)]))
def test_training_qparams_of_symmetric_weights(ends: tuple[Tensor, Tensor], limits: tuple[int, int]) -> None:
    two_sided = (ends[0] < 0) & (ends[1] > 0)
    low, high = ends[0].double()[two_sided], ends[1].double()[two_sided]
    scale, zero_point = training_qparams(*ends, *limits, symmetric=True)
    exact = torch.maximum(low / limits[0], high / limits[1]).clamp(min=6.1e-5)
    torch.testing.assert_close(scale.double()[two_sided], exact, rtol=3e-7, atol=0)
    assert set(zero_point[two_sided].tolist()) <= {0}


def test_training_qparams_never_read_the_device() -> None:
    ends = torch.empty(4, device="meta"), torch.empty(4, device="meta")
    scale, zero_point = training_qparams(*ends, -128, 127, symmetric=True)
    assert (scale.shape, zero_point.dtype) == ((4,), torch.int64)


# --- fake quantization ------------------------------------------------------------------------


@st.composite
def fake_quantize_cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, tuple[int, int], int]:
    """Values within and beyond the range, many of them exact ties, with parameters per channel."""
    generator = torch.Generator().manual_seed(draw(seeds))
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    axis = draw(st.integers(0, len(shape) - 1))
    limits = draw(st.sampled_from([(0, 255), (-128, 127), (-8, 7), (0, 127)]))
    channels = shape[axis]
    if draw(st.booleans()):
        scale = torch.exp2(torch.randint(-6, 7, (channels,), generator=generator).float())
    else:
        scale = torch.rand(channels, generator=generator) + 1e-3
    zero_point = torch.randint(*limits, (channels,), generator=generator, dtype=torch.int32)
    halves = torch.randint(-600, 600, shape, generator=generator) / 2
    if draw(st.booleans()):
        halves = halves + torch.rand(shape, generator=generator)
    return halves * scale.reshape(channel_shape(len(shape), axis)), scale, zero_point, limits, axis


def forward_and_gradient(function, x: Tensor, *args) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    x = x.clone().requires_grad_()
    out = function(x, *args)
    upstream = torch.linspace(-1, 2, out.numel()).reshape(out.shape).to(out)
    (gradient,) = torch.autograd.grad(out, x, upstream)
    return out.detach(), gradient


@native
@given(case=fake_quantize_cases())
def test_fake_quantize_per_channel(case: tuple[Tensor, Tensor, Tensor, tuple[int, int], int]) -> None:
    x, scale, zero_point, limits, axis = case
    ours = forward_and_gradient(fake_quantize, x, scale, zero_point, *limits, axis)
    theirs = forward_and_gradient(torch.fake_quantize_per_channel_affine, x, scale, zero_point, axis, *limits)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])


@native
@given(case=fake_quantize_cases())
def test_fake_quantize_with_float_zero_points(
    case: tuple[Tensor, Tensor, Tensor, tuple[int, int], int],
) -> None:
    x, scale, zero_point, limits, axis = case
    zero_point = zero_point + 0.25
    ours = forward_and_gradient(fake_quantize, x, scale, zero_point, *limits, axis)
    theirs = forward_and_gradient(torch.fake_quantize_per_channel_affine, x, scale, zero_point, axis, *limits)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])


@native
@given(case=fake_quantize_cases(), alone=st.booleans())
def test_fake_quantize_per_tensor(
    device: torch.device, case: tuple[Tensor, Tensor, Tensor, tuple[int, int], int], alone: bool
) -> None:
    x, scale, zero_point, limits, _ = case
    x, scale, zero_point = x.to(device), scale[:1].to(device), zero_point[:1].to(device)
    theirs = forward_and_gradient(torch.fake_quantize_per_tensor_affine, x, scale, zero_point, *limits)
    if alone:
        with fallback():
            ours = forward_and_gradient(fake_quantize, x, scale, zero_point, *limits)
    else:
        ours = forward_and_gradient(fake_quantize, x, scale, zero_point, *limits)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])


def test_ties_round_to_even_and_then_add_the_zero_point() -> None:
    x = torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.5])
    expected = torch.tensor([-2.0, 0.0, 0.0, 2.0, 2.0])
    args = torch.tensor([1.0]), torch.tensor([3], dtype=torch.int32), 0, 255
    assert torch.equal(fake_quantize(x, *args), expected)
    with fallback():
        assert torch.equal(fake_quantize(x, *args), expected)


@pytest.mark.parametrize("axis", [None, 0])
def test_the_gradient_passes_within_the_range_only(axis: int | None) -> None:
    # -8 … 7 in steps of a half: the ends themselves belong to the range
    x = torch.tensor([[-4.3, -4.2, 0.0, 3.7, 3.8]])
    args = torch.tensor([0.5]), torch.tensor([0], dtype=torch.int32), -8, 7, axis
    with fallback():
        _, gradient = forward_and_gradient(lambda x: fake_quantize(x, *args).sum(), x)
    assert gradient.ne(0).tolist() == [[False, True, True, True, False]]


@native
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("axis", [None, 1])
def test_fake_quantize_keeps_the_dtype(dtype: torch.dtype, axis: int | None) -> None:
    x = torch.randn(7, 3).to(dtype)
    scale, zero_point = torch.tensor([0.03, 0.02, 0.01]), torch.tensor([3, 0, 9], dtype=torch.int32)
    if axis is None:
        scale, zero_point = scale[:1], zero_point[:1]
        theirs = forward_and_gradient(torch.fake_quantize_per_tensor_affine, x, scale, zero_point, 0, 255)
    else:
        theirs = forward_and_gradient(torch.fake_quantize_per_channel_affine, x, scale, zero_point, axis, 0, 255)
    ours = forward_and_gradient(fake_quantize, x, scale, zero_point, 0, 255, axis)
    # in float64, torch's per-tensor operator still rounds to float32 on the way
    tolerance = 1e-7 if dtype is torch.float64 else 0.0
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=0)


@pytest.mark.parametrize("alone", [False, True])
def test_fake_quantize_of_one_number(alone: bool) -> None:
    x = torch.tensor(0.26)
    args = torch.tensor([0.5]), torch.tensor([0], dtype=torch.int32), -8, 7
    if alone:
        with fallback():
            out, gradient = forward_and_gradient(fake_quantize, x, *args)
    else:
        out, gradient = forward_and_gradient(fake_quantize, x, *args)
    assert out.shape == gradient.shape == ()
    assert out.item() == 0.5


def test_values_far_beyond_the_range_are_clamped() -> None:
    # torch's per-channel operator overflows here, and gives the wrong end
    x = torch.tensor([[1e20, -1e20, 3e38, -3e38]])
    out = fake_quantize(x, torch.tensor([0.1]), torch.tensor([3], dtype=torch.int32), 0, 255, axis=0)
    torch.testing.assert_close(out, torch.tensor([[25.2, -0.3, 25.2, -0.3]]))


@given(case=fake_quantize_cases())
def test_training_integers_are_those_that_fake_quantize_stands_for(
    case: tuple[Tensor, Tensor, Tensor, tuple[int, int], int],
) -> None:
    x, scale, zero_point, limits, axis = case
    integers = training_integers(x, scale, zero_point, *limits, axis)
    assert torch.equal(integers, integers.round())
    shape = channel_shape(x.dim(), axis)
    values = (integers - zero_point.reshape(shape)) * scale.reshape(shape)
    assert torch.equal(values, fake_quantize(x, scale, zero_point, *limits, axis))
