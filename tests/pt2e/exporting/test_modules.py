"""Every layer of the default maps in Q/DQ form: within one step of its integers, for any batch."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from pt2e.exporting.cases import CASES, Around, dynamic_model, inputs_of, int8_model, step
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves

from eagerq.pt2e import export
from eagerq.pt2e.operators import DEQUANTIZE, QUANTIZE
from eagerq.quantization_mappings import ROWS, Row

STATIC = [row for row in ROWS if row.quantized]
DYNAMIC = [row for row in ROWS if row.dynamic]


def _name(row: Row) -> str:
    return "-".join(kind.__name__ for kind in row.sequence)


def exported(model: nn.Module, inputs: tuple[Tensor, ...]) -> ExportedProgram:
    """With any batch."""
    shapes: Any = tuple({0: Dim("batch", max=64)} for _ in inputs)
    return export(model, inputs, dynamic_shapes=(shapes,) if isinstance(model, Around) else shapes)


def used(program: ExportedProgram) -> Counter[Any]:
    return Counter(node.target for node in program.graph.nodes if node.op == "call_function")


def test_every_layer_of_the_maps_has_a_case() -> None:
    assert {row.sequence for row in ROWS} == set(CASES)


@torch.no_grad()
@pytest.mark.parametrize("row", STATIC, ids=_name)
def test_a_static_layer_has_its_integers(row: Row) -> None:
    case, model = CASES[row.sequence], int8_model(row)
    program = exported(model, inputs_of(case, 3))
    assert not [target for target in used(program) if "eagerq" in str(target)]
    for batch in (2, 5):
        inputs = inputs_of(case, batch, seed=batch)
        wanted, got = model(*inputs), program.module()(*inputs)
        assert got.shape == wanted.shape
        assert len(wanted.unique()) > 3
        assert ((got - wanted) / step(model)).abs().max().round() <= 1


@torch.no_grad()
@pytest.mark.parametrize("row", DYNAMIC, ids=_name)
def test_a_dynamic_layer_has_its_numbers(row: Row) -> None:
    case, model = CASES[row.sequence], dynamic_model(row)
    program = exported(model, inputs_of(case, 3))
    assert not [target for target in used(program) if "eagerq" in str(target)]
    for batch in (2, 5):
        inputs = inputs_of(case, batch, seed=batch)
        for wanted, got in zip(tree_leaves(model(*inputs)), tree_leaves(program.module()(*inputs)), strict=True):
            torch.testing.assert_close(got, wanted)


def test_one_pair_where_the_layer_rounds() -> None:
    counts = used(exported(int8_model(STATIC[4]), inputs_of(CASES[STATIC[4].sequence], 3)))
    assert sum(counts[target] for target in QUANTIZE) == 2
    assert sum(counts[target] for target in DEQUANTIZE) == 3  # the weight's, too
