"""LSTM and attention made of parts that each have an int8 form."""

from eagerq.nn.quantizable.attention import MultiheadAttention
from eagerq.nn.quantizable.cell import LSTMCell
from eagerq.nn.quantizable.lstm import LSTM

__all__ = ["LSTM", "LSTMCell", "MultiheadAttention"]
