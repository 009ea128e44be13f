"""Telling whoever records a forward what is done in C, of which torch's dispatcher knows nothing."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, ParamSpec, TypeVar

from torch import Tensor

__all__ = ["Bound", "bound", "is_recording", "recorded", "recording"]

_Function = TypeVar("_Function", bound=Callable[..., Any])
_Arguments = ParamSpec("_Arguments")

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


def recorded(function: _Function) -> _Function:
    """Mark a function that works in C on tensors: whoever records calls it again."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        if _tapes and (tape := _tapes.get(threading.get_ident())) is not None:
            return tape(call, args)
        return function(*args)

    call.unrecorded = function  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]


class Bound(NamedTuple):
    """A call of the C library with its arguments: the tensors that are read, the result, then the rest.

    Attributes:
        result: makes the tensor that the result is written to.
        weight: bytes of parameters that it reads.
        kept: what lies at addresses among the rest, if nothing there keeps it alive.
    """

    read: tuple[Tensor, ...]
    function: Any
    rest: tuple[Any, ...]
    result: Callable[[], Tensor]
    weight: int = 0
    kept: Any = None


def bound(binding: Callable[_Arguments, Bound]) -> Callable[_Arguments, Tensor]:
    """A function that makes the call told by ``binding``; whoever records repeats that call alone.

    Where C does not serve, both give ``NotImplemented``.
    """

    @functools.wraps(binding)
    def call(*args: Any) -> Any:
        told = binding(*args)  # type: ignore[call-arg]
        if told is NotImplemented:
            return told
        read, function, rest, result, *_ = told
        out = result()
        function(*[x.data_ptr() for x in read], out.data_ptr(), *rest)
        return out

    marked = recorded(call)
    marked.binding = binding  # type: ignore[attr-defined]
    return marked  # type: ignore[return-value]
