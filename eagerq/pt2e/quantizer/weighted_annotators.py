"""Annotators of linear and convolution, with what follows them: BatchNorm, ReLU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
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
from eagerq.pt2e.quantizer.utils import (
    QuantizationConfig,
    get_bias_qspec,
    get_input_act_qspec,
    get_output_act_qspec,
    get_weight_qspec,
)

__all__ = ["CONVS", "CONV_TRANSPOSES", "LINEARS"]

_aten = torch.ops.aten
LINEARS = frozenset((_aten.linear.default,))
CONVS = frozenset(
    overload
    for conv in (_aten.conv1d, _aten.conv2d, _aten.conv3d)
    for overload in (conv.default, conv.padding)  # padding given as a word, such as "same"
)
CONV_TRANSPOSES = frozenset(
    (_aten.conv_transpose1d.default, _aten.conv_transpose2d.input, _aten.conv_transpose3d.input)
)
# those that training folds a BatchNorm into
_CONVS_BN = frozenset((_aten.conv1d.default, _aten.conv2d.default))
_CONV_TRANSPOSES_BN = frozenset((_aten.conv_transpose1d.default, _aten.conv_transpose2d.input))


def _is_batch_norm(node: Node) -> bool:
    return node.op == "call_function" and node.target is _aten.batch_norm.default


@dataclass(frozen=True)
class _Pattern:
    """An operator with weights, and what follows it."""

    operators: frozenset[Any]
    tail: tuple[Callable[[Node], bool], ...] = ()
    reuses_weight: bool = False  # whether a weight that another operator has is quantized here too


_PATTERNS = {
    "linear": _Pattern(LINEARS, reuses_weight=True),
    "linear_relu": _Pattern(LINEARS, (is_relu_node,)),
    "conv": _Pattern(CONVS),
    "conv_relu": _Pattern(CONVS, (is_relu_node,)),
    "conv_bn": _Pattern(_CONVS_BN, (_is_batch_norm,)),
    "conv_bn_relu": _Pattern(_CONVS_BN, (_is_batch_norm, is_relu_node)),
    "conv_transpose": _Pattern(CONV_TRANSPOSES),
    "conv_transpose_relu": _Pattern(CONV_TRANSPOSES, (is_relu_node,)),
    "conv_transpose_bn": _Pattern(_CONV_TRANSPOSES_BN, (_is_batch_norm,)),
    "conv_transpose_bn_relu": _Pattern(_CONV_TRANSPOSES_BN, (_is_batch_norm, is_relu_node)),
}


def _annotate(
    pattern: _Pattern,
    model: GraphModule,
    quantization_config: QuantizationConfig | None,
    filter_fn: FilterType | None = None,
) -> list[list[Node]]:
    found = []
    for chain in chains(model.graph, pattern.operators, pattern.tail, filter_fn):
        root = chain[0]
        parameters = [node for node in root.args[1:3] if isinstance(node, Node)]
        taken = chain if pattern.reuses_weight else [*chain, *parameters]
        if is_annotated(taken) or _is_left(pattern, root, quantization_config, filter_fn):
            continue
        specs = (
            get_input_act_qspec(quantization_config),
            _weight_qspec(root, quantization_config),
            get_bias_qspec(quantization_config),
        )
        inputs = {node: spec for node, spec in zip(root.args, specs, strict=False) if isinstance(node, Node)}
        annotate_chain(chain, inputs, get_output_act_qspec(quantization_config))
        mark_annotated([chain[-1], root, *parameters])
        found.append([*reversed(chain), *parameters])
    return found


def _weight_qspec(root: Node, quantization_config: QuantizationConfig | None) -> Any:
    """A transposed convolution's weight has its output channels second."""
    spec = get_weight_qspec(quantization_config)
    return replace(spec, ch_axis=1) if spec is not None and root.target in CONV_TRANSPOSES else spec


def _is_left(
    pattern: _Pattern, root: Node, quantization_config: QuantizationConfig | None, filter_fn: FilterType | None
) -> bool:
    """What XNNPACK has no kernel for, or another pattern is for."""
    if root.target in LINEARS:
        return False
    transposed = root.target in CONV_TRANSPOSES
    if transposed and _is_batch_norm not in pattern.tail and _groups(root) != 1:
        return True
    if pattern.tail:
        return False
    users = list(root.users)
    if len(users) == 1 and is_relu_node(users[0]) and (filter_fn is None or filter_fn(users[0])):
        return True
    activation = get_input_act_qspec(quantization_config)
    if activation is None or not activation.is_dynamic:
        return False
    shape = getattr(root.args[1].meta.get("val"), "shape", None)  # type: ignore[union-attr]
    return shape is not None and (len(shape) != 4 or (not transposed and shape[1] == 1))


def _groups(conv_transpose: Node) -> int:
    names = [argument.name for argument in conv_transpose.target._schema.arguments]  # type: ignore[union-attr]
    return {**dict(zip(names, conv_transpose.args, strict=False)), **conv_transpose.kwargs}.get("groups", 1)


for _name, _pattern in _PATTERNS.items():
    register_annotator(_name)(partial(_annotate, _pattern))
