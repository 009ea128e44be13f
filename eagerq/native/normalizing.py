"""Batch norm of scaled channels in C; see :mod:`eagerq.functional.normalizing`."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eagerq.native.library import LIBRARY, address, serves
from eagerq.native.training import Passing, room_for_bits

__all__ = ["Batch", "Norm", "batch_norm", "batch_norm_backward", "fold", "fold_backward_", "norms"]


class _Norm(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "channels", "plane")),
        *((name, ctypes.c_void_p) for name in ("factor", "weight", "bias")),
        *((name, ctypes.c_void_p) for name in ("running_mean", "running_var", "mean", "inverse", "ends")),
        *((name, ctypes.c_double) for name in ("eps", "pace")),
    ]


class Norm(NamedTuple):
    """A batch norm's running statistics, ``[C]``, to be updated; and how."""

    running_mean: Tensor
    running_var: Tensor
    eps: float
    pace: float


class Batch(NamedTuple):
    """What was normalised by: mean of each channel and the inverse of its spread."""

    mean: Tensor
    inverse: Tensor


def norms(y: Tensor, vectors: list[Tensor]) -> bool:
    """Whether C serves ``y`` ``[N, C, …]`` with these vectors ``[C]``: float32, contiguous or with channels last."""
    if y.dim() < 3 or y.dtype is not torch.float32 or not y.numel() or not serves(y):
        return False
    return all(
        one.dtype is torch.float32 and one.is_cpu and one.is_contiguous() and one.shape == y.shape[1:2]
        for one in vectors
    )


def _norm(y: Tensor, *rest: Any) -> Any:
    batch, channels = y.shape[:2]
    return ctypes.byref(_Norm(batch, channels, y.numel() // (batch * channels), *rest))


def _expect(served: int | None) -> None:
    if served == 0:
        raise MemoryError("no memory for a batch norm's sums")


def batch_norm(
    y: Tensor, factor: Tensor, weight: Tensor, bias: Tensor, norm: Norm, relu: bool, mask: bool
) -> tuple[Tensor, Batch, Passing]:
    """Normalise ``y/factor`` by its own statistics, and let the running statistics follow.

    The mask tells where a ReLU let pass.
    """
    out = torch.empty_like(y)
    batch = Batch(torch.empty_like(factor), torch.empty_like(factor))
    planes = y.shape[0] * y.shape[1] if y.is_contiguous() else 1
    passing = Passing(room_for_bits(y.numel(), planes) if relu and mask else None, planes, (ctypes.c_float * 2)())
    vectors = factor, weight, bias, norm.running_mean, norm.running_var, *batch
    run = LIBRARY.eagerq_batch_norm if y.is_contiguous() else LIBRARY.eagerq_batch_norm_last
    served = run(
        *(y.data_ptr(), out.data_ptr(), address(passing.bits), relu),
        _norm(y, *map(address, vectors), ctypes.addressof(passing.ends), norm.eps, norm.pace),
    )
    _expect(served)
    torch.autograd.graph.increment_version((norm.running_mean, norm.running_var))
    return out, batch, passing


def batch_norm_backward(
    grad: Tensor,
    y: Tensor,
    factor: Tensor,
    weight: Tensor,
    batch: Batch,
    bits: Tensor | None,
    eps: float,
    over: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients for ``y``, ``factor``, ``weight`` and ``bias``.

    Args:
        over: that for ``y`` takes its memory.
    """
    gradients = y if over else torch.empty_like(y), *(torch.empty_like(factor) for _ in range(3))
    vectors = factor, weight, None, None, None, *batch, None
    run = LIBRARY.eagerq_batch_norm_backward if y.is_contiguous() else LIBRARY.eagerq_batch_norm_last_backward
    served = run(
        *(grad.data_ptr(), y.data_ptr(), address(bits), *(one.data_ptr() for one in gradients)),
        _norm(y, *map(address, vectors), eps, 0.0),
    )
    _expect(served)
    return gradients  # type: ignore[return-value]


def fold(weight: Tensor, spread: Tensor) -> Tensor:
    """What folding a batch norm multiplies each channel by: ``weight / spread``, one in place of zero."""
    factor = torch.empty_like(weight)
    LIBRARY.eagerq_fold(weight.data_ptr(), spread.data_ptr(), factor.data_ptr(), weight.numel())
    return factor


def fold_backward_(of_weight: Tensor, spread: Tensor, one: Tensor, other: Tensor) -> None:
    """Add to the gradient of ``weight`` that of the factor, which is ``one + other``."""
    vectors = spread.data_ptr(), one.data_ptr(), other.data_ptr()
    LIBRARY.eagerq_fold_backward(*vectors, spread.numel(), of_weight.data_ptr())
