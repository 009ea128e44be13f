"""The linear layer in C gives the rule's very integers, or declines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernels.calls import BYTES, Call, bounds, integers, scales, zero_points

from eagerq import kernels, native
from eagerq.kernels import native_linear, reference

pytestmark = pytest.mark.skipif(not native.conv_ready(), reason="no compiler at installation, or no AVX-512 VNNI")

# around the widths of vectors and of blocks of them, and the heights of tiles
OUTPUTS = st.sampled_from([1, 7, 15, 16, 17, 32, 33, 48, 64, 65, 130, 193])
ROWS = st.sampled_from([1, 2, 3, 5, 6, 7, 8, 9, 14, 24, 25, 131])
RESULTS = st.sampled_from([torch.uint8, torch.int8, torch.float32])


@st.composite
def calls(draw: st.DrawFn) -> Call:
    inputs, outputs = 4 * draw(st.integers(1, 40)), draw(OUTPUTS)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x_dtype, dtype, kind = draw(BYTES), draw(RESULTS), draw(st.sampled_from(["plain", "power"]))
    output: tuple[Any, ...] = (1.0, 0, dtype, 0, 0)
    if dtype is not torch.float32:
        zero_point = draw(zero_points(dtype))
        output = (draw(scales(kind, 2.0**-4, 4.0)), zero_point, dtype, *draw(bounds(dtype, zero_point)))
    count = draw(st.sampled_from([1, outputs]))
    odd = draw(st.sets(st.integers(0, count - 1), max_size=3))
    points = [draw(st.integers(-128, 127)) if channel in odd else 0 for channel in range(count)]
    shape = (*draw(st.sampled_from([(), (1,), (2,)])), draw(ROWS), inputs)
    return {
        "x": integers(shape, x_dtype, generator),
        "x_scale": draw(scales(kind)),
        "x_zero_point": draw(zero_points(x_dtype)),
        "weight": integers((outputs, inputs), torch.int8, generator),
        "weight_scale": torch.rand(count, generator=generator) / 64 + 2**-9,
        "weight_zero_point": torch.tensor(points, dtype=torch.int32),
        "bias": torch.randn(outputs, generator=generator) if draw(st.booleans()) else None,
        **dict(zip(("scale", "zero_point", "dtype", "low", "high"), output, strict=True)),
    }


@given(calls())
def test_linear(call: Call) -> None:
    result = native_linear.linear(*call.values())
    if native_linear.tiles() and result is NotImplemented:  # of many rows
        return
    assert result is not NotImplemented
    wanted = reference.linear(*call.values())
    assert result.dtype is wanted.dtype
    assert torch.equal(result, wanted)


def one_call(**changes: Any) -> Call:
    generator = torch.Generator().manual_seed(0)
    call: Call = {
        "x": integers((3, 8), torch.uint8, generator),
        "x_scale": 0.02,
        "x_zero_point": 100,
        "weight": integers((20, 8), torch.int8, generator),
        "weight_scale": torch.rand(20, generator=generator) / 64 + 2**-9,
        "weight_zero_point": torch.zeros(20, dtype=torch.int32),
        "bias": torch.randn(20, generator=generator),
        **{"scale": 0.05, "zero_point": 120, "dtype": torch.uint8, "low": 0, "high": 255},
    }
    return {**call, **changes}


@pytest.mark.parametrize(
    "changes",
    [
        {"x": torch.zeros(0, 8, dtype=torch.uint8)},
        {"x": torch.zeros(3, 8, dtype=torch.int32)},
        {"dtype": torch.int32, "low": -(2**31), "high": 2**31 - 1},
        {"x_zero_point": 256},
        {"x": torch.zeros(3, 6, dtype=torch.uint8), "weight": torch.ones(20, 6, dtype=torch.int8)},
    ],
)
def test_others_are_declined(changes: Call) -> None:
    call = one_call(**changes)
    assert native_linear.linear(*call.values()) is NotImplemented
    assert torch.equal(kernels.linear(*call.values()), reference.linear(*call.values()))


@pytest.mark.parametrize("name", ["weight", "weight_scale", "weight_zero_point", "bias"])
def test_changes_are_seen(name: str) -> None:
    """What is packed follows parameters changed in place, and those put in their stead."""
    call = one_call()
    before = native_linear.linear(*call.values()).clone()
    call[name].add_(3)
    assert torch.equal(native_linear.linear(*call.values()), reference.linear(*call.values()))
    assert not torch.equal(native_linear.linear(*call.values()), before)
    call[name] = call[name] - 3
    assert torch.equal(native_linear.linear(*call.values()), before)


def test_any_layout_of_the_input() -> None:
    call = one_call()
    call["x"] = call["x"].t().contiguous().t()
    assert torch.equal(native_linear.linear(*call.values()), reference.linear(*call.values()))


@given(calls(), st.booleans(), st.sampled_from([1.0, 1e-3, 1e30]))
def test_dynamic(call: Call, reduce_range: bool, size: float) -> None:
    if native_linear.tiles():
        return
    x = torch.randn(call["x"].shape) * size
    layer = [call[name] for name in ("weight", "weight_scale", "weight_zero_point", "bias")]
    result = native_linear.linear_dynamic(x, *layer, reduce_range)
    assert torch.equal(result, kernels.linear_dynamic.reference(x, *layer, reduce_range))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_dynamic_of_what_is_not_finite(bad: float) -> None:
    call = one_call()
    layer = [call[name] for name in ("weight", "weight_scale", "weight_zero_point", "bias")]
    x = torch.randn(3, 8)
    x[2, 7] = bad
    assert native_linear.linear_dynamic(x, *layer, False) is NotImplemented
    assert kernels.linear_dynamic(x, *layer, False).isnan().all()
    assert native_linear.linear_dynamic(x.t().contiguous().t(), *layer, False) is NotImplemented


def test_dynamic_sees_changes() -> None:
    call, x = one_call(), torch.randn(3, 8)
    for name in ("weight", "weight_scale", "weight_zero_point", "bias"):
        layer = {name: call[name] for name in ("weight", "weight_scale", "weight_zero_point", "bias")}
        before = kernels.linear_dynamic(x, *layer.values(), False)
        call[name].add_(3)
        after = kernels.linear_dynamic(x, *layer.values(), False)
        assert not torch.equal(after, before)
        assert torch.equal(after, kernels.linear_dynamic.reference(x, *layer.values(), False))
