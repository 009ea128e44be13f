"""The doors to integer arithmetic: plain tensors in, plain tensors out, the fastest exact way."""

from eagerq.kernels.activation import pointwise, prelu
from eagerq.kernels.doors import (
    add,
    add_scalar,
    cat,
    conv,
    conv_transpose,
    dequantize,
    linear,
    matmul,
    mul,
    mul_scalar,
    quantize,
)
from eagerq.kernels.dynamic import (
    conv_dynamic,
    conv_transpose_dynamic,
    linear_dynamic,
    linear_dynamic_float16,
    to_float16,
)
from eagerq.kernels.embedding import embedding, embedding_bag, pack_halves, unpack_halves
from eagerq.kernels.native_recurrent import recur
from eagerq.kernels.normalization import batch_norm, group_norm, layer_norm
from eagerq.kernels.reference import (
    dequantize_per_channel,
    quantize_per_channel,
    requantize,
)

__all__ = [
    "add",
    "add_scalar",
    "batch_norm",
    "cat",
    "conv",
    "conv_dynamic",
    "conv_transpose",
    "conv_transpose_dynamic",
    "dequantize",
    "dequantize_per_channel",
    "embedding",
    "embedding_bag",
    "group_norm",
    "layer_norm",
    "linear",
    "linear_dynamic",
    "linear_dynamic_float16",
    "matmul",
    "mul",
    "mul_scalar",
    "pack_halves",
    "pointwise",
    "prelu",
    "quantize",
    "quantize_per_channel",
    "recur",
    "requantize",
    "to_float16",
    "unpack_halves",
]
