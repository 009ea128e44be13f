"""Tags of partitions, from the quantizer that sets them to the Q/DQ nodes of the converted and exported graph."""

from __future__ import annotations

import importlib
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from pt2e.graphs import peer
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from eagerq.pt2e.operators import CHOOSE_QPARAMS, DEQUANTIZE, QUANTIZE
from eagerq.pt2e.quantizer import PortNodeMetaForQDQ

aten = torch.ops.aten
ops = torch.ops.quantized_decomposed

Q, DQ = ops.quantize_per_tensor.default, ops.dequantize_per_tensor.default
DYNAMIC_Q, DYNAMIC_DQ = ops.quantize_per_tensor.tensor, ops.dequantize_per_tensor.tensor
CHANNEL_DQ, CHOOSE = ops.dequantize_per_channel.default, ops.choose_qparams.tensor
INSERTED = QUANTIZE | DEQUANTIZE | CHOOSE_QPARAMS
IMAGE = (torch.linspace(-1, 2, 75).reshape(1, 3, 5, 5),)
Tags = dict[Any, set[str]]


class ConvWithObsSharingOps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 3, 3), nn.Linear(3, 3)
        self.pool, self.hardtanh = nn.AdaptiveAvgPool2d((1, 1)), nn.Hardtanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.hardtanh(self.pool(self.conv(x))).view(-1, 3))


class MatmulWithConstInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.rand(8, 16))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.relu(torch.matmul(self.w, x) + y)


@dataclass(frozen=True)
class Flow:
    """One implementation of the graph flow, with annotators that know XNNPACK's patterns."""

    prepare: Callable[..., GraphModule]
    convert: Callable[..., GraphModule]
    annotation: Callable[..., Any]
    quantizer: type
    annotators: dict[str, Callable[..., Any]]
    config: Callable[..., Any]

    def run(self, model: nn.Module, inputs: tuple[Tensor, ...], annotate: Callable[[GraphModule], None]) -> GraphModule:
        class BackendA(self.quantizer):  # type: ignore[misc, name-defined]
            def annotate(self, model: GraphModule) -> GraphModule:
                annotate(model)
                return model

            def validate(self, model: GraphModule) -> None:
                pass

        prepared = self.prepare(torch.export.export(model.eval(), inputs).module(), BackendA())
        prepared(*inputs)
        converted = self.convert(prepared)
        converted(*inputs)
        return converted

    def annotator(self, *steps: tuple[str, str | None], **of_dynamic: bool) -> Callable[[GraphModule], None]:
        """Annotates these operators in this order, and tags their partitions where a tag is given."""

        def annotate(model: GraphModule) -> None:
            for name, tag in steps:
                config = self.config(is_per_channel=True, is_dynamic=of_dynamic.get(name, False))
                tag_partitions(tag, self.annotators[name](model, config))

        return annotate


def tag_partitions(tag: str | None, partitions: Iterable[list[Node]]) -> None:
    for index, partition in enumerate(partitions):
        for node in partition if tag else ():
            assert "quantization_tag" not in node.meta, f"{node} has a tag already"
            node.meta["quantization_tag"] = f"BackendA_{tag}_{index}"


def _ours() -> Flow:
    flow = importlib.import_module("eagerq.pt2e")
    quantizer = importlib.import_module("eagerq.pt2e.quantizer")
    return Flow(
        flow.prepare_pt2e,
        flow.convert_pt2e,
        quantizer.QuantizationAnnotation,
        quantizer.Quantizer,
        quantizer.OP_TO_ANNOTATOR,
        quantizer.get_symmetric_quantization_config,
    )


