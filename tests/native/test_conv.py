"""The convolutions in C give the rule's very integers, or decline."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernels.calls import BYTES, Call, bounds, conv_calls, expected, integers, scales, zero_points

from eagerq import kernels, native
from eagerq.kernels import native_conv, reference

pytestmark = pytest.mark.skipif(not native.conv_ready(), reason="no compiler at installation, or no AVX-512 VNNI")

# around the widths of vectors and of blocks of them
WIDTHS = st.sampled_from([1, 3, 4, 15, 16, 24, 32, 33, 48, 64, 65, 80, 129, 144, 193, 272])


@pytest.fixture(scope="module", autouse=True)
def no_tiles() -> Iterator[None]:
    """As on processors where nothing is left to oneDNN for speed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_conv, "tiles", lambda: False)
        yield


def odd_zero_points(call: Call, data: st.DataObject) -> Call:
    """Zero points other than 0 for some channels, for all or for none."""
    points = call["weight_zero_point"].clone()
    for channel in data.draw(st.sets(st.integers(0, len(points) - 1))):
        points[channel] = data.draw(st.integers(-128, 127))
    return {**call, "weight_zero_point": points}


@st.composite
def wide_calls(draw: st.DrawFn, depthwise: bool) -> Call:
    """Many channels, long rows."""
    inside = draw(WIDTHS.filter(lambda width: width > 1)) if depthwise else draw(WIDTHS)
    outside = inside if depthwise else draw(WIDTHS)
    taps = [draw(st.sampled_from([1, 2, 3, 5, 7])) for _ in "yx"]
    dilation = [draw(st.integers(1, 2)), draw(st.integers(1, 2)) if depthwise else 1]
    padding = [draw(st.integers(0, 3)) for _ in "yx"]
    least = [max(1, step * (tap - 1) + 1 - 2 * pad) for tap, step, pad in zip(taps, dilation, padding, strict=True)]
    sizes = [draw(st.integers(least[0], least[0] + 9)), draw(st.integers(least[1], least[1] + 70))]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x_dtype, dtype = draw(BYTES), draw(BYTES)
    zero_point = draw(zero_points(dtype))
    low, high = draw(bounds(dtype, zero_point))
    count = draw(st.sampled_from([1, outside]))
    return {
        "x": reference.channels_last(integers((draw(st.integers(1, 2)), inside, *sizes), x_dtype, generator)),
        "x_scale": draw(scales("plain")),
        "x_zero_point": draw(zero_points(x_dtype)),
        "weight": integers((outside, 1 if depthwise else inside, *taps), torch.int8, generator),
        "weight_scale": torch.rand(count, generator=generator) / 64 + 2**-9,
        "weight_zero_point": torch.zeros(count, dtype=torch.int32),
        "bias": torch.randn(outside, generator=generator) if draw(st.booleans()) else None,
        "stride": [draw(st.integers(1, 3)) for _ in "yx"],
        "padding": padding,
        "dilation": dilation,
        "groups": inside if depthwise else 1,
        "scale": draw(scales("plain", 2.0**-4, 4.0)),
        "zero_point": zero_point,
        "dtype": dtype,
        "low": low,
        "high": high,
    }


@pytest.mark.parametrize("depthwise", [False, True])
def test_wide(depthwise: bool) -> None:
    @given(wide_calls(depthwise), st.data())
    def check(call: Call, data: st.DataObject) -> None:
        call = odd_zero_points(call, data)
        result = native_conv.conv(*call.values())
        assert result.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(result, reference.conv(*call.values()))

    check()


@pytest.mark.parametrize("in_padding", [False, True])
def test_small(in_padding: bool) -> None:
    """Any groups, layouts, and windows wholly in padding."""

    @given(conv_calls(2, in_padding=in_padding), st.data())
    def check(call: Call, data: st.DataObject) -> None:
        call = odd_zero_points(call, data)
        result = native_conv.conv(*call.values())
        groups, each = call["groups"], call["weight"].shape[1]
        if groups == 1 and (call["dilation"][1] == 1 or call["weight"].shape[3] == 1):
            assert result is not NotImplemented
        if groups > 1 and (each > 1 or groups != len(call["weight"])):
            assert result is NotImplemented
        if result is not NotImplemented:
            assert torch.equal(result, expected(call))

    check()


