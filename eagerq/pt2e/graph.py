"""Questions about the nodes of a graph, shared by everything that reads one."""

from __future__ import annotations

import operator

import torch
from torch.fx import Node

__all__ = ["choose_qparams_of", "is_choose_qparams", "is_dequantize", "is_quantize"]

# torchao has operators of its own for blocks and groups; what they do is in their names too
_DIALECTS = ("quantized_decomposed", "torchao")


def _does(node: object, what: str) -> bool:
    if not isinstance(node, Node) or not isinstance(node.target, torch._ops.OpOverload):
        return False
    dialect, _, name = node.target.name().partition("::")
    return dialect in _DIALECTS and name.startswith(what)


def is_quantize(node: object) -> bool:
    """Whether this is a quantize of any kind: per tensor, channel, token or group; static or dynamic."""
    return _does(node, "quantize_")


def is_dequantize(node: object) -> bool:
    """Whether this is a dequantize of any kind."""
    return _does(node, "dequantize_")


def is_choose_qparams(node: object) -> bool:
    """Whether this finds scale and zero point of the tensor that it is given."""
    return _does(node, "choose_qparams")


def choose_qparams_of(quantize: Node) -> list[Node]:
    """Where a dynamic quantize has its scale and zero point from: its getitems, then choose_qparams; else nothing."""
    items = [node for node in quantize.all_input_nodes if node.target is operator.getitem]
    sources = [item for item in items if is_choose_qparams(item.args[0])]
    return [*sources, *sources[0].all_input_nodes] if sources else []
