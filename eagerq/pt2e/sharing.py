"""Which places of an annotated graph are quantized alike, and by what.

A place is the output of a node, or the input ``(producer, consumer)`` of one. Places that share form a
group, and a group has one observer. They share explicitly, by a specification that names another place,
or implicitly: all that is said of one tensor (by its producer, and by each of its consumers) in the same
terms is said of one group, unless the consumers do not allow it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from torch.fx import Graph, Node

from eagerq.errors import InvalidConfigError
from eagerq.pt2e.graph import describe
from eagerq.pt2e.quantizer.quantizer import ANNOTATION, EdgeOrNode

__all__ = ["describe_place", "groups_of", "own_specs", "specs_of"]

Specs = dict[EdgeOrNode, Any]

# what has to be equal for two specifications to be in the same terms; lacking an attribute is a term too
_TERMS = ("dtype", "is_dynamic", "quant_min", "quant_max", "qscheme", "ch_axis", "scale", "zero_point")
_MISSING = object()


def describe_place(place: EdgeOrNode) -> str:
    """The place in words, for messages."""
    if isinstance(place, tuple):
        return f"the input from {describe(place[0])} to {describe(place[1])}"
    return f"the output of {describe(place)}"


def specs_of(graph: Graph) -> Specs:
    """Each annotated place with its specification, in the order of the graph; inputs before the output.

    Raises:
        InvalidConfigError: for an annotated input that is no node.
    """
    return dict(_annotated(graph))


def _annotated(graph: Graph) -> Iterator[tuple[EdgeOrNode, Any]]:
    for node in graph.nodes:
        annotation = node.meta.get(ANNOTATION)
        if annotation is None:
            continue
        for source, spec in annotation.input_qspec_map.items():
            if not isinstance(source, Node):
                raise InvalidConfigError(
                    f"{describe(node)} is annotated with an input {source!r}, but only tensors in the graph can be "
                    "quantized",
                    remedy="leave it out of input_qspec_map, or make a tensor of it in transform_for_annotation",
                )
            yield (source, node), spec
        if annotation.output_qspec is not None:
            yield node, annotation.output_qspec


def own_specs(specs: Specs) -> Specs:
    """The specification that each place comes to when sharing is followed; None where it stays float.

    Raises:
        InvalidConfigError: when sharing leads to a place that has none, or round in a circle.
    """
    own: Specs = {}
    for place in specs:
        path: dict[EdgeOrNode, None] = {}
        end = place
        while end not in own and hasattr(specs[end], "edge_or_node"):
            path[end] = None
            end = _shared_with(end, path, specs)
        found = own[end] if end in own else specs[end]
        own.update(dict.fromkeys((*path, end), found))
    return own


def _shared_with(place: EdgeOrNode, path: Collection[EdgeOrNode], specs: Specs) -> EdgeOrNode:
    target: EdgeOrNode = specs[place].edge_or_node
    if target not in specs:
        raise InvalidConfigError(
            f"{describe_place(place)} shares the observer of {describe_place(target)}, which has none",
            remedy="annotate that place too, or give this one a specification of its own",
        )
    if target in path:
        circle = ", ".join(describe_place(member) for member in path)
        raise InvalidConfigError(
            f"these places share with each other and none has a specification of its own: {circle}",
            remedy="give one of them a specification that is not shared",
        )
    return target


class _Union:
    """Disjoint sets (Galler and Fischer 1964), with paths halved on the way."""

    def __init__(self, members: Specs) -> None:
        self.parent: dict[EdgeOrNode, EdgeOrNode] = {member: member for member in members}

    def root(self, member: EdgeOrNode) -> EdgeOrNode:
        while (parent := self.parent[member]) != member:
            self.parent[member] = member = self.parent[parent]
        return member

    def join(self, first: EdgeOrNode, second: EdgeOrNode) -> None:
        self.parent[self.root(second)] = self.root(first)


def groups_of(specs: Specs, own: Specs) -> list[list[EdgeOrNode]]:
    """The groups of places that share one observer, and in each the places, in the order of ``specs``.

    Args:
        own: from :func:`own_specs`.
    """
    union = _Union(specs)
    for tensor in _said_of_one_tensor(own):
        for place in tensor[1:]:
            union.join(tensor[0], place)
    for place, spec in specs.items():
        if hasattr(spec, "edge_or_node"):
            union.join(spec.edge_or_node, place)
    groups: dict[EdgeOrNode, list[EdgeOrNode]] = {}
    for place in specs:
        groups.setdefault(union.root(place), []).append(place)
    return list(groups.values())


def _said_of_one_tensor(own: Specs) -> Iterator[list[EdgeOrNode]]:
    """Places of the same tensor, in the same terms, where a consumer allows to share."""
    alike: dict[Any, list[EdgeOrNode]] = {}
    allowed = set()
    for place, spec in own.items():
        if spec is None:
            continue
        producer, consumer = place if isinstance(place, tuple) else (place, None)
        key = (producer, *(getattr(spec, term, _MISSING) for term in _TERMS))
        alike.setdefault(key, []).append(place)
        if consumer is not None and consumer.meta[ANNOTATION].allow_implicit_sharing:
            allowed.add(key)
    return (alike[key] for key in allowed)
