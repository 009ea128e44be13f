"""What compiled training calls as one operator each, on the CPU.

Inductor would make dozens of small kernels of an observer's formulas, for every layer: minutes of compiling, and
passes that are slower than torch's own.  As operators they are what eager training runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eagerq.functional import min_max, moving_average, training_qparams, update_natively
from eagerq.kernels.dispatch import Kernel

__all__ = ["averaged_qparams"]


def _average(running: tuple[Tensor, Tensor], seen: tuple[Tensor, Tensor], skipped: Tensor, constant: float) -> None:
    """Move the running range towards the batch's; one that is not finite is left out and counted."""
    finite = (seen[1] - seen[0]) < torch.inf
    skipped += ~finite.all()
    for old, new in zip(running, seen, strict=True):
        old.copy_(torch.where(finite, moving_average(old, new, constant), old))


def _averaged_qparams(
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


_SCHEMA = (
    "(Tensor x, Tensor(a!) low, Tensor(b!) high, Tensor(c!) scale, Tensor(d!) zero_point, Tensor(e!) skipped, "
    "float constant, int quant_min, int quant_max, bool symmetric, int? axis) -> (Tensor, Tensor)"
)
# Activations come in the order of channels last, or however the compiler likes them; weights as they lie in memory.
_of_all = Kernel("averaged_qparams" + _SCHEMA, _averaged_qparams, _copies, any_layout=True)
_of_channels = Kernel("averaged_qparams_of_channels" + _SCHEMA, _averaged_qparams, _copies)


def averaged_qparams(x: Tensor, *args: Any) -> Any:
    """:func:`_averaged_qparams` as an operator; its last argument is the channels' axis, or None for one range."""
    return (_of_all if args[-1] is None else _of_channels)(x, *args)
