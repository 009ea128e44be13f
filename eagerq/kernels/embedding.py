"""Look-ups in a table of integer rows: only the rows asked for become real numbers.

The steps are plain torch, on any device, and a compiler fuses them; torch has no public operator that
sums 8-bit rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["embedding", "embedding_bag"]


def _centred(indices: Tensor, weight: Tensor, zero_point: Tensor) -> Tensor:
    """``weight[indices] - zero_point[indices]`` in float32; an index out of range is an IndexError."""
    rows = weight.index_select(0, indices).to(torch.float32)
    return rows.sub_(zero_point.index_select(0, indices)[:, None])


def embedding(indices: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """The real values ``(q - zero_point)·scale`` of some rows of a table.

    Args:
        indices: int32 or int64, any shape.
        weight: integers ``[rows, columns]``.
        scale, zero_point: float32 ``[rows]``.

    Returns:
        float32 ``[*indices.shape, columns]``.

    Example:
        >>> table = torch.tensor([[0, 2], [4, 6]], dtype=torch.uint8)
        >>> embedding(torch.tensor([1]), table, torch.tensor([1.0, 0.5]), torch.tensor([0.0, 4.0]))
        tensor([[0., 1.]])
    """
    flat = indices.reshape(-1)
    rows = _centred(flat, weight, zero_point).mul_(scale.index_select(0, flat)[:, None])
    return rows.reshape(*indices.shape, weight.shape[1])


def embedding_bag(
    indices: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    offsets: Tensor | None,
    mode: str,
    per_sample_weights: Tensor | None,
    include_last_offset: bool,
    padding_idx: int | None,
) -> Tensor:
    """Sum, mean or maximum of the real rows of each bag; zeros for an empty one.

    Args:
        indices: int32 or int64, ``[n]``, or ``[bags, length]``.
        weight, scale, zero_point: as for :func:`embedding`.
        offsets: where each bag starts in 1-d ``indices``; None for 2-d ones.
        mode: ``"sum"``, ``"mean"`` or ``"max"``.
        per_sample_weights: a factor for each index, with ``"sum"`` only.
        include_last_offset: ``offsets`` has the end of the last bag besides.
        padding_idx: a row that does not count.

    Returns:
        float32 ``[bags, columns]``.
    """
    if offsets is None:
        bags, length = indices.shape
        offsets = torch.arange(bags, device=indices.device) * length
        include_last_offset = False
    flat = indices.reshape(-1)
    rows = _centred(flat, weight, zero_point)
    factor = scale.index_select(0, flat).to(torch.float32)
    padding = None if padding_idx is None else flat == padding_idx
    positions = torch.arange(flat.shape[0], device=offsets.device, dtype=offsets.dtype)
    if mode == "max":
        rows.mul_(factor[:, None])
        if padding is None:
            return F.embedding_bag(positions, rows, offsets, mode="max", include_last_offset=include_last_offset)
        rows.masked_fill_(padding[:, None], -torch.inf)
        most = F.embedding_bag(positions, rows, offsets, mode="max", include_last_offset=include_last_offset)
        return most.masked_fill(most == -torch.inf, 0.0)  # nothing but padding
    if per_sample_weights is not None:
        factor = factor * per_sample_weights.reshape(-1).to(torch.float32)
    if padding is not None:
        factor = factor.masked_fill(padding, 0.0)

    def total(values: Tensor, weights: Tensor | None) -> Tensor:
        return F.embedding_bag(
            positions,
            values,
            offsets,
            mode="sum",
            per_sample_weights=weights,
            include_last_offset=include_last_offset,
        )

    # torch's sum takes a factor for each row, so scaling costs no pass of its own
    sums = total(rows, factor)
    if mode == "sum":
        return sums
    counted = torch.ones_like(factor) if padding is None else (~padding).to(torch.float32)
    return sums / total(counted[:, None], None).clamp_(min=1.0)