def simple_call(**changed: Any) -> Call:
    generator = torch.Generator().manual_seed(0)
    call: Call = {
        "x": integers((2, 8, 9, 9), torch.uint8, generator),
        "x_scale": 0.1,
        "x_zero_point": 3,
        "weight": integers((5, 8, 3, 3), torch.int8, generator),
        "weight_scale": torch.full((5,), 0.01),
        "weight_zero_point": torch.zeros(5, dtype=torch.int32),
        "bias": torch.randn(5, generator=generator),
        "stride": [1, 1],
        "padding": [1, 1],
        "dilation": [1, 1],
        "groups": 1,
        "scale": 1.0,
        "zero_point": 128,
        "dtype": torch.uint8,
        "low": 0,
        "high": 255,
    }
    return {**call, **changed}


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_small_images_meet_a_large_weight(batch: int, stride: int) -> None:
    """Images that go together are not one after the other in memory as their results are."""
    generator = torch.Generator().manual_seed(batch)
    call = simple_call(
        x=reference.channels_last(integers((batch, 68, 7, 6), torch.uint8, generator)),
        weight=integers((500, 68, 3, 3), torch.int8, generator),
        weight_scale=torch.rand(500, generator=generator) / 512,
        weight_zero_point=torch.zeros(500, dtype=torch.int32),
        bias=torch.randn(500, generator=generator),
        stride=[stride, stride],
    )
    assert torch.equal(native_conv.conv(*call.values()), reference.conv(*call.values()))


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("x_scale", [1e6, 1e38])
@pytest.mark.parametrize(("low", "high"), [(0, 255), (3, 100)])
def test_far_out_of_range(depthwise: bool, x_scale: float, low: int, high: int) -> None:
    """Results beyond int32, and beyond float32, end at the bounds."""
    call = simple_call(x_scale=x_scale, low=low, high=high)
    if depthwise:
        generator = torch.Generator().manual_seed(1)
        weight = integers((8, 1, 3, 3), torch.int8, generator)
        call = {**call, "weight": weight, "groups": 8, "weight_scale": torch.ones(1), "bias": None}
        call["weight_zero_point"] = torch.zeros(1, dtype=torch.int32)
    result = native_conv.conv(*call.values())
    assert torch.equal(result, reference.conv(*call.values()))
    assert {low, high} <= set(result.flatten().tolist())


@pytest.mark.parametrize("columns", range(1, 9))
@pytest.mark.parametrize("channels", [16, 32, 48, 64])
def test_depthwise_columns(channels: int, columns: int) -> None:
    """Few columns and rows, of which some share a vector."""
    generator = torch.Generator().manual_seed(columns)
    call = simple_call(
        x=reference.channels_last(integers((2, channels, 5, columns), torch.uint8, generator)),
        weight=integers((channels, 1, 3, 3), torch.int8, generator),
        weight_scale=torch.rand(channels, generator=generator) / 64,
        weight_zero_point=torch.zeros(channels, dtype=torch.int32),
        bias=torch.randn(channels, generator=generator),
        groups=channels,
    )
    assert torch.equal(native_conv.conv(*call.values()), reference.conv(*call.values()))


