"""What the nodes put in by quantization are told about the model: which module, line and tag they belong to."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from eagerq.pt2e.graph import choose_qparams_of, is_dequantize, is_quantize
from eagerq.pt2e.quantizer.quantizer import ANNOTATION

__all__ = ["PortNodeMetaForQDQ"]

_PORTED = ("stack_trace", "quantization_tag", "nn_module_stack")

# aten operators that only rearrange elements: a weight is the same weight after them
_REARRANGING = frozenset(
    (
        *("_mkldnn_transpose", "permute", "permute_copy", "t", "transpose", "transpose_"),
        *("_unsafe_view", "flatten", "reshape", "squeeze", "squeeze_copy", "unsqueeze", "view", "view_copy"),
        *("slice", "slice_copy"),
    )
)
# torch.export's names for parameters, buffers and constants, where they are inputs of the graph
_CONSTANT_INPUTS = ("p_", "b_", "c_")


class PortNodeMetaForQDQ(PassBase):
    """Port metadata to the nodes that quantization has put into a graph.

    Ported are ``stack_trace``, ``quantization_tag`` and ``nn_module_stack``, and nothing else. The annotations
    in ``meta["quantization_annotation"]`` tell which nodes were to be quantized:

    - a dequantize on an annotated input takes the consumer's metadata;
    - a quantize on an annotated output takes the producer's;
    - a dynamic quantize on an annotated input, its choose_qparams and its getitems take the consumer's;
    - a quantize whose input is a weight takes the weight's, and so does what stands between the two (views,
      transposes and the like): a ``get_attr``, or a parameter, buffer or constant among the inputs of an
      ``ExportedProgram``'s graph. Any other operator in between stops the walk: that is no longer the weight;
    - around a node without annotation nothing is ported from that node.

    So in a chain of conv, pool and linear, with brackets around what shares metadata::

        all quantized      Q → [DQ → conv → Q] → [DQ → pool → Q] → [DQ → linear → Q] → DQ
        all but the pool   Q → [DQ → conv → Q] → DQ → [pool] → Q → [DQ → linear → Q] → DQ
        linear dynamic     Q → [DQ → conv → Q] → [DQ → pool → Q] → DQ → [choose_qparams → Q → DQ → linear]

    The first quantize and the last dequantize belong to no node. Of several consumers of one dequantize or
    choose_qparams, the last in the graph is the one whose metadata stays. An input is known by the name that its
    producer has in the annotation, so a copied graph is as good as its original; a weight whose name is gone
    because its quantize has been folded is known by being a constant. A graph may be ported twice.

    Example:
        >>> import torch
        >>> from eagerq.observer import MinMaxObserver
        >>> from eagerq.pt2e.operators import DEQUANTIZE_PER_TENSOR, QUANTIZE_PER_TENSOR
        >>> from eagerq.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec
        >>> class Model(torch.nn.Module):
        ...     def forward(self, x):
        ...         x = QUANTIZE_PER_TENSOR(x, 0.1, 0, -128, 127, torch.int8)
        ...         x = DEQUANTIZE_PER_TENSOR(x, 0.1, 0, -128, 127, torch.int8).relu()
        ...         x = QUANTIZE_PER_TENSOR(x, 0.05, -128, -128, 127, torch.int8)
        ...         return DEQUANTIZE_PER_TENSOR(x, 0.05, -128, -128, 127, torch.int8)
        >>> graph_module = torch.fx.symbolic_trace(Model())
        >>> x, q_in, dq_in, relu, q_out, dq_out, _ = graph_module.graph.nodes
        >>> spec = QuantizationSpec(torch.int8, MinMaxObserver)
        >>> relu.meta["quantization_annotation"] = QuantizationAnnotation({x: spec}, spec)
        >>> relu.meta["quantization_tag"] = "relu_0"
        >>> result = PortNodeMetaForQDQ()(graph_module)
        >>> [node.meta.get("quantization_tag") for node in (q_in, dq_in, relu, q_out, dq_out)]
        [None, 'relu_0', 'relu_0', 'relu_0', None]
    """

    def call(self, graph_module: GraphModule) -> PassResult:
        names = {node.name for node in graph_module.graph.nodes}
        modified = False
        for node in graph_module.graph.nodes:
            annotation = node.meta.get(ANNOTATION)
            if annotation is None:
                continue
            quantized = {source.name for source, spec in annotation.input_qspec_map.items() if spec is not None}
            for dequantize in _quantized_inputs(node, quantized, may_be_folded=not quantized <= names):
                modified |= _port_to_input(dequantize, node)
            if annotation.output_qspec is not None:
                modified |= _port(_static_quantizes(node), node)
        return PassResult(graph_module, modified)


def _port(nodes: list[Node], source: Node) -> bool:
    ported = {key: source.meta[key] for key in _PORTED if key in source.meta}
    for node in nodes:
        node.meta.update(ported)
    return bool(nodes and ported)


def _port_to_input(dequantize: Node, consumer: Node) -> bool:
    modified = _port([dequantize], consumer)
    quantize = dequantize.args[0]
    if not isinstance(quantize, Node) or not is_quantize(quantize):  # folded
        return modified
    if dynamic := choose_qparams_of(quantize):
        return _port([quantize, *dynamic], consumer) or modified
    *chain, weight = _unarranged(quantize)
    return (_is_constant(weight) and _port(chain, weight)) or modified


def _quantized_inputs(consumer: Node, names: set[str], may_be_folded: bool) -> Iterator[Node]:
    """The dequantizes on a node's inputs that come from the sources of these names."""
    for dequantize in filter(is_dequantize, consumer.all_input_nodes):
        chain = _undone(dequantize)
        if any(node.name in names for node in chain) or (may_be_folded and _is_constant(chain[-1])):
            yield dequantize


def _static_quantizes(producer: Node) -> list[Node]:
    return [user for user in producer.users if is_quantize(user) and not choose_qparams_of(user)]


def _undone(node: Node) -> list[Node]:
    """A (de)quantize, what it is made of while that is another, and what all of them stand for."""
    chain = [node]
    while (is_quantize(node) or is_dequantize(node)) and isinstance(node.args[0], Node):
        node = node.args[0]
        chain.append(node)
    return chain


def _unarranged(quantize: Node) -> list[Node]:
    """A quantize, what rearranges its input, and that input."""
    chain = [quantize, *quantize.all_input_nodes[:1]]
    while _rearranges(chain[-1]) and chain[-1].all_input_nodes:
        chain.append(chain[-1].all_input_nodes[0])
    return chain


def _rearranges(node: Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    dialect, _, name = node.target.name().partition("::")
    return dialect == "aten" and name.split(".")[0] in _REARRANGING


def _is_constant(node: Node) -> bool:
    if node.op == "placeholder":
        return str(node.target).startswith(_CONSTANT_INPUTS)
    return node.op == "get_attr"
