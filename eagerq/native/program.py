"""Calls of the C library made one after the other by itself, without Python between them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

from eagerq.native.library import LIBRARY

__all__ = ["Step", "runner", "step"]

# in the order of program.c
_KINDS = ("conv", "depthwise", "linear", "add", "quantize", "dequantize", "max_pool", "mean", "mul", "look_up")
_FIELDS = {
    ctypes.c_void_p: "pointers",
    ctypes.c_int64: "numbers",
    ctypes.c_int: "numbers",
    ctypes.c_float: "reals",
}


class Place(ctypes.Structure):
    """Where a call reads or writes, and how far apart images (or, if ``own``, threads) are there."""

    _fields_ = [("at", ctypes.c_void_p), ("apart", ctypes.c_int64), ("own", ctypes.c_int64)]


class Step(ctypes.Structure):
    """A call and its arguments.

    Attributes:
        images: of a batch that goes image by image; 0 where all go at once.
        group: a number of those that go through the batch together.
        places: of what is read, one or two tensors, and of the result, the third.
    """

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("kind", "images", "group")),
        ("places", Place * 3),
        ("pointers", ctypes.c_void_p * 2),
        ("numbers", ctypes.c_int64 * 7),
        ("reals", ctypes.c_float * 4),
    ]


def step(function: Any, reads: int, rest: Sequence[Any]) -> Step:
    """The call of a C function with ``rest`` after so many tensors to read and the result's address.

    Whoever keeps the step keeps ``rest``, too.
    """
    made = Step(kind=_KINDS.index(function.__name__.removeprefix("eagerq_")))
    filled = dict.fromkeys(_FIELDS.values(), 0)
    for kind, value in zip(function.argtypes[reads + 1 :], rest, strict=True):
        field = _FIELDS.get(kind, "pointers")
        getattr(made, field)[filled[field]] = _address(value) if field == "pointers" else value
        filled[field] += 1
    return made


def _address(value: Any) -> int:
    """Of a structure or array, or of what was passed by reference; an address itself."""
    return value if isinstance(value, int) else ctypes.addressof(getattr(value, "_obj", value))


def runner(steps: Sequence[Step], threads: int) -> tuple[Any, Callable[..., None], tuple[Any, ...]]:
    """The steps as they lie in memory, the C function that makes the calls, and its arguments.

    Args:
        threads: how many have memory for themselves.
    """
    listed = (Step * len(steps))(*steps)
    return listed, LIBRARY.eagerq_run, (ctypes.addressof(listed), len(steps), threads)
