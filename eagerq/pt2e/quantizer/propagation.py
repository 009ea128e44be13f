"""Operators that leave values as they are, or nearly: they share the parameters of their input."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from eagerq.pt2e.quantizer.annotation import annotate_chain, is_annotated
from eagerq.pt2e.quantizer.quantizer import ANNOTATION, SharedQuantizationSpec

__all__ = ["has_quantized_source", "propagate_annotation"]

_aten = torch.ops.aten
_SHARING = frozenset(
    (
        # within the range of their input
        _aten.adaptive_avg_pool2d.default,
        _aten.hardtanh.default,
        _aten.hardtanh_.default,
        _aten.max_pool2d.default,
        _aten.mean.default,
        _aten.mean.dim,
        _aten.relu.default,
        # the same values elsewhere
        _aten.flatten.using_ints,
        _aten.permute.default,
        _aten.permute_copy.default,
        _aten.reshape.default,
        _aten.slice.Tensor,
        _aten.slice_copy.Tensor,
        _aten.squeeze.dim,
        _aten.squeeze_copy.dim,
        _aten.transpose.int,
        _aten.view.default,
        _aten.view_copy.default,
        # the same values, in evaluation
        _aten.dropout.default,
        _aten.dropout_.default,
    )
)


def _source(node: Node) -> Node | None:
    """The node whose parameters this one shares, if it is such an operator."""
    if node.op != "call_function" or node.target not in _SHARING:
        return None
    return node.args[0] if isinstance(node.args[0], Node) else None


def _has_quantized_output(node: Node) -> bool:
    annotation = node.meta.get(ANNOTATION)
    return annotation is not None and annotation.output_qspec is not None


def has_quantized_source(node: Node) -> bool:
    """Whether a node, or what it has its values from, has been annotated with a quantized output."""
    ahead: Node | None = node
    while ahead is not None:
        if _has_quantized_output(ahead) and is_annotated([ahead]):
            return True
        ahead = _source(ahead)
    return False


def propagate_annotation(model: GraphModule) -> None:
    """Have operators such as pooling and reshape share the parameters of the quantized tensor that they are given."""
    for node in model.graph.nodes:
        source = _source(node)
        if source is None or not _has_quantized_output(source) or is_annotated([node]):
            continue
        shared = SharedQuantizationSpec(source)
        annotate_chain([node], {source: shared}, shared)
