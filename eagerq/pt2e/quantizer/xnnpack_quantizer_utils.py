"""The patterns that :class:`XNNPACKQuantizer` knows, for quantizers of one's own: ``OP_TO_ANNOTATOR["linear"]`` …"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from eagerq.pt2e.quantizer import activation_annotators, weighted_annotators  # noqa: F401 - they fill the table
from eagerq.pt2e.quantizer.annotation import OP_TO_ANNOTATOR, AnnotatorType, is_relu_node, register_annotator
from eagerq.pt2e.quantizer.propagation import propagate_annotation
from eagerq.pt2e.quantizer.quantizer import QuantizationAnnotation, QuantizationSpec, SharedQuantizationSpec
from eagerq.pt2e.quantizer.scalars import convert_scalars_to_attrs
from eagerq.pt2e.quantizer.utils import (
    OperatorConfig,
    OperatorPatternType,
    QuantizationConfig,
    annotate_input_qspec_map,
    annotate_output_qspec,
    get_bias_qspec,
    get_input_act_qspec,
    get_output_act_qspec,
    get_weight_qspec,
)

__all__ = [
    # patterns
    "OP_TO_ANNOTATOR",
    "AnnotatorType",
    "convert_scalars_to_attrs",
    "is_relu_node",
    "propagate_annotation",
    "register_annotator",
    # configurations
    "OperatorConfig",
    "OperatorPatternType",
    "QuantizationAnnotation",
    "QuantizationConfig",
    "QuantizationSpec",
    "SharedQuantizationSpec",
    "annotate_input_qspec_map",
    "annotate_output_qspec",
    "change_quantization_config",
    "get_bias_qspec",
    "get_input_act_qspec",
    "get_output_act_qspec",
    "get_weight_qspec",
]


def change_quantization_config(
    original_qspec: QuantizationSpec,
    dtype: Any = None,
    quant_min: int | None = None,
    quant_max: int | None = None,
    qscheme: Any = None,
    ch_axis: int | None = None,
    is_dynamic: bool | None = None,
    observer_or_fake_quant_ctr: Any = None,
) -> QuantizationSpec:
    """A copy of a specification, with the attributes changed that are not None.

    Example:
        >>> import torch
        >>> from eagerq.observer import MinMaxObserver
        >>> spec = QuantizationSpec(torch.int8, MinMaxObserver, -128, 127)
        >>> change_quantization_config(spec, quant_min=-127).quant_min
        -127
    """
    given = locals()
    changes = {field.name: given[field.name] for field in fields(QuantizationSpec) if given[field.name] is not None}
    return replace(original_qspec, **changes)
