"""Batch norms folded into the convolutions (and linear layers) of a graph."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn.utils import fuse_conv_bn_weights

from eagerq.functional import fold_transposed
from eagerq.pt2e.graph import ANNOTATION, argument, erase_unused, has_argument, set_argument
from eagerq.pt2e.rewriting import attribute_of, owner_of

__all__ = [
    "Pair",
    "fold",
    "fold_batch_norms",
    "is_batch_norm",
    "is_convolution",
    "is_transposed",
    "layers_with_bn",
    "norm_of",
    "source_of",
]

_aten: Any = torch.ops.aten
_TRANSPOSED = {_aten.conv_transpose1d.default, _aten.conv_transpose2d.input, _aten.conv_transpose3d.input}
_CONVOLUTIONS = _TRANSPOSED | {
    *(getattr(_aten, name).default for name in ("conv1d", "conv2d", "conv3d", "convolution")),
    *(getattr(_aten, name).padding for name in ("conv1d", "conv2d", "conv3d")),
}
_BATCH_NORMS = {
    _aten.batch_norm.default,
    _aten.cudnn_batch_norm.default,
    _aten.miopen_batch_norm.default,
    _aten._native_batch_norm_legit.default,
    _aten._native_batch_norm_legit_no_training.default,
}
Pair = tuple[Node, Node]
"""A convolution (or linear layer) and the batch norm that is its one user."""


def fold_batch_norms(model: GraphModule) -> GraphModule:
    """Fold batch norms in evaluation mode into the layers before them, in place.

    Those in training mode stay, and so do those whose layer has other users or computes its weight. A weight that
    several layers share is folded once for each batch norm.

    Args:
        model: an exported graph.

    Example:
        >>> layers = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), torch.nn.BatchNorm2d(2)).eval()
        >>> graph = torch.export.export(layers, (torch.ones(1, 1, 2, 2),)).module()
        >>> [node.name for node in fold_batch_norms(graph).graph.nodes if node.op == "call_function"]
        ['conv2d']
    """
    fold(model, [(layer, bn) for layer, bn in layers_with_bn(model) if not _trains(bn)])
    return model


def layers_with_bn(model: GraphModule) -> list[Pair]:
    """Each convolution that nothing but a batch norm uses, with that batch norm.

    So too a linear layer whose result is ``[batch, channels]``.
    """
    pairs = []
    for bn in model.graph.nodes:
        if is_batch_norm(bn) and argument(bn, "running_mean") is not None:
            layer = argument(bn, "input")
            if list(layer.users) == [bn] and (is_convolution(layer) or _is_flat_linear(layer)):
                pairs.append((layer, bn))
    return pairs


def is_batch_norm(node: Node) -> bool:
    """Whether this normalises by the statistics of the batch or by running ones."""
    return node.target in _BATCH_NORMS


def is_convolution(node: Node) -> bool:
    """Whether this is a convolution of any kind, transposed ones included."""
    return node.target in _CONVOLUTIONS


def is_transposed(layer: Node) -> bool:
    """Whether this is a transposed convolution, whose weight is ``[in, out / groups, ...]``."""
    return layer.target in _TRANSPOSED or (has_argument(layer, "transposed") and argument(layer, "transposed"))


def _is_flat_linear(node: Node) -> bool:
    return node.target is _aten.linear.default and "val" in node.meta and node.meta["val"].dim() == 2


def _trains(bn: Node) -> bool:
    return has_argument(bn, "training") and argument(bn, "training")


def fold(model: GraphModule, pairs: Iterable[Pair]) -> None:
    """Fold the batch norms of these pairs, whatever their mode, where all that takes is constant."""
    alike: dict[Any, list[Pair]] = {}
    for layer, bn in pairs:
        inputs = [source_of(layer, "weight"), source_of(layer, "bias"), *norm_of(bn)]
        if all(node.op == "get_attr" for node in inputs if isinstance(node, Node)) and _result(bn) is not None:
            alike.setdefault((layer.target, *inputs), []).append((layer, bn))
    for group in alike.values():
        _fold_alike(model, group)
    model.recompile()


def _edge(layer: Node, name: str) -> tuple[Node, Node | None]:
    """A parameter's node, and what reads it: the layer, or the first of the fake quantizers between them."""
    reader, value = layer, argument(layer, name)
    while value is not None and value.op == "call_module":
        reader, (value,) = value, value.all_input_nodes
    return reader, value


