"""Work in C, where a compiler was at hand when eagerq was installed."""

from eagerq.native.conv import PackedConv, conv, conv_ready, linear
from eagerq.native.embedding import embedding, embedding_bag
from eagerq.native.layers import dequantize, layer_norm, look_up, quantize_dynamic
from eagerq.native.library import available
from eagerq.native.pointwise import add, fake_quantize, masked, max_pool, quantize, serves, spatial_mean
from eagerq.native.recording import recording

__all__ = [
    "PackedConv",
    "add",
    "available",
    "conv",
    "conv_ready",
    "dequantize",
    "embedding",
    "embedding_bag",
    "fake_quantize",
    "layer_norm",
    "linear",
    "look_up",
    "masked",
    "max_pool",
    "quantize",
    "quantize_dynamic",
    "recording",
    "serves",
    "spatial_mean",
]
