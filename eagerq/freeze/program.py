"""Calls of the C library in a row, made by itself, and the memory that they share.

A batch goes image by image through layers whose results are large beside their weights: so each thread finds
what one layer gives the next in its own cache, and waits for no other thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from eagerq import native

__all__ = ["Group", "Memory", "Program", "groups", "storage"]

_LEAST = 16 * 1024  # bytes of an image that are worth a turn of their own
_LINE = 64  # bytes of a line of the cache


@dataclass(frozen=True, eq=False)
class Group:
    """Calls in a row that go image by image."""

    images: int


def groups(calls: Sequence[native.Bound | None], results: Sequence[Any]) -> list[Group | None]:
    """The group of each call, of those given; None where a batch goes all at once."""
    found: list[Group | None] = []
    for call, result in zip(calls, results, strict=True):
        images = 0 if call is None else _images(call, result)
        before = found[-1] if found else None
        found.append(None if not images else before if before and before.images == images else Group(images))
    return found


def _images(call: native.Bound, result: Tensor) -> int:
    """How many images go one by one; 0 where they do not."""
    tensors = (*call.read, result)
    images = len(result) if result.dim() else 0
    if images < 2 or any(x.dim() != 4 or len(x) != images or x.stride(0) * images != x.numel() for x in tensors):
        return 0
    size = sum(map(_bytes, tensors))
    return images if size > 2 * call.weight and size >= images * _LEAST else 0


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def storage(x: Tensor) -> int:
    """What tells apart the memory of tensors that are all alive."""
    return x.untyped_storage().data_ptr() if x.layout is torch.strided else -id(x)  # a packed weight has none


class Memory:
    """Pieces of memory for results, each taken again when nobody reads what lies there any more.

    Images of a group are not all at the same step: what is free for one thread's own next result is free for
    other results only after the group.

    Args:
        last: for each piece of memory of the recording, the last step that touches it.
        threads: how many there are.
        pieces: what there is already, to which new ones are added.
    """

    def __init__(self, last: dict[int, int], threads: int, pieces: list[Tensor]) -> None:
        self._last = last
        self._threads = threads
        self._pieces = pieces
        self._group: Group | None = None
        self._held: dict[int, tuple[Tensor, bool]] = {}  # pieces, and whether threads have them for their own
        self._free = list(pieces)
        self._own: list[Tensor] = []  # of the group
        self._later: list[Tensor] = []  # free after the group

    def enter(self, group: Group | None) -> None:
        """Go on to a step of this group, or of none."""
        if group is None or group is not self._group:
            self._free += self._own + self._later
            self._own, self._later = [], []
        self._group = group

    def whole(self, result: Tensor) -> Tensor:
        """A tensor like ``result``."""
        memory = self._take(result, max(_bytes(result), 1), False)
        return memory.view(result.dtype).as_strided(result.shape, result.stride())

    def own(self, result: Tensor, images: int) -> Tensor:
        """Bytes for one image of ``result`` for each thread."""
        each = _bytes(result) // images
        return self._take(result, (each + -each % _LINE) * self._threads, True)

    def _take(self, result: Tensor, size: int, own: bool) -> Tensor:
        piece = _least(self._own, size) if own else None
        if piece is None:
            piece = _least(self._free, size)
        if piece is None:  # of whole elements, whatever they are, for each thread
            piece = torch.empty(size + -size % _LINE, dtype=torch.uint8)
            self._pieces.append(piece)
        self._held[storage(result)] = piece, own
        return piece

    def release(self, number: int) -> None:
        """Free what no step after this one touches."""
        for place in [place for place in self._held if self._last.get(place, number) <= number]:
            piece, own = self._held.pop(place)
            (self._own if own else self._later if self._group else self._free).append(piece)


def _least(pieces: list[Tensor], size: int) -> Tensor | None:
    """Take the least piece that has room."""
    fitting = [number for number, piece in enumerate(pieces) if piece.numel() >= size]
    return pieces.pop(min(fitting, key=lambda number: pieces[number].numel())) if fitting else None


class Program:
    """Calls that wait to be made together.

    Args:
        values: where tensors are found by their slots, when the calls are made.
        threads: how many have memory for themselves.
    """

    def __init__(self, values: list[Any], threads: int) -> None:
        self._values = values
        self._threads = threads
        self._steps: list[native.Step] = []
        self._late: list[tuple[int, int, int]] = []  # a step, its place, the slot of what is there
        self._fresh: list[tuple[int, Callable[[], Tensor]]] = []  # slots of results, and what makes them
        self._alive: list[Any] = []

    def add(self, call: native.Bound, group: Group | None, read: Sequence[Tensor | int], out: Tensor | None) -> None:
        """One more call.

        Args:
            read: tensors that always lie where they lie now (or bytes, of threads' own memory), or slots.
            out: the same; None for a result that is to be new each time, see :meth:`give`.
        """
        step = native.step(call.function, len(call.read), call.rest)
        step.images, step.group = (group.images, id(group)) if group else (0, 0)
        for number, (x, recorded) in enumerate(zip(read, call.read, strict=True)):
            if isinstance(x, int):
                self._late.append((len(self._steps), number, x))
            self._place(step.places[number], recorded if isinstance(x, int) else x, step.images)
        if out is not None:
            self._place(step.places[2], out, step.images)
        self._steps.append(step)
        self._alive += [call.rest, call.kept, out, group, *read]

    def give(self, slot: int, result: Tensor) -> None:
        """Let the last call write to a new tensor like ``result``, found in its slot."""
        step = self._steps[-1]
        self._place(step.places[2], result, step.images)
        self._late.append((len(self._steps) - 1, 2, slot))
        self._fresh.append((slot, partial(torch.empty_strided, result.shape, result.stride(), dtype=result.dtype)))

    def _place(self, place: Any, x: Tensor, images: int) -> None:
        own = x.dim() == 1 and images > 0  # images have four dimensions
        place.at, place.own = x.data_ptr(), own
        share = x.numel() // self._threads // _LINE * _LINE
        place.apart = share if own else _bytes(x) // images if images else 0

    def calls(self) -> Iterator[Callable[[], Any]]:
        """One that makes all calls that wait; none where none does."""
        if not self._steps:
            return
        listed, function, arguments = native.runner(self._steps, self._threads)
        late = [(listed[step].places[number], slot) for step, number, slot in self._late]
        call = _Call(partial(function, *arguments), late, self._fresh, self._values, (listed, self._alive))
        self._steps, self._late, self._fresh, self._alive = [], [], [], []
        yield call


@dataclass(frozen=True, eq=False)
class _Call:
    """A program with its places that are known only when it runs, and what must live as long."""

    run: Callable[[], None]
    late: list[tuple[Any, int]]
    fresh: list[tuple[int, Callable[[], Tensor]]]
    values: list[Any]
    alive: Any

    def __call__(self) -> None:
        for slot, make in self.fresh:
            self.values[slot] = make()
        for place, slot in self.late:
            place.at = self.values[slot].data_ptr()
        self.run()
