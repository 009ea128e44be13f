"""Embeddings of 4 bits, two values a byte: exact against float64, and torch.ao's where it works."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from conftest import Oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from nn.tables import MODES, bags, bags_in_float64, kinds, real_tables, relative, some_input
from torch import Tensor, nn

import eagerq
from eagerq import QTensor
from eagerq.errors import CheckpointError, InvalidConfigError
from eagerq.nn import quantized as nnq
from eagerq.qconfig import default_embedding_qat_qconfig_4bit, float_qparams_weight_only_qconfig_4bit


def drawn_table(rows: int, columns: int) -> QTensor:
    integers = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
    return QTensor(integers, torch.rand(rows) + 0.01, torch.rand(rows) * 15, 0)


tables = st.builds(drawn_table, st.integers(1, 30), st.integers(1, 17))


def layer_of(name: str, table: QTensor, **others: Any) -> Any:
    return getattr(nnq, name)(*table.integers.shape, _weight=table, dtype=torch.uint4, **others)


def converted(library: Any, name: str, w: Tensor, **arguments: Any) -> Any:
    module = getattr(nn, name)(*w.shape, _weight=w.clone(), **arguments)
    net = nn.Sequential(module).eval()
    net.qconfig = library.float_qparams_weight_only_qconfig_4bit
    return library.convert(library.prepare(net))


@given(tables, st.data())
def test_rows(table: QTensor, data: st.DataObject) -> None:
    layer = layer_of("Embedding", table)
    rows, columns = table.integers.shape
    assert layer._weight.shape == (rows, -(-columns // 2))
    assert torch.equal(layer.weight().int_repr(), table.integers)
    indices = torch.randint(0, rows, data.draw(st.sampled_from([(0,), (5,), (2, 3)])))
    exact = (table.integers.double() - table.zero_point.double()[:, None]) * table.scale.double()[:, None]
    assert relative(layer(indices), exact[indices]) < 1e-6


@pytest.mark.parametrize("mode", MODES)
def test_bags(mode: str) -> None:
    @given(tables, st.data())
    def check(table: QTensor, data: st.DataObject) -> None:
        drawn = data.draw(bags(len(table.integers)))
        weighted = mode == "sum" and data.draw(st.booleans())
        weights = torch.randn(drawn.indices.shape) if weighted else None
        options = {"mode": mode, "include_last_offset": drawn.include_last_offset}
        layer = layer_of("EmbeddingBag", table, **options)
        y = layer(drawn.indices, drawn.offsets, weights)
        wanted, size = bags_in_float64(table, drawn.indices, drawn.offsets, weights, **options)
        assert y.shape == wanted.shape
        assert ((y - wanted).abs() <= 1e-5 * size.abs() + 1e-6).all()

    check()


# --- from float -------------------------------------------------------------------------------------


@kinds
def test_converted_rows_are_near(name: str) -> None:
    @given(real_tables)
    def check(w: Tensor) -> None:
        layer = converted(eagerq, name, w)[0]
        assert layer.dtype is torch.uint4
        table = layer.weight()
        assert int(table.int_repr().max()) <= 15
        spread = w.amax(1) - w.amin(1)
        some = spread > 1e-4
        error = (table.dequantize() - w).abs().amax(1)
        assert (error[some] <= spread[some] / 30 * 1.001 + w.abs().amax(1)[some] * 1e-5).all()

    check()


def test_integers_are_torchs(ao: Oracle) -> None:
    """And the sums, but that torch.ao keeps scales in float16 and only sums."""

    @settings(max_examples=20)
    @given(st.integers(1, 20), st.sampled_from([2, 4, 6, 16]))
    def check(rows: int, columns: int) -> None:
        w = torch.randn(rows, columns)
        mine, theirs = (converted(library, "EmbeddingBag", w, mode="sum")[0] for library in (eagerq, ao.quantization))
        assert torch.equal(mine._weight.flatten(), theirs.weight().int_repr())
        assert torch.equal(mine._weight_scale, theirs.weight().q_per_channel_scales().float())
        indices, offsets = torch.arange(rows), torch.arange(rows)
        integers, scale, zero_point = mine.weight().int_repr(), mine._weight_scale, mine._weight_zero_point
        halved = integers * scale.half().float()[:, None] + (-zero_point * scale).half().float()[:, None]
        assert relative(theirs(indices, offsets), halved) < 1e-6
        exact = (integers.double() - zero_point.double()[:, None]) * scale.double()[:, None]
        assert relative(mine(indices, offsets), exact) < 1e-6

    check()


@kinds
def test_trained(name: str) -> None:
    """prepare_qat with the 4-bit qconfig; as_trained is what was trained."""
    net = nn.Sequential(getattr(nn, name)(12, 5, **({"mode": "sum"} if "Bag" in name else {}))).train()
    net.qconfig = default_embedding_qat_qconfig_4bit
    net = eagerq.prepare_qat(net, eagerq.quantization_mappings.get_embedding_qat_module_mappings())
    given_ = some_input(name)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        net[0](*given_).square().sum().backward()
        optimizer.step()
    trained = net.eval()[0](*given_)
    int4 = eagerq.convert(copy.deepcopy(net), as_trained=True)[0]
    assert int4.dtype is torch.uint4
    # the fake quantizer looks at the weight in eval mode too
    assert relative(int4(*given_), trained) < 1e-5


@kinds
def test_quantize_dynamic(name: str) -> None:
    net = nn.Sequential(getattr(nn, name)(12, 5, **({"mode": "sum"} if "Bag" in name else {}))).eval()
    int4 = eagerq.quantize_dynamic(net, {getattr(nn, name): float_qparams_weight_only_qconfig_4bit})[0]
    assert type(int4) is getattr(nnq, name)
    assert int4.dtype is torch.uint4


# --- state ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [4, 5])
@kinds
def test_files(ao: Oracle, name: str, columns: int) -> None:
    one, two = converted(eagerq, name, torch.randn(6, columns)), converted(eagerq, name, torch.randn(6, columns))
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert {key: (value.dtype, tuple(value.shape)) for key, value in state.items()} == {
        "0.weight": (torch.uint8, (6, -(-columns // 2))),
        "0.weight_scale": (torch.float32, (6,)),
        "0.weight_zero_point": (torch.float32, (6,)),
    }
    two.load_state_dict(state)
    assert torch.equal(two[0].weight().dequantize(), one[0].weight().dequantize())
    assert torch.equal(copy.deepcopy(one)[0].weight().dequantize(), one[0].weight().dequantize())
    # torch.ao's table, whose halves run on from row to row
    table = one[0].weight()
    w = table.dequantize()
    old = torch.quantize_per_channel(w, table.scale, table.zero_point, 0, torch.quint4x2)
    two = converted(eagerq, name, torch.randn(6, columns))
    two[0].load_state_dict({"_packed_params.dtype": torch.quint4x2, "_packed_params._packed_weight": old})
    assert torch.equal(two[0].weight().int_repr(), table.int_repr())


def test_files_of_another_width_are_refused() -> None:
    four, eight = converted(eagerq, "Embedding", torch.randn(6, 4)), nn.Sequential(nnq.Embedding(6, 4))
    for layer, state in ((four, eight.state_dict()), (eight, four.state_dict())):
        before = copy.deepcopy(layer.state_dict())
        with pytest.raises(RuntimeError, match="weight has shape"):
            layer.load_state_dict(state)
        assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())
    # 5 values have a spare half, where a row of 6 has its last
    five, six = (converted(eagerq, "Embedding", torch.randn(6, columns)) for columns in (5, 6))
    wrong = {**six.state_dict(), "0.weight": six.state_dict()["0.weight"] | 0x10}
    with pytest.raises((CheckpointError, RuntimeError), match="more than 5 values of 4 bits"):
        five.load_state_dict(wrong)


@kinds
def test_values_beyond_4_bits_are_refused(name: str) -> None:
    table = drawn_table(3, 4)
    table.integers[1, 2] = 16
    with pytest.raises(InvalidConfigError, match=f"{name}.*up to 16"):
        layer_of(name, table)


@kinds
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_and_exported(name: str) -> None:
    layer = layer_of(name, drawn_table(12, 5))
    wanted, given_ = layer(*some_input(name)), some_input(name)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(*given_), wanted)
    assert torch.equal(torch.export.export(layer, given_).module()(*given_), wanted)
    assert "uint4" in repr(layer)
