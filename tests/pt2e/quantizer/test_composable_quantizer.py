"""Quantizers beside each other: in order, and out of each other's way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pt2e.graphs import exported
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from eagerq.pt2e import MinMaxObserver, prepare_pt2e
from eagerq.pt2e.quantizer import (
    ComposableQuantizer,
    EmbeddingQuantizer,
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
    XNNPACKQuantizer,
    annotate_input_qspec_map,
    annotate_output_qspec,
    get_symmetric_quantization_config,
)

KEY = "quantization_annotation"
SPEC = QuantizationSpec(torch.int8, MinMaxObserver, -128, 127, torch.per_tensor_affine)
OTHER = QuantizationSpec(torch.uint8, MinMaxObserver, 0, 255, torch.per_tensor_affine)


class Says(Quantizer):
    """Does one thing to each linear."""

    def __init__(self, deed: Any, log: list[str] | None = None) -> None:
        self.deed, self.log = deed, log if log is not None else []

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        self.log.append("transform")
        return model

    def annotate(self, model: GraphModule) -> GraphModule:
        self.log.append("annotate")
        for node in model.graph.nodes:
            if node.target is torch.ops.aten.linear.default:
                self.deed(node)
        return model

    def validate(self, model: GraphModule) -> None:
        self.log.append("validate")

    def prepare_obs_or_fq_callback(self, model: GraphModule, edge_or_node_to_obs_or_fq: dict[Any, Any]) -> None:
        self.log.append("callback")


class Overrides(Says):
    pass


def annotate_input(node: Node) -> None:
    annotate_input_qspec_map(node, node.all_input_nodes[0], SPEC)


def annotate_output(node: Node) -> None:
    annotate_output_qspec(node, SPEC)


def replace(node: Node) -> None:
    node.meta[KEY] = QuantizationAnnotation(output_qspec=SPEC)


def empty(node: Node) -> None:
    node.meta[KEY] = None


def remove(node: Node) -> None:
    del node.meta[KEY]


def other_input(node: Node) -> None:
    annotate_input_qspec_map(node, node.all_input_nodes[0], OTHER)


def no_input(node: Node) -> None:
    node.meta[KEY].input_qspec_map.clear()


def graph() -> GraphModule:
    return exported(nn.Sequential(nn.Linear(2, 2)).eval(), torch.ones(1, 2))


@pytest.mark.parametrize(
    ("deed", "what"),
    [
        (replace, "changed"),
        (other_input, "changed"),
        (no_input, "changed"),
        (empty, "removed"),
        (remove, "removed"),
    ],
)
def test_what_one_has_said_stands(deed: Any, what: str) -> None:
    message = rf"Overrides has {what} the annotation of Says on node 'linear' \(aten.linear.default, in module '0'\)"
    with pytest.raises(RuntimeError, match=message):
        ComposableQuantizer([Says(annotate_input), Overrides(deed)]).annotate(graph())


def test_an_annotation_may_be_added_to() -> None:
    model = graph()
    ComposableQuantizer([Says(annotate_input), Overrides(annotate_output)]).annotate(model)
    (annotation,) = [node.meta[KEY] for node in model.graph.nodes if KEY in node.meta]
    assert list(annotation.input_qspec_map.values()) == [annotation.output_qspec] == [SPEC]


def test_none_is_no_annotation() -> None:
    ComposableQuantizer([Says(empty), Overrides(replace)]).annotate(graph())


def test_each_has_its_turn() -> None:
    log: list[str] = []
    composed = ComposableQuantizer([Says(annotate_input, log), ComposableQuantizer([Says(lambda node: None, log)])])
    for _ in range(2):  # nothing of one model is left for the next
        prepare_pt2e(graph(), composed)
        assert log == [step for step in ("transform", "annotate", "validate", "callback") for _ in range(2)]
        log.clear()


def test_the_first_to_annotate_has_it() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.conv, self.linear = nn.Embedding(5, 4), nn.Conv1d(3, 3, 1), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Any:
            return self.linear(self.conv(self.table(x)))

    model = exported(Net().eval(), torch.tensor([[1, 2, 3]]))
    dynamic, static = (get_symmetric_quantization_config(is_dynamic=is_dynamic) for is_dynamic in (True, False))
    quantizers = [EmbeddingQuantizer(), XNNPACKQuantizer().set_global(dynamic), XNNPACKQuantizer().set_global(static)]
    ComposableQuantizer(quantizers).annotate(model)
    inputs = {
        node.name: next(iter(node.meta[KEY].input_qspec_map.values()))
        for node in model.graph.nodes
        if node.op == "call_function"
    }
    assert inputs["embedding"].dtype is torch.uint8
    assert inputs["linear"].is_dynamic
    assert not inputs["conv1d"].is_dynamic
