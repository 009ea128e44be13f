"""What is known before any input is seen, up to a quantize, becomes an integer buffer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

from eagerq.pt2e.graph import in_memory_of, is_dequantize, is_quantize, written_by
from eagerq.pt2e.quantizer.quantizer import ANNOTATION
from eagerq.pt2e.rewriting import Names, add_buffer, attribute_of

__all__ = ["constants_of", "fold_quantize", "value_of"]

_OF_THE_FLOAT_VALUE = ("val", "tensor_meta", ANNOTATION)


def constants_of(model: GraphModule) -> set[Node]:
    """The nodes whose values depend on the model alone.

    Buffers that the graph writes to do not count, nor what is drawn at random, nor a dequantize: integers
    and the dequantize that follows them are what backends look for.
    """
    changing = in_memory_of(*(target for node in model.graph.nodes if (target := written_by(node)) is not None))
    constants: set[Node] = set()
    for node in model.graph.nodes:
        if node not in changing and _is_known(model, node, constants):
            constants.add(node)
    return constants


def _is_known(model: GraphModule, node: Node, constants: set[Node]) -> bool:
    if node.op == "get_attr":
        value = attribute_of(model, node)
        return isinstance(value, Tensor) and not isinstance(value, FakeTensor) and not value.is_meta
    return (
        node.op == "call_function"
        and constants.issuperset(node.all_input_nodes)
        and not is_dequantize(node)
        and not node.is_impure()
    )


def value_of(model: GraphModule, node: Node) -> Any:
    """The value of one of :func:`constants_of`."""
    if node.op == "get_attr":
        return attribute_of(model, node)
    assert callable(node.target)
    args, kwargs = map_aggregate(
        (node.args, node.kwargs), lambda arg: value_of(model, arg) if isinstance(arg, Node) else arg
    )
    return node.target(*args, **kwargs)


@torch.no_grad()
def fold_quantize(model: GraphModule) -> None:
    """Replace each quantize of a constant by a buffer ``_frozen_param0`` … of its result; changes ``model``.

    Everything between the constant and the quantize goes with it; other constants stay as they are. The
    buffer's node has the metadata of the quantize, and of the weight that it comes from.
    """
    constants, names = constants_of(model), Names(model)
    for node in [node for node in model.graph.nodes if node in constants and is_quantize(node)]:
        with model.graph.inserting_before(node):
            frozen = add_buffer(model, names.new("_frozen_param"), value_of(model, node))
        frozen.meta = {key: value for source in (_weight_of(node), node) for key, value in _metadata(source)}
        node.replace_all_uses_with(frozen)
        model.graph.erase_node(node)


def _weight_of(node: Node) -> Node:
    while node.op != "get_attr" and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _metadata(node: Node) -> Iterator[tuple[str, Any]]:
    return ((key, value) for key, value in node.meta.items() if key not in _OF_THE_FLOAT_VALUE)
