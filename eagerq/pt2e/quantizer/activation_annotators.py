"""Annotators of operators without weights: sums, products, cat, pooling, and the ends of a GRU."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from eagerq.pt2e.quantizer.annotation import (
    FilterType,
    annotate_chain,
    chains,
    is_annotated,
    is_relu_node,
    mark_annotated,
    register_annotator,
)
from eagerq.pt2e.quantizer.propagation import has_quantized_source
from eagerq.pt2e.quantizer.quantizer import ANNOTATION, SharedQuantizationSpec
from eagerq.pt2e.quantizer.utils import QuantizationConfig, get_input_act_qspec, get_output_act_qspec
from eagerq.pt2e.rewriting import attribute_of

__all__ = ["ADAPTIVE_AVG_POOLS", "ADDS", "CATS", "MULS"]

_aten = torch.ops.aten
ADDS = frozenset((_aten.add.Tensor, _aten.add_.Tensor))
MULS = frozenset((_aten.mul.Tensor, _aten.mul_.Tensor))
CATS = frozenset((_aten.cat.default,))
ADAPTIVE_AVG_POOLS = frozenset((_aten.adaptive_avg_pool2d.default,))
_GRUS = frozenset((_aten.gru.input,))

_PAIRS = {
    "add": (ADDS, ()),
    "add_relu": (ADDS, (is_relu_node,)),
    "mul": (MULS, ()),
    "mul_relu": (MULS, (is_relu_node,)),
}
_LARGEST_SCALAR = 3.4028235e15
"""The histogram observer's torch.histc fails above it."""


def _annotate_pair(
    operators: frozenset[Any],
    tail: tuple[Any, ...],
    model: GraphModule,
    quantization_config: QuantizationConfig | None,
    filter_fn: FilterType | None = None,
) -> list[list[Node]]:
    spec = get_input_act_qspec(quantization_config)
    found: list[list[Node]] = []
    for chain in chains(model.graph, operators, tail, filter_fn):
        inputs = [node for node in chain[0].args[:2] if isinstance(node, Node)]
        if spec is None or is_annotated(chain) or not all(_can_be_observed(model, node) for node in inputs):
            continue
        annotate_chain(chain, dict.fromkeys(inputs, spec), get_output_act_qspec(quantization_config))
        found.append([*reversed(chain), *inputs])
    return found


def _can_be_observed(model: GraphModule, node: Node) -> bool:
    """Observers take float32, and histograms no scalar that is too large."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dtype is not torch.float32:
        return False
    if node.op != "get_attr":
        return True
    constant = attribute_of(model, node)
    return constant.numel() != 1 or abs(constant.item()) <= _LARGEST_SCALAR


@register_annotator("cat")
def _annotate_cat(
    model: GraphModule, quantization_config: QuantizationConfig | None, filter_fn: FilterType | None = None
) -> list[list[Node]]:
    """Inputs and output share their parameters: those of an input that has some already, or of the first."""
    spec = get_input_act_qspec(quantization_config)
    found: list[list[Node]] = []
    for (cat,) in chains(model.graph, CATS, (), filter_fn):
        inputs: Any = cat.args[0]
        dtype = getattr(cat.meta.get("val"), "dtype", torch.float32)
        if spec is None or is_annotated([cat]) or not dtype.is_floating_point:
            continue
        source = next(filter(has_quantized_source, inputs), inputs[0])
        shared = SharedQuantizationSpec((source, cat))
        annotate_chain([cat], {source: spec, **{node: shared for node in inputs if node is not source}}, shared)
        found.append(cat.all_input_nodes)
    return found


@register_annotator("adaptive_avg_pool2d")
def _annotate_adaptive_avg_pool2d(
    model: GraphModule, quantization_config: QuantizationConfig | None, filter_fn: FilterType | None = None
) -> list[list[Node]]:
    """The output has the input's parameters, and the input those of the node that made it, if that is quantized."""
    spec = get_input_act_qspec(quantization_config)
    found: list[list[Node]] = []
    for (pool,) in chains(model.graph, ADAPTIVE_AVG_POOLS, (), filter_fn):
        source: Any = pool.args[0]
        if spec is None or is_annotated([pool]):
            continue
        is_quantized = is_annotated([source]) and source.meta[ANNOTATION].output_qspec is not None
        inputs = {source: SharedQuantizationSpec(source) if is_quantized else spec}
        annotate_chain([pool], inputs, SharedQuantizationSpec((source, pool)))
        found.append([pool])
    return found


@register_annotator("gru_io_only")
def _annotate_gru_io_only(
    model: GraphModule, quantization_config: QuantizationConfig | None, filter_fn: FilterType | None = None
) -> list[list[Node]]:
    """What goes into a GRU and comes out of it; the state that it begins with only where the model is given one."""
    spec, output_spec = get_input_act_qspec(quantization_config), get_output_act_qspec(quantization_config)
    found: list[list[Node]] = []
    for (gru,) in chains(model.graph, _GRUS, (), filter_fn):
        outputs = list(gru.users)
        if spec is None or is_annotated([gru, *outputs]):
            continue
        inputs: Any = [node for node in gru.args[:2] if node.target is not _aten.zeros.default]  # type: ignore[union-attr]
        annotate_chain([gru], dict.fromkeys(inputs, spec), None)
        for output in outputs:
            annotate_chain([output], {}, output_spec)
        parameters: Any = gru.args[2]
        mark_annotated(parameters)
        found.append([*parameters, gru, *outputs])
    return found


for _name, (_operators, _tail) in _PAIRS.items():
    register_annotator(_name)(partial(_annotate_pair, _operators, _tail))
