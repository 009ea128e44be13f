"""Embeddings and dynamic layers with other options than their defaults, and what unrolls in time, in Q/DQ form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nn.recurrences import start_of, tensors
from nn.tables import MODES
from nn.twins import Between
from pt2e.exporting.graphs import exported, steps_between, used
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

import eagerq
from eagerq import QTensor
from eagerq.errors import UnsupportedError
from eagerq.nn import quantized
from eagerq.pt2e import export
from eagerq.pt2e.operators import DEQUANTIZE_PER_CHANNEL
from eagerq.scheme import uint4

BATCH = Dim("batch", min=3, max=64)
LENGTH = Dim("length", min=3, max=1000)
INDICES, OFFSETS = torch.tensor([1, 4, 4, 0, 7, 11, 3, 3]), torch.tensor([0, 2, 2, 5])


class Inside(nn.Module):
    """A module as a part of a model, with the options that it is called with."""

    def __init__(self, inner: nn.Module, **options: Any) -> None:
        super().__init__()
        self.inner, self.options = inner, options

    def forward(self, *inputs: Any) -> Any:
        return self.inner(*inputs, **self.options)


def table(columns: int, dtype: torch.dtype) -> QTensor:
    torch.manual_seed(columns)
    high = 16 if dtype is uint4 else 256
    integers = torch.randint(0, high, (12, columns), dtype=torch.uint8)
    return QTensor(integers, torch.rand(12) + 0.1, torch.rand(12) * 20 - 5, 0)


def _ranges(program: Any) -> set[tuple[Any, ...]]:
    return {node.args[3:] for node in program.graph.nodes if node.target is DEQUANTIZE_PER_CHANNEL}


@torch.no_grad()
@pytest.mark.parametrize("columns", [1, 5, 6])
@pytest.mark.parametrize("dtype", [torch.uint8, uint4])
@pytest.mark.parametrize("index", [torch.int64, torch.int32])
def test_embeddings(columns: int, dtype: torch.dtype, index: torch.dtype) -> None:
    model = Inside(quantized.Embedding(12, columns, _weight=table(columns, dtype), dtype=dtype))
    program, graph = exported(model, (INDICES.to(index),), (({0: LENGTH},),))
    assert torch.equal(graph(INDICES[:5].to(index)), model(INDICES[:5].to(index)))
    assert _ranges(program) == {(0, 0, 15 if dtype is uint4 else 255, torch.uint8)}
    assert used(program).total() == 2  # a look-up in the table made real


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.uint8, uint4])
@pytest.mark.parametrize(
    "options", [{}, {"padding_idx": 4}, {"include_last_offset": True, "padding_idx": 3}], ids=["", "padded", "ended"]
)
def test_bags(mode: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    inner = quantized.EmbeddingBag(12, 5, mode=mode, _weight=table(5, dtype), dtype=dtype, **options)
    offsets = torch.cat([OFFSETS, torch.tensor([8])]) if inner.include_last_offset else OFFSETS
    _, graph = exported(Inside(inner), (INDICES, offsets), (({0: LENGTH}, {0: BATCH}),))
    for indices in (INDICES, INDICES.flip(0)):
        torch.testing.assert_close(graph(indices, offsets), inner(indices, offsets))
    if not options.get("include_last_offset"):
        rows = torch.randint(0, 12, (6, 3))
        _, graph = exported(Inside(inner), (rows[:3],), (({0: BATCH},),))
        torch.testing.assert_close(graph(rows), inner(rows))


@torch.no_grad()
def test_bags_with_factors_and_indices_of_two_types() -> None:
    inner = quantized.EmbeddingBag(12, 5, _weight=table(5, torch.uint8))
    factors = torch.rand(8)
    _, graph = exported(Inside(inner), (INDICES, OFFSETS.int(), factors), (({0: LENGTH}, {0: BATCH}, {0: LENGTH}),))
    torch.testing.assert_close(graph(INDICES, OFFSETS.int(), factors), inner(INDICES, OFFSETS.int(), factors))


@torch.no_grad()
@pytest.mark.parametrize("qconfig", ["default", "per_channel", "float16"])
@pytest.mark.parametrize("reduced", [True, False])
@pytest.mark.parametrize("kind", ["Linear", "LSTM", "GRU", "GRUCell"])
def test_dynamic_layers(qconfig: str, reduced: bool, kind: str) -> None:
    """The tolerance is that of sums in another order, a thousand times less than a step of the input."""
    torch.manual_seed(3)
    kinds = {getattr(nn, kind): getattr(eagerq, f"{qconfig}_dynamic_qconfig")}
    options = {"bidirectional": True} if kind == "LSTM" else {}
    float_layer = getattr(nn, kind)(6, 8, **options)
    model: Any = eagerq.quantize_dynamic(Inside(float_layer), kinds)
    model.inner.reduce_range = reduced
    x = torch.randn(*((4, 3, 6) if kind in ("LSTM", "GRU") else (3, 6)))
    inputs = (x,) if kind == "Linear" else (x, start_of(float_layer, 3))
    _, graph = exported(model, inputs)
    for got, wanted in zip(tensors(graph(*inputs)), tensors(model(*inputs)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_small_and_empty_ranges_are_floored_as_eagerly() -> None:
    model = eagerq.quantize_dynamic(nn.Sequential(nn.Linear(6, 4)), {nn.Linear})
    _, graph = exported(model, (torch.randn(3, 6),))
    for x in (torch.zeros(3, 6), torch.full((3, 6), 1e-5), torch.rand(3, 6) + 4, -torch.rand(3, 6)):
        torch.testing.assert_close(graph(x), model(x), rtol=1e-5, atol=1e-6)


class Packing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.LSTM(6, 8)

    def forward(self, x: Any, lengths: Any = None) -> Tensor:
        x = x if lengths is None else pack_padded_sequence(x, lengths, enforce_sorted=False)
        out: Tensor = self.encoder(x)[1][0]
        return out


@pytest.mark.parametrize(
    "inputs",
    [
        (pack_sequence([torch.randn(3, 6), torch.randn(2, 6)]),),
        (torch.randn(4, 2, 6), [4, 2]),
        (torch.randn(4, 2, 6), torch.tensor([4, 2])),
    ],
)
def test_packed_sequences_are_refused_by_name(inputs: Any) -> None:
    model = eagerq.quantize_dynamic(Packing(), {nn.LSTM})
    with pytest.raises(UnsupportedError, match=r"'encoder' .*packed sequence.*pad_packed_sequence"):
        export(model, inputs)


def _int8(inner: nn.Module, inputs: tuple[Any, ...], trained: bool) -> Any:
    torch.manual_seed(0)
    model: Any = Between(inner, eagerq).train(trained)
    model.qconfig = getattr(eagerq, f"get_default_{'qat_' * trained}qconfig")("onednn")
    model = (eagerq.prepare_qat if trained else eagerq.prepare)(model)
    for _ in range(2):
        model(*inputs)
    return eagerq.convert(model.eval(), as_trained=True)


def _steps(model: Any, inputs: tuple[Any, ...], shapes: Any) -> Tensor:
    _, graph = exported(model, inputs, shapes)
    return torch.cat([_in_steps(*pair) for pair in zip(tensors(graph(*inputs)), tensors(model(*inputs)), strict=True)])


def _in_steps(got: Tensor, wanted: Tensor) -> Tensor:
    between = wanted.unique().diff()
    return steps_between(got, wanted, float(between[between > 1e-6].min()))


@torch.no_grad()
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"batch_first": True, "num_layers": 2}])
def test_static_lstms(options: dict[str, Any], trained: bool) -> None:
    """Step by step the state carries on what was rounded, so that single differences may add up."""
    x = torch.randn(3, 4, 6)
    model = _int8(nn.LSTM(6, 8, **options), (x,), trained)
    steps = _steps(model, (x,), (({0 if options.get("batch_first") else 1: BATCH},),))
    assert (steps <= 1).float().mean() > 0.97
    assert steps.max() <= 3


@torch.no_grad()
def test_a_static_lstm_that_is_given_its_state() -> None:
    inputs = (torch.randn(3, 4, 6), (torch.randn(1, 4, 8), torch.randn(1, 4, 8)))
    by_batch = {1: BATCH}
    model = _int8(nn.LSTM(6, 8), inputs, False)
    assert _steps(model, inputs, ((by_batch, (by_batch, by_batch)),)).max() <= 1


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"add_bias_kv": True, "add_zero_attn": True}])
def test_attention(options: dict[str, Any]) -> None:
    x = torch.randn(4, 5, 6)
    model = _int8(nn.MultiheadAttention(6, 2, **options), (x, x, x), True)
    by_batch = {0 if options.get("batch_first") else 1: BATCH}
    assert _steps(model, (x, x, x), ((by_batch,) * 3,)).max() <= 1
