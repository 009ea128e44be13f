"""The road from a float model to an int8 one: prepare, train or calibrate, convert."""

from eagerq.quantize.converting import convert, quantize, quantize_qat
from eagerq.quantize.custom import get_default_custom_config_dict
from eagerq.quantize.dynamic import quantize_dynamic
from eagerq.quantize.preparing import prepare, prepare_qat
from eagerq.quantize.qconfigs import add_quant_dequant, propagate_qconfig_
from eagerq.twins import swap_module

__all__ = [
    "add_quant_dequant",
    "convert",
    "get_default_custom_config_dict",
    "prepare",
    "prepare_qat",
    "propagate_qconfig_",
    "quantize",
    "quantize_dynamic",
    "quantize_qat",
    "swap_module",
]
