"""Every layer of the default maps in Q/DQ form: within one step of its integers, for any batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pt2e.exporting.cases import CASES, Around, dynamic_model, inputs_of, int8_model, step
from pt2e.exporting.graphs import exported, steps_between, used
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves

from eagerq import DeQuantStub, QuantStub
from eagerq.nn import quantized
from eagerq.nn.quantized.state import StoredTensors
from eagerq.pt2e.operators import (
    CHOOSE_QPARAMS_AFFINE,
    DEQUANTIZE,
    DEQUANTIZE_PER_CHANNEL,
    DEQUANTIZE_PER_TENSOR_DYNAMIC,
    QUANTIZE,
    QUANTIZE_PER_TENSOR_DYNAMIC,
)
from eagerq.quantization_mappings import ROWS, Row

STATIC = [row for row in ROWS if row.quantized]
DYNAMIC = [row for row in ROWS if row.dynamic]
LOOKING_UP = (nn.Embedding, nn.EmbeddingBag)


def _name(row: Row) -> str:
    return "-".join(kind.__name__ for kind in row.sequence)


def _for_any_batch(model: Any, row: Row) -> tuple[Any, Any]:
    inputs = inputs_of(CASES[row.sequence], 3)
    shapes: Any = tuple({0: Dim("batch", max=64)} for _ in inputs)
    return exported(model, inputs, (shapes,) if isinstance(model, Around) else shapes)


def test_every_layer_of_the_maps_has_a_case() -> None:
    assert {row.sequence for row in ROWS} == set(CASES)


@torch.no_grad()
@pytest.mark.parametrize("row", STATIC, ids=_name)
def test_a_static_layer_has_its_integers(row: Row) -> None:
    model = int8_model(row)
    program, graph = _for_any_batch(model, row)
    _check_pairs(program, model, rounds=row.float_module not in (QuantStub, DeQuantStub, nn.Dropout, *LOOKING_UP))
    for batch in (2, 5):
        inputs = inputs_of(CASES[row.sequence], batch, seed=batch)
        wanted = model(*inputs)
        assert len(wanted.unique()) > 3
        assert steps_between(graph(*inputs), wanted, step(model)).max() <= 1


def _check_pairs(program: ExportedProgram, model: nn.Module, rounds: bool) -> None:
    """One pair for each input and where the layer rounds, and a dequantize for each weight."""
    kinds = [type(module) for module in model.modules()]
    tables = sum(len(module._tables()) for module in model.modules() if isinstance(module, StoredTensors))
    pairs, counts = kinds.count(quantized.Quantize) + rounds, used(program)
    assert sum(counts[target] for target in QUANTIZE) == pairs
    assert sum(counts[target] for target in DEQUANTIZE) == pairs + tables


@torch.no_grad()
@pytest.mark.parametrize("row", DYNAMIC, ids=_name)
def test_a_dynamic_layer_has_its_numbers(row: Row) -> None:
    """Sums run in another order, and a value on a tie may be rounded to the other side."""
    model = dynamic_model(row)
    program, graph = _for_any_batch(model, row)
    if row.float_module not in LOOKING_UP:
        counts = used(program)
        assert counts[CHOOSE_QPARAMS_AFFINE] == counts[QUANTIZE_PER_TENSOR_DYNAMIC] > 0
        assert counts[DEQUANTIZE_PER_TENSOR_DYNAMIC] == counts[DEQUANTIZE_PER_CHANNEL] == counts[CHOOSE_QPARAMS_AFFINE]
    for batch in (2, 5):
        inputs = inputs_of(CASES[row.sequence], batch, seed=batch)
        for wanted, got in zip(tree_leaves(model(*inputs)), tree_leaves(graph(*inputs)), strict=True):
            torch.testing.assert_close(got, wanted)