@pytest.mark.parametrize(
    ("dtype", "zero_point", "low", "high"),
    [
        (torch.uint8, 0, 0, 255),
        (torch.uint8, 0, 0, 100),
        (torch.uint8, 0, 7, 255),
        (torch.uint8, 3, 0, 255),
        (torch.uint8, 3, 3, 255),
        (torch.int8, 0, 0, 127),
        (torch.int8, 0, -128, 127),
    ],
)
@pytest.mark.parametrize("columns", [5, 16, 50])
@pytest.mark.parametrize("width", [16, 24, 32, 40, 64, 80])
def test_bounds(width: int, columns: int, dtype: torch.dtype, zero_point: int, low: int, high: int) -> None:
    """Results that need no zero point or no bounds skip them; tiles within a row, and beyond its end."""
    generator = torch.Generator().manual_seed(width)
    for depthwise in (False, True):
        for taps in (1, 3):
            inside = 1 if depthwise else width
            call = simple_call(
                x=reference.channels_last(integers((2, width, 4, columns), torch.uint8, generator)),
                weight=integers((width, inside, taps, taps), torch.int8, generator),
                weight_scale=torch.rand(width, generator=generator) / 2 / inside**0.5,
                weight_zero_point=torch.zeros(width, dtype=torch.int32),
                bias=torch.randn(width, generator=generator) * 20,
                padding=[taps // 2, taps // 2],
                groups=width // inside,
                dtype=dtype,
                zero_point=zero_point,
                low=low,
                high=high,
            )
            result = native_conv.conv(*call.values())
            assert torch.equal(result, reference.conv(*call.values()))
            assert {low, high} <= set(result.flatten().tolist())


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("taps", range(1, 6))
@pytest.mark.parametrize("channels", [16, 32, 48, 80, 144])
def test_depthwise_zero_points_of_a_few(channels: int, taps: int, stride: int) -> None:
    """Channels with zero points are computed in another way than those beside them, on shared rows, too."""
    generator = torch.Generator().manual_seed(channels)
    points = torch.zeros(channels, dtype=torch.int32)
    points[[3, channels // 2, channels - 1]] = torch.tensor([-128, 127, 5], dtype=torch.int32)
    call = simple_call(
        x=reference.channels_last(integers((2, channels, 9, 10), torch.int8, generator)),
        x_zero_point=-7,
        weight=integers((channels, 1, taps, 3), torch.int8, generator),
        weight_scale=torch.rand(channels, generator=generator) / 64,
        bias=torch.randn(channels, generator=generator),
        stride=[stride, stride],
        groups=channels,
    )
    for weight_zero_point in (points, points * 0):
        call = {**call, "weight_zero_point": weight_zero_point}
        assert torch.equal(native_conv.conv(*call.values()), reference.conv(*call.values()))


@pytest.mark.parametrize("name", ["weight", "weight_scale", "weight_zero_point", "bias"])
def test_parameters_changed_in_place(name: str) -> None:
    call = simple_call()
    before = kernels.conv(*call.values())
    call[name].mul_(-1 if name == "weight" else 2).add_(1)
    after = kernels.conv(*call.values())
    assert torch.equal(after, expected(call))
    assert not torch.equal(after, before)


@pytest.mark.parametrize("name", ["weight", "weight_scale", "weight_zero_point", "bias"])
def test_parameters_replaced(name: str) -> None:
    call = simple_call()
    for step in range(5):  # each may get the place in memory, and the id, of the one before
        new = call[name].clone() + step
        call[name] = new
        del new
        assert torch.equal(kernels.conv(*call.values()), expected(call))


@pytest.mark.parametrize(
    "changed",
    [
        {"x": torch.zeros(2, 8, 9, 9, dtype=torch.int32)},
        {"x": torch.zeros(2, 9, 9, 9, dtype=torch.uint8)},
        {"x": torch.zeros(0, 8, 9, 9, dtype=torch.uint8)},
        {"x": torch.zeros(2, 8, 9, 9, dtype=torch.uint8, device="meta")},
        {"x": torch.zeros(2, 8, 1, 1, dtype=torch.uint8), "padding": [0, 0]},
        {"dtype": torch.float32},
        {"weight_scale": torch.ones(3)},
        {"weight": torch.zeros(5, 8, 70, 70, dtype=torch.int8), "padding": [50, 50]},
    ],
    ids=["int32", "channels", "nothing", "meta", "no window", "float32", "scales", "overflow"],
)
def test_declined(changed: Call) -> None:
    assert native_conv.conv(*simple_call(**changed).values()) is NotImplemented


def test_much_is_left_to_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_conv, "tiles", lambda: True)
    small, large = simple_call(), simple_call(x=torch.ones(2, 8, 300, 300, dtype=torch.uint8))
    assert native_conv.conv(*small.values()) is not NotImplemented
    assert native_conv.conv(*large.values()) is NotImplemented
    # oneDNN knows no zero points of weights
    large["weight_zero_point"][1] = 3
    assert torch.equal(native_conv.conv(*large.values()), expected(large))
