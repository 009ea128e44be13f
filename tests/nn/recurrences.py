"""Recurrent layers and their inputs, as the tests of their dynamic forms draw them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import eagerq
from eagerq.nn.quantized import dynamic

CELLS = ("LSTMCell", "GRUCell", "RNNCell")
SEQUENCES = ("LSTM", "GRU")
KINDS = (*SEQUENCES, *CELLS)
QCONFIGS = ("default_dynamic_qconfig", "per_channel_dynamic_qconfig")


def tensors(result: Any) -> list[Tensor]:
    """Everything in an output, in order."""
    if isinstance(result, PackedSequence):
        return [result.data]
    return [result] if isinstance(result, Tensor) else [one for part in result for one in tensors(part)]


def convert(layer: nn.Module, qconfig: str = "default_dynamic_qconfig") -> Any:
    """The dynamic form of a float layer, which stays as it is."""
    layer = copy.deepcopy(layer)
    layer.qconfig = getattr(eagerq.qconfig, qconfig)  # type: ignore[assignment]
    return getattr(dynamic, type(layer).__name__).from_float(layer)


def convert_as_ao(ao: Any, layer: nn.Module, qconfig: str = "default_dynamic_qconfig") -> Any:
    layer = copy.deepcopy(layer)
    layer.qconfig = getattr(ao.quantization, qconfig)
    return getattr(ao.dynamic, type(layer).__name__).from_float(layer)


def made(kind: str, seed: int = 0, **options: Any) -> Any:
    """A small dynamic layer with weights of a seed."""
    torch.manual_seed(seed)
    return convert(getattr(nn, kind)(6, 8, **options))


def some_input(kind: str) -> Tensor:
    shape = (3, 6) if kind in CELLS else (4, 3, 6)
    return torch.randn(shape, generator=torch.Generator().manual_seed(9))


def start_of(layer: nn.Module, batch: int) -> Any:
    """A random hidden state."""
    size: Any = layer.hidden_size
    shape: tuple[int, ...] = (batch, size)
    if isinstance(layer, nn.RNNBase):
        shape = (layer.num_layers * (2 if layer.bidirectional else 1), *shape)
    hidden = torch.randn(shape)
    return (hidden, torch.randn(shape)) if isinstance(layer, (nn.LSTM, nn.LSTMCell)) else hidden


@st.composite
def cells(draw: st.DrawFn) -> tuple[nn.Module, Tensor, Any]:
    """A float cell, its input, and a hidden state or None."""
    kind = draw(st.sampled_from(CELLS))
    inputs, size, batch = (draw(st.integers(1, most)) for most in (40, 50, 5))
    torch.manual_seed(draw(st.integers(0, 10**6)))
    options = {"nonlinearity": draw(st.sampled_from(("tanh", "relu")))} if kind == "RNNCell" else {}
    layer = getattr(nn, kind)(inputs, size, **options)
    x = torch.randn(batch, inputs) * draw(st.sampled_from((0.1, 1.0, 10.0)))
    return layer, x, start_of(layer, batch) if draw(st.booleans()) else None


@st.composite
def sequences(draw: st.DrawFn) -> tuple[nn.Module, Any, Any]:
    """A float LSTM or GRU with drawn options, its input, padded or packed, and a hidden state or None."""
    inputs, size, batch, steps = (draw(st.integers(1, most)) for most in (40, 50, 5, 8))
    batch_first = draw(st.booleans())
    torch.manual_seed(draw(st.integers(0, 10**6)))
    layer = getattr(nn, draw(st.sampled_from(SEQUENCES)))(
        inputs, size, draw(st.integers(1, 3)), batch_first=batch_first, bidirectional=draw(st.booleans())
    )
    x: Any
    if draw(st.booleans()):
        ordered = draw(st.booleans())
        lengths = draw(st.lists(st.integers(1, steps), min_size=batch, max_size=batch))
        lengths = sorted(lengths, reverse=True) if ordered else lengths
        x = pack_sequence([torch.randn(length, inputs) for length in lengths], enforce_sorted=ordered)
    else:
        x = torch.randn((batch, steps, inputs) if batch_first else (steps, batch, inputs))
    return layer, x, start_of(layer, batch) if draw(st.booleans()) else None
