"""Look-ups in C: the plain steps' very numbers, or declined."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nn.tables import INDEX_DTYPES, MODES, bags, integer_table
from torch import Tensor

from eagerq import kernels, native
from eagerq.kernels import pack_halves
from eagerq.qtensor import QTensor

plain: Any = importlib.import_module("eagerq.kernels.embedding")  # the function has the module's name

pytestmark = pytest.mark.skipif(not native.available, reason="the C library was not built: no compiler at installation")

# around the width that C takes at a time, and beyond where it splits the work between threads
WIDTHS = st.sampled_from([1, 2, 7, 16, 63, 64, 65, 128, 200])


@st.composite
def tables(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, int | None]:
    """Arguments of a look-up: whole bytes, or halves of them and how many."""
    table: QTensor = integer_table(draw(st.integers(1, 40)), draw(WIDTHS), draw(st.booleans()))
    if draw(st.booleans()):
        return table.integers, table.scale, table.zero_point, None
    return pack_halves(table.integers & 15), table.scale, table.zero_point, table.integers.shape[1]


def rows_of(table: Any, indices: Tensor) -> Tensor:
    weight, scale, zero_point, columns = table
    flat = indices.reshape(-1)
    rows = plain._centred(flat, weight, zero_point, columns) * scale[flat][:, None]
    return rows.reshape(*indices.shape, rows.shape[1])


@given(tables(), st.lists(st.integers(0, 5), max_size=3), st.sampled_from(INDEX_DTYPES))
def test_embedding(table: Any, shape: list[int], dtype: torch.dtype) -> None:
    indices = torch.randint(0, len(table[0]), shape, dtype=dtype)
    assert torch.equal(native.embedding(indices, *table), rows_of(table, indices))


@given(tables(), st.sampled_from(MODES), st.booleans(), st.booleans(), st.data())
def test_bags(table: Any, mode: str, weighted: bool, padded: bool, data: st.DataObject) -> None:
    weight, scale, zero_point, columns = table
    indices, offsets, include_last_offset = data.draw(bags(len(weight)))
    if offsets is None:
        offsets = torch.arange(len(indices), dtype=indices.dtype) * indices.shape[1]
        indices = indices.flatten()
    factors = torch.randn(len(indices)) if weighted and mode == "sum" else None
    padding = data.draw(st.integers(0, len(weight) - 1)) if padded else None
    how = (offsets, mode, factors, include_last_offset, padding)
    got = native.embedding_bag(indices, weight, scale, zero_point, *how, columns)
    assert torch.equal(got, plain._bags(indices, weight, scale, zero_point, columns, *how))


@pytest.mark.parametrize("mode", MODES)
def test_many_bags(mode: str) -> None:
    """Enough to be shared between threads."""
    table = integer_table(1000, 64)
    indices, offsets = torch.randint(0, 1000, (5000,)), torch.arange(0, 5000, 13)
    parts = (table.integers, table.scale, table.zero_point)
    got = native.embedding_bag(indices, *parts, offsets, mode, None, False, None, None)
    assert torch.equal(got, plain._bags(indices, *parts, None, offsets, mode, None, False, None))
    assert torch.equal(native.embedding(indices, *parts, None), rows_of((*parts, None), indices))


@pytest.mark.parametrize(
    ("indices", "offsets"),
    [([0, 5], [0]), ([0, -1], [0]), ([0, 1], [0, 3]), ([0, 1], [1]), ([0, 1], [0, 2, 1]), ([0, 1], [])],
)
def test_what_is_out_of_range_is_left_to_torch(indices: list[int], offsets: list[int]) -> None:
    table = integer_table(5, 3)
    parts = (table.integers, table.scale, table.zero_point)
    rows, starts = torch.tensor(indices), torch.tensor(offsets, dtype=torch.int64)
    assert native.embedding_bag(rows, *parts, starts, "sum", None, False, None, None) is NotImplemented
    if indices != [0, 1]:
        assert native.embedding(rows, *parts, None) is NotImplemented
        with pytest.raises(IndexError):
            kernels.embedding(rows, *parts)


def test_gradients_of_the_factors_are_left_to_torch() -> None:
    table = integer_table(5, 3)
    factors = torch.ones(4, requires_grad=True)
    sums = kernels.embedding_bag(
        *(torch.tensor([0, 1, 2, 3]), table.integers, table.scale, table.zero_point, torch.tensor([0, 2])),
        *("sum", factors, False, None),
    )
    sums.sum().backward()
    assert factors.grad is not None


@given(st.data())
def test_other_memory_is_left_to_torch(data: st.DataObject) -> None:
    table = integer_table(6, 8)
    indices = torch.randint(0, 6, (4,))
    broken = data.draw(st.sampled_from(["weight", "scale", "zero_point", "indices"]))
    given_ = {"indices": indices, "weight": table.integers, "scale": table.scale, "zero_point": table.zero_point}
    apart = given_[broken].repeat_interleave(2, -1)[..., ::2]
    call = [*(given_ | {broken: apart}).values()]
    assert native.embedding(*call, None) is NotImplemented
    assert torch.equal(kernels.embedding(*call), rows_of((*call[1:], None), indices))
