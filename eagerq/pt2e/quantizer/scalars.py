"""Scalars of a graph become tensors, which can be quantized."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from eagerq.pt2e.rewriting import Names, add_buffer

__all__ = ["convert_scalars_to_attrs"]

_OPERATORS = frozenset((torch.ops.aten.add.Tensor, torch.ops.aten.mul.Tensor))


def convert_scalars_to_attrs(model: GraphModule) -> GraphModule:
    """Make the number that is added to a tensor, or that multiplies one, a buffer of the model; returns the model.

    Integer arithmetic stays as it is: a buffer of float32 would make its result a float.

    Example:
        >>> class AddOne(torch.nn.Module):
        ...     def forward(self, x):
        ...         return x + 1
        >>> model = torch.export.export(AddOne(), (torch.ones(2),)).module()
        >>> convert_scalars_to_attrs(model)._tensor_constant_0
        tensor(1.)
    """
    names = Names(model)
    for node in list(model.graph.nodes):
        result = node.meta.get("val")
        if node.op != "call_function" or node.target not in _OPERATORS:
            continue
        if isinstance(result, Tensor) and result.is_floating_point():
            node.args = tuple(
                arg if isinstance(arg, Node) else _buffer(model, names, node, float(arg), result) for arg in node.args
            )
    model.recompile()
    return model


def _buffer(model: GraphModule, names: Names, node: Node, number: float, like: Tensor) -> Node:
    """A new buffer, and the node before ``node`` that reads it."""
    # with 16 bits the operator computes in float32: the number keeps that precision
    dtype = torch.float64 if like.dtype is torch.float64 else torch.float32
    tensor = torch.tensor(number, dtype=dtype, device=like.device)
    with model.graph.inserting_before(node):
        read = add_buffer(model, names.new("_tensor_constant_"), tensor)
    fake_mode = getattr(like, "fake_mode", None)
    read.meta["val"] = tensor if fake_mode is None else fake_mode.from_tensor(tensor, static_shapes=True)
    return read
