"""EmbeddingQuantizer: each row of a table with a scale and zero point of its own."""

from __future__ import annotations

import pytest
import torch
from pt2e.flows import quiet
from pt2e.graphs import call, exported
from pt2e.quantizer.models import said
from torch import nn

import eagerq.pt2e
from eagerq.pt2e import convert_pt2e, prepare_pt2e, quantizer
from eagerq.pt2e.quantizer import (
    EmbeddingQuantizer,
    QuantizationAnnotation,
    XNNPACKQuantizer,
    get_embedding_operators_config,
)

INDICES = torch.tensor([3, 0, 1, 2, 3])


def table() -> nn.Embedding:
    """Rows of very different ranges, around five."""
    made = nn.Embedding(4, 8)
    with torch.no_grad():
        made.weight.mul_(torch.tensor([[0.2], [1.0], [10.0], [1000.0]])).add_(5)
    return made.eval()


def test_rows() -> None:
    """Zero points are no integers, and the operator cuts them off: up to one step more than half of one."""
    model = table()
    prepared = prepare_pt2e(exported(model, INDICES), EmbeddingQuantizer())
    prepared(INDICES)
    quantized, wanted = convert_pt2e(prepared)(INDICES), model(INDICES)
    error, step = (quantized - wanted).abs().amax(1), (wanted.amax(1) - wanted.amin(1)) / 255
    assert (error > 0.1 * step).all()
    assert (error < 1.5 * step).all()


def test_as_torchao() -> None:
    with quiet():
        theirs = pytest.importorskip("torchao.quantization.pt2e.quantizer.embedding_quantizer")
        from torchao.quantization.pt2e import quantize_pt2e
    model = table()
    notes = [said(made.EmbeddingQuantizer().annotate(exported(model, INDICES))) for made in (theirs, quantizer)]
    assert [note[:2] for note in notes[1].values()] == [note[:2] for note in notes[0].values()]
    assert list(notes[1]) == list(notes[0]) == ["embedding"]
    outputs = []
    for made, flow in ((theirs, quantize_pt2e), (quantizer, eagerq.pt2e)):
        with quiet():
            prepared = flow.prepare_pt2e(exported(model, INDICES), made.EmbeddingQuantizer())
            prepared(INDICES)
            outputs.append(flow.convert_pt2e(prepared)(INDICES))
    assert torch.equal(*outputs)


def test_an_annotated_one_is_left() -> None:
    model = exported(nn.Embedding(4, 8).eval(), INDICES)
    embedding = call(model, torch.ops.aten.embedding.default)
    mine = embedding.meta["quantization_annotation"] = QuantizationAnnotation(_annotated=True)
    EmbeddingQuantizer().annotate(model)
    assert embedding.meta["quantization_annotation"] is mine
    assert mine.input_qspec_map == {}


def test_supported() -> None:
    (config,) = EmbeddingQuantizer.get_supported_quantization_configs()
    operators = EmbeddingQuantizer.get_supported_operator_for_quantization_config(config)
    assert operators == get_embedding_operators_config().operators == [[nn.Embedding], [nn.functional.embedding]]
    other = XNNPACKQuantizer.get_supported_quantization_configs()[0]
    assert EmbeddingQuantizer.get_supported_operator_for_quantization_config(other) == []
