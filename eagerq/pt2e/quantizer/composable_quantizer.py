"""Several quantizers as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule, Node

from eagerq.errors import InvalidInputError
from eagerq.pt2e.graph import describe
from eagerq.pt2e.quantizer.quantizer import ANNOTATION, EdgeOrNode, Quantizer

__all__ = ["ComposableQuantizer"]


@dataclass(frozen=True)
class _Record:
    """A node's annotation as a quantizer left it."""

    annotation: Any
    owner: str
    inputs: dict[Node, Any]
    output: Any

    @classmethod
    def of(cls, annotation: Any, owner: str) -> _Record:
        return cls(annotation, owner, dict(annotation.input_qspec_map or {}), annotation.output_qspec)

    def is_kept_by(self, annotation: Any) -> bool:
        """Whether all that was said is still said; an annotation may have been added to."""
        inputs = annotation.input_qspec_map or {} if annotation is self.annotation else None
        return (
            inputs is not None
            and all(node in inputs and inputs[node] is spec for node, spec in self.inputs.items())
            and (self.output is None or annotation.output_qspec is self.output)
        )


class ComposableQuantizer(Quantizer):
    """Applies quantizers one after the other: each annotates what those before it have left.

    Args:
        quantizers: in order.

    Raises:
        InvalidInputError: (a RuntimeError) by ``annotate``, when a quantizer changes or removes what another one
            has annotated; it names both, and the node.

    Example:
        >>> from eagerq.pt2e.quantizer import EmbeddingQuantizer, XNNPACKQuantizer
        >>> len(ComposableQuantizer([EmbeddingQuantizer(), XNNPACKQuantizer()]).quantizers)
        2
    """

    def __init__(self, quantizers: Sequence[Any]) -> None:
        super().__init__()
        self.quantizers = list(quantizers)

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        """Each quantizer's transformation, in order."""
        for quantizer in self.quantizers:
            model = quantizer.transform_for_annotation(model)
        return model

    def annotate(self, model: GraphModule) -> GraphModule:
        """Each quantizer's annotations, in order."""
        records: dict[Node, _Record] = {}
        for quantizer in self.quantizers:
            quantizer.annotate(model)
            self._check(model, type(quantizer).__name__, records)
        return model

    def validate(self, model: GraphModule) -> None:
        """Let each quantizer look at the result."""
        for quantizer in self.quantizers:
            quantizer.validate(model)

    def prepare_obs_or_fq_callback(self, model: GraphModule, edge_or_node_to_obs_or_fq: dict[EdgeOrNode, Any]) -> None:
        """Each quantizer's callback, in order."""
        for quantizer in self.quantizers:
            if hasattr(quantizer, "prepare_obs_or_fq_callback"):
                quantizer.prepare_obs_or_fq_callback(model, edge_or_node_to_obs_or_fq)

    @staticmethod
    def _check(model: GraphModule, owner: str, records: dict[Node, _Record]) -> None:
        for node in model.graph.nodes:
            annotation, record = node.meta.get(ANNOTATION), records.get(node)
            if record is not None and (annotation is None or not record.is_kept_by(annotation)):
                raise _conflict(node, owner, record.owner, "removed" if annotation is None else "changed")
            if annotation is not None:
                records[node] = _Record.of(annotation, record.owner if record else owner)


def _conflict(node: Node, owner: str, other: str, what: str) -> InvalidInputError:
    return InvalidInputError(
        f"{owner} has {what} the annotation of {other} on {describe(node)}",
        remedy=f"let {owner} pass over annotated nodes, put it before {other}, or give each its own nodes",
    )
