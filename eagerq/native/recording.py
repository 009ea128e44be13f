"""Telling whoever records a forward what is done in C, of which torch's dispatcher knows nothing."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

__all__ = ["is_recording", "recorded", "recording"]

_Function = TypeVar("_Function", bound=Callable[..., Any])

# the thread that records and what it shows calls to; empty nearly always, which is all that a call looks at
_tapes: dict[int, Callable[[Callable[..., Any], tuple[Any, ...]], Any]] = {}


@contextmanager
def recording(tape: Callable[[Callable[..., Any], tuple[Any, ...]], Any]) -> Iterator[None]:
    """Let ``tape(function, arguments)`` make this thread's calls, for the time of a ``with``."""
    thread = threading.get_ident()
    _tapes[thread] = tape
    try:
        yield
    finally:
        del _tapes[thread]


def is_recording() -> bool:
    """Whether someone records what this thread does."""
    return bool(_tapes) and threading.get_ident() in _tapes


def recorded(binding: Callable[..., Any] | None = None) -> Callable[[_Function], _Function]:
    """Mark a function that works in C on tensors.

    Args:
        binding: given the same arguments, tells the tensors that are read, the C function, and what it takes
            after their addresses and the result's; left out, repeating a call means calling the function.
    """

    def mark(function: _Function) -> _Function:
        @functools.wraps(function)
        def call(*args: Any) -> Any:
            if _tapes and (tape := _tapes.get(threading.get_ident())) is not None:
                return tape(call, args)
            return function(*args)

        call.binding = binding  # type: ignore[attr-defined]
        call.unrecorded = function  # type: ignore[attr-defined]
        return call  # type: ignore[return-value]

    return mark
