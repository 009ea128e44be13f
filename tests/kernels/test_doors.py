"""What is made of the doors, and their operators under torch's own checks, compilers and exporters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernels.calls import (
    BYTES,
    LAYOUTS,
    SCALE_KINDS,
    Call,
    bounds,
    conv_calls,
    integers,
    linear_calls,
    scales,
    zero_points,
)
from kernels.test_reference import quantized
from torch import Tensor

from eagerq import kernels
from eagerq.kernels import reference


@given(st.data())
def test_cat(data: st.DataObject) -> None:
    kind, dtype = data.draw(SCALE_KINDS), data.draw(BYTES)
    zero_point, scale = data.draw(zero_points(dtype)), data.draw(scales(kind))
    low, high = data.draw(bounds(dtype, zero_point))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    dim = data.draw(st.integers(-3, 2))
    parts, wanted = [], []
    for length in data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=4)):
        shape = [2, 3, 5]
        shape[dim] = length
        same = data.draw(st.booleans())
        part_type = dtype if same else data.draw(BYTES)
        part = (scale, zero_point) if same else (data.draw(scales(kind)), data.draw(zero_points(part_type)))
        q = integers(shape, part_type, generator)
        parts.append((q, *part))
        real = reference.dequantize(q, *part)
        wanted.append(q.clamp(low, high) if same else quantized(real, scale, zero_point, dtype, low, high))
    tensors, part_scales, part_zero_points = zip(*parts, strict=True)
    result = kernels.cat(tensors, part_scales, part_zero_points, dim, scale, zero_point, dtype, low, high)
    assert torch.equal(result, torch.cat(wanted, dim))


def test_cat_of_two_integer_types() -> None:
    """Equal parameters are not enough to copy integers."""
    parts = [torch.tensor([5, 100], dtype=torch.uint8), torch.tensor([-5, 100], dtype=torch.int8)]
    result = kernels.cat(parts, [0.5, 0.5], [3, 3], 0, 0.5, 3, torch.uint8, 0, 255)
    assert result.dtype is torch.uint8
    assert result.tolist() == [5, 100, 0, 100]


@given(st.data())
def test_matmul(data: st.DataObject) -> None:
    kind, dtype = data.draw(SCALE_KINDS), data.draw(BYTES)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    a_shape, b_shape = data.draw(
        st.sampled_from([((3, 20), (20, 4)), ((2, 5, 7), (7, 3)), ((4,), (4,)), ((2, 0), (0, 3))])
    )
    a_type, b_type = data.draw(BYTES), data.draw(BYTES)
    a, b = integers(a_shape, a_type, generator), integers(b_shape, b_type, generator)
    sa, sb = data.draw(scales(kind)), data.draw(scales(kind))
    za, zb, zo = data.draw(zero_points(a_type)), data.draw(zero_points(b_type)), data.draw(zero_points(dtype))
    scale = data.draw(scales(kind)) * 2**9
    low, high = data.draw(bounds(dtype, zo))
    total = (a.numpy().astype(np.int64) - za) @ (b.numpy().astype(np.int64) - zb)
    real = torch.from_numpy(np.asarray(np.float32(total) * (np.float32(sa) * np.float32(sb))))
    result = kernels.matmul(a, sa, za, b, sb, zb, scale, zo, dtype, low, high)
    assert torch.equal(result, quantized(real, scale, zo, dtype, low, high))


# --- operators --------------------------------------------------------------------------------------


def assert_fake_is_true(operator: Any, arguments: Any) -> None:
    """The fake implementation tells the real one's shape, dtype and strides (where an axis has any)."""
    made = operator(*arguments)
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(value) if isinstance(value, Tensor) else value for value in arguments]
        fake = operator(*fakes)
    assert fake.shape == made.shape
    assert fake.dtype is made.dtype
    assert fake.device == made.device
    if made.numel():
        told = [stride for size, stride in zip(fake.shape, fake.stride(), strict=True) if size > 1]
        assert told == [stride for size, stride in zip(made.shape, made.stride(), strict=True) if size > 1]


@given(linear_calls())
def test_fake_linear(call: Call) -> None:
    assert_fake_is_true(torch.ops.eagerq.linear.default, call.values())


