"""The doors to integer arithmetic: plain tensors in, plain tensors out, the fastest exact way."""

from eagerq.kernels.doors import conv, linear, quantize
from eagerq.kernels.reference import (
    add,
    cat,
    dequantize,
    dequantize_per_channel,
    matmul,
    mul,
    quantize_per_channel,
)

__all__ = [
    "add",
    "cat",
    "conv",
    "dequantize",
    "dequantize_per_channel",
    "linear",
    "matmul",
    "mul",
    "quantize",
    "quantize_per_channel",
]
