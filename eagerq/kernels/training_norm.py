"""Batch norms of compiled training, one operator each way, on the CPU."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eagerq import native
from eagerq.kernels.dispatch import Kernel
from eagerq.kernels.storing import is_exporting, ready, room_like, stored, storing
from eagerq.kernels.training import observe
from eagerq.kernels.training_layers import Convolved
from eagerq.native import Norm, Rounding, Running

__all__ = ["Normalized", "batch_norm_in_graph", "round_over_in_graph"]


def _normalized(y: Tensor, factor: Tensor, weight: Tensor, bias: Tensor, *rest: Any) -> Any:
    *norm, relu = rest
    work = ready(y)
    out, batch, passing = native.batch_norm(work, factor, weight, bias, Norm(*norm), relu, mask=True)
    bits = native.room_for_bits(y.numel(), _rows(work)).zero_() if passing.bits is None else passing.bits
    return stored(out, y), *batch, bits, torch.frombuffer(passing.ends, dtype=torch.float32)


def _rows(x: Tensor) -> int:
    """How many rows of bits there are."""
    return x.shape[0] * x.shape[1] if x.is_contiguous() else 1


def _like_normalized(y: Tensor, factor: Tensor, *rest: Any) -> Any:
    rows = _rows(ready(y))
    bits = y.new_empty(rows * ((y.numel() // rows + 7) // 8), dtype=torch.uint8)
    return room_like(y), torch.empty_like(factor), torch.empty_like(factor), bits, y.new_empty(2)


def _normalized_backward(grad: Tensor, y: Tensor, *rest: Any) -> Any:
    factor, weight, mean, inverse, bits, masked, eps = rest
    batch, mask = native.Batch(mean, inverse), bits if masked else None
    of_y, *others = native.batch_norm_backward(ready(grad), ready(y), factor, weight, batch, mask, eps)
    return stored(of_y, y), *others


def _like_normalized_backward(grad: Tensor, y: Tensor, factor: Tensor, *rest: Any) -> Any:
    return room_like(y), *(torch.empty_like(factor) for _ in range(3))


_NORMALIZED = Kernel(
    "batch_norm_of_scaled(Tensor y, Tensor factor, Tensor weight, Tensor bias, Tensor(a!) running_mean, "
    "Tensor(b!) running_var, float eps, float pace, bool relu) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _normalized,
    storing("batch_norm_of_scaled", _like_normalized, images=True),
    any_layout=True,
)
_NORMALIZED_BACKWARD = Kernel(
    "batch_norm_of_scaled_backward(Tensor grad, Tensor y, Tensor factor, Tensor weight, Tensor mean, Tensor inverse, "
    "Tensor bits, bool masked, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    _normalized_backward,
    storing("batch_norm_of_scaled_backward", _like_normalized_backward, images=True),
    any_layout=True,
)


def _round_over(
    x: Tensor,
    bits: Tensor,
    ends: Tensor,
    merge: bool,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    *observing: Any,
) -> None:
    """Round what a batch norm gave in its memory; its bits, if they are to be merged, lose what is out of range."""
    to = Rounding(scale, zero_point, quant_min, quant_max)
    work = ready(x)
    known = (ctypes.c_float * 2).from_address(ends.data_ptr()) if ends.numel() else None
    passing = native.Passing(bits, _rows(work), known)
    if observing:
        low, high, skipped, constant, symmetric = observing
        observed = to._replace(running=Running(low, high, constant, symmetric))
        done = native.round_over(work, observed, passing, merge)
        if not done:  # a range that is not finite
            observe(x, low, high, scale, zero_point, skipped, constant, quant_min, quant_max, symmetric, None)
    if not observing or not done:
        native.round_over(work, to, passing, merge)
    if work is not x:
        x.copy_(work)


def _nothing(*args: Any) -> None:
    return None


_OVER = "(Tensor(a!) x, Tensor(b!) bits, Tensor ends, bool merge, "
_ROUND_OVER = Kernel(
    f"round_over{_OVER}Tensor scale, Tensor zero_point, int quant_min, int quant_max) -> ()",
    _round_over,  # type: ignore[arg-type]
    _nothing,  # type: ignore[arg-type]
    any_layout=True,
)
_OBSERVE_OVER = Kernel(
    f"observe_over{_OVER}Tensor(c!) scale, Tensor(d!) zero_point, int quant_min, int quant_max, Tensor(e!) low, "
    "Tensor(f!) high, Tensor(g!) skipped, float constant, bool symmetric) -> ()",
    _round_over,  # type: ignore[arg-type]
    _nothing,  # type: ignore[arg-type]
    any_layout=True,
)


class _Normalized(torch.autograd.Function):
    """Attaches the gradient to what was computed apart from autograd."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        y, factor, weight, _, (out, *batch), *ctx.numbers = args
        ctx.save_for_backward(y, factor, weight, *batch)
        attached: Tensor = out.view_as(out)
        return attached

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return *_NORMALIZED_BACKWARD(grads[0], *ctx.saved_tensors, *ctx.numbers), None, None, None


class Normalized(NamedTuple):
    """What a batch norm in a graph was made of and gave, for who rounds it before anybody else looks at it."""

    inputs: tuple[Tensor, ...]
    computed: tuple[Tensor, ...]
    ends: Tensor
    relu: bool
    eps: float

    def to_be_rounded(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """The result, its bits and its ends."""
        return self.computed[0], self.computed[-1], self.ends

    def attached(self, masked: bool) -> Tensor:
        """The result with its gradient, which passes where the bits are set, if they are to mask it."""
        out: Tensor = _Normalized.apply(*self.inputs, self.computed, masked, self.eps)
        return out


def batch_norm_in_graph(
    y: Tensor, factor: Tensor, weight: Tensor, bias: Tensor, norm: Norm, relu: bool
) -> Normalized | None:
    """As :func:`eagerq.functional.batch_norm_of_scaled`, in code that is being compiled."""
    vectors = factor, weight, bias, norm.running_mean, norm.running_var
    if not (native.available and y.dim() > 2 and y.dtype is torch.float32 and y.device.type == "cpu"):
        return None
    if y.numel() <= y.shape[1] or is_exporting():
        return None
    if not all(one.dtype is torch.float32 and one.numel() == y.shape[1] for one in vectors):
        return None
    with torch.no_grad():
        *computed, ends = _NORMALIZED(y, *vectors, norm.eps, norm.pace, relu)
    return Normalized((y, factor, weight, bias), tuple(computed), ends, relu, norm.eps)


def round_over_in_graph(made: Normalized | Convolved, to: Rounding, skipped: Tensor | None) -> Tensor | None:
    """Round a layer's result to one scale in its memory; None, with nothing changed, where that cannot be."""
    numbers = [to.scale] if to.running is None else [to.scale, to.running.low, to.running.high]
    if to.rows or to.zero_point.dtype is not torch.int32:
        return None
    if any(one.numel() != 1 or one.dtype is not torch.float32 for one in numbers):
        return None
    given = made.to_be_rounded()
    if given is None:
        return None
    with torch.no_grad():
        values = *given, made.relu, to.scale, to.zero_point, to.quant_min, to.quant_max
        if to.running is None:
            _ROUND_OVER(*values)
        else:
            low, high, constant, symmetric = to.running
            _OBSERVE_OVER(*values, low, high, skipped, constant, symmetric)
    return made.attached(True)
