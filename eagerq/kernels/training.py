"""What compiled training calls as one operator each, on the CPU.

Inductor would make dozens of small kernels of an observer's formulas, for every layer: minutes of compiling, and
passes that are slower than torch's own.  As operators they are what eager training runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eagerq import native
from eagerq.functional import channel_shape, min_max, moving_average, training_qparams, update_natively
from eagerq.kernels.dispatch import Kernel
from eagerq.kernels.storing import storing
from eagerq.native import Rounding, Running

__all__ = ["qparams_in_graph", "rounded_in_graph"]


def _average(running: tuple[Tensor, Tensor], seen: tuple[Tensor, Tensor], skipped: Tensor, constant: float) -> None:
    """Move the running range towards the batch's; one that is not finite is left out and counted."""
    finite = (seen[1] - seen[0]) < torch.inf
    skipped += ~finite.all()
    for old, new in zip(running, seen, strict=True):
        old.copy_(torch.where(finite, moving_average(old, new, constant), old))


def observe(
    x: Tensor,
    low: Tensor,
    high: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    skipped: Tensor,
    constant: float,
    quant_min: int,
    quant_max: int,
    symmetric: bool,
    axis: int | None,
) -> Any:
    """Observe ``x``: update the running range (moving average) and the training qparams that follow, in place.

    Returns copies of scale and zero point: a backward pass may keep what it is given, while the next forward pass
    writes over the buffers.
    """
    if x.numel():
        seen = min_max(_in_memory_order(x) if axis is None else x, axis)
        if not update_natively(*seen, low, high, scale, zero_point, constant, quant_min, quant_max, symmetric):
            _average((low, high), seen, skipped, constant)
            qparams = training_qparams(low, high, quant_min, quant_max, symmetric)
            for old, new in zip((scale, zero_point), qparams, strict=True):
                old.copy_(new)
    return scale.clone(), zero_point.clone()


def _in_memory_order(x: Tensor) -> Tensor:
    """``x`` with its axes so permuted that a dense one is contiguous; torch's reductions would copy it otherwise."""
    return x.permute(sorted(range(x.dim()), key=x.stride, reverse=True))


def _copies(x: Tensor, low: Tensor, high: Tensor, scale: Tensor, zero_point: Tensor, *rest: Any) -> Any:
    return torch.empty_like(scale), torch.empty_like(zero_point)


_SEEN = (
    "(Tensor x, Tensor(a!) low, Tensor(b!) high, Tensor(c!) scale, Tensor(d!) zero_point, Tensor(e!) skipped, "
    "float constant, int quant_min, int quant_max, bool symmetric, int? axis) -> (Tensor, Tensor)"
)
_of_all = Kernel("averaged_qparams" + _SEEN, observe, _copies, any_layout=True)
_of_channels = Kernel("averaged_qparams_of_channels" + _SEEN, observe, _copies)


def qparams_in_graph(x: Tensor, to: Rounding, skipped: Tensor, axis: int | None) -> tuple[Tensor, Tensor] | None:
    """Observe ``x`` in code that is being compiled.

    Args:
        to: has a running range; its buffers are updated.
        skipped: counts the ranges that are not finite.
        axis: of the channels, or None for one range.

    Returns:
        Scale and zero point; None, with nothing changed, where the CPU's operator does not serve: other devices and
        dtypes, buffers that have not their size yet.
    """
    running = to.running
    count = 1 if axis is None else x.shape[axis]
    if running is None or x.device.type != "cpu" or x.dtype is not torch.float32:
        return None
    if any(buffer.numel() != count for buffer in (running.low, running.high, to.scale, to.zero_point)):
        return None
    numbers = running.constant, to.quant_min, to.quant_max, running.symmetric
    operator = _of_all if axis is None else _of_channels
    with torch.no_grad():
        scale, zero_point = operator(x, running.low, running.high, to.scale, to.zero_point, skipped, *numbers, axis)
    return scale, zero_point


