"""QFunctional: torch.ao's integers, and its parameters for operations with a number."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.calls import BYTES, RANGES, SCALE_KINDS, integers, scales, zero_points
from torch import Tensor, nn

import eagerq
from eagerq import QTensor
from eagerq.errors import InvalidConfigError, InvalidInputError
from eagerq.nn import quantized
from eagerq.nn.quantized.base import Output
from eagerq.scheme import integer_type

# torch.ao's sums and products follow one rule in the part of a tensor that fills vector registers (64
# bytes with AVX-512, 32 with AVX2) and another in what is left over: there values are dequantized and
# rounded otherwise, and ties differ.  Tensors of a multiple of 64 elements (and few enough to stay on
# one thread) have no left-over; eagerq follows the first rule everywhere.
WHOLE = 64


def rounds_after_adding() -> bool:
    """Whether this build of torch adds the zero point before it rounds, as eagerq always does.

    torch's wheels for CPUs do.  Those for CUDA round first, on CPUs too, wherever they quantize floats:
    in ``quantize_per_tensor``, ``cat`` and ``matmul``.  Ties then agree only for even zero points.
    """
    return int(torch.quantize_per_tensor(torch.tensor([0.5]), 1.0, 1, torch.quint8).int_repr()) == 2


@st.composite
def quantized_like_torch(draw: st.DrawFn, dtype: torch.dtype, *kinds: str) -> tuple[str, int]:
    """A kind of scales and a zero point with which every build of torch quantizes alike."""
    zero_point = draw(zero_points(dtype))
    if rounds_after_adding():
        return draw(st.sampled_from(kinds)), zero_point
    return "power", zero_point // 2 * 2


def twin_tensor(q: QTensor) -> Tensor:
    return torch._make_per_tensor_quantized_tensor(q.integers.contiguous(), q.scale, q.zero_point)


def ours_for(scale: float, zero_point: int, dtype: torch.dtype = torch.uint8) -> quantized.QFunctional:
    """One whose result was observed in ``dtype``; torch.ao's always has the first operand's."""
    module = quantized.QFunctional()
    module.output = Output(scale, zero_point, dtype, *RANGES[dtype])
    return module


def both(ao: Oracle, scale: float, zero_point: int, dtype: torch.dtype = torch.uint8) -> tuple[Any, Any]:
    theirs = ao.quantized.QFunctional()
    theirs.scale, theirs.zero_point = scale, zero_point
    return ours_for(scale, zero_point, dtype), theirs


def assert_same(ours: QTensor, theirs: Tensor) -> None:
    assert ours.dtype is theirs.int_repr().dtype
    assert ours.shape == theirs.shape
    assert ours.q_zero_point() == theirs.q_zero_point()
    assert ours.q_scale() == pytest.approx(theirs.q_scale(), rel=1e-7)
    assert torch.equal(ours.int_repr(), theirs.int_repr())


@st.composite
def qtensors(draw: st.DrawFn, shape: tuple[int, ...], kind: str, dtype: torch.dtype, like: Any = None) -> QTensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    zero_point = draw(zero_points(dtype))
    scale = draw(scales(kind) if like is None else scales(kind) | st.just(like.scale))
    return QTensor(integers(shape, dtype, generator), scale, zero_point)


@st.composite
def outputs(draw: st.DrawFn, x: QTensor, kind: str) -> tuple[float, int]:
    """A result's parameters: twice the operand's scale makes sums of equal scales fall on ties."""
    return draw(scales(kind) | st.just(2 * x.scale)), draw(zero_points(x.dtype))


@pytest.mark.parametrize("name", ["add", "add_relu", "mul"])
def test_two_operands_are_torchs(ao: Oracle, name: str) -> None:
    @settings(max_examples=60)
    @given(st.data(), SCALE_KINDS, BYTES)
    def check(data: st.DataObject, kind: str, dtype: torch.dtype) -> None:
        shape = data.draw(st.sampled_from([(WHOLE,), (2, 3, 8, 8), (5, WHOLE), (320,)]))
        x = data.draw(qtensors(shape, kind, dtype))
        y = data.draw(qtensors(shape, kind, dtype, like=x))
        ours, theirs = both(ao, *data.draw(outputs(x, kind)), dtype)
        assert_same(getattr(ours, name)(x, y), getattr(theirs, name)(twin_tensor(x), twin_tensor(y)))

    check()


@pytest.mark.parametrize("name", ["add", "add_relu", "mul"])
def test_odd_shapes_follow_the_same_rule(ao: Oracle, name: str) -> None:
    """Element for element what the whole tensor gives, though torch.ao itself changes its mind."""

    @given(st.data(), SCALE_KINDS)
    def check(data: st.DataObject, kind: str) -> None:
        x = data.draw(qtensors((2 * WHOLE,), kind, torch.uint8))
        y = data.draw(qtensors((2 * WHOLE,), kind, torch.uint8, like=x))
        ours, theirs = both(ao, *data.draw(outputs(x, kind)))
        count = data.draw(st.integers(1, 2 * WHOLE))
        wanted = getattr(theirs, name)(twin_tensor(x), twin_tensor(y)).int_repr()[:count]
        assert torch.equal(getattr(ours, name)(x[:count], y[:count]).int_repr(), wanted)

    check()


@given(st.data())
def test_broadcast(data: st.DataObject) -> None:
    x = data.draw(qtensors((2, 3, 4, 4), "single", torch.uint8))
    y = data.draw(qtensors((2, 3, 1, 1), "single", torch.uint8))
    ours = ours_for(data.draw(scales("single")), 0)
    whole = y.expand(2, 3, 4, 4)
    for name in ("add", "mul", "add_relu"):
        operation = getattr(ours, name)
        assert torch.equal(operation(x, y).int_repr(), operation(x, whole).int_repr())


def test_cat_is_torchs(ao: Oracle) -> None:
    @given(st.data(), BYTES)
    def check(data: st.DataObject, dtype: torch.dtype) -> None:
        kind, zero_point = data.draw(quantized_like_torch(dtype, "power", "single", "plain"))
        dim = data.draw(st.integers(0, 3))
        parts: list[QTensor] = []
        for length in data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)):
            shape = [2, 3, 4, 5]
            shape[dim] = length
            parts.append(data.draw(qtensors(tuple(shape), kind, dtype, like=parts[0] if parts else None)))
        ours, theirs = both(ao, data.draw(outputs(parts[0], kind))[0], zero_point, dtype)
        if data.draw(st.booleans()):  # the same parameters: a copy
            ours, theirs = both(ao, parts[0].scale, parts[0].zero_point, dtype)
        assert_same(ours.cat(parts, dim), theirs.cat([twin_tensor(part) for part in parts], dim))

    check()


def test_matmul_is_torchs(ao: Oracle) -> None:
    """torch.ao multiplies in float32; with powers of two that is exact."""

    @given(st.data(), BYTES)
    def check(data: st.DataObject, dtype: torch.dtype) -> None:
        shapes = data.draw(st.sampled_from([((3, 20), (20, 4)), ((2, 5, 16), (2, 16, 3)), ((1, 1), (1, 1))]))
        x, y = (data.draw(qtensors(shape, "power", dtype)) for shape in shapes)
        scale = x.scale * y.scale * 2.0 ** data.draw(st.integers(1, 12))
        _, zero_point = data.draw(quantized_like_torch(dtype, "power"))
        ours, theirs = both(ao, scale, zero_point, dtype)
        assert_same(ours.matmul(x, y), theirs.matmul(twin_tensor(x), twin_tensor(y)))

    check()


@given(st.data(), SCALE_KINDS)
def test_matmul_is_exact(data: st.DataObject, kind: str) -> None:
    x, y = data.draw(qtensors((4, 30), kind, torch.uint8)), data.draw(qtensors((30, 5), kind, torch.int8))
    ours = ours_for(x.scale * y.scale * data.draw(st.floats(500, 3e4)), 128)
    result = ours.matmul(x, y).int_repr().numpy().astype(np.float64)
    total = (x.integers.long() - x.zero_point).double() @ (y.integers.long() - y.zero_point).double()
    unrounded = (total * (x.scale * y.scale / ours.scale)).numpy() + ours.zero_point
    assert (np.abs(unrounded.clip(0, 255) - result) <= 0.5 + 1e-4).all()


def test_operations_with_a_number_are_torchs(ao: Oracle) -> None:
    @settings(max_examples=100)
    @given(st.data(), SCALE_KINDS, st.floats(-40, 40, width=32), st.booleans())
    def check(data: st.DataObject, kind: str, number: float, on_tie: bool) -> None:
        x = data.draw(qtensors((WHOLE,), kind, torch.uint8))
        if on_tie:
            number = (round(number) + 0.5) * x.scale
        ours, theirs = both(ao, 1.0, 0)
        for name in ("add_scalar", "mul_scalar"):
            mine, twins = getattr(ours, name)(x, number), getattr(theirs, name)(twin_tensor(x), number)
            assert mine.q_zero_point() == twins.q_zero_point(), name
            assert mine.q_scale() == pytest.approx(twins.q_scale(), rel=1e-6), name
            assert torch.equal(mine.int_repr(), twins.int_repr()), name

    check()


@given(st.data(), SCALE_KINDS, BYTES, st.floats(-40, 40))
def test_operations_with_a_number_are_exact(data: st.DataObject, kind: str, dtype: torch.dtype, number: float) -> None:
    """Within half a step of the result (a sum: of the operand's, to which the number is rounded)."""
    x = data.draw(qtensors((WHOLE,), kind, dtype))
    ours = quantized.QFunctional()
    real = (x.integers.double() - x.zero_point) * x.scale
    for result, wanted, slack in (
        (ours.add_scalar(x, number), real + number, x.scale / 2),
        (ours.mul_scalar(x, number), real * number, 0.0),
    ):
        kind_of = integer_type(result.dtype)
        assert kind_of.minimum <= result.zero_point <= kind_of.maximum
        got = (result.integers.double() - result.zero_point) * result.scale
        assert ((got - wanted).abs() <= slack + result.scale * 0.5001 + 1e-6 * wanted.abs()).all()


def test_parameters_are_float32s_in_the_state() -> None:
    ours = ours_for(0.25, 7)
    state = ours.state_dict()
    assert {name: value.tolist() for name, value in state.items()} == {"scale": 0.25, "zero_point": 7}
    assert math.isclose(ours.scale, 0.25)


@pytest.mark.parametrize("make", [quantized.FloatFunctional, quantized.FXFloatFunctional])
def test_unobserved_is_an_identity(make: type[quantized.FloatFunctional]) -> None:
    """Before prepare, FloatFunctional is arithmetic and no more."""
    ff = make()
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    assert torch.equal(ff.add(x, y), x + y)
    assert torch.equal(ff.mul(x, y), x * y)
    assert torch.equal(ff.add_relu(x, y), (x + y).relu())
    assert torch.equal(ff.cat([x, y], 1), torch.cat([x, y], 1))
    assert torch.equal(ff.matmul(x, y.t()), x @ y.t())
    assert torch.equal(ff.add_scalar(x, 2.0), x + 2)
    assert torch.equal(ff.mul_scalar(x, 2.0), x * 2)
    for module in (ff, quantized.QFunctional()):
        with pytest.raises(RuntimeError, match="has no forward"):
            module(x)


def test_float_operands_are_refused_by_name() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quant, self.joined = eagerq.QuantStub(), quantized.FloatFunctional()

        def forward(self, x: Tensor) -> Tensor:
            joined: Tensor = self.joined.add(self.quant(x), x)
            return joined

    net = Net().train()
    net.qconfig = eagerq.get_default_qat_qconfig("onednn")
    prepared = eagerq.prepare_qat(net)
    prepared(torch.randn(2, 3))
    converted = eagerq.convert(prepared.eval())
    with pytest.raises(InvalidInputError, match=r"'joined' .*QFunctional.*QTensor.*torch.float32.*QuantStub"):
        converted(torch.randn(2, 3))


def test_per_channel_operands_are_refused() -> None:
    q = eagerq.quantize_per_channel(torch.randn(2, 3), torch.ones(3), torch.zeros(3), 1, torch.uint8)
    with pytest.raises(InvalidInputError, match="one scale"):
        quantized.QFunctional().add(q, q)


def test_only_made_from_a_float_functional() -> None:
    with pytest.raises(InvalidConfigError, match=r"FloatFunctional.*Linear"):
        quantized.QFunctional.from_float(nn.Linear(2, 2))
