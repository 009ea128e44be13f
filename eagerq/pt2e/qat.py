"""Training with the folding to come: convolutions see weights as their batch norms will scale them."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from eagerq.functional import channel_shape
from eagerq.intrinsic.qat import kept
from eagerq.pt2e.conv_bn import (
    Pair,
    fold,
    is_batch_norm,
    is_convolution,
    is_transposed,
    layers_with_bn,
    norm_of,
    source_of,
)
from eagerq.pt2e.graph import ANNOTATION, EdgeOrNode, argument, erase_unused, made_from, set_argument
from eagerq.pt2e.rewriting import repointed

__all__ = ["fold_simulated", "simulate_folding"]

_aten: Any = torch.ops.aten
_KEPT = getattr(torch.ops.eagerq, kept.name).default  # the batch norm will have written over it, see there
# what a node says of itself alone, and not of the module that it comes from
_OF_ITS_OWN = (ANNOTATION, "val", "tensor_meta")
Moved = dict[EdgeOrNode, EdgeOrNode]


def simulate_folding(model: GraphModule) -> None:
    """Let annotated convolutions train with the weights that folding their batch norms will give; in place.

    The weight is scaled by ``bn.weight / sqrt(running_var + eps)``, where its fake quantizer will go, and the result
    is scaled back before the batch norm, whose statistics stay what they would be unfolded (Krishnamoorthi 2018,
    arXiv:1806.08342, section 3.2.2). The convolution, the batch norm and what is said about them stay.

    Left alone are convolutions whose weight is not annotated, or whose own result is: folding would change that.
    """
    moved: Moved = {}
    for conv, bn in layers_with_bn(model):
        if is_convolution(conv) and _is_quantized_as_one(conv):
            moved |= _simulate(conv, bn)
    _repoint(model, moved)


def _is_quantized_as_one(conv: Node) -> bool:
    annotation: Any = conv.meta.get(ANNOTATION)
    if annotation is None or annotation.output_qspec is not None:
        return False
    return annotation.input_qspec_map.get(argument(conv, "weight")) is not None


def _simulate(conv: Node, bn: Node) -> Moved:
    """Put the scaling in; returns the edges into the convolution that have moved."""
    weight, bias = argument(conv, "weight"), argument(conv, "bias")
    shape = channel_shape(weight.meta["val"].dim(), 1)
    with conv.graph.inserting_before(conv):
        factor = _factor(conv, bn)
        scaled = _call(conv, _aten.mul.Tensor, weight, _along_weight(conv, factor))
        # a bias is added after the scaling back; folded, it will go where its annotation wants it
        quantized = bias is not None and conv.meta[ANNOTATION].input_qspec_map.get(bias) is not None
        zero = _call(conv, _aten.zeros_like.default, bias) if quantized else None
    set_argument(conv, "weight", scaled)
    if bias is not None:
        set_argument(conv, "bias", zero)
    with conv.graph.inserting_before(bn):
        y = _call(conv, _aten.div.Tensor, conv, _call(conv, _aten.reshape.default, factor, shape))
        if bias is not None:
            y = _call(conv, _aten.add.Tensor, y, _call(conv, _aten.reshape.default, bias, shape))
    set_argument(bn, "input", y)
    moved: Moved = {(weight, conv): (scaled, conv)}
    return moved if zero is None else moved | {(bias, conv): (zero, conv)}


def _factor(conv: Node, bn: Node) -> Node:
    _, variance, eps, gain, _ = norm_of(bn)
    variance = _call(conv, _KEPT, variance)
    deviation = _call(conv, _aten.sqrt.default, _call(conv, _aten.add.Tensor, variance, eps))
    if gain is None:
        return _call(conv, _aten.reciprocal.default, deviation)
    factor = _call(conv, _aten.div.Tensor, gain, deviation)
    # a channel that the batch norm multiplies by zero still has statistics and gradients
    return _call(conv, _aten.where.ScalarSelf, _call(conv, _aten.eq.Scalar, factor, 0), 1.0, factor)


def _along_weight(conv: Node, factor: Node) -> Node:
    size = argument(conv, "weight").meta["val"].shape
    shape = channel_shape(len(size), int(is_transposed(conv)))
    if is_transposed(conv) and (groups := argument(conv, "groups")) > 1:
        # [in, out / groups, ...], where each group of inputs has its own outputs
        by_group = _call(conv, _aten.reshape.default, factor, [groups, -1])
        factor = _call(conv, _aten.repeat_interleave.self_int, by_group, size[0] // groups, 0)
        shape = [*size[:2], *shape[2:]]
    return _call(conv, _aten.reshape.default, factor, shape)


def _call(conv: Node, target: Any, *args: Any) -> Node:
    """A new node at the insertion point, which says of itself that it comes from where the convolution does."""
    node = conv.graph.call_function(target, args)
    node.meta = {key: value for key, value in conv.meta.items() if key not in _OF_ITS_OWN}
    values: list[Any] = [arg.meta.get("val") if isinstance(arg, Node) else arg for arg in args]
    with values[0].fake_mode:
        node.meta["val"] = target(*values)
    return node


def fold_simulated(model: GraphModule) -> None:
    """Fold the batch norms whose folding was simulated, into weights and biases; in place."""
    moved: Moved = {}
    pairs: list[Pair] = []
    for bn in list(model.graph.nodes):
        conv = _simulated(bn)
        if conv is not None:
            moved |= _restore(conv, bn)
            pairs.append((conv, bn))
    _repoint(model, moved)
    fold(model, pairs)


def _simulated(bn: Node) -> Any:
    """The convolution of this batch norm, if the folding of the two is being simulated."""
    if not is_batch_norm(bn):
        return None
    divided, _ = _unbiased(argument(bn, "input"))
    if divided.target is not _aten.div.Tensor or not is_convolution(divided.args[0]):
        return None
    conv, factor = divided.args
    scaled, variance = source_of(conv, "weight"), norm_of(bn)[1]
    made_alike = variance in made_from(factor) & made_from(scaled)
    return conv if made_alike and scaled.target is _aten.mul.Tensor else None


def _unbiased(y: Any) -> tuple[Any, Any]:
    """What a bias was added to, and the bias."""
    if y.target is _aten.add.Tensor and isinstance(y.args[1], Node) and y.args[1].target is _aten.reshape.default:
        return y.args[0], y.args[1].args[0]
    return y, None


def _restore(conv: Node, bn: Node) -> Moved:
    """Undo :func:`_simulate`, but keep the fake quantizers; returns the edges that have moved."""
    y, scaled, zero = argument(bn, "input"), source_of(conv, "weight"), source_of(conv, "bias")
    _, bias = _unbiased(y)
    back = {scaled: scaled.args[0]}
    if zero is not None:
        back[zero] = bias
    elif bias is not None:
        set_argument(conv, "bias", bias)
    for node, original in back.items():
        node.replace_all_uses_with(original)
    set_argument(bn, "input", conv)
    for node in (y, *back):
        erase_unused(node)
    return {(node, conv): (original, conv) for node, original in back.items()}


def _repoint(model: GraphModule, moved: Moved) -> None:
    for node in model.graph.nodes:
        if moved and node.meta.get(ANNOTATION) is not None:
            node.meta[ANNOTATION] = repointed(node.meta[ANNOTATION], node, lambda place: moved.get(place, place))