@pytest.mark.parametrize("in_padding", [False, True])
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_fake_conv(dim: int, in_padding: bool) -> None:
    @given(conv_calls(dim, in_padding=in_padding))
    def check(call: Call) -> None:
        assert_fake_is_true(torch.ops.eagerq.conv.default, call.values())

    check()


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(4, 5),
        torch.randn(4, 5).t(),
        torch.randn(4, 5, 2)[..., 0],
        torch.randn(1, 5).expand(3, 5),
        torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        torch.randn(2, 3, 4, 4)[:, :, ::2],
        torch.randn(()),
        torch.randn(0, 3),
    ],
    ids=lambda x: f"{list(x.shape)} {list(x.stride())}",
)
def test_fake_quantize(x: Tensor) -> None:
    assert_fake_is_true(torch.ops.eagerq.quantize.default, (x, 0.1, 3, torch.uint8, 0, 255))


def quantize_call() -> Call:
    return {"x": torch.randn(3, 4), "scale": 0.1, "zero_point": 3, "dtype": torch.uint8, "low": 0, "high": 255}


def linear_call(x_shape: tuple[int, ...] = (3, 4)) -> Call:
    generator = torch.Generator().manual_seed(0)
    return {
        "x": integers(x_shape, torch.uint8, generator),
        "x_scale": 0.02,
        "x_zero_point": 100,
        "weight": integers((5, x_shape[-1]), torch.int8, generator),
        "weight_scale": torch.rand(5, generator=generator) * 0.01,
        "weight_zero_point": torch.zeros(5, dtype=torch.int32),
        "bias": torch.randn(5, generator=generator),
        "scale": 0.03,
        "zero_point": 120,
        "dtype": torch.uint8,
        "low": 0,
        "high": 255,
    }


def conv_call(dim: int) -> Call:
    generator = torch.Generator().manual_seed(dim)
    call = linear_call()
    call["x"] = integers((2, 4, *[7] * dim), torch.uint8, generator)
    call["weight"] = integers((5, 4, *[3] * dim), torch.int8, generator)
    middle = {"stride": [1] * dim, "padding": [1] * dim, "dilation": [1] * dim, "groups": 1}
    names = list(call)
    at = names.index("scale")
    return {**{name: call[name] for name in names[:at]}, **middle, **{name: call[name] for name in names[at:]}}


OPERATORS: dict[str, tuple[str, Callable[[], Call]]] = {
    "quantize": ("quantize", quantize_call),
    "linear": ("linear", linear_call),
    "linear of batches": ("linear", lambda: linear_call((2, 3, 4))),
    **{f"conv{dim}d": ("conv", lambda dim=dim: conv_call(dim)) for dim in (1, 2, 3)},
}


@pytest.mark.parametrize("case", OPERATORS)
def test_operators_pass_torchs_own_checks(case: str) -> None:
    name, call = OPERATORS[case]
    torch.library.opcheck(getattr(torch.ops.eagerq, name).default, tuple(call().values()))


@pytest.mark.parametrize("case", OPERATORS)
def test_operators_compute_what_the_doors_do(case: str) -> None:
    name, call = OPERATORS[case]
    arguments = tuple(call().values())
    door = getattr(kernels, name)(*arguments)
    assert torch.equal(getattr(torch.ops.eagerq, name)(*arguments), door)
    assert torch.equal(getattr(reference, name)(*arguments), door)


# --- compiled and exported --------------------------------------------------------------------------


@pytest.fixture
def compiled_anew() -> Iterator[None]:
    """Not out of a cache, which does not notice that an implementation has changed."""
    torch._dynamo.reset()
    with torch._inductor.config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
        yield
    torch._dynamo.reset()


LAYERS = {"linear": linear_call((8, 64)), **{f"conv{dim}d": conv_call(dim) for dim in (1, 2, 3)}}
# Parameters of a part and of the result that make many near ties: products that float32 rounds to a
# tie, and so to the wrong side of it, unless product and sum are rounded together.
NEAR_TIES = (1.0599499940872192, 255, 2.1198999881744385, 130)
# Sums of two with these are halves of a step of twice the scale, but for float32's rounding.
HALVES = (0.07310000061988831, 77)


