"""Which operators of a graph XNNPACKQuantizer takes, and which it leaves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pt2e.graphs import exported
from pt2e.quantizer.models import KEY, ConvBN, Convs, Linears, Residual, Transposed, TransposedBN, said
from torch import nn

from eagerq.pt2e.quantizer import XNNPACKQuantizer, get_symmetric_quantization_config

FLAT, IMAGE = torch.zeros(2, 4, 4), torch.zeros(2, 4, 8, 8)


def taken(model: nn.Module, *, train: bool = False, **config: bool) -> tuple[list[str], list[str]]:
    """Names of the operators with a quantized input, and of those with a quantized output."""
    graph = exported(model.train(train), FLAT if isinstance(model, Linears) else IMAGE)
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(**config))
    quantizer.annotate(quantizer.transform_for_annotation(graph))
    notes = {
        node.name: node.meta[KEY] for node in graph.graph.nodes if node.meta.get(KEY) and node.op == "call_function"
    }
    inputs = [name for name, note in notes.items() if any(note.input_qspec_map.values())]
    return inputs, [name for name, note in notes.items() if note.output_qspec is not None]


def test_linears() -> None:
    inputs, outputs = taken(Linears())
    # relu_1 is not the only one to use linear_2, so it shares its parameters instead of being fused
    assert inputs == ["linear", "linear_1", "dropout", "linear_2", "relu_1", "add", "linear_3", "flatten", "mean"]
    assert outputs == ["relu", "relu_", "dropout", "linear_2", "relu_1", "add", "linear_3", "flatten", "mean"]


def test_convolutions() -> None:
    inputs, outputs = taken(Convs())
    # of the two calls of one module, only that without ReLU: a weight is taken once
    assert inputs == ["conv2d_1", "conv2d_2", "max_pool2d", "conv2d_3", "flatten", "conv1d", "conv3d"]
    assert outputs == ["conv2d_1", "conv2d_2", "max_pool2d", "conv2d_3", "flatten", "relu_1", "conv3d"]


def test_dynamic_convolutions() -> None:
    """Two dimensions, not depthwise, without ReLU; outputs stay float."""
    assert taken(Convs(), is_dynamic=True) == (["conv2d_2", "conv2d_3"], [])
    assert taken(Transposed(), is_dynamic=True) == (["conv_transpose2d_1"], [])


def test_transposed_convolutions() -> None:
    """Not in groups."""
    inputs, outputs = taken(Transposed())
    assert inputs == ["conv_transpose2d", "conv_transpose2d_1", "mul", "flatten", "conv_transpose1d"]
    assert outputs == ["relu", "conv_transpose2d_1", "mul", "flatten", "conv_transpose1d"]


def test_sums_products_and_cat() -> None:
    graph = exported(Residual().eval(), IMAGE)
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config())
    notes = said(quantizer.annotate(quantizer.transform_for_annotation(graph)))
    assert "mul_2" not in notes  # by 1e20, which no histogram takes
    assert "add_2" not in notes  # of integers
    # the first of the inputs that is quantized already has the parameters of all, through permute and reshape
    (inputs, output, *_) = notes["cat"]
    assert output == "(reshape, cat)"
    assert {name: spec for name, spec in inputs.items() if name != "reshape"} == dict.fromkeys(
        ("permute", "relu_1", "x"), "(reshape, cat)"
    )
    assert notes["adaptive_avg_pool2d_1"][:2] == (
        {"adaptive_avg_pool2d": "adaptive_avg_pool2d"},
        "(adaptive_avg_pool2d, adaptive_avg_pool2d_1)",
    )


@pytest.mark.parametrize("is_dynamic", [False, True])
def test_batch_norms(is_dynamic: bool) -> None:
    config: dict[str, Any] = {"train": True, "is_qat": True, "is_dynamic": is_dynamic}
    inputs, outputs = taken(ConvBN(), **config)
    assert inputs[:2] == ["conv2d", "conv2d_1"]
    assert outputs == ([] if is_dynamic else ["relu", "batch_norm_1", "flatten", "relu_", "add", "conv3d"])
    inputs, outputs = taken(TransposedBN(), **config)
    assert [name for name in inputs if "conv" in name] == ["conv_transpose2d", "conv_transpose1d"]
    assert outputs == ([] if is_dynamic else ["relu", "flatten", "batch_norm_1"])
