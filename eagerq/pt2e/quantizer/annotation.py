"""The annotators' common ground: their table, chains of operators, and the annotation of one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from eagerq.pt2e.quantizer.quantizer import ANNOTATION, QuantizationAnnotation

__all__ = [
    "OP_TO_ANNOTATOR",
    "AnnotatorType",
    "FilterType",
    "annotate_chain",
    "chains",
    "is_annotated",
    "is_relu_node",
    "mark_annotated",
    "register_annotator",
]

_aten = torch.ops.aten
_RELU = frozenset((_aten.relu.default, _aten.relu_.default))

FilterType = Callable[[Node], bool]
AnnotatorType = Callable[..., list[list[Node]]]
"""``(model, config, filter_fn=None)``: annotates the occurrences of a pattern, and returns their nodes."""

OP_TO_ANNOTATOR: dict[str, AnnotatorType] = {}
"""Name of a pattern, such as ``"linear_relu"``, to the function that annotates it."""


def register_annotator(op: str) -> Callable[[AnnotatorType], AnnotatorType]:
    """Have the decorated function annotate the pattern ``op``: it goes into ``OP_TO_ANNOTATOR``."""

    def register(annotator: AnnotatorType) -> AnnotatorType:
        OP_TO_ANNOTATOR[op] = annotator
        return annotator

    return register


def is_relu_node(node: Node) -> bool:
    """Whether this is a ReLU, in place or not."""
    return node.op == "call_function" and node.target in _RELU


def is_annotated(nodes: Iterable[Node]) -> bool:
    """Whether any of the nodes has been annotated already: the first quantizer or pattern to come has it."""
    annotations = (node.meta.get(ANNOTATION) for node in nodes)
    return any(annotation is not None and annotation._annotated for annotation in annotations)


def mark_annotated(nodes: Iterable[Node]) -> None:
    """Keep other patterns away from the nodes."""
    for node in nodes:
        node.meta.setdefault(ANNOTATION, QuantizationAnnotation())._annotated = True


def chains(
    graph: Graph, operators: Collection[Any], tail: Sequence[Callable[[Node], bool]], filter_fn: FilterType | None
) -> Iterator[list[Node]]:
    """Each operator among ``operators`` with what follows it: ``[conv2d, batch_norm, relu]``.

    Args:
        tail: what the nodes after the operator have to be; a node that is followed has no other user.
        filter_fn: has to be true for each node of a chain.
    """
    for last in graph.nodes:
        chain = _chain_to(last, operators, tail)
        if chain and (filter_fn is None or all(map(filter_fn, chain))):
            yield chain


def _chain_to(last: Node, operators: Collection[Any], tail: Sequence[Callable[[Node], bool]]) -> list[Node]:
    chain = [last]
    for is_wanted in reversed(tail):
        source = chain[0].args[0] if is_wanted(chain[0]) else None
        if not isinstance(source, Node) or len(source.users) > 1:
            return []
        chain.insert(0, source)
    return chain if chain[0].op == "call_function" and chain[0].target in operators else []


def annotate_chain(chain: Sequence[Node], inputs: dict[Node, Any], output: Any) -> None:
    """Quantize the inputs of a chain's first node and the output of its last."""
    first, last = chain[0], chain[-1]
    first.meta[ANNOTATION] = QuantizationAnnotation(input_qspec_map=inputs, _annotated=True)
    if last is not first:
        last.meta[ANNOTATION] = QuantizationAnnotation(_annotated=True)
    last.meta[ANNOTATION].output_qspec = output
