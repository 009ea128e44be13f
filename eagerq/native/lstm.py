"""An LSTM of integers through time, in C: what :class:`eagerq.nn.quantizable.LSTMCell` does step by step."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from eagerq.native.conv import PackedConv, linear_numbers
from eagerq.native.library import LIBRARY, Pair
from eagerq.native.pointwise import product_numbers, sum_numbers
from eagerq.native.recording import recorded

__all__ = ["Requantized", "States", "lstm"]

_PAIRS = ("gates", "kept", "added", "cell", "shown")


class Requantized(NamedTuple):
    """How integers stand for real numbers, and which of them are in use; all uint8."""

    scale: float
    zero_point: int
    low: int = 0
    high: int = 255


class States(NamedTuple):
    """What each intermediate result of a cell is quantized to.

    Attributes:
        inputs, recurrent: the two products.
        gates: their sum.
        sigmoid, tanh: of the gates, and of the cell state.
        kept, added, cell: the old cell state times its gate; input gate times new; their sum.
        hidden: the new hidden state.
    """

    inputs: Requantized
    recurrent: Requantized
    gates: Requantized
    sigmoid: Requantized
    tanh: Requantized
    kept: Requantized
    added: Requantized
    cell: Requantized
    hidden: Requantized


class _Sequence(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("layer", "product", "x", "h", "y", "c", "sums", "answers")),
        *((name, Pair) for name in _PAIRS),
        *((name, ctypes.c_int64) for name in ("rows", "hidden", "steps")),
    ]


def _pairs(to: States, cell: Requantized) -> dict[str, Pair]:
    """The numbers of sums and products, with a cell state ``cell`` before the step."""

    def operand(one: Requantized) -> tuple[torch.dtype, float, int]:
        return torch.uint8, one.scale, one.zero_point

    return {
        "gates": sum_numbers((operand(to.inputs), operand(to.recurrent)), *to.gates),
        "kept": product_numbers((operand(to.sigmoid), operand(cell)), *to.kept),
        "added": product_numbers((operand(to.sigmoid), operand(to.tanh)), *to.added),
        "cell": sum_numbers((operand(to.kept), operand(to.added)), *to.cell),
        "shown": product_numbers((operand(to.sigmoid), operand(to.tanh)), *to.hidden),
    }


@recorded
def lstm(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    packed: PackedConv,
    answers: Tensor,
    to: States,
    start: tuple[Requantized, Requantized],
) -> Tensor:
    """All hidden states, and the last cell state behind them, of one direction of one layer.

    Args:
        x: the input's part of all gates (input, forget, cell, output), uint8 ``[steps, rows, 4·hidden]``, contiguous.
        h, c: hidden and cell state before, uint8 ``[rows, hidden]``, contiguous.
        packed: the recurrent weight.
        answers: uint8 ``[5, 256]``: what the four gates, and the cell state's tangent, make of each integer.
        to: how intermediate results are quantized.
        start: how ``h`` and ``c`` are.

    Returns:
        uint8 ``[steps + 1, rows, hidden]``.
    """
    steps, rows, hidden = *x.shape[:2], h.shape[1]
    states, sums = x.new_empty(steps + 1, rows, hidden), x.new_empty(rows, 4 * hidden)
    states[steps] = c
    plan = _Sequence(
        layer=packed.address,
        **{"answers": answers.data_ptr(), "c": states[steps].data_ptr(), "sums": sums.data_ptr()},
        **{"rows": rows, "hidden": hidden},
    )
    for first, last, (before, cell) in ((0, 1, start), (1, steps, (to.hidden, to.cell))):
        if first == last:
            continue
        before_h = states[first - 1] if first else h
        numbers = linear_numbers(rows, hidden, 4 * hidden, before.scale, before.zero_point, torch.uint8, *to.recurrent)
        plan.product, plan.h = ctypes.addressof(numbers), before_h.data_ptr()
        plan.x, plan.y, plan.steps = x[first].data_ptr(), states[first].data_ptr(), last - first
        for name, pair in _pairs(to, cell).items():
            setattr(plan, name, pair)
        LIBRARY.eagerq_lstm(ctypes.byref(plan))
    return states
