"""Modules with small weights that quantize their float input as it comes."""

from eagerq.nn.quantized.dynamic.base import DynamicModule
from eagerq.nn.quantized.dynamic.cells import GRUCell, LSTMCell, RNNCell, RNNCellBase
from eagerq.nn.quantized.dynamic.conv import (
    Conv1d,
    Conv2d,
    Conv3d,
    ConvTranspose1d,
    ConvTranspose2d,
    ConvTranspose3d,
)
from eagerq.nn.quantized.dynamic.linear import Linear
from eagerq.nn.quantized.dynamic.rnn import GRU, LSTM, RNNBase

__all__ = [
    # base classes
    "DynamicModule",
    "RNNBase",
    "RNNCellBase",
    # layers
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "GRU",
    "GRUCell",
    "LSTM",
    "LSTMCell",
    "Linear",
    "RNNCell",
]
