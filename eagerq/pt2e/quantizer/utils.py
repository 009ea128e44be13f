"""What quantizers are written with: configurations, annotations of a node, filters by module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import torch
from torch.fx import Node

from eagerq.errors import InvalidArgumentError, InvalidConfigError
from eagerq.pt2e.graph import modules_of
from eagerq.pt2e.quantizer.quantizer import ANNOTATION, QuantizationAnnotation, QuantizationSpec

__all__ = [
    "OperatorConfig",
    "OperatorPatternType",
    "QuantizationConfig",
    "annotate_input_qspec_map",
    "annotate_output_qspec",
    "get_bias_qspec",
    "get_input_act_qspec",
    "get_module_name_filter",
    "get_output_act_qspec",
    "get_weight_qspec",
    "is_valid_annotation",
]

OperatorPatternType = Annotated[list[Callable[..., Any]], None]
"""Module classes and functions that follow one another, such as ``[nn.Conv2d, nn.ReLU]``."""


@dataclass(eq=True, frozen=True)
class QuantizationConfig:
    """Specifications of an operator's tensors; None leaves one in float.

    Attributes:
        input_activation, output_activation: of what goes in and what comes out.
        weight, bias: of its parameters.
        is_qat: whether it is meant for training: patterns with BatchNorm are annotated too.
    """

    input_activation: QuantizationSpec | None
    output_activation: QuantizationSpec | None
    weight: QuantizationSpec | None
    bias: QuantizationSpec | None
    is_qat: bool = False


class OperatorConfig(NamedTuple):
    """A configuration, and the operators that a quantizer supports it for."""

    config: QuantizationConfig
    operators: list[OperatorPatternType]


def _spec(config: QuantizationConfig | None, field: str, error: type[Exception], **allowed: tuple[Any, ...]) -> Any:
    """A field of a configuration, refused when one of its attributes is not among those allowed."""
    spec = getattr(config, field) if config is not None else None
    if spec is None:
        return None
    for attribute, values in allowed.items():
        value = getattr(spec, attribute, None)
        if value not in values:
            wanted = " or ".join(map(str, values))
            raise error(f"{field} has {attribute} {value}", remedy=f"give its specification {attribute} {wanted}")  # type: ignore[call-arg]
    return spec


_PER_TENSOR = (torch.per_tensor_affine, torch.per_tensor_symmetric)


def get_input_act_qspec(quantization_config: QuantizationConfig | None) -> QuantizationSpec | None:
    """Specification of the input; None for none.

    Raises:
        InvalidConfigError: for one that is not per tensor.
    """
    return _spec(quantization_config, "input_activation", InvalidConfigError, qscheme=_PER_TENSOR)


def get_output_act_qspec(quantization_config: QuantizationConfig | None) -> QuantizationSpec | None:
    """Specification of the output; None for none.

    Raises:
        InvalidConfigError: for one that is not per tensor.
    """
    return _spec(quantization_config, "output_activation", InvalidConfigError, qscheme=_PER_TENSOR)


def get_weight_qspec(quantization_config: QuantizationConfig | None) -> QuantizationSpec | None:
    """Specification of the weight; None for none.

    Raises:
        InvalidArgumentError: for one that is not symmetric.
    """
    symmetric = (torch.per_tensor_symmetric, torch.per_channel_symmetric, None)
    return _spec(quantization_config, "weight", InvalidArgumentError, qscheme=symmetric)


def get_bias_qspec(quantization_config: QuantizationConfig | None) -> QuantizationSpec | None:
    """Specification of the bias; None for none.

    Raises:
        InvalidConfigError: for one that is not of dtype float32.
    """
    return _spec(quantization_config, "bias", InvalidConfigError, dtype=(torch.float32,))


def annotate_input_qspec_map(node: Node, input_node: Node, qspec: Any) -> None:
    """Have the edge from ``input_node`` to ``node`` quantized as ``qspec`` says, whatever else is annotated."""
    node.meta.setdefault(ANNOTATION, QuantizationAnnotation()).input_qspec_map[input_node] = qspec


def annotate_output_qspec(node: Node, qspec: Any) -> None:
    """Have the output of ``node`` quantized as ``qspec`` says, whatever else is annotated."""
    node.meta.setdefault(ANNOTATION, QuantizationAnnotation()).output_qspec = qspec


def get_module_name_filter(module_name: str) -> Callable[[Node], bool]:
    """A function that tells whether a node comes from a module, or one inside it.

    Args:
        module_name: qualified name as in ``named_modules()``, such as ``"blocks.sub"``.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
        >>> graph = torch.export.export(model, (torch.ones(1, 2),)).module().graph
        >>> [node.name for node in graph.nodes if get_module_name_filter("1")(node)]
        ['relu']
    """

    def module_name_filter(n: Node) -> bool:
        return any(name == module_name for name, _ in modules_of(n))

    return module_name_filter


def is_valid_annotation(annotation: QuantizationAnnotation | None) -> bool:
    """Whether an annotation asks for anything to be quantized."""
    return annotation is not None and bool(annotation.input_qspec_map or annotation.output_qspec is not None)
