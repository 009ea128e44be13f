"""Quantizers of exported graphs: what they are made of, and those that come with eagerq."""

from eagerq.pt2e.quantizer.composable_quantizer import ComposableQuantizer
from eagerq.pt2e.quantizer.duplicate_dq_pass import DuplicateDQPass
from eagerq.pt2e.quantizer.embedding_quantizer import EmbeddingQuantizer, get_embedding_operators_config
from eagerq.pt2e.quantizer.port_metadata_pass import PortNodeMetaForQDQ
from eagerq.pt2e.quantizer.quantizer import (
    DerivedQuantizationSpec,
    EdgeOrNode,
    FixedQParamsQuantizationSpec,
    QuantizationAnnotation,
    QuantizationSpec,
    QuantizationSpecBase,
    Quantizer,
    SharedQuantizationSpec,
)
from eagerq.pt2e.quantizer.utils import (
    OperatorConfig,
    OperatorPatternType,
    QuantizationConfig,
    annotate_input_qspec_map,
    annotate_output_qspec,
    get_bias_qspec,
    get_input_act_qspec,
    get_module_name_filter,
    get_output_act_qspec,
    get_weight_qspec,
    is_valid_annotation,
)
from eagerq.pt2e.quantizer.xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config
from eagerq.pt2e.quantizer.xnnpack_quantizer_utils import OP_TO_ANNOTATOR, propagate_annotation, register_annotator

__all__ = [
    # the interface, and what it speaks of
    "DerivedQuantizationSpec",
    "EdgeOrNode",
    "FixedQParamsQuantizationSpec",
    "QuantizationAnnotation",
    "QuantizationSpec",
    "QuantizationSpecBase",
    "Quantizer",
    "SharedQuantizationSpec",
    # quantizers
    "ComposableQuantizer",
    "EmbeddingQuantizer",
    "XNNPACKQuantizer",
    "get_embedding_operators_config",
    "get_symmetric_quantization_config",
    # for quantizers of one's own
    "OP_TO_ANNOTATOR",
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
    "propagate_annotation",
    "register_annotator",
    # passes
    "DuplicateDQPass",
    "PortNodeMetaForQDQ",
]