def everything(images: Tensor, rows: Tensor, q: Tensor) -> tuple[Tensor, ...]:
    """Each door once or more, one after the other."""
    whole, out = (torch.uint8, 0, 255), (0.05, 120, torch.uint8, 0, 255)
    x = kernels.quantize(images, 0.03, 128, *whole)
    made = [x]
    for name, call in LAYERS.items():
        shape = {"linear": (8, 64), "conv1d": (2, 4, 64), "conv2d": (2, 4, 8, 8), "conv3d": (2, 4, 4, 4, 4)}[name]
        arguments = {**call, "x": x.reshape(shape), "x_scale": 0.03, "x_zero_point": 128}
        made.append((kernels.linear if name == "linear" else kernels.conv)(*arguments.values()))
    a, b = kernels.quantize(rows, 0.0301, 90, *whole), kernels.quantize(rows.flip(1), *out)
    made.append(kernels.add(a, 0.0301, 90, b, 0.05, 120, 0.0613, 101, *whole))
    made.append(kernels.mul(a, 0.0301, 90, b, 0.05, 120, 0.0613, 101, torch.int8, -128, 127))
    made.append(kernels.matmul(a, 0.0301, 90, b.t(), 0.05, 120, 0.5, 101, *whole))
    made.append(kernels.cat([a, b], [0.0301, 0.05], [90, 120], 1, *out))
    channels = torch.tensor([0.01, 0.02, 0.03]), torch.tensor([0, 3, -5])
    each = kernels.quantize_per_channel(rows, *channels, 0, torch.int8, -128, 127)
    made += [each, kernels.dequantize_per_channel(each, *channels, 0), kernels.dequantize(a, 0.0301, 90)]
    part_scale, part_zero_point, scale, zero_point = NEAR_TIES
    made.append(kernels.cat([q], [part_scale], [part_zero_point], 0, scale, zero_point, *whole))
    made.append(kernels.add(q, *HALVES, q.flip(0), *HALVES, 2 * HALVES[0], 101, *whole))
    one = (torch.ones(1, 1, dtype=torch.uint8), 1.0, 0)
    made.append(kernels.matmul(q[:, None], part_scale, part_zero_point, *one, scale, zero_point, *whole))
    return tuple(made)


def assert_same(results: Any, wanted: Any) -> None:
    for number, (one, other) in enumerate(zip(results, wanted, strict=True)):
        assert one.dtype is other.dtype, number
        assert torch.equal(one, other), number
        assert one.stride() == other.stride(), number


def inputs() -> tuple[Tensor, ...]:
    return torch.randn(2, 4, 64), torch.randn(3, 100) * 4, torch.arange(256, dtype=torch.int32).to(torch.uint8)


def test_near_ties() -> None:
    q, (part_scale, part_zero_point, scale, zero_point) = inputs()[2], NEAR_TIES
    real = reference.dequantize(q, part_scale, part_zero_point)
    result = kernels.cat([q], [part_scale], [part_zero_point], 0, scale, zero_point, torch.uint8, 0, 255)
    assert torch.equal(result, quantized(real, scale, zero_point, torch.uint8, 0, 255))
    apart = (real * reference.single(1 / scale) + zero_point).round().clamp(0, 255)
    assert int((apart != result).sum()) > 10
    total = reference.dequantize(q, *HALVES) + reference.dequantize(q.flip(0), *HALVES)
    apart = (total * reference.single(0.5 / HALVES[0])).round().add(101).clamp(0, 255)
    result = kernels.add(q, *HALVES, q.flip(0), *HALVES, 2 * HALVES[0], 101, torch.uint8, 0, 255)
    assert int((apart != result).sum()) > 10


def test_compiled(compiled_anew: None) -> None:
    given_inputs = inputs()
    assert_same(torch.compile(everything, fullgraph=True)(*given_inputs), everything(*given_inputs))


class Everything(torch.nn.Module):
    def forward(self, images: Tensor, rows: Tensor, q: Tensor) -> tuple[Tensor, ...]:
        return everything(images, rows, q)


@pytest.mark.parametrize("strict", [False, True])
def test_exported(strict: bool) -> None:
    given_inputs = inputs()
    program = torch.export.export(Everything(), given_inputs, strict=strict)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {f"eagerq.{name}.default" for name in ("quantize", "linear", "conv")} <= names
    assert_same(program.module()(*given_inputs), everything(*given_inputs))


@given(LAYOUTS, st.sampled_from([1, 2]))
def test_quantize_keeps_the_layout(layout: str, batch: int) -> None:
    from kernels.calls import laid_out

    x = laid_out(torch.randn(batch, 3, 4, 5), layout)
    q = kernels.quantize(x, 0.1, 3, torch.uint8, 0, 255)
    assert q.is_contiguous(memory_format=torch.channels_last) == x.is_contiguous(memory_format=torch.channels_last)
