"""Weights in a backend's own layout, made when first needed and kept as long as the weight they come from."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

__all__ = ["Packed", "Unpacker", "kept", "pack", "unpacker", "version"]

_Form = TypeVar("_Form")


class Packed(NamedTuple):
    """A weight packed as if its zero points were all zero, and what that leaves to mend.

    Attributes:
        weight: in the backend's layout.
        zero: zero points to give the backend.
        odd: int64 indices of the output channels whose zero point is not zero, to be computed
            otherwise; None when there are none.
    """

    weight: Tensor
    zero: Tensor
    odd: Tensor | None

    def rows(
        self, weight: Tensor, scale: Tensor, zero_point: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The odd channels of a layer's parameters."""
        assert self.odd is not None
        return (
            weight[self.odd],
            scale if scale.numel() == 1 else scale[self.odd],
            zero_point[self.odd],
            None if bias is None else bias[self.odd],
        )

    def unpack(self) -> Tensor:
        """What was packed."""
        plain: Tensor = self.weight.to_dense()
        return plain.t() if plain.dim() == 2 else plain  # linear ones are turned


class _Entry(NamedTuple):
    alive: weakref.ref[Tensor]
    zero_point: Tensor
    versions: tuple[int, int]
    layouts: list[tuple[Any, Any]]  # by key, the newest first


# for one weight: its layer may run in several places, or on single images of several sizes
MOST_LAYOUTS = 4
# The integer weight alone is a model's state: one that is loaded, moved or copied is a new tensor or a
# new version, and is packed anew.
_entries: dict[int, _Entry] = {}


def _make(zero_point: Tensor, make: Callable[[], Tensor]) -> Packed | None:
    odd = zero_point.nonzero().flatten()
    if len(odd) == 0:
        return Packed(make(), zero_point, None)
    # training gives a channel whose weights share a sign a zero point of its own; seldom are they many
    if 2 * len(odd) > len(zero_point):
        return None
    return Packed(make(), torch.zeros_like(zero_point), odd)


def pack(weight: Tensor, zero_point: Tensor, key: Any, make: Callable[[], Tensor]) -> Packed | None:
    """The packed form of an integer weight.

    Args:
        weight: integers, output channels first.
        zero_point: ``[1]`` or ``[channels]``.
        key: whatever else the packing depends on; the last few keys are kept.
        make: packs the weight.

    Returns:
        None when too many zero points are not zero for the backend to be of use.
    """
    return kept(weight, zero_point, key, lambda: _make(zero_point, make))


def kept(weight: Tensor, zero_point: Tensor, key: Any, make: Callable[[], _Form]) -> _Form:
    """What ``make`` gives, kept for ``key`` as long as neither tensor changes."""
    if weight.is_inference() or zero_point.is_inference():  # has no version to tell a change by
        return make()
    entry = _entry(weight)
    if entry is None or entry.zero_point is not zero_point:
        entry = _enter(weight, zero_point, [])
    for known, packed in entry.layouts:
        if known == key:
            return packed
    made = make()
    entry.layouts[:] = [(key, made), *entry.layouts[: MOST_LAYOUTS - 1]]
    return made


def _entry(weight: Tensor) -> _Entry | None:
    """What is kept for a weight, unless it or its zero points have changed."""
    entry = _entries.get(id(weight))
    if entry is None or entry.alive() is not weight:
        return None
    return entry if entry.versions == (weight._version, entry.zero_point._version) else None


def _enter(weight: Tensor, zero_point: Tensor, layouts: list[tuple[Any, Any]]) -> _Entry:
    number = id(weight)

    def forget(_: Any, entries: dict[int, _Entry] = _entries) -> None:  # the module may be gone before the weight
        entries.pop(number, None)

    entry = _Entry(weakref.ref(weight, forget), zero_point, (weight._version, zero_point._version), layouts)
    _entries[number] = entry
    return entry


class Unpacker:
    """Makes a weight again, bit for bit, of a packed form of it, which is kept for the new one too."""

    def __init__(self, weight: Tensor, zero_point: Tensor, key: Any, form: Any) -> None:
        self._shape, self._stride = weight.shape, weight.stride()
        self._kept = (zero_point, [(key, form)])
        self.bytes = weight.numel()

    def __call__(self) -> Tensor:
        zero_point, layouts = self._kept
        plain = torch.empty_strided(self._shape, self._stride, dtype=torch.int8, device="cpu")
        plain.copy_(layouts[0][1].unpack().reshape(self._shape))
        _enter(plain, zero_point, list(layouts))
        return plain


def unpacker(weight: Tensor) -> Unpacker | None:
    """What makes ``weight`` again, once it is given up; None where no packed form of it gives it back."""
    entry = None if weight.is_inference() else _entry(weight)
    if entry is None or weight.dtype is not torch.int8:
        return None
    for key, form in entry.layouts:
        plain = form.unpack() if hasattr(form, "unpack") else weight[:0]
        if plain.numel() == weight.numel() and torch.equal(plain.reshape(weight.shape), weight):
            return Unpacker(weight, entry.zero_point, key, form)
    return None


def version(x: Tensor | None) -> tuple[int, int]:
    """What a packed layer knows a parameter by."""
    return (0, 0) if x is None else (id(x), 0 if x.is_inference() else x._version)
