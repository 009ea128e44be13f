"""Transposed convolution: sums of their own in numpy, the fast way as the reference, shapes as torch's."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.calls import BYTES, LAYOUTS, SCALE_KINDS, Call, bounds, expected, integers, laid_out, scales, zero_points
from kernels.test_doors import assert_fake_is_true
from torch import nn

from eagerq import kernels
from eagerq.kernels import onednn, reference, transposed

needs_onednn = pytest.mark.skipif(
    not onednn.available() or onednn._saturates(), reason="needs oneDNN on a processor with VNNI"
)


@st.composite
def transposed_calls(draw: st.DrawFn, dim: int, dtypes: Any = BYTES) -> Call:
    """Strides beyond the kernel, paddings beyond it, output padding, dilation; groups of many shapes."""
    axes = []
    for _ in range(dim):
        taps, stride, step = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
        more = draw(st.integers(0, max(stride, step) - 1))
        pad = draw(st.integers(0, step * (taps - 1) + 1))
        # one output at least
        least = max(1, -(-(1 + 2 * pad - more - 1 - step * (taps - 1)) // stride) + 1)
        axes.append((least + draw(st.integers(0, 4)), taps, stride, pad, more, step))
    length, taps_, stride_, pad_, more_, step_ = (list(values) for values in zip(*axes, strict=True))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    inside, outside = draw(st.sampled_from([1, 3, 8])), draw(st.sampled_from([1, 3, 8]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kind, x_dtype, dtype = draw(SCALE_KINDS), draw(dtypes), draw(dtypes)
    x_zero_point, zero_point = draw(zero_points(x_dtype)), draw(zero_points(dtype))
    x_scale, count = draw(scales(kind)), draw(st.sampled_from([1, outside]))
    weight_scale = torch.tensor([draw(scales(kind)) for _ in range(count)])
    scale = (
        x_scale * weight_scale.max().item() * 2.0 ** round(np.log2(128 * 64 * (inside * np.prod(taps_)) ** 0.5 / 40))
    )
    bias = torch.randn(groups * outside, generator=generator) * scale * 20 if draw(st.booleans()) else None
    low, high = draw(bounds(dtype, zero_point))
    x_shape = (draw(st.integers(1, 3)), groups * inside, *length)
    return {
        "x": laid_out(integers(x_shape, x_dtype, generator), draw(LAYOUTS)),
        "x_scale": x_scale,
        "x_zero_point": x_zero_point,
        "weight": integers((groups * inside, outside, *taps_), torch.int8, generator),
        "weight_scale": weight_scale,
        "weight_zero_point": torch.zeros(count, dtype=torch.int32),
        "bias": bias,
        "stride": stride_,
        "padding": pad_,
        "output_padding": more_,
        "dilation": step_,
        "groups": groups,
        "scale": scale,
        "zero_point": zero_point,
        "dtype": dtype,
        "low": low,
        "high": high,
    }


def float_layer(call: Call) -> Any:
    """torch's own layer of the same shape, for the size of its result."""
    inside, outside, *kernel = call["weight"].shape
    names = ("stride", "padding", "output_padding", "dilation")
    how = {name: tuple(call[name]) for name in names} | {"groups": call["groups"]}
    return getattr(nn, f"ConvTranspose{len(kernel)}d")(inside, outside * call["groups"], tuple(kernel), **how)


def sums(call: Call) -> np.ndarray:
    """Each input adds its products to the outputs that it reaches; in int64."""
    x = call["x"].numpy().astype(np.int64) - call["x_zero_point"]
    shift = call["weight_zero_point"].numpy().astype(np.int64)
    weight = call["weight"].numpy().astype(np.int64)
    weight = weight - shift.reshape(1, -1, *[1] * (weight.ndim - 2))
    groups, (inside, outside, *kernel) = call["groups"], weight.shape
    per_group = inside // groups
    # the whole of it, before the padding is cut off and the output padding added
    size = [
        (length - 1) * stride + step * (taps - 1) + 1
        for length, stride, step, taps in zip(x.shape[2:], call["stride"], call["dilation"], kernel, strict=True)
    ]
    whole = np.zeros(
        (x.shape[0], groups * outside, *(s + m for s, m in zip(size, call["output_padding"], strict=True)))
    )
    for place in itertools.product(*map(range, kernel)):
        where = tuple(
            slice(tap * step, tap * step + (length - 1) * stride + 1, stride)
            for tap, step, length, stride in zip(place, call["dilation"], x.shape[2:], call["stride"], strict=True)
        )
        for group in range(groups):
            mine = slice(group * per_group, (group + 1) * per_group)
            products = np.einsum("ni...,io->no...", x[:, mine], weight[(mine, slice(None), *place)])
            whole[(slice(None), slice(group * outside, (group + 1) * outside), *where)] += products
    cut = tuple(slice(pad, length - pad) for pad, length in zip(call["padding"], whole.shape[2:], strict=True))
    return whole[(slice(None), slice(None), *cut)].astype(np.int64)


