"""Changing graph modules: a copy to work on, its tensors by path, new names in it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_map_only

from eagerq.pt2e.graph import ANNOTATION, EdgeOrNode

__all__ = ["Names", "add_buffer", "attribute_of", "copied", "owner_of", "pruned", "repointed"]


def copied(model: GraphModule) -> GraphModule:
    """A graph module with a graph of its own and the very parameters, buffers and submodules of ``model``.

    Whatever goes wrong with the copy, ``model`` stays as it is. Annotations speak of the copy's nodes.
    """
    graph = Graph(tracer_cls=model.graph._tracer_cls)
    twins: dict[Node, Node] = {}
    for node in model.graph.nodes:
        twins[node] = graph.node_copy(node, twins.__getitem__)
    graph._codegen = copy.copy(model.graph._codegen)

    def twin(place: EdgeOrNode) -> EdgeOrNode:
        return tree_map_only(Node, lambda node: twins.get(node, node), place)

    for node in graph.nodes:
        if node.meta.get(ANNOTATION) is not None:
            node.meta[ANNOTATION] = repointed(node.meta[ANNOTATION], node, twin)
    return _module_of(model, graph)


def pruned(model: GraphModule) -> GraphModule:
    """``model`` without nodes that nothing needs, and without what only those needed."""
    model.graph.eliminate_dead_code()
    return _module_of(model, model.graph)


def _module_of(model: GraphModule, graph: Graph) -> GraphModule:
    made = GraphModule(model, graph)
    made.meta.update(model.meta)
    for node in graph.nodes:
        if node.op == "get_attr":  # the constructor registers every tensor as part of the state_dict
            (owner, name), (made_owner, _) = owner_of(model, node.target), owner_of(made, node.target)
            if name in owner._non_persistent_buffers_set:
                made_owner._non_persistent_buffers_set.add(name)
    return made


def repointed(annotation: Any, consumer: Node, at: Callable[[EdgeOrNode], EdgeOrNode]) -> Any:
    """The annotation of ``consumer``, once what it speaks of has moved; ``at`` tells where each place is now."""

    def moved(spec: Any) -> Any:
        if hasattr(spec, "edge_or_node"):
            return replace(spec, edge_or_node=at(spec.edge_or_node))
        if hasattr(spec, "derived_from"):
            return replace(spec, derived_from=[at(place) for place in spec.derived_from])
        return spec

    made = copy.copy(annotation)
    made.input_qspec_map = {
        at((source, consumer))[0]: moved(spec)  # type: ignore[index]
        for source, spec in annotation.input_qspec_map.items()
    }
    made.output_qspec = moved(annotation.output_qspec)
    return made


def owner_of(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The submodule that holds what ``path`` names, and its name there."""
    owner, _, name = path.rpartition(".")
    return model.get_submodule(owner), name


def attribute_of(model: GraphModule, node: Node) -> Any:
    """What a ``get_attr`` or ``call_module`` node of the model's graph speaks of."""
    assert isinstance(node.target, str)
    owner, name = owner_of(model, node.target)
    return getattr(owner, name)


class Names:
    """New attribute names for a module, each prefix with the first number that is free."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._next: dict[str, int] = {}

    def new(self, prefix: str) -> str:
        number = self._next.get(prefix, 0)
        while hasattr(self.model, f"{prefix}{number}"):
            number += 1
        self._next[prefix] = number + 1
        return f"{prefix}{number}"


def add_buffer(model: GraphModule, name: str, value: Tensor) -> Node:
    """Register a buffer, and return the node that reads it, at the graph's insertion point."""
    model.register_buffer(name, value)
    return model.graph.get_attr(name)
