"""Tables, bags and indices to look up, as the tests of embeddings draw them."""

from __future__ import annotations

import io
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from eagerq.nn import qat as nnqat
from eagerq.qconfig import default_embedding_qat_qconfig
from eagerq.qtensor import QTensor

MODES = ("sum", "mean", "max")
NAMES = ("Embedding", "EmbeddingBag")
INDEX_DTYPES = (torch.int64, torch.int32)
kinds = pytest.mark.parametrize("name", NAMES)


def relative(got: Tensor, wanted: Tensor) -> float:
    """Distance as a share of what was wanted."""
    assert got.shape == wanted.shape
    got, wanted = got.detach().double(), wanted.detach().double()
    return float((got - wanted).norm() / wanted.norm().clamp(min=1e-30))


def real_table(rows: int, columns: int, kind: str) -> Tensor:
    """Float weights of several kinds; all kinds have rows of other sizes."""
    w = torch.randn(rows, columns) * 10 ** (torch.rand(rows, 1) * 4 - 2)
    if kind == "shifted":  # zero is not in the rows' range
        w += 3
    elif kind == "grid":  # values, scales and ties are powers of two
        w = (w * 64).round() / 64
    elif kind == "flat":  # rows of one value each, zeros among them
        w = torch.arange(rows)[:, None].repeat(1, columns).float()
    return w


real_tables = st.builds(
    real_table, st.integers(1, 40), st.integers(1, 33), st.sampled_from(("normal", "shifted", "grid", "flat"))
)


def integer_table(rows: int, columns: int, power_of_two: bool = False) -> QTensor:
    integers = torch.randint(0, 256, (rows, columns), dtype=torch.uint8)
    scale = torch.rand(rows) + 0.01
    if power_of_two:
        scale = 2.0 ** scale.log2().round()
    return QTensor(integers, scale, torch.rand(rows) * 300 - 20, 0)


integer_tables = st.builds(integer_table, st.integers(1, 40), st.integers(1, 33), st.booleans())


class Bags(NamedTuple):
    """Arguments of an embedding bag, as drawn."""

    indices: Tensor
    offsets: Tensor | None
    include_last_offset: bool


@st.composite
def bags(draw: st.DrawFn, rows: int) -> Bags:
    """Bags of none to six indices: with starts, with starts and the end, or as the rows of a matrix."""
    dtype = draw(st.sampled_from(INDEX_DTYPES))
    if draw(st.integers(0, 2)) == 0:
        shape = (draw(st.integers(1, 5)), draw(st.integers(1, 6)))
        return Bags(torch.randint(0, rows, shape, dtype=dtype), None, False)
    lengths = torch.tensor(draw(st.lists(st.integers(0, 6), min_size=1, max_size=6)))
    ends = lengths.cumsum(0)
    include_last_offset = draw(st.booleans())
    offsets = torch.cat([ends.new_zeros(1), ends if include_last_offset else ends[:-1]]).to(dtype)
    return Bags(torch.randint(0, rows, (int(ends[-1]),), dtype=dtype), offsets, include_last_offset)


def bags_in_float64(
    table: QTensor, indices: Tensor, offsets: Tensor | None, weights: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """The exact result, and its size had nothing cancelled out: what errors are measured by."""
    rows = (table.integers.double() - table.zero_point.double()[:, None]) * table.scale.double()[:, None]
    exact = None if weights is None else weights.double()
    wanted = F.embedding_bag(indices, rows, offsets, per_sample_weights=exact, **options)
    absolute = None if exact is None else exact.abs()
    return wanted, F.embedding_bag(indices, rows.abs(), offsets, per_sample_weights=absolute, **options)


def as_old(table: QTensor) -> Tensor:
    """The same integers and parameters as torch.ao's modules take them."""
    return torch._make_per_channel_quantized_tensor(table.integers, table.scale, table.zero_point, 0)


def make(name: str, rows: int = 12, columns: int = 5, **arguments: Any) -> Any:
    """A QAT module."""
    return getattr(nnqat, name)(rows, columns, qconfig=default_embedding_qat_qconfig, **arguments)


def some_input(name: str) -> tuple[Tensor, ...]:
    indices = torch.tensor([1, 4, 4, 0, 7, 11])
    return (indices,) if name == "Embedding" else (indices, torch.tensor([0, 2, 2, 5]))


def save_and_load(module: nn.Module) -> dict[str, Tensor]:
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    state: dict[str, Tensor] = torch.load(file, weights_only=True)
    return state