def wanted(call: Call) -> torch.Tensor:
    scale = call["weight_scale"]
    each = {**call, "weight_scale": scale if len(scale) == 1 else scale.repeat(call["groups"])}
    return expected(each, sums(call))


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_reference_follows_the_rule(dim: int) -> None:
    @settings(max_examples=15)
    @given(transposed_calls(dim), st.data())
    def check(call: Call, data: st.DataObject) -> None:
        count = len(call["weight_scale"])
        shifts = data.draw(st.lists(st.integers(-128, 127), min_size=count, max_size=count) | st.just([0] * count))
        call = {**call, "weight_zero_point": torch.tensor(shifts, dtype=torch.int32)}
        result = reference.conv_transpose(*call.values())
        assert result.shape == float_layer(call)(call["x"].float()).shape
        assert torch.equal(result, wanted(call))
        assert torch.equal(kernels.conv_transpose(*call.values()), result)
        assert result.movedim(1, -1).is_contiguous()

    check()


@needs_onednn
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_fast_is_the_reference(dim: int) -> None:
    taken = []

    @settings(max_examples=40)
    @given(transposed_calls(dim))
    def check(call: Call) -> None:
        result = transposed.conv_transpose(*call.values())
        taken.append(result is not NotImplemented)
        if taken[-1]:
            slow = reference.conv_transpose(*call.values())
            assert torch.equal(result, slow)
            assert result.movedim(1, -1).is_contiguous()

    check()
    assert sum(taken) > 0.8 * len(taken)


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_fake(dim: int) -> None:
    @settings(max_examples=15)
    @given(transposed_calls(dim))
    def check(call: Call) -> None:
        assert_fake_is_true(torch.ops.eagerq.conv_transpose.default, call.values())

    check()


def call_of(x_shape: tuple[int, ...], weight_shape: tuple[int, ...], **changed: Any) -> Call:
    generator = torch.Generator().manual_seed(7)
    dim = len(x_shape) - 2
    return {
        "x": integers(x_shape, torch.uint8, generator),
        "x_scale": 0.02,
        "x_zero_point": 3,
        "weight": integers(weight_shape, torch.int8, generator),
        "weight_scale": torch.rand(weight_shape[1], generator=generator) * 0.01 + 0.001,
        "weight_zero_point": torch.zeros(weight_shape[1], dtype=torch.int32),
        "bias": None,
        "stride": [2] * dim,
        "padding": [0] * dim,
        "output_padding": [0] * dim,
        "dilation": [1] * dim,
        "groups": 1,
        "scale": 0.1 * weight_shape[0] ** 0.5 * 2,
        "zero_point": 100,
        "dtype": torch.uint8,
        "low": 0,
        "high": 255,
        **changed,
    }


@pytest.mark.parametrize(
    ("x_shape", "weight_shape", "changed"),
    [
        ((2, 16, 7, 7), (16, 8, 4, 4), {"padding": [1, 1]}),  # twice the size
        ((1, 32, 8, 8), (32, 16, 2, 2), {}),
        ((2, 16, 7, 9), (16, 24, 3, 3), {"padding": [1, 1], "output_padding": [1, 1]}),
        ((1, 8, 5, 5), (8, 1, 16, 16), {"stride": [8, 8], "padding": [4, 4], "groups": 8}),  # upsampling
        ((1, 2, 5, 5), (2, 3, 11, 3), {"padding": [9, 0]}),  # more than there is
        ((2, 16, 20), (16, 8, 4), {"padding": [1]}),
        ((1, 4, 3, 6, 6), (4, 4, 3, 3, 3), {"padding": [1, 1, 1]}),
    ],
)
def test_ordinary_layers(x_shape: tuple[int, ...], weight_shape: tuple[int, ...], changed: Call) -> None:
    call = call_of(x_shape, weight_shape, **changed)
    for _ in range(2):  # packed before, the second time
        assert torch.equal(kernels.conv_transpose(*call.values()), wanted(call))


@pytest.mark.parametrize(
    "changed",
    [
        {"dtype": torch.int32, "low": -(2**31), "high": 2**31 - 1},
        {"weight_zero_point": torch.tensor([0, 0, 5], dtype=torch.int32)},
        {"x": torch.zeros(0, 2, 5, 5, dtype=torch.uint8)},
    ],
)
def test_left_to_reference(changed: Call) -> None:
    call = call_of((1, 2, 5, 5), (2, 3, 11, 3), **changed)
    assert transposed.conv_transpose(*call.values()) is NotImplemented
    assert torch.equal(kernels.conv_transpose(*call.values()), wanted(call))


def test_shapes_that_cannot_be_are_torchs_to_refuse() -> None:
    for changed, words in (
        ({"output_padding": [2, 0]}, "output padding must be smaller"),
        ({"padding": [6, 6]}, "Output size is too small"),
        ({"x": torch.zeros(1, 3, 5, 5, dtype=torch.uint8)}, "channels"),
    ):
        with pytest.raises(RuntimeError, match=words):
            kernels.conv_transpose(*call_of((1, 2, 5, 5), (2, 3, 3, 3), **changed).values())
