"""The Q/DQ dialect: torch's ``quantized_decomposed`` operators, by what they do."""

from __future__ import annotations

import contextlib
import importlib
from typing import Any

import torch

__all__ = [
    "CHOOSE_QPARAMS",
    "CHOOSE_QPARAMS_AFFINE",
    "CHOOSE_QPARAMS_SYMMETRIC",
    "CONVERT_ELEMENT_TYPE",
    "DEQUANTIZE",
    "DEQUANTIZE_PER_CHANNEL",
    "DEQUANTIZE_PER_TENSOR",
    "DEQUANTIZE_PER_TENSOR_DYNAMIC",
    "QUANTIZE",
    "QUANTIZE_PER_CHANNEL",
    "QUANTIZE_PER_TENSOR",
    "QUANTIZE_PER_TENSOR_DYNAMIC",
]

# torch registers these in a file of its old quantization. While that is there it has to be the one
# that defines them: torchao, ExecuTorch and Inductor load it too, before or after us, and a library can
# be defined only once. Where it is gone, and nobody else has defined them, eagerq does.
with contextlib.suppress(ImportError):
    importlib.import_module("torch.ao.quantization.fx._decomposed")
if not hasattr(torch.ops.quantized_decomposed, "quantize_per_tensor"):
    importlib.import_module("eagerq.pt2e.own_operators")

_ops: Any = torch.ops.quantized_decomposed

QUANTIZE_PER_TENSOR = _ops.quantize_per_tensor.default
QUANTIZE_PER_TENSOR_DYNAMIC = _ops.quantize_per_tensor.tensor
QUANTIZE_PER_CHANNEL = _ops.quantize_per_channel.default
DEQUANTIZE_PER_TENSOR = _ops.dequantize_per_tensor.default
DEQUANTIZE_PER_TENSOR_DYNAMIC = _ops.dequantize_per_tensor.tensor
DEQUANTIZE_PER_CHANNEL = _ops.dequantize_per_channel.default
CHOOSE_QPARAMS_AFFINE = _ops.choose_qparams.tensor
CHOOSE_QPARAMS_SYMMETRIC = _ops.choose_qparams_symmetric.tensor
CONVERT_ELEMENT_TYPE = _ops.convert_element_type.no_fuse

QUANTIZE = frozenset((QUANTIZE_PER_TENSOR, QUANTIZE_PER_TENSOR_DYNAMIC, QUANTIZE_PER_CHANNEL))
DEQUANTIZE = frozenset((DEQUANTIZE_PER_TENSOR, DEQUANTIZE_PER_TENSOR_DYNAMIC, DEQUANTIZE_PER_CHANNEL))
CHOOSE_QPARAMS = frozenset((CHOOSE_QPARAMS_AFFINE, CHOOSE_QPARAMS_SYMMETRIC))
