"""Operators of a program are annotated and tagged as the graph flow would have left them."""

from __future__ import annotations

from collections import Counter

import torch
from pt2e.exporting.nets import IMAGES, prepared, saved_and_loaded
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule

import eagerq
from eagerq.nn.quantized import FloatFunctional
from eagerq.pt2e import export

TAGS = Counter(conv=4, depthwise=4, sum=4, pool=3, mean=3, classify=4)


def _tags(graph: Graph) -> Counter[str]:
    nodes = [node for node in graph.nodes if node.op == "call_function" and "quantization_tag" in node.meta]
    return Counter(node.meta["quantization_tag"] for node in nodes)


def _exported() -> ExportedProgram:
    return export(prepared(), (torch.randn(IMAGES),))


def test_operators_are_tagged_with_their_modules_and_qdq_with_them() -> None:
    program = _exported()
    assert _tags(program.graph) == TAGS
    ends = [node for node in program.graph.nodes if node.op == "call_function" and "quantization_tag" not in node.meta]
    assert [node.name for node in ends] == ["quantize_per_tensor", "dequantize_per_tensor_7"]


def test_tags_go_with_the_module_and_through_another_export() -> None:
    program = _exported()
    assert _tags(program.run_decompositions({}).graph) == TAGS
    assert set(_tags(program.run_decompositions().graph)) == set(TAGS)
    module = program.module()
    assert _tags(module.graph) == TAGS
    for strict in (False, True):
        assert _tags(torch.export.export(module, (torch.randn(IMAGES),), strict=strict).graph) == TAGS


def test_each_operator_says_how_it_is_quantized() -> None:
    nodes = {node.name: node for node in _exported().graph.nodes}
    annotated = [name for name, node in nodes.items() if "quantization_annotation" in node.meta]
    assert annotated == ["conv2d", "conv2d_1", "add", "max_pool2d", "mean", "linear"]
    annotation = nodes["conv2d"].meta["quantization_annotation"]
    assert annotation._annotated
    assert list(annotation.input_qspec_map) == [nodes["x"], nodes["b_conv_weight"]]
    x, weight = annotation.input_qspec_map.values()
    assert (weight.dtype, weight.quant_min, weight.quant_max, weight.ch_axis) == (torch.int8, -128, 127, 0)
    assert weight.qscheme is torch.per_channel_affine
    assert (x.dtype, x.quant_min, x.quant_max, x.qscheme) == (torch.uint8, 0, 255, torch.per_tensor_affine)
    assert annotation.output_qspec == x
    added = nodes["add"].meta["quantization_annotation"]
    assert list(added.input_qspec_map) == [nodes["conv2d"], nodes["conv2d_1"]]


class _Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.add = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), FloatFunctional()

    def forward(self, x: Tensor) -> Tensor:
        return self.add.add_relu(self.inner(x), x).flatten(1)


class _Partly(nn.Module):
    """Two of the same block, what is functional in the root, and a float layer at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = eagerq.QuantStub(), eagerq.DeQuantStub()
        self.blocks, self.last = nn.Sequential(_Nested(), _Nested()), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.blocks(self.quant(x)))
        out: Tensor = self.last(self.dequant(x))
        return out


def test_functionals_and_functions_have_names_too_and_float_layers_none() -> None:
    model = _Partly().train()
    model.qconfig = eagerq.get_default_qat_qconfig("onednn")  # type: ignore[assignment]
    model.last.qconfig = None  # type: ignore[assignment]
    model = eagerq.prepare_qat(model)
    x = torch.randn(5, 4)
    model(x)
    program = export(model, (x,))
    tags = _tags(program.graph)
    assert set(tags) == {"relu"} | {
        f"blocks.{number}{part}" for number in (0, 1) for part in (".inner.0", ".inner.1", ".add", "")
    }
    assert tags["blocks.0.add"] == 4  # two dequantized, added, quantized
    assert torch.equal(saved_and_loaded(program).module()(x), program.module()(x))


def test_inputs_quantized_as_they_come_belong_to_their_layer() -> None:
    model = eagerq.quantize_dynamic(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
    program = export(model, (torch.randn(5, 4),))
    called = [node for node in program.graph.nodes if node.op == "call_function"]
    tags = [node.meta.get("quantization_tag") for node in called]
    assert tags == [*["0"] * 7, None, *["2"] * 7]  # choose_qparams and its two results, Q, DQ, weight's DQ, linear
    linear = next(node for node in called if "linear" in node.name)
    x, weight = linear.meta["quantization_annotation"].input_qspec_map.values()
    assert (x.is_dynamic, x.dtype, x.quant_min, x.quant_max) == (True, torch.uint8, 0, 127)  # reduced, by default
    assert (weight.is_dynamic, weight.dtype) == (False, torch.int8)


class _Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = eagerq.QuantWrapper(nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        out: Tensor = torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x * 2, (x,))
        return out


def test_no_marks_are_left_behind() -> None:
    model, x = _Branching().train(), torch.randn(5, 4)
    model.qconfig = eagerq.get_default_qat_qconfig("onednn")  # type: ignore[assignment]
    model = eagerq.prepare_qat(model)
    model.inner(x)  # type: ignore[operator]
    program = export(model, (x,))
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, GraphModule)]
    assert len(graphs) == 3
    assert not [node for graph in graphs for node in graph.nodes if {"custom", "seq_nr"} & set(node.meta)]
    assert torch.equal(program.module()(x), saved_and_loaded(program).module()(x))


def test_names_are_those_in_the_model_that_is_exported() -> None:
    model = nn.Sequential(eagerq.convert(prepared(), as_trained=True))
    tags = _tags(export(model, (torch.randn(IMAGES),)).graph)
    assert set(tags) == {"0", *(f"0.{name}" for name in TAGS if name != "mean")}