def _to(scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> Rounding:
    return Rounding(scale, zero_point, quant_min, quant_max, scale.numel() > 1)


def _rounded(
    x: Tensor, factor: Tensor | None, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int
) -> Any:
    return _with_flags(x, _to(scale, zero_point, quant_min, quant_max), factor)


def _with_flags(x: Tensor, to: Rounding, factor: Tensor | None) -> Any:
    x = x if native.serves(x) else x.clone()  # dense
    rounded, inside = native.fake_quantize(x, to, factor, True) or (None, None)
    if inside is None or to.rows:
        return None if rounded is None else (rounded, inside)
    return rounded, native.unpacked(inside, x)


def _observed(
    x: Tensor,
    factor: Tensor | None,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    low: Tensor,
    high: Tensor,
    skipped: Tensor,
    constant: float,
    symmetric: bool,
) -> Any:
    """Take ``x·factor`` into the running range, then round it; and what was inside the integers' range.

    That is a bool for each value, which compiled code of any layout can multiply with; or the bits of the rows,
    which are for :func:`_masked_rows`.
    """
    to = _to(scale, zero_point, quant_min, quant_max)
    result = _with_flags(x, to._replace(running=Running(low, high, constant, symmetric)), factor)
    if result is None:  # a range that is not finite
        scaled = x if factor is None else x * factor.reshape(channel_shape(x.dim(), 0))
        numbers = constant, quant_min, quant_max, symmetric
        observe(scaled, low, high, scale, zero_point, skipped, *numbers, 0 if to.rows else None)
        return _with_flags(x, to, factor)
    return result


def observed_rows(x: Tensor, factor: Tensor | None, to: Rounding, skipped: Tensor | None, last: bool) -> Tensor:
    """Round rows of a weight ``x·factor``, taken into the running range first if ``to`` has one; not in a graph.

    Args:
        last: store the result, if it is a convolution's of images, in channels_last.
    """
    result = native.fake_quantize(x, to, factor, mask=False, last=last)
    if result is None:
        assert to.running is not None
        assert skipped is not None
        low, high, constant, symmetric = to.running
        numbers = to.quant_min, to.quant_max, low, high, skipped, constant, symmetric
        rounded: Tensor = _observed(x, factor, to.scale, to.zero_point, *numbers)[0]
        return rounded
    return result[0]


def _rounded_like(x: Tensor, factor: Tensor | None, scale: Tensor, *rest: Any) -> Any:
    rows = scale.numel()
    if rows == 1:
        return torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)
    return torch.empty_like(x), x.new_empty(rows * ((x.numel() // rows + 7) // 8), dtype=torch.uint8)


def _masked_rows(grad: Tensor, inside: Tensor, x: Tensor, factor: Tensor | None) -> Any:
    of_x, of_factor = native.masked_rows(grad.contiguous(), inside, x, factor, len(x))
    return of_x, grad.new_empty(0) if of_factor is None else of_factor


def _gradients_like(grad: Tensor, inside: Tensor, x: Tensor, factor: Tensor | None) -> Any:
    return torch.empty_like(x), x.new_empty(0 if factor is None else len(x))


_VALUES = "(Tensor x, Tensor? factor, Tensor scale, Tensor zero_point, int quant_min, int quant_max)"
_UPDATED = (
    "(Tensor x, Tensor? factor, Tensor(a!) scale, Tensor(b!) zero_point, int quant_min, int quant_max, "
    "Tensor(c!) low, Tensor(d!) high, Tensor(e!) skipped, float constant, bool symmetric)"
)
_GRADIENT = "(Tensor grad, Tensor inside, Tensor x, Tensor? factor)"


def _twice(name: str, schema: str, run: Any, fake: Any) -> dict[bool, Kernel]:
    """An operator for tensors whose rows have parameters of their own, and one for tensors of any layout."""
    return {
        rows: Kernel(
            f"{name}{'_rows' * rows}{schema} -> (Tensor, Tensor)",
            run,
            fake if rows else storing(name, fake, images=False),
            any_layout=not rows,
        )
        for rows in (False, True)
    }


_ROUNDED = _twice("rounded", _VALUES, _rounded, _rounded_like)
_OBSERVED = _twice("observed", _UPDATED, _observed, _rounded_like)
_MASKED = Kernel(f"masked_rows{_GRADIENT} -> (Tensor, Tensor)", _masked_rows, _gradients_like)


class _StraightThrough(torch.autograd.Function):
    """Values that were computed apart from autograd, with the gradient of rounding."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor | None, rounded: Tensor, inside: Tensor) -> Tensor:
        ctx.rows = inside.dtype is not torch.bool
        ctx.save_for_backward(inside, factor, x if ctx.rows else None)
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        inside, factor, x = ctx.saved_tensors
        if not ctx.rows:
            return grads[0] * inside, None, None, None
        of_x, of_factor = _MASKED(grads[0], inside, x, factor)
        return of_x, None if factor is None else of_factor, None, None


def rounded_in_graph(x: Tensor, to: Rounding, factor: Tensor | None, skipped: Tensor | None) -> Tensor | None:
    """As :func:`eagerq.functional.round_in_c`, in code that is being compiled.

    Args:
        skipped: counts the ranges that are not finite.
    """
    running, rows = to.running, len(x) if to.rows else 1
    if not (native.available and x.device.type == "cpu" and x.numel() and (rows == 1 or x.is_contiguous())):
        return None
    numbers = [to.scale] if running is None else [to.scale, running.low, running.high]
    if any(one.numel() != rows or one.dtype is not torch.float32 for one in numbers):
        return None
    if x.dtype is not torch.float32 or to.zero_point.dtype is not torch.int32 or (rows == 1 and factor is not None):
        return None
    with torch.no_grad():
        values = x, factor, to.scale, to.zero_point, to.quant_min, to.quant_max
        if running is None:
            rounded, inside = _ROUNDED[rows > 1](*values)
        else:
            buffers = running.low, running.high, skipped
            rounded, inside = _OBSERVED[rows > 1](*values, *buffers, running.constant, running.symmetric)
    straight: Tensor = _StraightThrough.apply(x, factor, rounded, inside)
    return straight
