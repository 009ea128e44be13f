"""What torch's functions and modules do with quantized tensors.

Three yardsticks: the same movement of plain integers, the same function of the real values, and
torch.ao's quantized tensors.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Oracle
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from eagerq import QTensor, quantize_per_channel, quantize_per_tensor
from eagerq.errors import InvalidInputError

SHAPES = st.tuples(st.integers(1, 3), st.sampled_from((2, 4, 6)), st.integers(4, 9), st.integers(4, 9))
ANY_SCALE = st.one_of(st.floats(1e-3, 10.0), st.integers(-8, 2).map(lambda exponent: 2.0**exponent))
POWER_OF_TWO = st.integers(-8, 2).map(lambda exponent: 2.0**exponent)


@st.composite
def qtensors(draw: st.DrawFn, scales: st.SearchStrategy[float] = ANY_SCALE, shapes: Any = SHAPES) -> QTensor:
    """Integers all over the range; the seed is drawn too, or every example would have the same ones."""
    dtype = draw(st.sampled_from((torch.uint8, torch.int8)))
    shape = draw(shapes)
    limits = torch.iinfo(dtype)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    integers = torch.randint(limits.min, limits.max + 1, shape, dtype=dtype, generator=generator)
    if len(shape) == 4 and draw(st.booleans()):
        integers = integers.contiguous(memory_format=torch.channels_last)
    return QTensor(integers, draw(scales), draw(st.integers(limits.min, limits.max)))


def example(device: Any = "cpu", dtype: torch.dtype = torch.uint8) -> QTensor:
    x = torch.randn(2, 8, 6, 6, device=device)
    return quantize_per_tensor(x, 0.05, 100 if dtype is torch.uint8 else -3, dtype)


def parts(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (tuple, list)) else [value]


def keeps_parameters(q: QTensor, result: Any) -> bool:
    return (
        isinstance(result, QTensor)
        and (result.scale, result.zero_point, result.axis) == (q.scale, q.zero_point, q.axis)
        and result.int_repr().dtype is q.int_repr().dtype
        and result.stride() == result.int_repr().stride()
        and result.shape == result.int_repr().shape
    )


def twin(q: QTensor) -> Tensor:
    """torch's own quantized tensor with the same integers and memory format."""
    dtype = torch.quint8 if q.dtype is torch.uint8 else torch.qint8
    theirs = torch.quantize_per_tensor(q.dequantize(), q.scale, q.zero_point, dtype)
    assert torch.equal(theirs.int_repr(), q.int_repr())
    return theirs


def channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


# --- movements: the same integers elsewhere -----------------------------------------------------------

