"""What the graph flow would have left on a program's operators: how they are quantized, and whose they are."""

from __future__ import annotations

import itertools
import operator
from collections import defaultdict
from typing import Any

from torch import Tensor
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from eagerq.observer import MinMaxObserver, PerChannelMinMaxObserver, PlaceholderObserver
from eagerq.pt2e import operators
from eagerq.pt2e.exporting.tracing import Call, take_call
from eagerq.pt2e.graph import choose_qparams_of, is_choose_qparams, is_dequantize, is_quantize
from eagerq.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec
from eagerq.pt2e.quantizer.port_metadata_pass import PortNodeMetaForQDQ
from eagerq.pt2e.quantizer.quantizer import ANNOTATION
from eagerq.scheme import per_channel_affine, per_tensor_affine

__all__ = ["annotate"]

TAG = "quantization_tag"
_PER_CHANNEL = (operators.QUANTIZE_PER_CHANNEL, operators.DEQUANTIZE_PER_CHANNEL)


def annotate(program: ExportedProgram) -> None:
    """Annotate and tag the float operators of each quantized call, then port that to their Q/DQ nodes."""
    calls: dict[Call, list[Node]] = defaultdict(list)
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, GraphModule)]
    for node in itertools.chain.from_iterable(graph.nodes for graph in graphs):
        call = take_call(node)
        if call is not None:
            calls[call].append(node)
    for call, nodes in calls.items():
        if any(map(is_quantize, nodes)) or any(map(is_dequantize, nodes)):
            for node in filter(_is_operator, nodes):
                node.meta[ANNOTATION] = _annotation(node, nodes)
                node.meta[TAG] = call.module or _operation(node)
    PortNodeMetaForQDQ()(program.graph_module)


def _operation(node: Node) -> str:
    target: Any = node.target
    return str(target.overloadpacket.__name__) if isinstance(target, OpOverload) else node.name


def _is_operator(node: Node) -> bool:
    """Whether it computes real numbers: neither Q/DQ nor a size."""
    if node.target is operator.getitem:
        return _is_operator(node.all_input_nodes[0])
    is_of_quantization = is_quantize(node) or is_dequantize(node) or is_choose_qparams(node)
    return isinstance(node.target, OpOverload) and not is_of_quantization and not _is_number(node.meta["val"])


def _is_number(value: Any) -> bool:
    return not isinstance(value, (Tensor, tuple, list))


def _annotation(node: Node, call: list[Node]) -> QuantizationAnnotation:
    inputs = [source for source in node.all_input_nodes if source in call and is_dequantize(source)]
    outputs = [user for user in node.users if user in call and is_quantize(user)]
    return QuantizationAnnotation(
        {_real_source(one): _spec(one) for one in inputs},
        _spec(outputs[0]) if outputs else None,
        _annotated=True,
    )


def _real_source(dequantize: Node) -> Node:
    """What a dequantize stands for: the tensor before its quantize, or a weight's integers."""
    source = dequantize.all_input_nodes[0]
    return source.all_input_nodes[0] if is_quantize(source) else source


def _spec(node: Node) -> QuantizationSpec:
    """The specification that a Q/DQ node carries out."""
    arguments: Any = node.args
    source, *parameters, low, high, dtype = arguments
    if is_quantize(source) and choose_qparams_of(source):
        return QuantizationSpec(dtype, PlaceholderObserver, low, high, per_tensor_affine, is_dynamic=True)
    if node.target in _PER_CHANNEL:
        return QuantizationSpec(dtype, PerChannelMinMaxObserver, low, high, per_channel_affine, parameters[-1])
    return QuantizationSpec(dtype, MinMaxObserver, low, high, per_tensor_affine)
