"""Packed weights give the plain ones back, byte for byte, whatever their shape."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from eagerq import kernels, native
from eagerq.kernels import onednn
from eagerq.kernels.packing import pack, unpacker

WIDTHS = st.one_of(st.integers(1, 70), st.sampled_from([80, 127, 128, 129, 144, 193, 257]))
TAPS = st.tuples(st.integers(1, 9), st.integers(1, 5))


def weight_of(shape: tuple[int, ...], data: st.DataObject) -> Tensor:
    """Integers from end to end, seldom the same twice in a row."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    weight = torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)
    last = len(shape) == 4 and data.draw(st.booleans())
    return weight.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def packed(weight: Tensor, depthwise: bool, data: st.DataObject) -> native.PackedConv:
    outputs = len(weight)
    zero_point = torch.tensor(data.draw(st.lists(st.integers(-128, 127), min_size=outputs, max_size=outputs)))
    zero_point = zero_point.int() if data.draw(st.booleans()) else torch.zeros(1, dtype=torch.int32)
    bias = torch.randn(outputs) if data.draw(st.booleans()) else None
    return native.PackedConv(weight, torch.ones(1), zero_point, bias, depthwise)


@given(WIDTHS, WIDTHS, TAPS, st.data())
def test_dense(outputs: int, inputs: int, taps: tuple[int, int], data: st.DataObject) -> None:
    weight = weight_of((outputs, inputs, *taps), data)
    assert torch.equal(packed(weight, False, data).unpack(), weight)


@given(WIDTHS, TAPS, st.data())
def test_depthwise(channels: int, taps: tuple[int, int], data: st.DataObject) -> None:
    weight = weight_of((channels, 1, *taps), data)
    assert torch.equal(packed(weight, True, data).unpack(), weight)


def restored(weight: Tensor, form: Any) -> Tensor:
    """What is made of the form once the weight has gone."""
    zero_point = torch.zeros(1, dtype=torch.int32)
    assert kernels.packing.kept(weight, zero_point, "drawn", lambda: form) is form
    unpack = unpacker(weight)
    assert unpack is not None
    again = unpack()
    assert (again.stride(), again.dtype) == (weight.stride(), torch.int8)
    assert kernels.packing.kept(again, zero_point, "drawn", lambda: None) is form
    return again


@given(WIDTHS, WIDTHS, TAPS, st.data())
def test_made_again(outputs: int, inputs: int, taps: tuple[int, int], data: st.DataObject) -> None:
    """In the order in memory that it had; and what it was made of serves it too."""
    weight = weight_of((outputs, inputs, *taps), data)
    assert torch.equal(restored(weight, packed(weight, False, data)), weight)
    flat = weight_of((outputs, inputs), data)
    assert torch.equal(restored(flat, packed(flat[:, :, None, None], False, data)), flat)


@pytest.mark.skipif(not onednn.available(), reason="oneDNN's operators are not there")
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 3), st.sampled_from([1, 2, 3]), st.data())
def test_onednn(outputs: int, inputs: int, groups: int, dims: int, data: st.DataObject) -> None:
    weight = weight_of((outputs * groups, inputs, *[data.draw(st.integers(1, 3)) for _ in range(dims)]), data)
    ones, shifted = [1] * dims, data.draw(st.integers(0, 1))
    shape = [1, inputs * groups, *[7] * dims] if data.draw(st.booleans()) else None
    scale, zero_point = torch.ones(len(weight)), torch.zeros(1, dtype=torch.int32)
    prepack = torch.ops.onednn.qconv_prepack.default
    form = pack(
        weight, zero_point, "conv", lambda: prepack(weight, scale, 1.0, shifted, ones, ones, ones, groups, shape)
    )
    assert torch.equal(restored(weight, form), weight)
    flat = weight_of((outputs, inputs), data)
    form = pack(flat, zero_point, "linear", lambda: torch.ops.onednn.qlinear_prepack.default(flat, None))
    assert torch.equal(restored(flat, form), flat)


def test_only_what_gives_the_weight_back() -> None:
    """A form of another weight, or one made before a change, is none of its own."""
    weight, zero_point = torch.ones(4, 4, 1, 1, dtype=torch.int8), torch.zeros(1, dtype=torch.int32)
    assert unpacker(weight) is None
    other = native.PackedConv(-weight, torch.ones(1), zero_point, None, False)
    kernels.packing.kept(weight, zero_point, "other", lambda: other)
    assert unpacker(weight) is None
    right = native.PackedConv(weight, torch.ones(1), zero_point, None, False)
    kernels.packing.kept(weight, zero_point, "right", lambda: right)
    assert unpacker(weight) is not None
    weight[0] = 2
    assert unpacker(weight) is None
