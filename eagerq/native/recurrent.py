"""LSTM and GRU through time: C between torch's own sigmoids and tangents, in memory prepared once for all steps.

Which elements torch rounds in vectors and which one by one depends on how they lie in rows, so gates lie in rows of
``hidden`` with a gap between, as they do when they are cut out of the sum of all gates.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from eagerq.native.conv import PackedConv, dynamic_numbers
from eagerq.native.library import LIBRARY
from eagerq.native.recording import is_recording

__all__ = ["recur"]

_LANES = 16
# up to which size torch leaves elementwise work to one thread, so that several gates can be done at once
_GRAIN = 32768


class _Recurrence(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("layer", "product", "x", "y", "h", "c", "sums", "gates", "bent")),
        ("bytes", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "hidden", "pitch", "apart", "forward", "left")),
        *((name, ctypes.c_int) for name in ("is_lstm", "most")),
    ]


def _runs(sizes: Sequence[int], reverse: bool) -> Iterator[tuple[int, int, int]]:
    """Steps on end with as many rows: where the first begins, its rows, how many steps."""
    at = sum(sizes) if reverse else 0
    for rows, steps in groupby(reversed(sizes) if reverse else sizes):
        count = sum(1 for _ in steps)
        yield (at - rows if reverse else at), rows, count
        at += -rows * count if reverse else rows * count


def _bends(gates: Tensor, bent: Tensor, cell: Tensor | None) -> tuple[list[Callable[[], object]], Callable[[], object]]:
    """What torch does with all gates, then with what the middle of a step gives; rows of this many sequences."""
    sigmoids = gates if cell is None else gates[:3]
    first: list[Callable[[], object]] = (
        [sigmoids.sigmoid_] if sigmoids.numel() <= _GRAIN else [gate.sigmoid_ for gate in sigmoids]
    )
    if cell is None:
        return first, bent.tanh_
    return [*first, gates[3].tanh_], partial(torch.tanh, cell, out=bent)


def _go(
    plan: _Recurrence,
    steps: int,
    first: Sequence[Callable[[], object]],
    tangent: Callable[[], object],
) -> bool:
    """Steps of as many rows; False where a hidden state is not finite."""
    address = ctypes.addressof(plan)
    gates, middle, end = LIBRARY.eagerq_recur_gates, LIBRARY.eagerq_recur_middle, LIBRARY.eagerq_recur_end
    if gates(address):
        return False
    for _ in range(steps):
        for bend in first:
            bend()
        middle(address)
        tangent()
        if end(address):
            return False
    return True


def recur(
    x: Tensor,
    sizes: Sequence[int],
    start: Sequence[Tensor],
    weight: PackedConv,
    quant_max: int,
    reverse: bool,
) -> tuple[Tensor, tuple[Tensor, ...]] | None:
    """All outputs and the state after, of an LSTM for a ``start`` of hidden and cell state, else of a GRU.

    Args:
        x: float32 ``[rows of all steps, gates·hidden]``, dense: the input's part.
        sizes: how many rows each step has.
        start: float32 ``[the most rows of a step, hidden]`` each.
        weight: the recurrent one.
        quant_max: of the rows' integers.

    Returns:
        None where a hidden state is not finite, so that it has no integers, and for who records each step.
    """
    if is_recording():
        return None
    (batch, hidden), width = start[0].shape, x.shape[1]
    state = tuple(part.clone(memory_format=torch.contiguous_format) for part in start)
    h, c = state[0], state[1] if len(state) == 2 else None
    pitch = hidden + _LANES + -hidden % _LANES
    y, sums, bent = (x.new_empty(shape) for shape in ((len(x), hidden), (batch, width), (batch, hidden)))
    gates = x.new_empty(2 if c is None else 4, batch, pitch)
    integers = x.new_empty(batch, hidden, dtype=torch.uint8)
    plan = _Recurrence(
        layer=weight.address,
        **{"h": h.data_ptr(), "c": None if c is None else c.data_ptr(), "sums": sums.data_ptr()},
        **{"gates": gates.data_ptr(), "bent": bent.data_ptr(), "bytes": integers.data_ptr()},
        **{"hidden": hidden, "pitch": pitch, "apart": batch * pitch, "is_lstm": c is not None, "most": quant_max},
    )
    for at, rows, steps in _runs(sizes, reverse):
        numbers = dynamic_numbers(rows, hidden, width)
        plan.product, plan.rows, plan.left = ctypes.addressof(numbers), rows, steps
        plan.forward = -rows if reverse else rows
        plan.x, plan.y = x.data_ptr() + 4 * at * width, y.data_ptr() + 4 * at * hidden
        first, tangent = _bends(gates[:, :rows, :hidden], bent[:rows], None if c is None else c[:rows])
        if not _go(plan, steps, first, tangent):
            return None
    return y, state
