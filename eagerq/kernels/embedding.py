"""Look-ups in a table of integer rows: only the rows asked for become real numbers.

The steps are plain torch, on any device, and a compiler fuses them; torch has no public operator that
sums 8-bit rows, so that a CPU does it in C where it can.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from eagerq import native
from eagerq.kernels.dispatch import door

__all__ = ["embedding", "embedding_bag", "pack_halves", "unpack_halves"]

# How many values a CPU makes real at a time: enough to share between threads, few enough for its caches.
_PIECE = 1 << 20


def pack_halves(integers: Tensor) -> Tensor:
    """4-bit values ``[rows, columns]`` two a byte, ``[rows, ceil(columns / 2)]``: even columns in the low halves.

    Example:
        >>> pack_halves(torch.tensor([[1, 2, 3]], dtype=torch.uint8))
        tensor([[33,  3]], dtype=torch.uint8)
    """
    integers = F.pad(integers, (0, integers.shape[1] % 2))
    return integers[:, ::2] | (integers[:, 1::2] << 4)


def unpack_halves(packed: Tensor, columns: int) -> Tensor:
    """The ``columns`` values of each row that :func:`pack_halves` packed."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(1)[:, :columns]


def _centred(indices: Tensor, weight: Tensor, zero_point: Tensor, columns: int | None) -> Tensor:
    """``weight[indices] - zero_point[indices]`` in float32; an index out of range is an IndexError."""
    # the result comes before the bytes: a heap whose last block is freed first is given back at every call
    width = weight.shape[1] if columns is None else columns
    rows = torch.empty(indices.shape[0], width, dtype=torch.float32, device=weight.device)
    picked = weight.index_select(0, indices)
    rows.copy_(picked if columns is None else unpack_halves(picked, columns))
    return rows.sub_(zero_point.index_select(0, indices)[:, None])


@door
def embedding(indices: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor, columns: int | None = None) -> Tensor:
    """The real values ``(q - zero_point)·scale`` of some rows of a table.

    Args:
        indices: int32 or int64, any shape.
        weight: integers ``[rows, columns]``, or 4-bit ones as of :func:`pack_halves`.
        scale, zero_point: float32 ``[rows]``.
        columns: how many there are, of 4-bit integers only.

    Returns:
        float32 ``[*indices.shape, columns]``.

    Example:
        >>> table = torch.tensor([[0, 2], [4, 6]], dtype=torch.uint8)
        >>> embedding(torch.tensor([1]), table, torch.tensor([1.0, 0.5]), torch.tensor([0.0, 4.0]))
        tensor([[0., 1.]])
    """
    if native.available and not torch.compiler.is_compiling():
        found = native.embedding(indices, weight, scale, zero_point, columns)
        if found is not NotImplemented:
            rows: Tensor = found
            return rows
    flat = indices.reshape(-1)
    rows = _centred(flat, weight, zero_point, columns).mul_(scale.index_select(0, flat)[:, None])
    return rows.reshape(*indices.shape, rows.shape[1])


@door
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
    columns: int | None = None,
) -> Tensor:
    """Sum, mean or maximum of the real rows of each bag; zeros for an empty one.

    Args:
        indices: int32 or int64, ``[n]``, or ``[bags, length]``.
        weight, scale, zero_point, columns: as for :func:`embedding`.
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
        offsets, include_last_offset = torch.arange(bags, device=indices.device) * length, False
        indices = indices.reshape(-1)
        per_sample_weights = None if per_sample_weights is None else per_sample_weights.reshape(-1)
    if native.available and not torch.compiler.is_compiling():
        how = (offsets, mode, per_sample_weights, include_last_offset, padding_idx, columns)
        sums = native.embedding_bag(indices, weight, scale, zero_point, *how)
        if sums is not NotImplemented:
            return sums
    table = (weight, scale, zero_point, columns)
    count, width = indices.shape[0], weight.shape[1] if columns is None else columns
    if (
        torch.compiler.is_compiling()
        or indices.device.type != "cpu"
        or count * width <= 2 * _PIECE
        or not _in_order(offsets, count)  # torch's own operator says what is wrong
    ):
        return _bags(indices, *table, offsets, mode, per_sample_weights, include_last_offset, padding_idx)
    starts = torch.cat([offsets, offsets.new_tensor([count])]) if not include_last_offset else offsets
    results = []
    for first, last in _pieces(starts, width):
        begin, end = int(starts[first]), int(starts[last])
        factors = None if per_sample_weights is None else per_sample_weights[begin:end]
        own = starts[first:last] - begin
        results.append(_bags(indices[begin:end], *table, own, mode, factors, False, padding_idx))
    return torch.cat(results)


def _in_order(offsets: Tensor, count: int) -> bool:
    return bool(offsets[0] == 0) and bool(offsets[-1] <= count) and bool((offsets[1:] >= offsets[:-1]).all())


def _pieces(starts: Tensor, columns: int) -> Iterator[tuple[int, int]]:
    """Runs of whole bags, first and past the last, each of about ``_PIECE`` values; ends come with starts."""
    marks = torch.arange(0, int(starts[-1]), max(_PIECE // columns, 1), dtype=starts.dtype)
    bags = len(starts) - 1
    cuts = torch.searchsorted(starts[:-1].contiguous(), marks).unique().tolist()
    for first, last in zip(cuts, [*cuts[1:], bags], strict=True):
        if first < last:
            yield first, last


def _bags(
    indices: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    columns: int | None,
    offsets: Tensor,
    mode: str,
    per_sample_weights: Tensor | None,
    include_last_offset: bool,
    padding_idx: int | None,
) -> Tensor:
    """:func:`embedding_bag` of 1-d indices, all at once."""
    rows = _centred(indices, weight, zero_point, columns)
    factor = scale.index_select(0, indices).to(torch.float32)
    padding = None if padding_idx is None else indices == padding_idx
    positions = torch.arange(indices.shape[0], device=offsets.device, dtype=offsets.dtype)
    if mode == "max":
        rows.mul_(factor[:, None])
        if padding is None:
            return F.embedding_bag(positions, rows, offsets, mode="max", include_last_offset=include_last_offset)
        rows.masked_fill_(padding[:, None], -torch.inf)
        most = F.embedding_bag(positions, rows, offsets, mode="max", include_last_offset=include_last_offset)
        return most.masked_fill(most == -torch.inf, 0.0)  # nothing but padding
    if per_sample_weights is not None:
        factor = factor * per_sample_weights.to(torch.float32)
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
