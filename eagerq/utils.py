"""For programs that come from ``torch.ao.quantization.utils``: what of it concerns eager mode, under its names."""

from eagerq.inspection import (
    QuantType,
    activation_dtype,
    activation_is_dynamically_quantized,
    activation_is_int8_quantized,
    activation_is_int32_quantized,
    activation_is_statically_quantized,
    get_qconfig_dtypes,
    get_qparam_dict,
    get_quant_type,
    op_is_int8_dynamically_quantized,
    weight_dtype,
    weight_is_quantized,
    weight_is_statically_quantized,
)
from eagerq.quantization_mappings import get_combined_dict
from eagerq.ranges import calculate_qmin_qmax, check_min_max_valid, determine_qparams, validate_qmin_qmax
from eagerq.scheme import is_per_channel, is_per_tensor, to_underlying_dtype
from eagerq.tree import is_leaf as has_no_children_ignoring_parametrizations

__all__ = [
    # dtypes and schemes
    "is_per_channel",
    "is_per_tensor",
    "to_underlying_dtype",
    # qconfigs and observers
    "QuantType",
    "activation_dtype",
    "activation_is_dynamically_quantized",
    "activation_is_int32_quantized",
    "activation_is_int8_quantized",
    "activation_is_statically_quantized",
    "get_qconfig_dtypes",
    "get_qparam_dict",
    "get_quant_type",
    "op_is_int8_dynamically_quantized",
    "weight_dtype",
    "weight_is_quantized",
    "weight_is_statically_quantized",
    # ranges
    "calculate_qmin_qmax",
    "check_min_max_valid",
    "determine_qparams",
    "validate_qmin_qmax",
    # maps and modules
    "get_combined_dict",
    "has_no_children_ignoring_parametrizations",
]
