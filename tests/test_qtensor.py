"""The integer tensor itself: making one, asking it, copying, moving, saving and printing it."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Oracle
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import eagerq
from eagerq import QTensor, quantize_per_channel, quantize_per_tensor
from eagerq.errors import EagerqError, InvalidArgumentError, InvalidInputError

DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32)


def per_tensor(device: Any = "cpu") -> QTensor:
    x = torch.linspace(-2, 2, 2 * 4 * 3 * 3, device=device).reshape(2, 4, 3, 3)
    return quantize_per_tensor(x, 0.05, 60, torch.uint8)


def per_channel(device: Any = "cpu") -> QTensor:
    x = torch.linspace(-2, 2, 4 * 6, device=device).reshape(4, 6)
    scales = torch.tensor([0.1, 0.2, 0.3, 0.4], device=device)
    return quantize_per_channel(x, scales, torch.tensor([1, 0, -1, 5], device=device), 0, torch.int8)


BOTH: list[Any] = [pytest.param(per_tensor, id="per_tensor"), pytest.param(per_channel, id="per_channel")]


def same(a: QTensor, b: QTensor) -> bool:
    """The same class, integers and parameters."""

    def equal(one: Any, other: Any) -> bool:
        return torch.equal(one, other) if isinstance(one, Tensor) else one == other

    return (
        type(a) is type(b) is QTensor
        and a.int_repr().dtype is b.int_repr().dtype
        and torch.equal(a.int_repr(), b.int_repr())
        and equal(a.scale, b.scale)
        and equal(a.zero_point, b.zero_point)
        and a.axis == b.axis
    )


# --- making ---------------------------------------------------------------------------------------


@given(
    shape=st.lists(st.integers(0, 5), max_size=4),
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-8, 2),
    offset=st.floats(0, 1),
)
def test_per_tensor_integers_are_rounded_half_to_even_and_clamped(
    shape: list[int], dtype: torch.dtype, exponent: int, offset: float
) -> None:
    scale = 2.0**exponent  # a power of two: x / scale is exact, so that ties are ties
    limits = torch.iinfo(dtype)
    zero_point = max(limits.min, -1000) + int(offset * min(limits.max - limits.min, 2000))
    x = torch.randint(-700, 700, shape) * scale / 2
    q = quantize_per_tensor(x, scale, zero_point, dtype)
    expected = [min(max(round(value / scale + zero_point), limits.min), limits.max) for value in x.reshape(-1).tolist()]
    assert q.int_repr().dtype is dtype
    assert q.int_repr().reshape(-1).tolist() == expected
    assert q.shape == x.shape
    assert (q.q_scale(), q.q_zero_point()) == (scale, zero_point)


@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    data=st.data(),
    dtype=st.sampled_from((torch.uint8, torch.int8)),
)
def test_per_channel_is_per_tensor_on_each_channel(shape: list[int], data: st.DataObject, dtype: torch.dtype) -> None:
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    x = torch.randn(shape)
    scales = torch.rand(shape[axis]) + 0.01
    zero_points = torch.randint(0, 100, (shape[axis],))
    q = quantize_per_channel(x, scales, zero_points, axis, dtype)
    assert q.q_per_channel_axis() == axis % len(shape)
    for index in range(shape[axis]):
        one = quantize_per_tensor(x.select(axis, index), scales[index], zero_points[index], dtype)
        # the two sum x/scale and the zero point with and without a rounding in between
        assert (one.int_repr().int() - q.int_repr().select(axis, index).int()).abs().max() <= 1
        real = (q.int_repr().select(axis, index).long() - zero_points[index]) * scales[index]
        torch.testing.assert_close(q.dequantize().select(axis, index), real)


@given(
    shape=st.lists(st.integers(0, 5), max_size=4),
    signed=st.booleans(),
    scale=st.one_of(st.floats(1e-4, 1e3), st.integers(-10, 8).map(lambda exponent: 2.0**exponent)),
    offset=st.integers(0, 255),
)
def test_per_tensor_equals_the_oracle(ao: Oracle, shape: list[int], signed: bool, scale: float, offset: int) -> None:
    dtype, twin = (torch.int8, torch.qint8) if signed else (torch.uint8, torch.quint8)
    zero_point = offset + torch.iinfo(dtype).min
    x = (torch.randn(shape) * 100 * scale).mul(2).round().div(2)  # halves, for ties
    ours = quantize_per_tensor(x, scale, zero_point, dtype)
    theirs = torch.quantize_per_tensor(x, scale, zero_point, twin)
    assert torch.equal(ours.int_repr(), theirs.int_repr())
    assert torch.equal(ours.dequantize(), theirs.dequantize())
    assert (ours.q_scale(), ours.q_zero_point()) == (theirs.q_scale(), theirs.q_zero_point())
    assert ours.qscheme() == theirs.qscheme()


@given(rows=st.integers(1, 5), columns=st.integers(1, 6), axis=st.sampled_from((0, 1)))
def test_per_channel_equals_the_oracle(ao: Oracle, rows: int, columns: int, axis: int) -> None:
    x = torch.randn(rows, columns)
    count = x.shape[axis]
    scales, zero_points = torch.rand(count) * 0.1 + 0.001, torch.randint(-128, 128, (count,))
    ours = quantize_per_channel(x, scales, zero_points, axis, torch.int8)
    theirs = torch.quantize_per_channel(x, scales, zero_points, axis, torch.qint8)
    assert torch.equal(ours.int_repr(), theirs.int_repr())
    torch.testing.assert_close(ours.dequantize(), theirs.dequantize(), rtol=1e-6, atol=0)
    assert ours.q_per_channel_scales().tolist() == theirs.q_per_channel_scales().tolist()
    assert ours.q_per_channel_zero_points().tolist() == theirs.q_per_channel_zero_points().tolist()
    assert ours.q_per_channel_axis() == theirs.q_per_channel_axis()
    assert ours.qscheme() == theirs.qscheme()


@pytest.mark.parametrize("source", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_quantized_as_float32(source: torch.dtype, device: torch.device) -> None:
    x = torch.randn(50, device=device).to(source)
    q = quantize_per_tensor(x, 0.03, 7, torch.uint8)
    assert same(q, quantize_per_tensor(x.float(), 0.03, 7, torch.uint8))
    assert q.dequantize().dtype is torch.float32


def test_parameters_may_be_tensors() -> None:
    x = torch.randn(5)
    q = quantize_per_tensor(x, torch.tensor([0.5]), torch.tensor(3), torch.uint8)
    assert same(q, quantize_per_tensor(x, 0.5, 3, torch.uint8))
    assert isinstance(q.scale, float)
    assert isinstance(q.zero_point, int)


@pytest.mark.parametrize(("old", "plain"), [("quint8", "uint8"), ("qint8", "int8"), ("qint32", "int32")])
def test_old_dtypes_mean_plain_ones(old: str, plain: str) -> None:
    if not hasattr(torch, old):
        pytest.skip(f"torch {torch.__version__} has no {old} any more")
    q = quantize_per_tensor(torch.ones(2), 1.0, 0, getattr(torch, old))
    assert q.dtype is getattr(torch, plain)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_memory_format_is_kept(layout: torch.memory_format, device: torch.device) -> None:
    x = torch.randn(2, 3, 4, 5, device=device).contiguous(memory_format=layout)
    q = quantize_per_tensor(x, 0.1, 0, torch.int8)
    assert q.is_contiguous(memory_format=layout)
    assert q.stride() == q.int_repr().stride() == x.stride()
    assert q.dequantize().is_contiguous(memory_format=layout)
    assert q.clone().is_contiguous(memory_format=layout)
    assert q.contiguous(memory_format=layout).stride() == x.stride()


def test_zero_survives_exactly() -> None:
    for zero_point in (0, 17, 255):
        q = quantize_per_tensor(torch.zeros(3), 0.123, zero_point, torch.uint8)
        assert q.dequantize().tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda x: quantize_per_tensor(x, 0.0, 0, torch.uint8), "scale is 0.0"),
        (lambda x: quantize_per_tensor(x, float("nan"), 0, torch.uint8), "scale is nan"),
        (lambda x: quantize_per_tensor(x, float("inf"), 0, torch.uint8), "scale is inf"),
        (lambda x: quantize_per_tensor(x, 0.1, -1, torch.uint8), r"zero_point -1 .* \[0, 255\]"),
        (lambda x: quantize_per_tensor(x, 0.1, 128, torch.int8), r"zero_point 128 .* \[-128, 127\]"),
        (lambda x: quantize_per_tensor(x, 0.1, 0, torch.float16), "float16"),
        (lambda x: quantize_per_tensor(x.long(), 0.1, 0, torch.uint8), "torch.int64.*float tensor"),
        (lambda x: quantize_per_tensor(per_tensor(), 0.1, 0, torch.uint8), "already quantized"),
        (lambda x: quantize_per_channel(x, torch.ones(2), torch.zeros(3), 0, torch.int8), r"scales has shape \(2,\)"),
        (lambda x: quantize_per_channel(x, torch.ones(3), torch.zeros(1), 0, torch.int8), r"zero_points .* 3 entries"),
        (lambda x: quantize_per_channel(x.int(), torch.ones(3), torch.zeros(3), 0, torch.int8), "float tensor"),
    ],
)
def test_what_cannot_be_made_is_refused(make: Callable[[Tensor], QTensor], match: str) -> None:
    with pytest.raises(EagerqError, match=match):
        make(torch.randn(3))


def test_mistakes_are_of_builtin_types_too() -> None:
    with pytest.raises(ValueError, match="scale"):
        quantize_per_tensor(torch.ones(1), -1.0, 0, torch.uint8)
    with pytest.raises(RuntimeError, match="quantized"):
        per_tensor() + 1
    assert issubclass(InvalidArgumentError, ValueError)
    assert issubclass(InvalidInputError, RuntimeError)


# --- asking ---------------------------------------------------------------------------------------


def test_it_answers_like_a_tensor(device: torch.device) -> None:
    q = per_tensor(device)
    plain = q.int_repr()
    assert isinstance(q, Tensor)
    assert type(plain) is Tensor
    assert q.is_quantized is True
    assert torch.is_tensor(q)
    assert q.shape == q.size() == plain.shape
    assert q.size(1) == q.shape[1] == 4
    assert (q.dim(), q.ndim, len(q)) == (4, 4, 2)
    assert q.numel() == q.nelement() == torch.numel(q) == plain.numel()
    assert (q.dtype, q.device, q.layout) == (torch.uint8, plain.device, torch.strided)
    assert q.is_cuda is (device.type == "cuda")
    assert q.get_device() == plain.get_device()
    assert q.element_size() == q.itemsize == 1
    assert q.stride() == plain.stride()
    assert q.storage_offset() == 0
    assert q.is_contiguous()
    assert not q.is_floating_point()
    assert not torch.is_floating_point(q)
    assert not q.is_complex()
    assert not q.requires_grad
    assert q.is_leaf
    assert q.grad is None
    assert "int_repr" in dir(q)
    assert isinstance(hash(q), int)


def test_parameters_per_tensor() -> None:
    q = per_tensor()
    assert (q.q_scale(), q.q_zero_point()) == (0.05, 60)
    assert q.qscheme() == eagerq.scheme.per_tensor_affine
    for asked in (q.q_per_channel_scales, q.q_per_channel_zero_points, q.q_per_channel_axis):
        with pytest.raises(InvalidInputError, match=r"one scale.*q_scale\(\)"):
            asked()


def test_parameters_per_channel() -> None:
    q = per_channel()
    assert q.q_per_channel_scales().tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert q.q_per_channel_zero_points().tolist() == [1, 0, -1, 5]
    assert q.q_per_channel_axis() == 0
    assert q.qscheme() == eagerq.scheme.per_channel_affine
    for asked in (q.q_scale, q.q_zero_point):
        with pytest.raises(InvalidInputError, match=r"per-channel scales.*q_per_channel_scales\(\)"):
            asked()


def test_dequantize_and_int_repr_as_functions() -> None:
    q = per_tensor()
    for name, method in (("dequantize", q.dequantize), ("int_repr", q.int_repr)):
        if hasattr(torch, name):
            assert torch.equal(getattr(torch, name)(q), method())
        if hasattr(Tensor, name):
            assert torch.equal(getattr(Tensor, name)(q), method())


def test_single_values_become_numbers() -> None:
    q = quantize_per_tensor(torch.tensor([0.5, 0.0]), 0.25, 3, torch.uint8)
    half, zero = q  # iterates over the first axis
    assert half.item() == float(half) == 0.5
    assert int(half) == 0
    assert bool(half)
    assert not zero
    assert q.tolist() == [0.5, 0.0]
    assert f"{half}" == "0.5"
    assert f"{half:.3f}" == "0.500"
    assert 0.5 in q
    assert 0.25 not in q


# --- printing -------------------------------------------------------------------------------------


def test_repr_shows_real_values_and_parameters() -> None:
    q = quantize_per_tensor(torch.tensor([[0.0, 1.0], [2.0, 3.0]]), 0.5, 2, torch.uint8)
    expected = (
        "QTensor([[0., 1.],\n"
        "         [2., 3.]], dtype=torch.uint8, scale=0.5, zero_point=2)"
    )  # fmt: skip
    assert repr(q) == str(q) == f"{q}" == expected


def test_repr_of_a_per_channel_tensor_tells_the_axis() -> None:
    q = quantize_per_channel(torch.ones(1, 2), torch.tensor([0.5, 1.0]), torch.zeros(2), 1, torch.int8)
    assert repr(q) == (
        "QTensor([[1., 1.]], dtype=torch.int8, scale=tensor([0.5000, 1.0000]), zero_point=tensor([0., 0.]), axis=1)"
    )


def test_repr_in_inference_mode() -> None:
    with torch.inference_mode():
        assert "scale=0.05" in repr(per_tensor())


# --- copying, moving, saving ------------------------------------------------------------------------


def saved_and_loaded(value: Any, **options: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True, **options)


COPIES: list[Any] = [
    pytest.param(torch.clone, id="torch.clone"),
    pytest.param(lambda q: q.clone(), id="clone"),
    pytest.param(lambda q: q.detach(), id="detach"),
    pytest.param(lambda q: q.data, id="data"),
    pytest.param(lambda q: q.contiguous(), id="contiguous"),
    pytest.param(lambda q: q.to(q.device), id="to device"),
    pytest.param(lambda q: q.to(q), id="to like"),
    pytest.param(lambda q: q.to(device=q.device, non_blocking=True), id="to keyword"),
    pytest.param(copy.copy, id="copy"),
    pytest.param(copy.deepcopy, id="deepcopy"),
    pytest.param(lambda q: pickle.loads(pickle.dumps(q)), id="pickle"),
    pytest.param(saved_and_loaded, id="save"),
    pytest.param(lambda q: saved_and_loaded({"nested": [q]})["nested"][0], id="save nested"),
]


@pytest.mark.parametrize("make", BOTH)
@pytest.mark.parametrize("take", COPIES)
def test_copies_are_the_same(take: Callable[[QTensor], QTensor], make: Callable[..., QTensor], device: Any) -> None:
    q = make(device)
    taken = take(q)
    assert same(taken, q)
    assert taken.device == q.device


@pytest.mark.parametrize("make", BOTH)
@pytest.mark.parametrize("take", [torch.clone, copy.deepcopy])
def test_copies_share_no_memory(take: Callable[[QTensor], QTensor], make: Callable[..., QTensor]) -> None:
    q = make()
    taken = take(q)
    before = taken.int_repr().clone()
    q.int_repr().zero_()
    assert torch.equal(taken.int_repr(), before)


def test_a_tensor_in_two_places_stays_one() -> None:
    q = per_tensor()
    for taken in (copy.deepcopy([q, q]), saved_and_loaded([q, q])):
        assert taken[0] is taken[1]


@pytest.mark.parametrize("make", BOTH)
def test_moving_to_another_device_takes_the_parameters_along(make: Callable[..., QTensor], device: Any) -> None:
    q = make()
    for moved in (q.to(device), q.to(torch.empty(0, dtype=q.dtype, device=device))):
        assert moved.device.type == torch.device(device).type
        assert same(moved.cpu(), q)
        if moved.axis is not None:
            assert moved.q_per_channel_scales().device == moved.int_repr().device
    if torch.cuda.is_available():
        assert q.cuda().is_cuda
        assert q.pin_memory().is_pinned()


def test_loading_elsewhere() -> None:
    q = saved_and_loaded(per_tensor(), map_location="meta")
    assert q.device.type == q.int_repr().device.type == "meta"


def test_another_dtype_is_refused() -> None:
    for change in (lambda q: q.to(torch.float32), lambda q: q.to(torch.randn(1)), lambda q: q.view(torch.int8)):
        with pytest.raises(InvalidInputError, match=r"cannot become torch\..*dequantize\(\).*int_repr\(\)"):
            change(per_tensor())
    assert same(per_tensor().to(torch.uint8), per_tensor())
    assert same(per_tensor().view(torch.uint8), per_tensor())


def test_a_module_can_hold_one(device: torch.device) -> None:
    module = nn.Module()
    module.register_buffer("table", per_tensor())
    moved = copy.deepcopy(module).to(device)
    assert same(moved.table.cpu(), module.table)
    assert same(saved_and_loaded(module.state_dict())["table"], module.table)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_grad_modes(mode: Any, device: torch.device) -> None:
    x = torch.randn(2, 3, 4, 4, device=device, requires_grad=True)
    with mode():
        q = quantize_per_tensor(x, 0.125, 0, torch.int8)
        y = torch.relu(q).flatten(1).dequantize()
    assert not q.requires_grad
    assert not y.requires_grad
    assert torch.equal(y, (x.detach() / 0.125).round().clamp(0, 127).mul(0.125).flatten(1))
    # made in inference mode, used outside it
    assert torch.equal(torch.relu(q).flatten(1).dequantize(), y)
    assert same(copy.deepcopy(q), q)
