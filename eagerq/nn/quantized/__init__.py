"""int8 modules."""

from eagerq.nn.quantized import functional
from eagerq.nn.quantized.activation import ELU, Hardswish, LeakyReLU, PReLU, ReLU6, Sigmoid, Softmax
from eagerq.nn.quantized.attention import MultiheadAttention
from eagerq.nn.quantized.base import WeightedQuantizedModule
from eagerq.nn.quantized.batchnorm import (
    BatchNorm2d,
    BatchNorm3d,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
)
from eagerq.nn.quantized.conv import Conv1d, Conv2d, Conv3d
from eagerq.nn.quantized.conv_transpose import ConvTranspose1d, ConvTranspose2d, ConvTranspose3d
from eagerq.nn.quantized.dropout import Dropout
from eagerq.nn.quantized.embedding import Embedding, EmbeddingBag
from eagerq.nn.quantized.functional_modules import FloatFunctional, FXFloatFunctional, QFunctional
from eagerq.nn.quantized.linear import Linear
from eagerq.nn.quantized.lstm import LSTM
from eagerq.nn.quantized.normalization import GroupNorm, LayerNorm
from eagerq.nn.quantized.quantize import DeQuantize, Quantize
from eagerq.nn.quantized.state import QuantizedModule

__all__ = [
    # functions of quantized tensors
    "functional",
    # base classes
    "QuantizedModule",
    "WeightedQuantizedModule",
    # layers
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "Embedding",
    "EmbeddingBag",
    "LSTM",
    "Linear",
    "MultiheadAttention",
    # activations
    "Dropout",
    "ELU",
    "Hardswish",
    "LeakyReLU",
    "PReLU",
    "ReLU6",
    "Sigmoid",
    "Softmax",
    # normalization
    "BatchNorm2d",
    "BatchNorm3d",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    # the ends
    "DeQuantize",
    "Quantize",
    # operations
    "FXFloatFunctional",
    "FloatFunctional",
    "QFunctional",
]