MOVEMENTS: dict[str, Callable[[Any], Any]] = {
    "view": lambda q: q.contiguous().view(q.size(0), -1),
    "view of one size": lambda q: q.contiguous().view(-1),
    "view_as": lambda q: q.contiguous().view_as(q.contiguous().flatten(1)),
    "reshape": lambda q: q.reshape(q.shape[0], -1),
    "reshape of a tuple": lambda q: torch.reshape(q, (-1, q.shape[-1])),
    "reshape_as": lambda q: q.reshape_as(q.flatten()),
    "flatten": lambda q: torch.flatten(q, 1),
    "flatten by name": lambda q: q.flatten(start_dim=1),
    "unflatten": lambda q: q.unflatten(1, (2, -1)),
    "ravel": lambda q: q.ravel(),
    "permute": lambda q: q.permute(0, 2, 3, 1),
    "torch.permute": lambda q: torch.permute(q, (3, 2, 1, 0)),
    "transpose": lambda q: q.transpose(1, -1),
    "transpose by name": lambda q: torch.transpose(q, dim0=1, dim1=2),
    "swapaxes": lambda q: q.swapaxes(0, 1),
    "movedim": lambda q: torch.movedim(q, 1, -1),
    "t": lambda q: q[0, 0].t(),
    "T": lambda q: q[0, 0].T,
    "mT": lambda q: q.mT,
    "H": lambda q: q[0, 0].H,
    "squeeze": lambda q: q[:1].squeeze(0),
    "squeeze all": lambda q: q[:1, :1].squeeze(),
    "unsqueeze": lambda q: q.unsqueeze(1),
    "unsqueeze by name": lambda q: torch.unsqueeze(input=q, dim=-1),
    "expand": lambda q: q[:, :1].expand(-1, 5, -1, -1),
    "expand_as": lambda q: q[:1].expand_as(q),
    "expand_as a float": lambda q: q[:1].expand_as(torch.empty(4, *q.shape[1:])),
    "broadcast_to": lambda q: torch.broadcast_to(q[:1], (3, *q.shape[1:])),
    "repeat": lambda q: q.repeat(1, 2, 1, 1),
    "tile": lambda q: q.tile(2),
    "integer index": lambda q: q[0],
    "slices": lambda q: q[:, 1:, ::2, :-1],
    "ellipsis and None": lambda q: q[..., None, 0],
    "list index": lambda q: q[:, [1, 0]],
    "tensor index": lambda q: q[torch.tensor([0, 0])],
    "mask": lambda q: q[torch.arange(q.shape[0]) % 2 == 0],
    "select": lambda q: q.select(1, 1),
    "narrow": lambda q: q.narrow(2, 1, 2),
    "index_select": lambda q: q.index_select(1, torch.tensor([1, 0, 1])),
    "gather": lambda q: q.gather(1, torch.ones(q.shape[0], 1, *q.shape[2:], dtype=torch.long)),
    "diagonal": lambda q: q.diagonal(dim1=2, dim2=3),
    "unfold": lambda q: q.unfold(2, 2, 1),
    "chunk": lambda q: q.chunk(2, dim=1),
    "torch.chunk": lambda q: torch.chunk(q, 3, 2),
    "split": lambda q: q.split(2, 1),
    "split by sizes": lambda q: torch.split(q, [1, q.shape[1] - 1], dim=1),
    "tensor_split": lambda q: q.tensor_split(3, 2),
    "unbind": lambda q: q.unbind(1),
    "iteration": lambda q: list(q),
    "cat": lambda q: torch.cat([q, q[:, :1]], 1),
    "cat by name": lambda q: torch.cat(tensors=(q, q), dim=-1),
    "concat": lambda q: torch.concat((q, q)),
    "stack": lambda q: torch.stack([q, q, q], dim=1),
    "hstack": lambda q: torch.hstack((q, q)),
    "vstack": lambda q: torch.vstack((q, q)),
    "flip": lambda q: q.flip(-1, 1),
    "roll": lambda q: torch.roll(q, 1, 2),
    "rot90": lambda q: torch.rot90(q, 1, (2, 3)),
    "pixel_shuffle": lambda q: F.pixel_shuffle(q.repeat(1, 2, 1, 1), 2),
    "pixel_unshuffle": lambda q: F.pixel_unshuffle(q[:, :, :4, :4], 2),
    "channel_shuffle": lambda q: F.channel_shuffle(q.contiguous(), 2),
    "channels by hand": lambda q: (
        q.view(q.size(0), 2, q.size(1) // 2, q.size(2), q.size(3)).transpose(1, 2).contiguous().view(q.size())
    ),
    "reflection": lambda q: F.pad(q, (1, 2, 2, 1), mode="reflect"),
    "replication": lambda q: F.pad(q, (1, 2, 2, 1), "replicate"),
    "circular": lambda q: F.pad(q, (1, 2, 2, 1), mode="circular"),
}


@given(q=qtensors())
def test_movements_move_the_integers(q: QTensor) -> None:
    for name, move in MOVEMENTS.items():
        results, expected = parts(move(q)), parts(move(q.int_repr()))
        assert len(results) == len(expected), name
        for result, integers in zip(results, expected, strict=True):
            assert keeps_parameters(q, result), name
            assert torch.equal(result.int_repr(), integers), name
            assert result.int_repr().stride() == integers.stride(), name


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_movements_of_other_widths_and_devices(dtype: torch.dtype, device: torch.device) -> None:
    q = example(device, dtype)
    for move in MOVEMENTS.values():
        for result, integers in zip(parts(move(q.cpu())), parts(move(q.int_repr().cpu())), strict=True):
            assert keeps_parameters(q, result)
            assert torch.equal(result.int_repr(), integers)
    assert torch.cat([q, q]).device == q.device


def test_a_view_that_channels_last_memory_does_not_have_is_a_copy(device: torch.device) -> None:
    # a float convolution leaves its channels where the model put them, an int8 one puts them last
    q = example(device)
    last = q.contiguous(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        last.int_repr().view(2, -1)
    assert torch.equal(last.view(2, -1).int_repr(), q.view(2, -1).int_repr())


@given(q=qtensors(), left=st.integers(0, 2), right=st.integers(0, 2), top=st.integers(0, 2))
def test_padding_with_a_constant_is_padding_of_real_values(q: QTensor, left: int, right: int, top: int) -> None:
    zeros = F.pad(q, (left, right, top, 0))
    assert keeps_parameters(q, zeros)
    assert torch.equal(zeros.dequantize(), F.pad(q.dequantize(), (left, right, top, 0)))
    value = (5 - q.zero_point) * q.scale  # the integer 5, which both dtypes have
    assert torch.equal(F.pad(q, [left, 1], value=value).int_repr(), F.pad(q.int_repr(), [left, 1], value=5))
    far = F.pad(q, [1, 0], "constant", 1e9).int_repr()
    assert (far[..., 0] == torch.iinfo(q.dtype).max).all()
    assert channels_last(zeros) == channels_last(q)


@pytest.mark.parametrize("join", [torch.cat, torch.stack])
def test_joining_needs_equal_parameters(join: Callable[..., QTensor]) -> None:
    q = example()
    other = quantize_per_tensor(torch.randn(2, 8, 6, 6), 0.06, 100, torch.uint8)
    with pytest.raises(InvalidInputError, match=r"scale 0\.05 and zero point 100 beside 0\.06.*self\.ff\.cat"):
        join([q, other])
    for mixed in ([q, torch.randn(2, 8, 6, 6)], [torch.randn(2, 8, 6, 6), q]):
        with pytest.raises(InvalidInputError, match=r"float tensor beside a quantized one.*QuantStub"):
            join(mixed)
    with pytest.raises(InvalidInputError, match="different parameters"):
        join([q, QTensor(q.int_repr().view(torch.int8), q.scale, q.zero_point)])


# --- order --------------------------------------------------------------------------------------------

ORDER: dict[str, Callable[[Any], Any]] = {
    "relu": F.relu,
    "torch.relu": torch.relu,
    "method relu": lambda x: x.relu(),
    "relu in place": lambda x: F.relu(x.clone(), inplace=True),
    "relu_": lambda x: torch.relu_(x.clone()),
    "method relu_": lambda x: x.clone().relu_(),
    "max_pool1d": lambda x: F.max_pool1d(x.flatten(1), 3, 2, 1),
    "max_pool2d": lambda x: F.max_pool2d(x, 3, stride=2, padding=1),
    "torch.max_pool2d": lambda x: torch.max_pool2d(x, 2),
    "max_pool2d ceil": lambda x: F.max_pool2d(x, 2, ceil_mode=True),
    "max_pool2d dilated": lambda x: F.max_pool2d(x, 2, 1, 1, 2),
    "max_pool3d": lambda x: F.max_pool3d(x.contiguous(), 2, 1, 1),
    "adaptive_max_pool1d": lambda x: F.adaptive_max_pool1d(x.flatten(1), 3),
    "adaptive_max_pool2d": lambda x: F.adaptive_max_pool2d(x, (2, 3)),
    "adaptive_max_pool3d": lambda x: F.adaptive_max_pool3d(x, 2),
    "max": lambda x: x.max(),
    "min": lambda x: torch.min(x),
    "max over axis": lambda x: x.max(1)[0],
    "max over axis by name": lambda x: torch.max(x, dim=-1, keepdim=True).values,
    "min over axis": lambda x: x.min(2).values,
    "amax": lambda x: x.amax((2, 3)),
    "amin": lambda x: x.amin(1, keepdim=True),
    "larger of two": lambda x: torch.max(x, x.flip(-1)),
    "maximum": lambda x: torch.maximum(x, x.flip(-1)),
    "minimum": lambda x: torch.minimum(input=x, other=x.flip(-1)),
    "sort": lambda x: x.sort(dim=1).values,
    "sort descending": lambda x: torch.sort(x, descending=True)[0],
    "topk": lambda x: x.topk(2, dim=-1)[0],
    "kthvalue": lambda x: x.kthvalue(2, 1).values,
    "threshold of the order": lambda x: x[x > 0.3],
}


@given(q=qtensors())
def test_order_is_that_of_the_real_values(q: QTensor) -> None:
    real = q.dequantize()
    for name, function in ORDER.items():
        result, expected = function(q), function(real)
        assert keeps_parameters(q, result), name
        assert torch.equal(result.dequantize(), expected), name
        assert channels_last(result) == channels_last(expected), name


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_max_pooling_of_large_maps(layout: torch.memory_format, device: torch.device) -> None:
    # torch's own kernel for 8-bit integers with their channels last counts pixels in 8 bits
    x = torch.randn(1, 3, 40, 50, device=device).contiguous(memory_format=layout)
    for dtype, zero_point in ((torch.uint8, 100), (torch.int8, 0)):
        q = quantize_per_tensor(x, 0.05, zero_point, dtype)
        for options in ({}, {"stride": 2, "padding": 1}, {"stride": 2, "ceil_mode": True}, {"dilation": 2}):
            result, expected = F.max_pool2d(q, 3, **options), F.max_pool2d(q.dequantize(), 3, **options)
            assert torch.equal(result.dequantize(), expected)
            assert channels_last(result) == channels_last(expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_order_of_other_widths_and_devices(dtype: torch.dtype, device: torch.device) -> None:
    q = example(device, dtype)
    for name, function in ORDER.items():
        assert torch.equal(function(q).dequantize(), function(q.dequantize())), name


def test_indices_come_as_plain_integers(device: torch.device) -> None:
    row = torch.randperm(36, device=device).reshape(1, 1, 6, 6)  # all different: one answer
    q = QTensor(row.to(torch.uint8), 0.1, 7)
    real = q.dequantize()
    for function in (
        lambda x: x.max(2),
        lambda x: x.sort(3),
        lambda x: x.topk(3, 2),
        lambda x: x.kthvalue(2),
        lambda x: F.max_pool2d(x, 2, return_indices=True),
        lambda x: F.max_pool1d(x[0], 2, return_indices=True),
        lambda x: F.max_pool3d(x, (1, 2, 2), return_indices=True),
        lambda x: F.adaptive_max_pool2d(x, 3, return_indices=True),
    ):
        (values, indices), (real_values, real_indices) = function(q), function(real)
        assert torch.equal(values.dequantize(), real_values)
        assert type(indices) is Tensor
        assert torch.equal(indices, real_indices)
    for plain in (lambda x: x.argmax(), lambda x: torch.argmax(x, 2), lambda x: x.argmin(3), lambda x: x.argsort(3)):
        assert torch.equal(plain(q), plain(real))


def test_two_tensors_are_ordered_only_with_equal_parameters() -> None:
    q = example()
    other = quantize_per_tensor(torch.randn(2, 8, 6, 6), 0.06, 100, torch.uint8)
    for function in (torch.maximum, torch.minimum, torch.max, torch.min):
        with pytest.raises(InvalidInputError, match="different parameters"):
            function(q, other)
        with pytest.raises(InvalidInputError, match="float tensor beside a quantized one"):
            function(q, torch.zeros(2, 8, 6, 6))


def clamped(q: QTensor, low: float | None, high: float | None) -> list[int]:
    """The definition, number by number: thresholds become integers as values do."""
    limits = torch.iinfo(q.dtype)

    def integer(value: float) -> int:
        return max(limits.min, min(limits.max, round(value / q.scale + q.zero_point)))

    least = limits.min if low is None else integer(low)
    most = limits.max if high is None else integer(high)
    return [min(max(value, least), most) for value in q.int_repr().reshape(-1).tolist()]


# quarters are halves of a step of the larger powers of two: ties
@given(
    q=st.one_of(qtensors(), qtensors(POWER_OF_TWO)),
    low=st.one_of(st.floats(-3, 1), st.integers(-12, 4).map(lambda quarters: quarters / 4)),
    width=st.one_of(st.floats(0, 4), st.integers(0, 16).map(lambda quarters: quarters / 4)),
)
def test_clamping_rounds_the_thresholds_like_values(q: QTensor, low: float, width: float) -> None:
    high = low + width
    calls: list[tuple[QTensor, float | None, float | None]] = [
        (F.hardtanh(q, low, high), low, high),
        (F.hardtanh(q.clone(), low, high, inplace=True), low, high),
        (F.hardtanh_(q.clone(), low, high), low, high),
        (F.hardtanh(q), -1.0, 1.0),
        (F.relu6(q), 0.0, 6.0),
        (F.relu6(q.clone(), inplace=True), 0.0, 6.0),
        (torch.clamp(q, low, high), low, high),
        (torch.clamp(input=q, min=low), low, None),
        (q.clamp(max=high), None, high),
        (q.clip(low, high), low, high),
        (q.clone().clamp_(low, high), low, high),
        (torch.clamp_min(q, low), low, None),
        (q.clamp_max(high), None, high),
        (q.clamp(torch.tensor(low)), low, None),
    ]
    for result, least, most in calls:
        assert keeps_parameters(q, result)
        if least is not None:  # a tensor's threshold is float32
            least = float(torch.tensor(least)) if calls[-1][0] is result else least
        assert result.int_repr().reshape(-1).tolist() == clamped(q, least, most)


def test_infinite_thresholds_leave_that_side_open() -> None:
    q = example()
    assert torch.equal(F.hardtanh(q, 0.0, float("inf")).int_repr(), F.relu(q).int_repr())
    assert torch.equal(q.clamp(min=-float("inf")).int_repr(), q.int_repr())


def test_in_place_functions_change_the_tensor() -> None:
    for change in (
        lambda q: q.relu_(),
        lambda q: F.relu(q, inplace=True),
        lambda q: F.relu6(q, inplace=True),
        lambda q: F.hardtanh(q, 0, 6, inplace=True),
        lambda q: q.clamp_(0, 6),
    ):
        q = example()
        expected = F.relu(q).int_repr()
        assert change(q) is q
        assert torch.equal(q.int_repr(), expected)
        assert q.dequantize().min() == 0


# --- comparison -----------------------------------------------------------------------------------------


@given(q=qtensors())
def test_comparisons_are_those_of_real_values(q: QTensor) -> None:
    real, other = q.dequantize(), QTensor(q.int_repr().flip(0), q.scale * 2, q.zero_point)
    for compare in (torch.eq, torch.ne, torch.lt, torch.le, torch.gt, torch.ge):
        assert torch.equal(compare(q, other), compare(real, other.dequantize()))
    assert torch.equal(q < 0.5, real < 0.5)
    assert torch.equal(q.__gt__(0.5), real > 0.5)
    assert torch.equal(q == real, torch.ones_like(real, dtype=torch.bool))
    assert torch.equal(real >= other, real >= other.dequantize())
    assert torch.allclose(q, real)
    assert torch.isfinite(q).all()
    assert not torch.isnan(q).any()
    assert (q == None) is False  # noqa: E711


def test_equal_means_the_same_integers_and_parameters() -> None:
    q = example()
    assert torch.equal(q, q.clone())
    assert q.equal(q.clone())
    assert not torch.equal(q, QTensor(q.int_repr(), q.scale, q.zero_point + 1))
    assert not torch.equal(q, QTensor(q.int_repr(), q.scale * 2, q.zero_point))
    assert not torch.equal(q, q.flip(0))
    assert torch.equal(q, q.dequantize())


# --- averages -------------------------------------------------------------------------------------------


def rounded(q: QTensor, sums: list[int], counts: list[int]) -> list[int]:
    """``round(mean + zero_point)`` in exact fractions, halves to even, from sums of ``integer - zero_point``."""
    limits = torch.iinfo(q.dtype)
    exact = [round(Fraction(total, count) + q.zero_point) for total, count in zip(sums, counts, strict=True)]
    return [max(limits.min, min(limits.max, value)) for value in exact]


def windows(q: QTensor, rows: list[tuple[int, int]], columns: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Sum and number of the centred integers in each window, in the order of the result."""
    centred = q.int_repr().long() - q.zero_point
    tiles = [
        centred[:, :, top:bottom, left:right].sum((2, 3))
        for (top, bottom), (left, right) in itertools.product(rows, columns)
    ]
    sizes = [(bottom - top) * (right - left) for (top, bottom), (left, right) in itertools.product(rows, columns)]
    totals = torch.stack(tiles, -1)
    return totals.reshape(-1).tolist(), sizes * (q.shape[0] * q.shape[1])


@given(q=qtensors())
def test_mean_rounds_to_its_own_parameters(q: QTensor) -> None:
    whole = [(0, q.shape[2])], [(0, q.shape[3])]
    expected = rounded(q, *windows(q, *whole))
    results = [q.mean([2, 3]), torch.mean(q, dim=(-1, -2)), q.mean((2, 3), keepdim=True), q.flatten(2).mean(-1)]
    for result in results:
        assert keeps_parameters(q, result)
        assert result.int_repr().reshape(-1).tolist() == expected
    assert results[2].shape == (*q.shape[:2], 1, 1)
    everything = int((q.int_repr().long() - q.zero_point).sum())
    assert q.mean().int_repr().tolist() == rounded(q, [everything], [q.numel()])[0]


@given(q=qtensors(), kernel=st.integers(1, 3), stride=st.integers(1, 3), divisor=st.booleans())
def test_average_pooling(q: QTensor, kernel: int, stride: int, divisor: bool) -> None:
    rows, columns = (
        [(start, start + kernel) for start in range(0, length - kernel + 1, stride)] for length in q.shape[2:]
    )
    result = F.avg_pool2d(q, kernel, stride, divisor_override=kernel**2 if divisor else None)
    assert keeps_parameters(q, result)
    assert result.int_repr().reshape(-1).tolist() == rounded(q, *windows(q, rows, columns))
    assert channels_last(result) == channels_last(F.avg_pool2d(q.dequantize(), kernel, stride))


@given(q=qtensors(), padding=st.integers(0, 1), count=st.booleans(), ceil=st.booleans())
def test_average_pooling_counts_padding_as_torch_does(q: QTensor, padding: int, count: bool, ceil: bool) -> None:
    options: dict[str, Any] = {"padding": padding, "ceil_mode": ceil, "count_include_pad": count}
    centred = q.int_repr().double() - q.zero_point
    exact = F.avg_pool2d(centred, 3, 2, **options)
    # of the float64 result only the last bits are wrong, and thirds are never near a half
    expected = torch.round(exact.mul(36).round().div(36) + q.zero_point)
    limits = torch.iinfo(q.dtype)
    result = F.avg_pool2d(q, 3, 2, **options)
    assert torch.equal(result.int_repr().double(), expected.clamp(limits.min, limits.max))


@given(q=qtensors(), size=st.tuples(st.integers(1, 4), st.integers(1, 4)))
def test_adaptive_average_pooling(q: QTensor, size: tuple[int, int]) -> None:
    def bins(length: int, count: int) -> list[tuple[int, int]]:
        return [(index * length // count, -(-(index + 1) * length // count)) for index in range(count)]

    result = F.adaptive_avg_pool2d(q, size)
    expected = rounded(q, *windows(q, bins(q.shape[2], size[0]), bins(q.shape[3], size[1])))
    assert keeps_parameters(q, result)
    assert result.shape == (*q.shape[:2], *size)
    assert result.int_repr().reshape(-1).tolist() == expected


POOLS: dict[str, Callable[[Any], Any]] = {
    "avg_pool1d": lambda x: F.avg_pool1d(x.flatten(1), 4),
    "avg_pool3d": lambda x: F.avg_pool3d(x, 2),
    "adaptive_avg_pool1d": lambda x: F.adaptive_avg_pool1d(x.flatten(2), 1),
    "adaptive_avg_pool3d": lambda x: F.adaptive_avg_pool3d(x, (1, 2, 2)),
}


@given(q=qtensors())
def test_pools_of_other_dimensions(q: QTensor) -> None:
    limits = torch.iinfo(q.dtype)
    for name, pool in POOLS.items():
        exact = pool(q.int_repr().double() - q.zero_point)
        expected = torch.round(exact + q.zero_point).clamp(limits.min, limits.max)
        result = pool(q)
        assert keeps_parameters(q, result), name
        # one step apart at most, and only where the mean is a half but for float64's own last bit
        halves = ((exact % 1) - 0.5).abs() < 1e-6
        assert ((result.int_repr() - expected).abs() <= halves.double()).all(), name


def test_volumes_with_channels_last(device: torch.device) -> None:
    x = torch.randn(2, 4, 5, 6, 6, device=device).contiguous(memory_format=torch.channels_last_3d)
    q = quantize_per_tensor(x, 0.05, 100, torch.uint8)
    for function in (
        lambda x: F.max_pool3d(x, 2, 1, 1),
        lambda x: F.avg_pool3d(x, 2),
        F.relu,
        lambda x: F.pad(x, (1, 1, 1, 1, 1, 1)),
        lambda x: torch.cat([x, x], 1),
    ):
        result = function(q)
        assert result.stride() == function(q.dequantize()).stride()
        assert torch.equal(result.int_repr(), function(q.contiguous()).int_repr())


@given(q=qtensors(), scale=st.sampled_from((2, 3)))
def test_nearest_interpolation_repeats_integers(q: QTensor, scale: int) -> None:
    result = F.interpolate(q, scale_factor=scale)
    assert keeps_parameters(q, result)
    expected = q.int_repr().repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    assert torch.equal(result.int_repr(), expected)
    assert channels_last(result) == channels_last(q)


@given(q=qtensors(), height=st.integers(2, 12), width=st.integers(2, 12), corners=st.booleans())
def test_bilinear_interpolation_is_within_half_a_step(q: QTensor, height: int, width: int, corners: bool) -> None:
    result = F.interpolate(q, size=(height, width), mode="bilinear", align_corners=corners)
    assert keeps_parameters(q, result)
    exact = F.interpolate(q.int_repr().double(), size=(height, width), mode="bilinear", align_corners=corners)
    assert (result.int_repr() - exact).abs().max() <= 0.5 + 1e-4


def test_averages_on_each_device(device: torch.device) -> None:
    for dtype in (torch.uint8, torch.int8):
        q = example(device, dtype)
        for function in (
            *POOLS.values(),
            lambda x: x.mean((2, 3)),
            lambda x: F.avg_pool2d(x, 2),
            lambda x: F.adaptive_avg_pool2d(x, 1),
            lambda x: F.interpolate(x, scale_factor=2),
        ):
            assert torch.equal(function(q).int_repr().cpu(), function(q.cpu()).int_repr())


# --- torch.ao as the yardstick ----------------------------------------------------------------------------

# Its kernels round halves in ways of their own, which differ from build to build: windows here have an
# odd number of values, and thresholds lie on the grid.
AS_IN_THE_ORACLE: dict[str, Callable[[Any], Any]] = {
    "relu": F.relu,
    "max_pool1d": lambda q: F.max_pool1d(q.flatten(1), 3),
    "max_pool2d": lambda q: F.max_pool2d(q, 3, 2, 1),
    "max_pool2d ceil": lambda q: F.max_pool2d(q, 2, 2, ceil_mode=True),
    "max_pool3d": lambda q: F.max_pool3d(q.unsqueeze(0), 2),
    "nearest": lambda q: F.interpolate(q, scale_factor=2),
    "nearest to a size": lambda q: F.interpolate(q, size=(4, 5)),
    "cat": lambda q: torch.cat([q, q], 1),
    "stack": lambda q: torch.stack([q, q]),
    "pad": lambda q: F.pad(q, (1, 2, 3, 0)),
    "pad with a value": lambda q: F.pad(q, (1, 2), value=3 * q.q_scale()),
    "reflect": lambda q: F.pad(q, (1, 2, 1, 1), "reflect"),
    "hardtanh": lambda q: F.hardtanh(q, -4 * q.q_scale(), 50 * q.q_scale()),
    "clamp": lambda q: q.clamp(-4 * q.q_scale(), 50 * q.q_scale()),
    "topk": lambda q: q.topk(2, 1)[0],
    "sort": lambda q: q.sort(1)[0],
    "max": lambda q: q.max(),
    "min": lambda q: q.min(),
    "max over axis": lambda q: q.max(1)[0],
    "pixel_shuffle": lambda q: F.pixel_shuffle(q.repeat(1, 2, 1, 1), 2),
    "permute": lambda q: q.permute(0, 2, 3, 1),
    "slice": lambda q: q[:, 1::2],
    "mask": lambda q: q[q > 0],
    "compare": lambda q: q >= 0.25,
    "avg_pool1d": lambda q: F.avg_pool1d(q.flatten(1), 3),
    "avg_pool2d": lambda q: F.avg_pool2d(q, 3, 2),
    "avg_pool2d padded": lambda q: F.avg_pool2d(q, 3, 2, 1),
    "avg_pool3d": lambda q: F.avg_pool3d(q.unsqueeze(0), (1, 3, 3)),
    "adaptive_avg_pool2d": lambda q: F.adaptive_avg_pool2d(q[:, :, :3, :3], 1),
    "adaptive_avg_pool3d": lambda q: F.adaptive_avg_pool3d(q[:, :, :3, :3].unsqueeze(0), (None, 1, 1)),
    "mean": lambda q: q[:, :, :3, :3].mean([2, 3]),
    "mean kept": lambda q: q[:, :, :3, :3].mean((2, 3), keepdim=True),
}


@given(q=qtensors())
def test_integers_equal_the_oracle(ao: Oracle, q: QTensor) -> None:
    reference = twin(q)
    for name, function in AS_IN_THE_ORACLE.items():
        ours, theirs = function(q), function(reference)
        assert ours.shape == theirs.shape, name
        if theirs.is_quantized:
            assert (ours.q_scale(), ours.q_zero_point()) == (theirs.q_scale(), theirs.q_zero_point()), name
            ours, theirs = ours.int_repr(), theirs.int_repr()
        assert torch.equal(ours, theirs), name


@given(q=qtensors(POWER_OF_TWO))
def test_halves_are_within_a_step_of_the_oracle(ao: Oracle, q: QTensor) -> None:
    for function in (
        F.relu6,
        lambda q: F.hardtanh(q, -0.75, 1.25),
        lambda q: F.avg_pool2d(q, 2),
        lambda q: F.avg_pool2d(q, 3, 2, 1, ceil_mode=True, count_include_pad=False),
        lambda q: F.adaptive_avg_pool2d(q, (3, 2)),
        lambda q: q.mean((2, 3)),
        lambda q: F.interpolate(q, scale_factor=2, mode="bilinear", align_corners=False),
    ):
        off = function(q).int_repr().int() - function(twin(q)).int_repr()
        assert off.abs().max() <= 1


# --- modules ----------------------------------------------------------------------------------------------

MODULES: list[nn.Module] = [
    nn.MaxPool2d(2),
    nn.MaxPool2d(3, 2, 1, ceil_mode=True),
    nn.AvgPool2d(2),
    nn.AvgPool2d(3, 1, 1),
    nn.AdaptiveAvgPool2d(1),
    nn.AdaptiveAvgPool2d((2, 3)),
    nn.AdaptiveMaxPool2d(1),
    nn.ReLU(),
    nn.ReLU(inplace=True),
    nn.ReLU6(),
    nn.ReLU6(inplace=True),
    nn.Hardtanh(),
    nn.Hardtanh(0.0, 3.0, inplace=True),
    nn.Flatten(),
    nn.Unflatten(1, (2, 4)),
    nn.Identity(),
    nn.Upsample(scale_factor=2),
    nn.Upsample(size=(9, 7), mode="bilinear", align_corners=True),
    nn.UpsamplingNearest2d(scale_factor=2),
    nn.UpsamplingBilinear2d(scale_factor=2),
    nn.ZeroPad2d(1),
    nn.ConstantPad2d((0, 1, 2, 0), 0.5),
    nn.ReflectionPad2d(1),
    nn.ReplicationPad2d(1),
    nn.CircularPad2d(1),
    nn.PixelShuffle(2),
    nn.PixelUnshuffle(2),
    nn.ChannelShuffle(2),
    nn.Dropout().eval(),
    nn.Dropout2d(inplace=True).eval(),
    nn.AlphaDropout().eval(),
    nn.Sequential(nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
]


@pytest.mark.parametrize("module", MODULES, ids=repr)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_modules_take_quantized_tensors(module: nn.Module, layout: torch.memory_format, device: torch.device) -> None:
    q = example(device).contiguous(memory_format=layout)
    real = module(q.dequantize())
    result = module(q)
    assert keeps_parameters(q, result)
    assert result.shape == real.shape
    # the average of what is off by rounding, and thresholds off the grid, by half a step
    assert (result.dequantize() - real).abs().max() <= q.q_scale() * 0.501
    if real.dim() == 4:
        assert channels_last(result) == channels_last(real)


@pytest.mark.parametrize("module", [nn.Dropout(), nn.Dropout1d(), nn.Dropout2d(), nn.Dropout3d(), nn.AlphaDropout()])
def test_dropout_leaves_quantized_tensors_alone_in_training_mode_too(module: nn.Module) -> None:
    # a model converted in training mode and never switched still runs, as it does in torch.ao
    q = example()
    assert torch.equal(module.train()(q).int_repr(), q.int_repr())


# --- per channel ------------------------------------------------------------------------------------------


def test_per_channel_tensors_are_compared_and_copied_but_not_computed_with() -> None:
    q = quantize_per_channel(torch.randn(4, 6), torch.rand(4) + 0.1, torch.zeros(4, dtype=torch.int32), 0, torch.int8)
    assert torch.equal(q, q.clone())
    assert torch.equal(q > 0, q.dequantize() > 0)
    assert q.tolist() == q.dequantize().tolist()
    for function in (
        F.relu,
        lambda q: q[0],
        lambda q: q.view(-1),
        lambda q: q.reshape(-1),
        lambda q: q.mean(),
        lambda q: q.max(),
        lambda q: q.clamp(0, 1),
        lambda q: F.max_pool1d(q, 2),
        lambda q: F.pad(q, (1, 1)),
        lambda q: torch.cat([q, q]),
        lambda q: torch.maximum(q, q),
    ):
        with pytest.raises(InvalidInputError, match=r"per-channel QTensors.*dequantize\(\)"):
            function(q)
