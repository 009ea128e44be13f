"""What a quantizer says about a graph: specifications of tensors, and annotations that hang them on nodes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from eagerq.errors import InvalidArgumentError
from eagerq.pt2e.graph import ANNOTATION, EdgeOrNode

__all__ = [
    "ANNOTATION",
    "DerivedQuantizationSpec",
    "EdgeOrNode",
    "FixedQParamsQuantizationSpec",
    "QuantizationAnnotation",
    "QuantizationSpec",
    "QuantizationSpecBase",
    "Quantizer",
    "SharedQuantizationSpec",
]


class QuantizationSpecBase(ABC):  # noqa: B024 - a family, not an interface
    """How a tensor in a graph (the output of a node, or an input of one) is quantized."""


@dataclass(eq=True, frozen=True)
class QuantizationSpec(QuantizationSpecBase):
    """A tensor with an observer or fake quantizer of its own.

    Attributes:
        dtype: integer (or float8) dtype of the stored values.
        observer_or_fake_quant_ctr: makes the observer or fake quantizer, such as
            ``MinMaxObserver.with_args(eps=2**-12)``; it is given the other attributes that are not None.
        quant_min, quant_max: least and greatest stored value.
        qscheme: ``torch.per_tensor_affine`` and the like.
        ch_axis: channel axis, where the scheme is per channel.
        is_dynamic: whether scale and zero point come from each input as it is seen.

    Raises:
        InvalidArgumentError: for a range upside down, or a negative axis.

    Example:
        >>> from eagerq.observer import MinMaxObserver
        >>> QuantizationSpec(torch.int8, MinMaxObserver, -128, 127).dtype
        torch.int8
    """

    dtype: torch.dtype
    observer_or_fake_quant_ctr: Callable[..., Any]
    quant_min: int | None = None
    quant_max: int | None = None
    qscheme: torch.qscheme | None = None
    ch_axis: int | None = None
    is_dynamic: bool = False

    def __post_init__(self) -> None:
        if self.quant_min is not None and self.quant_max is not None and self.quant_min > self.quant_max:
            raise InvalidArgumentError(
                f"quant_min {self.quant_min} must be <= quant_max {self.quant_max}", remedy="swap them"
            )
        if self.ch_axis is not None and self.ch_axis < 0:
            raise InvalidArgumentError(
                f"Ch_axis is < 0: {self.ch_axis}", remedy="count the axis from the front, starting at 0"
            )


@dataclass(eq=True, frozen=True)
class FixedQParamsQuantizationSpec(QuantizationSpecBase):
    """A tensor whose scale and zero point are known beforehand, such as a sigmoid's result."""

    dtype: torch.dtype
    scale: float
    zero_point: int
    quant_min: int | None = None
    quant_max: int | None = None
    qscheme: torch.qscheme | None = None
    is_dynamic: bool = False


@dataclass(eq=True, frozen=True)
class SharedQuantizationSpec(QuantizationSpecBase):
    """A tensor with the parameters (the very observer) of another place in the graph."""

    edge_or_node: EdgeOrNode


@dataclass(eq=True, frozen=True)
class DerivedQuantizationSpec(QuantizationSpecBase):
    """A tensor whose parameters follow from those of others, as a bias's from input and weight.

    Attributes:
        derived_from: the places concerned.
        derive_qparams_fn: takes their observers or fake quantizers, returns scale and zero point.
    """

    derived_from: list[EdgeOrNode]
    derive_qparams_fn: Callable[[list[Any]], tuple[Tensor, Tensor]]
    dtype: torch.dtype
    quant_min: int | None = None
    quant_max: int | None = None
    qscheme: torch.qscheme | None = None
    ch_axis: int | None = None
    is_dynamic: bool = False


@dataclass
class QuantizationAnnotation:
    """How a node's inputs and output are quantized; lives in ``node.meta["quantization_annotation"]``.

    Attributes:
        input_qspec_map: input node to the specification of that edge; None leaves it float.
        output_qspec: that of the output; None leaves it to the consumers.
        allow_implicit_sharing: whether the edges to the consumers may use this output's observer.
    """

    input_qspec_map: dict[Node, QuantizationSpecBase | None] = field(default_factory=dict)
    output_qspec: QuantizationSpecBase | None = None
    allow_implicit_sharing: bool = True
    _annotated: bool = False


class Quantizer(ABC):
    """Decides which tensors of an exported graph are quantized, and how.

    ``prepare_pt2e`` calls its methods in the order they stand here.
    """

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        """Rewrite the graph before it is annotated, such as scalars into tensors; optional."""
        return model

    @abstractmethod
    def annotate(self, model: GraphModule) -> GraphModule | None:
        """Put a :class:`QuantizationAnnotation` on each node that is to be quantized."""

    @abstractmethod
    def validate(self, model: GraphModule) -> None:
        """Raise where the annotated graph is not what the backend supports."""

    def prepare_obs_or_fq_callback(  # noqa: B027 - optional
        self, model: GraphModule, edge_or_node_to_obs_or_fq: dict[EdgeOrNode, Any]
    ) -> None:
        """Change observers once they are made, before they are put into the graph; optional.

        Args:
            edge_or_node_to_obs_or_fq: each annotated place to its observer or fake quantizer, to be
                changed in place.
        """