def source_of(layer: Node, name: str) -> Any:
    """The node of a layer's weight or bias, before the fake quantizers that it goes through."""
    return _edge(layer, name)[1]


def norm_of(bn: Node) -> list[Any]:
    """Running mean and variance, eps, weight and bias."""
    eps = "eps" if has_argument(bn, "eps") else "epsilon"
    return [argument(bn, name) for name in ("running_mean", "running_var", eps, "weight", "bias")]


def _result(bn: Node) -> Node | None:
    """The normalised tensor; None where something else that the operator returns is used too."""
    if bn.target is _aten.batch_norm.default:
        return bn
    used = [item for item in bn.users if item.users]
    return used[0] if [item.args[1:] for item in used] == [(0,)] else None


def _fold_alike(model: GraphModule, pairs: list[Pair]) -> None:
    """Fold one batch norm into one layer, of which these are the calls."""
    layer, bn = pairs[0]
    mean = argument(bn, "running_mean").target
    old = [source_of(layer, "weight"), source_of(layer, "bias")]
    values: Any = [attribute_of(model, node) if isinstance(node, Node) else node for node in (*old, *norm_of(bn))]
    if is_transposed(layer):
        folded = fold_transposed(*values, groups=argument(layer, "groups"))
    else:
        folded = fuse_conv_bn_weights(*values)
    for name, node, value in zip(("weight", "bias"), old, folded, strict=True):
        edges = [_edge(layer, name) for layer, _ in pairs]
        new = _stored(model, node, {reader for reader, _ in edges}, value, old[0])
        for (layer, _), (reader, _) in zip(pairs, edges, strict=True):
            if node is None:
                set_argument(layer, name, new)
            else:
                reader.replace_input_with(node, new)
    for layer, bn in pairs:
        _bypass(layer, bn)
    _stop_counting(model, mean)


def _stored(model: GraphModule, old: Node | None, readers: set[Node], value: Tensor, weight: Node) -> Node:
    """The node of a parameter's new value: under its name, or under a new one where others read that too."""
    owner, name = owner_of(model, str((old or weight).target))
    new = nn.Parameter(value.detach(), requires_grad=getattr(owner, name).requires_grad)
    if old is not None and _readers(model, old.target) <= readers:
        setattr(owner, name, new)
        return old
    name = "bias" if old is None else name
    names = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(1)))
    free = next(candidate for candidate in names if getattr(owner, candidate, None) is None)
    setattr(owner, free, new)
    with model.graph.inserting_after(weight):
        node = model.graph.get_attr(".".join([*str(weight.target).split(".")[:-1], free]))
    if old is not None:
        node.meta = dict(old.meta)
    elif "val" in weight.meta:
        node.meta["val"] = weight.meta["val"].new_empty(new.shape)
    return node


def _readers(model: GraphModule, target: Any) -> set[Node]:
    return {user for node in model.graph.find_nodes(op="get_attr") if node.target == target for user in node.users}


def _bypass(layer: Node, bn: Node) -> None:
    """Let the layer's result be the batch norm's, and be quantized as that was to be."""
    result: Any = _result(bn)
    result.replace_all_uses_with(layer)
    output = getattr(bn.meta.get(ANNOTATION), "output_qspec", None)
    if output is not None and ANNOTATION in layer.meta:
        layer.meta[ANNOTATION] = copy.copy(layer.meta[ANNOTATION])
        layer.meta[ANNOTATION].output_qspec = output
    for item in list(bn.users):
        bn.graph.erase_node(item)
    erase_unused(bn)


def _stop_counting(model: GraphModule, mean: str) -> None:
    """Erase what counts the batches of a batch norm, of which this was the running mean, if nothing reads that."""
    if not _readers(model, mean):
        for add in _readers(model, mean.removesuffix("running_mean") + "num_batches_tracked"):
            erase_unused(add)
