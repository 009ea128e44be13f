"""All steps of an int8 LSTM at once, in C, where nobody can tell them from steps taken one by one."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from eagerq import native
from eagerq.fake_quantize import is_plain
from eagerq.kernels.dispatch import dialect
from eagerq.kernels.native_linear import packed_static, serves
from eagerq.native import Requantized, States
from eagerq.nn.quantizable.cell import LSTMCell
from eagerq.nn.quantized.base import Output
from eagerq.nn.quantized.functional_modules import QFunctional
from eagerq.nn.quantized.linear import Linear
from eagerq.qtensor import QTensor

__all__ = ["sequence_in_c"]

_SUMS = ("gates", "fgate_cx", "igate_cgate", "fgate_cx_igate_cgate", "ogate_cy")
_ACTIVATIONS = {"input_gate": nn.Sigmoid, "forget_gate": nn.Sigmoid, "cell_gate": nn.Tanh, "output_gate": nn.Sigmoid}


def sequence_in_c(cell: Any, x: QTensor, hidden: tuple[Tensor, Tensor] | None) -> tuple[QTensor, Any] | None:
    """An int8 :class:`~eagerq.nn.quantizable.LSTMCell` from the first step to the last.

    Args:
        cell: of plain class, as are its parts.
        x: ``[length, batch, input_dim]``.
        hidden: the state before, or None for zeros.

    Returns:
        All hidden states, and the last state; None where C does not serve, and for parts that do more than they say.
    """
    if torch.compiler.is_compiling() or dialect() is not None or not native.conv_ready() or not _is_int8(cell):
        return None
    h: Any
    c: Any
    h, c = (None, None) if hidden is None else hidden
    if h is None or c is None:
        h, c = cell.initialize_hidden(x.shape[1], True, x)
    if not all(map(_readable, (x, h, c))) or not h.shape == c.shape == (x.shape[1], cell.hidden_size):
        return None
    recurrent = cell.hgates
    weight = recurrent._weight, recurrent._weight_scale, recurrent._weight_zero_point
    if not serves(x.shape[1], cell.hidden_size, *weight[:2]):
        return None
    gates = cell.igates(x)
    sums = (_requantized(getattr(cell, name).output) for name in _SUMS)
    to_gates, kept, added, state, shown = sums
    sigmoid, tanh, answers = _answers(to_gates.scale, to_gates.zero_point, state.scale, state.zero_point)
    to = States(
        *(_requantized(cell.igates._clamped_output), _requantized(recurrent._clamped_output)),
        *(to_gates, sigmoid, tanh, kept, added, state, shown),
    )
    start = Requantized(h.scale, h.zero_point), Requantized(c.scale, c.zero_point)
    packed = packed_static(*weight, recurrent._bias)
    states = native.lstm(gates.integers, h.integers, c.integers, packed, answers, to, start)
    y = QTensor(states[:-1], shown.scale, shown.zero_point)
    return y, (y[-1], QTensor(states[-1], state.scale, state.zero_point))


def _is_int8(cell: Any) -> bool:
    """Whether each part is what int8 cells are made of, in uint8, with no hook that would see single steps."""
    layers, sums = (cell.igates, cell.hgates), [getattr(cell, name) for name in _SUMS]
    return (
        not cell.split_gates
        and is_plain(cell, LSTMCell)
        and all(is_plain(layer, Linear) and layer._clamped_output.dtype is torch.uint8 for layer in layers)
        and all(is_plain(one, QFunctional) and one.output.dtype is torch.uint8 for one in sums)
        and all(type(one.activation_post_process) is nn.Identity for one in sums)
        and all(is_plain(getattr(cell, name), kind) for name, kind in _ACTIVATIONS.items())
    )


def _readable(x: Any) -> bool:
    """Whether C can go through ``x`` byte by byte."""
    return (
        isinstance(x, QTensor)
        and x.axis is None
        and x.integers.dtype is torch.uint8
        and x.numel() > 0
        and x.integers.is_contiguous()
        and native.serves(x.integers)
    )


def _requantized(output: Output) -> Requantized:
    return Requantized(output.scale, output.zero_point, output.low, output.high)


@lru_cache(maxsize=256)
def _answers(
    scale: float, zero_point: int, c_scale: float, c_zero_point: int
) -> tuple[Requantized, Requantized, Tensor]:
    """How sigmoids and tangents are quantized, and what the gates, and the cell state, give for each integer."""
    every = torch.arange(256, dtype=torch.uint8, device="cpu")
    sums, state = QTensor(every, scale, zero_point), QTensor(every, c_scale, c_zero_point)
    found: list[Any] = [torch.sigmoid(sums), torch.tanh(sums), torch.tanh(state)]
    sigmoid, tanh, _ = (Requantized(one.scale, one.zero_point) for one in found)
    bent, new, tangent = (one.integers for one in found)
    return sigmoid, tanh, torch.stack([bent, bent, new, bent, tangent])