def _torchao() -> Flow:
    """torchao's flow, but for the porting: that is undone, and done by our pass."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        flow = peer("torchao.quantization.pt2e.quantize_pt2e")
        quantizer = peer("torchao.quantization.pt2e.quantizer")
        xnnpack = peer("executorch.backends.xnnpack.quantizer.xnnpack_quantizer")
        annotators = peer("executorch.backends.xnnpack.quantizer.xnnpack_quantizer_utils")

    def convert(prepared: GraphModule) -> GraphModule:
        converted = flow.convert_pt2e(prepared)
        for node in converted.graph.nodes:
            if node.target in INSERTED:
                node.meta.pop("quantization_tag", None)
        return PortNodeMetaForQDQ()(converted).graph_module

    return Flow(
        flow.prepare_pt2e,
        convert,
        quantizer.QuantizationAnnotation,
        quantizer.Quantizer,
        annotators.OP_TO_ANNOTATOR,
        xnnpack.get_symmetric_quantization_config,
    )


@pytest.fixture(params=[_ours, _torchao], ids=["eagerq", "torchao"])
def flow(request: pytest.FixtureRequest) -> Flow:
    return request.param()


def tags(nodes: Iterable[Node]) -> Tags:
    """The tags of each kind of Q/DQ node, and of get_attr; no two nodes of a kind share one."""
    found: Tags = defaultdict(set)
    for node in nodes:
        tag = node.meta.get("quantization_tag")
        if tag is None or (node.op != "get_attr" and node.target not in INSERTED):
            continue
        key = "get_attr" if node.op == "get_attr" else node.target
        assert key == "get_attr" or tag not in found[key], f"{node.format_node()}: {tag} is another {key}'s too"
        found[key].add(tag)
    return found


def check(converted: GraphModule, inputs: tuple[Tensor, ...], wanted: Tags, through: dict[Any, str]) -> None:
    """Tags are these in the converted graph, in the exported one, and, for the operators in ``through``, also on
    what they are decomposed into."""
    assert tags(converted.graph.nodes) == wanted
    exported = torch.export.export(converted, inputs)
    assert tags(exported.graph.nodes) == {kind: one for kind, one in wanted.items() if kind != "get_attr"}
    decomposed = exported.run_decompositions()
    for operator, tag in through.items():
        for program in (exported, decomposed):
            made = [node for node in program.graph.nodes if _made_from(operator, node)]
            assert made
            assert {node.meta.get("quantization_tag") for node in made} == {tag}
    assert not {node.target for node in decomposed.graph.nodes} & set(through)


def _made_from(operator: Any, node: Node) -> bool:
    return node.target not in INSERTED and str(operator) in _origins(node.meta.get("from_node", ()))


def _origins(sources: Iterable[Any]) -> set[str]:
    """What the nodes that a node was made from called, the oldest too."""
    return {name for source in sources for name in (source.target, *_origins(source.from_node))}


def named(*tags: str) -> set[str]:
    return {f"BackendA_{tag}" for tag in tags}


def test_simple_metadata_porting(flow: Flow) -> None:
    steps = ("linear", "linear"), ("conv", "conv2d"), ("adaptive_avg_pool2d", "adaptive_avg_pool2d")
    converted = flow.run(ConvWithObsSharingOps(), IMAGE, flow.annotator(*steps))
    weighted, pool = named("conv2d_0", "linear_0"), named("adaptive_avg_pool2d_0")
    wanted = {"get_attr": weighted, Q: weighted | pool, DQ: weighted | pool, CHANNEL_DQ: weighted}
    through = {
        aten.adaptive_avg_pool2d.default: "BackendA_adaptive_avg_pool2d_0",
        aten.linear.default: "BackendA_linear_0",
    }
    check(converted, IMAGE, wanted, through)


def test_metadata_porting_with_no_quant_inbetween(flow: Flow) -> None:
    """The pool is float, so it has no part in the Q/DQ around it."""
    steps = ("linear", "linear"), ("conv", "conv2d")
    converted = flow.run(ConvWithObsSharingOps(), IMAGE, flow.annotator(*steps))
    weighted = named("conv2d_0", "linear_0")
    check(converted, IMAGE, {"get_attr": weighted, Q: weighted, DQ: weighted, CHANNEL_DQ: weighted}, {})


def test_metadata_porting_for_dq(flow: Flow) -> None:
    """Static conv and pool, dynamic linear."""
    steps = ("conv", "conv2d"), ("adaptive_avg_pool2d", "adaptive_avg_pool2d"), ("linear", "linear_dynamic")
    converted = flow.run(ConvWithObsSharingOps(), IMAGE, flow.annotator(*steps, linear=True))
    static, linear = named("conv2d_0", "adaptive_avg_pool2d_0"), named("linear_dynamic_0")
    weighted = named("conv2d_0", "linear_dynamic_0")
    wanted = {"get_attr": weighted, Q: static, DQ: static, CHANNEL_DQ: weighted}
    wanted |= {CHOOSE: linear, DYNAMIC_Q: linear, DYNAMIC_DQ: linear}
    check(converted, IMAGE, wanted, {aten.linear.default: "BackendA_linear_dynamic_0"})


def test_metadata_porting_for_two_dq(flow: Flow) -> None:
    """Dynamic conv and linear."""
    steps = ("conv", "conv2d_dynamic"), ("linear", "linear_dynamic")
    converted = flow.run(ConvWithObsSharingOps(), IMAGE, flow.annotator(*steps, conv=True, linear=True))
    both = named("conv2d_dynamic_0", "linear_dynamic_0")
    wanted = dict.fromkeys(("get_attr", DYNAMIC_Q, DYNAMIC_DQ, CHANNEL_DQ, CHOOSE), both)
    check(converted, IMAGE, wanted, {aten.linear.default: "BackendA_linear_dynamic_0"})


def test_metadata_porting_for_dq_no_static_q(flow: Flow) -> None:
    """A dynamic linear, and nothing else quantized."""
    converted = flow.run(ConvWithObsSharingOps(), IMAGE, flow.annotator(("linear", "linear_dynamic"), linear=True))
    linear = named("linear_dynamic_0")
    wanted = dict.fromkeys(("get_attr", DYNAMIC_Q, DYNAMIC_DQ, CHANNEL_DQ, CHOOSE), linear)
    check(converted, IMAGE, wanted, {aten.linear.default: "BackendA_linear_dynamic_0"})


def test_no_metadata_porting(flow: Flow) -> None:
    """Annotated, but not tagged."""
    converted = flow.run(
        ConvWithObsSharingOps(), IMAGE, flow.annotator(("linear", None), ("conv", None), ("adaptive_avg_pool2d", None))
    )
    check(converted, IMAGE, {}, {})


def test_no_metadata_porting_through_unknown_ops(flow: Flow) -> None:
    """The constant's tag goes to its own Q/DQ, and not through the matmul to the addition's."""

    def annotate(model: GraphModule) -> None:
        config = flow.config()
        for node in model.graph.nodes:
            if node.op != "call_function":
                continue
            node.meta["quantization_annotation"] = flow.annotation(
                input_qspec_map={node.args[0]: config.input_activation}, output_qspec=config.output_activation
            )
            for tagged in (node, *(arg for arg in node.args if arg.op == "get_attr")):
                tagged.meta["quantization_tag"] = str(node.target)

    inputs = torch.randn(16, 24), torch.randn(8, 24)
    each, matmul = {"aten.matmul.default", "aten.add.Tensor", "aten.relu.default"}, "aten.matmul.default"
    converted = flow.run(MatmulWithConstInput(), inputs, annotate)
    check(converted, inputs, {"get_attr": {matmul}, Q: each, DQ: each}, {aten.matmul.default: matmul})

    def all_but_the_matmul(model: GraphModule) -> None:
        annotate(model)
        for node in model.graph.nodes:
            if node.target == aten.matmul.default:
                del node.meta["quantization_annotation"]

    # no Q/DQ between the constant and the matmul: only that it is no transpose keeps its tag from the addition's
    converted = flow.run(MatmulWithConstInput(), inputs, all_but_the_matmul)
    check(converted, inputs, {"get_attr": {matmul}, Q: each - {matmul}, DQ: each - {matmul}}, {})
