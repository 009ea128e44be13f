"""What stands between products, in C: the plain formulas' very numbers, or declined."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from kernels.calls import BYTES, SCALE_KINDS, Call, scales, zero_points
from kernels.normalizations import calls
from torch import Tensor

import eagerq
from eagerq import kernels, native
from eagerq.kernels import dynamic, normalization, reference
from eagerq.kernels.activation import look_up

pytestmark = pytest.mark.skipif(not native.available, reason="the C library was not built: no compiler at installation")

# around the vector widths, and beyond where the work is split between threads
COUNTS = st.sampled_from([1, 7, 16, 63, 64, 65, 8191, 8193, 40_000])


def reals(count: int, seed: int, power: bool) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, generator=generator) * 10 ** (torch.rand(1, generator=generator) * 6 - 3)
    return (x * 64).round() / 64 if power else x


@given(COUNTS, BYTES, SCALE_KINDS, st.data())
def test_dequantize(count: int, dtype: torch.dtype, kind: str, data: st.DataObject) -> None:
    q = torch.arange(count).to(torch.uint8).view(dtype)
    scale, zero_point = data.draw(scales(kind)), data.draw(zero_points(dtype))
    assert torch.equal(native.dequantize(q, scale, zero_point), reference.dequantize(q, scale, zero_point))


def test_dequantized_values_lie_as_the_integers_do() -> None:
    q = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8).to(memory_format=torch.channels_last)
    real = kernels.dequantize(q, 0.5, 3)
    assert real.stride() == q.stride()
    assert torch.equal(real, reference.dequantize(q, 0.5, 3))
    apart = q[..., ::2]
    assert native.dequantize(apart, 0.5, 3) is NotImplemented
    assert torch.equal(kernels.dequantize(apart, 0.5, 3), reference.dequantize(apart, 0.5, 3))


@given(COUNTS, st.integers(0, 1000), st.booleans(), st.booleans(), st.sampled_from([0.0, 3.0, -3.0]))
def test_quantize_by_its_own_range(count: int, seed: int, power: bool, reduce_range: bool, shift: float) -> None:
    check_own_range(reals(count, seed, power) + shift, reduce_range)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40), st.booleans())
@example([0.0, 0.0], False)
@example([-4.0, 4.0], False)
@example([-1e-45, 1e-45], True)
@example([-3e38, 3e38], True)
def test_quantize_any_numbers_by_their_own_range(values: list[float], reduce_range: bool) -> None:
    check_own_range(torch.tensor(values, dtype=torch.float32), reduce_range)


@given(st.floats(0.001, 2.0), st.integers(20, 230))
def test_quantize_near_ties(scale: float, zero_point: int) -> None:
    """Halves of steps: the product is rounded before the zero point is added."""
    steps = torch.arange(-zero_point, 255 - zero_point) + 0.5
    steps[0], steps[-1] = -zero_point, 255 - zero_point
    check_own_range(steps * scale, False)


def check_own_range(x: Tensor, reduce_range: bool) -> None:
    found = native.quantize_dynamic(x, 127 if reduce_range else 255)
    integers, scale, zero_point = dynamic._by_tensors(x, reduce_range)
    assert found is not None
    assert found[1:] == (scale.item(), int(zero_point))
    assert torch.equal(found[0], integers)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 20_000, 39_999])
def test_what_is_not_finite_is_declined(bad: float, place: int) -> None:
    x = torch.randn(40_000)
    x[place] = bad
    assert native.quantize_dynamic(x, 255) is None


@given(calls("layer_norm", dtypes=BYTES))
def test_layer_norm(call: Call) -> None:
    assert torch.equal(native.layer_norm(*call.values()), normalization._layer_norm(*call.values()))


@pytest.mark.parametrize("width", [768, 20_000])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_layer_norm_of_long_lines(width: int, dtype: torch.dtype) -> None:
    x = torch.randint(0, 256, (40, width), dtype=torch.uint8).view(dtype)
    x[3] = 7  # without deviation
    x[4, :-1] = 100  # nearly so
    call = (x, 0.03, 5, [width], torch.randn(width), torch.randn(width), 1e-5, 0.02, 100, torch.uint8, 0, 255)
    assert torch.equal(native.layer_norm(*call), normalization._layer_norm(*call))


def test_layer_norm_leaves_other_memory_to_torch() -> None:
    x = torch.randint(0, 256, (4, 6), dtype=torch.uint8)
    output = (0.02, 100, torch.uint8, 0, 255)
    for weight, lines in ((torch.randn(6).double(), x), (torch.randn(12)[::2], x), (None, x.t().contiguous().t())):
        call = (lines, 0.03, 5, [6], weight, None, 1e-5, *output)
        assert native.layer_norm(*call) is NotImplemented
        assert torch.equal(kernels.layer_norm(*call), normalization._layer_norm(*call))


@given(COUNTS, BYTES, BYTES)
def test_look_up(count: int, dtype: torch.dtype, answers: torch.dtype) -> None:
    x = torch.randint(0, 256, (count,), dtype=torch.uint8)
    table = torch.randint(0, 256, (256,), dtype=torch.uint8).view(answers)
    found = look_up(x.view(dtype), table)
    assert found.dtype is answers
    assert torch.equal(found, table[x.long()])


@given(COUNTS, BYTES, st.sampled_from(["none", "tanh"]), SCALE_KINDS, st.data())
def test_gelu_by_table(count: int, dtype: torch.dtype, approximate: str, kind: str, data: st.DataObject) -> None:
    scale, zero_point = data.draw(scales(kind)), data.draw(zero_points(dtype))
    q = eagerq.QTensor(torch.arange(count).to(torch.uint8).view(dtype), scale, zero_point)
    info = torch.iinfo(dtype)
    real = F.gelu(q.dequantize(), approximate=approximate)
    wanted = reference.quantize(real, scale, zero_point, dtype, info.min, info.max)
    result: Any = F.gelu(q, approximate=approximate)
    assert torch.equal(result.int_repr(), wanted)
    assert (result.q_scale(), result.q_zero_point()) == (scale, zero_point)


@pytest.mark.parametrize("length", [5, 258, 259, 511, 3000])
@pytest.mark.parametrize("zero_point", [0, 255])
def test_long_products(length: int, zero_point: int) -> None:
    """Sums that float32 has, and those that it has not."""
    a = torch.full((2, length), 255 - zero_point, dtype=torch.uint8)
    b = torch.full((length, 3), 255 - zero_point, dtype=torch.uint8)
    a[0, 0] += 1 if zero_point else -1
    side = (1.0, zero_point)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = kernels.matmul(a, *side, b, *side, 1.0, 0, torch.int32, -(2**31), 2**31 - 1)
    result = kernels.matmul(a, *side, b, *side, 1.0, 0, torch.int32, -(2**31), 2**31 - 1)
    total = (a.long() - zero_point) @ (b.long() - zero_point)
    wanted = reference.quantize(total.to(torch.float32), 1.0, 0, torch.int32, -(2**31), 2**31 - 1)
    assert torch.equal(result, wanted)
    assert torch.equal(narrow, wanted)
