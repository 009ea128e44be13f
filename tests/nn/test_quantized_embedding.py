"""8-bit look-ups against torch.ao and float64."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nn.tables import (
    INDEX_DTYPES,
    MODES,
    as_old,
    bags,
    bags_in_float64,
    integer_table,
    integer_tables,
    kinds,
    relative,
    save_and_load,
    some_input,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import eagerq
from eagerq.errors import InvalidArgumentError, InvalidConfigError, InvalidInputError, UnsupportedError
from eagerq.nn import quantized as nnq
from eagerq.qtensor import QTensor

# --- 8-bit look-ups ------------------------------------------------------------------------------


@given(table=integer_tables, data=st.data())
def test_rows_equal_oracle(ao: Any, table: QTensor, data: st.DataObject) -> None:
    rows, columns = table.shape
    shape = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=2))
    indices = torch.randint(0, rows, shape, dtype=data.draw(st.sampled_from(INDEX_DTYPES)))
    theirs = ao.quantized.Embedding(rows, columns, _weight=as_old(table))
    got = nnq.Embedding(rows, columns, _weight=table)(indices)
    assert got.dtype is torch.float32
    assert relative(got, theirs(indices)) < 1e-6


@given(table=integer_tables, shape=st.lists(st.integers(0, 3), max_size=4))
def test_rows_equal_the_dequantized_table(table: QTensor, shape: list[int]) -> None:
    indices = torch.randint(0, table.shape[0], shape)
    got = nnq.Embedding(*table.shape, _weight=table)(indices)
    assert torch.equal(got, table.dequantize()[indices])


@given(table=integer_tables, data=st.data())
def test_bags_equal_oracle(ao: Any, table: QTensor, data: st.DataObject) -> None:
    indices, offsets, include_last_offset = data.draw(bags(table.shape[0]))
    weights = torch.randn(indices.shape) if data.draw(st.booleans()) else None
    options = {"mode": "sum", "include_last_offset": include_last_offset}
    theirs = ao.quantized.EmbeddingBag(*table.shape, _weight=as_old(table), **options)
    ours = nnq.EmbeddingBag(*table.shape, _weight=table, **options)
    _, size = bags_in_float64(table, indices, offsets, weights, **options)
    error = ours(indices, offsets, weights) - theirs(indices, offsets, weights)
    assert error.norm() <= 1e-6 * size.norm()


@pytest.mark.parametrize("mode", MODES)
@given(table=integer_tables, data=st.data())
def test_bags_equal_float64(mode: str, table: QTensor, data: st.DataObject) -> None:
    indices, offsets, include_last_offset = data.draw(bags(table.shape[0]))
    padding_idx = data.draw(st.none() | st.integers(-table.shape[0], table.shape[0] - 1))
    weights = torch.randn(indices.shape) if mode == "sum" and data.draw(st.booleans()) else None
    options = {"mode": mode, "include_last_offset": include_last_offset, "padding_idx": padding_idx}
    wanted, size = bags_in_float64(table, indices, offsets, weights, **options)
    got = nnq.EmbeddingBag(*table.shape, _weight=table, **options)(indices, offsets, weights)
    assert got.dtype is torch.float32
    assert got.shape == wanted.shape
    assert (got - wanted).norm() <= 1e-6 * size.norm()


@pytest.mark.parametrize("layout", ["starts", "starts and end", "matrix"])
@pytest.mark.parametrize("mode", MODES)
def test_large_bags_equal_float64(mode: str, layout: str) -> None:
    # more than a CPU makes real at a time: done in pieces, with empty bags, and one longer than a piece
    table = integer_table(100, 64)
    options: dict[str, Any] = {"mode": mode, "padding_idx": 7, "include_last_offset": layout == "starts and end"}
    lengths = torch.randint(0, 60, (1000,))
    lengths[[0, 1, 500, 998, 999]] = torch.tensor([0, 0, 20_000, 0, 0])
    ends = lengths.cumsum(0)
    count = int(ends[-1])
    assert count * 64 > 2**21
    indices, weights = torch.randint(0, 100, (count,)), torch.randn(count) if mode == "sum" else None
    offsets: Tensor | None = torch.cat([ends.new_zeros(1), ends if options["include_last_offset"] else ends[:-1]])
    if layout == "matrix":
        rows = count // 10
        indices, offsets = indices[: rows * 10].reshape(rows, 10), None
        weights = None if weights is None else weights[: rows * 10].reshape(rows, 10)
    wanted, size = bags_in_float64(table, indices, offsets, weights, **options)
    module = nnq.EmbeddingBag(100, 64, _weight=table, **options)
    got = module(indices, offsets, weights)
    assert got.shape == wanted.shape
    assert (got - wanted).norm() <= 1e-6 * size.norm()
    if offsets is not None:
        with pytest.raises(RuntimeError, match=r"offsets\[0\] has to be 0"):
            module(indices, offsets + 1)
        with pytest.raises(IndexError):
            module(indices + 1, offsets)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding_idx", [None, 2])
def test_empty_bags_are_zero(mode: str, padding_idx: int | None) -> None:
    module = nnq.EmbeddingBag(3, 4, mode=mode, padding_idx=padding_idx, _weight=integer_table(3, 4))
    nothing = torch.zeros(0, dtype=torch.int64)
    assert torch.equal(module(nothing, torch.zeros(2, dtype=torch.int64)), torch.zeros(2, 4))
    assert torch.equal(module(torch.zeros(2, 0, dtype=torch.int64)), torch.zeros(2, 4))
    assert module(nothing, nothing).shape == (0, 4)
    if padding_idx is not None:
        assert torch.equal(module(torch.full((1, 3), padding_idx)), torch.zeros(1, 4))


def test_a_matrix_of_indices_has_no_last_offset() -> None:
    # torch.ao takes the last row for an end and drops it; the float module does not
    indices = torch.tensor([[0, 1], [2, 3], [4, 5]])
    module = nnq.EmbeddingBag(6, 4, include_last_offset=True)
    assert module(indices).shape == nn.EmbeddingBag(6, 4, include_last_offset=True)(indices).shape == (3, 4)


@kinds
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_result_is_float32_whatever_the_model_is(name: str, dtype: torch.dtype) -> None:
    module = getattr(nnq, name)(12, 5, _weight=integer_table(12, 5)).to(dtype)
    assert module(*some_input(name)).dtype is torch.float32


@pytest.mark.parametrize(("name", "mode"), [("Embedding", "sum"), *(("EmbeddingBag", mode) for mode in MODES)])
def test_only_the_rows_asked_for_become_float(name: str, mode: str) -> None:
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for one in out if isinstance(out, tuple) else (out,):
                largest = max(largest, one.numel())
            return out

    options = {} if name == "Embedding" else {"mode": mode, "padding_idx": 0}
    module = getattr(nnq, name)(1000, 8, **options)
    with Watch():
        module(*some_input(name))
    assert largest <= 6 * 8


@kinds
def test_on_device(name: str, device: torch.device) -> None:
    table = integer_table(12, 5)
    options: list[dict[str, Any]] = [{}]
    if name == "EmbeddingBag":
        options = [{"mode": mode, "padding_idx": padding} for mode in MODES for padding in (None, 4)]
    for option in options:
        module = getattr(nnq, name)(12, 5, _weight=table, **option)
        wanted = module(*some_input(name))
        got = module.to(device)(*(one.to(device) for one in some_input(name)))
        assert got.device.type == device.type
        assert relative(got.cpu(), wanted) < 1e-6


# --- compiled and exported -----------------------------------------------------------------------


class Many(nn.Module):
    """Several kinds of look-ups on one input."""

    def __init__(self) -> None:
        super().__init__()
        table = integer_table(20, 8)
        self.rows = nnq.Embedding(20, 8, _weight=table)
        self.sums = nnq.EmbeddingBag(20, 8, _weight=table)
        self.means = nnq.EmbeddingBag(20, 8, mode="mean", padding_idx=3, _weight=table)
        self.most = nnq.EmbeddingBag(20, 8, mode="max", padding_idx=3, _weight=table)

    def forward(self, indices: Tensor, offsets: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        matrix = indices.reshape(-1, 4)
        return (
            self.rows(matrix),
            self.sums(indices, offsets, weights),
            self.means(matrix),
            self.most(indices, offsets),
        )


def many_inputs(count: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randint(0, 20, (count,)), torch.tensor([0, 3, 3, 9]), torch.rand(count)


def assert_all_close(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted, strict=True):
        assert relative(one, other) < 1e-6


@pytest.mark.usefixtures("fresh_compiler")
def test_compiles() -> None:
    model, inputs = Many(), many_inputs()
    assert_all_close(torch.compile(model, fullgraph=True)(*inputs), model(*inputs))


@pytest.mark.parametrize("strict", [True, False])
def test_exports(strict: bool) -> None:
    model, inputs = Many(), many_inputs()
    count = torch.export.Dim("count", min=1, max=64)
    exported = torch.export.export(model, inputs, dynamic_shapes=({0: 4 * count}, None, {0: 4 * count}), strict=strict)
    other = many_inputs(24)
    assert_all_close(exported.module()(*other), model(*other))


# --- state ---------------------------------------------------------------------------------------


@kinds
def test_state_is_plain_tensors(name: str) -> None:
    module = getattr(nnq, name)(12, 5, _weight=integer_table(12, 5))
    state = save_and_load(module)
    assert {key: (value.dtype, tuple(value.shape)) for key, value in state.items()} == {
        "weight": (torch.uint8, (12, 5)),
        "weight_scale": (torch.float32, (12,)),
        "weight_zero_point": (torch.float32, (12,)),
    }
    fresh = getattr(nnq, name)(12, 5)
    fresh.load_state_dict(state)
    assert torch.equal(fresh(*some_input(name)), module(*some_input(name)))
    assert not hasattr(module, "scale")


@kinds
def test_state_of_another_table_is_refused(name: str) -> None:
    module = getattr(nnq, name)(12, 5, _weight=integer_table(12, 5))
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(RuntimeError, match="weight has shape"):
        module.load_state_dict(getattr(nnq, name)(13, 5).state_dict())
    with pytest.raises(RuntimeError, match="weight_scale"):
        module.load_state_dict({"weight": before["weight"]})
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


@kinds
def test_copies_are_independent(name: str) -> None:
    module = getattr(nnq, name)(12, 5, _weight=integer_table(12, 5))
    wanted = module(*some_input(name))
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(*some_input(name)), wanted)
        twin.set_weight(integer_table(12, 5))
        assert not torch.equal(twin(*some_input(name)), wanted)
    assert torch.equal(module(*some_input(name)), wanted)


# --- what bad input gets -------------------------------------------------------------------------


@kinds
def test_constructor_errors(name: str) -> None:
    cls = getattr(nnq, name)
    old_name = getattr(torch, "quint8", None)
    if old_name is not None:
        assert cls(3, 2, dtype=old_name).dtype is torch.uint8
    with pytest.raises(UnsupportedError, match=r"not in torch\.int8"):
        cls(3, 2, dtype=torch.int8)
    with pytest.raises(InvalidArgumentError, match="padding_idx 3 is none of the 3 rows"):
        cls(3, 2, padding_idx=3)
    if name == "EmbeddingBag":
        with pytest.raises(InvalidArgumentError, match="unknown mode 'last'"):
            cls(3, 2, mode="last")


@kinds
@pytest.mark.parametrize(
    ("table", "message"),
    [
        (torch.zeros(3, 2), "got Tensor"),
        (eagerq.quantize_per_tensor(torch.zeros(3, 2), 1.0, 0, torch.uint8), "axis None"),
        (QTensor(torch.zeros(3, 2, dtype=torch.uint8), torch.ones(2), torch.zeros(2), 1), "axis 1"),
        (QTensor(torch.zeros(3, 2, dtype=torch.int8), torch.ones(3), torch.zeros(3), 0), "dtype torch.int8"),
        (QTensor(torch.zeros(2, 3, dtype=torch.uint8), torch.ones(2), torch.zeros(2), 0), r"shape \(2, 3\)"),
        (QTensor(torch.zeros(3, 2, dtype=torch.uint8), torch.ones(1), torch.zeros(1), 0), r"\(1,\) scales"),
    ],
)
def test_tables_that_do_not_fit(name: str, table: Tensor, message: str) -> None:
    module = getattr(nnq, name)(3, 2)
    with pytest.raises(InvalidConfigError, match=message):
        module.set_weight(table)
    with pytest.raises(InvalidConfigError, match=message):
        getattr(nnq, name)(3, 2, _weight=table)


@pytest.mark.parametrize("index", [-1, 12, 2**31 - 1])
@pytest.mark.parametrize("dtype", INDEX_DTYPES)
def test_index_out_of_range(index: int, dtype: torch.dtype) -> None:
    indices = torch.tensor([[0, index]], dtype=dtype)
    with pytest.raises(IndexError):
        nnq.Embedding(12, 5)(indices)
    for mode in MODES:
        with pytest.raises(IndexError):
            nnq.EmbeddingBag(12, 5, mode=mode, padding_idx=0)(indices)


@kinds
def test_indices_have_to_be_integers(name: str) -> None:
    module = getattr(nnq, name)(12, 5)
    quantized = eagerq.quantize_per_tensor(torch.zeros(2, 2), 1.0, 0, torch.uint8)
    for wrong in (torch.zeros(2, 2), quantized):
        with pytest.raises(InvalidInputError, match="expected row numbers in int64 or int32"):
            module(wrong)


def test_bags_that_do_not_fit() -> None:
    module = nnq.EmbeddingBag(12, 5)
    indices, offsets = some_input("EmbeddingBag")
    shapes: list[tuple[Tensor, Tensor | None]] = [
        (indices, None),
        (indices.reshape(2, 3), offsets),
        (indices, offsets.reshape(2, 2)),
        (indices.reshape(1, 2, 3), None),
    ]
    for wrong in shapes:
        with pytest.raises(ValueError, match="1-d indices with 1-d offsets, or 2-d indices alone"):
            module(*wrong)
    with pytest.raises(RuntimeError, match=r"offsets\[0\] has to be 0"):
        module(indices, offsets + 1)
    with pytest.raises(RuntimeError, match=r"offsets\[-1\] can not be greater"):
        module(indices, torch.tensor([0, 99]))
    with pytest.raises(ValueError, match="one weight for each index"):
        module(indices, offsets, torch.ones(2))
    with pytest.raises(NotImplementedError, match="per_sample_weights with mode 'mean'"):
        nnq.EmbeddingBag(12, 5, mode="mean")(indices, offsets, torch.ones(6))
