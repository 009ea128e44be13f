"""One door per integer operation: a reference that is always right, and fast ones where they apply.

A door is called with plain tensors and Python numbers.  Eagerly it hands them straight to the first
fast implementation of the device that takes them (one that returns ``NotImplemented`` passes on to
the next), or to the reference.  Under ``torch.compile`` and ``torch.export`` the call is recorded as
the operator ``torch.ops.eagerq.<name>``, whose implementation is that same choice.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["LIBRARY", "Dialect", "Kernel", "dialect", "door", "speaking"]

LIBRARY = torch.library.Library("eagerq", "FRAGMENT")

_Door = TypeVar("_Door", bound=Callable[..., Any])


@dataclass(frozen=True)
class Dialect:
    """Other words for what int8 models do, for graphs that shall hold no operator of ours.

    Attributes:
        doors: a door's name to what is called in its stead.
        functions: a function of torch to what it does with QTensors.
    """

    doors: Mapping[str, Callable[..., Any]]
    functions: Mapping[Callable[..., Any], Callable[..., Any]]


# the dialect and the thread that speaks it; empty nearly always, which is all that the doors look at
_spoken: dict[int, Dialect] = {}


def dialect() -> Dialect | None:
    """The dialect that this thread speaks, if any."""
    return _spoken.get(threading.get_ident()) if _spoken else None


@contextmanager
def speaking(words: Dialect) -> Iterator[None]:
    """Call the doors by other words in this thread, for the time of a ``with``."""
    thread = threading.get_ident()
    _spoken[thread] = words
    try:
        yield
    finally:
        del _spoken[thread]


def door(function: _Door) -> _Door:
    """A door that is a plain function, with the same steps on any device."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        words = dialect()
        if words is not None:
            return words.doors[function.__name__](*args, **kwargs)
        return function(*args, **kwargs)

    return call  # type: ignore[return-value]


class Kernel:
    """An integer operation with interchangeable implementations.

    Args:
        schema: the operator's schema, ``name(Tensor x, …) -> Tensor``.
        reference: implementation in plain torch, for every device; the specification of the others.
        fake: tells shape and dtype of the result without computing it; left out, the result is like the
            first argument, in the ``dtype`` that the schema names.
        any_layout: the work is the same whatever the order of the values in memory, so that compiled code
            need not restore the one that eager code would have had.
    """

    def __init__(
        self,
        schema: str,
        reference: Callable[..., Tensor],
        fake: Callable[..., Tensor] | None = None,
        any_layout: bool = False,
    ) -> None:
        self.name = schema.partition("(")[0]
        self.reference = reference
        self.fake: Callable[..., Tensor] = fake or self._like_first
        self._fast: dict[str, list[Callable[..., Any]]] = {}
        LIBRARY.define(schema, tags=(torch.Tag.flexible_layout,) if any_layout else ())
        LIBRARY.impl(self.name, self.run, "CompositeExplicitAutograd")
        self._operator = getattr(torch.ops.eagerq, self.name).default
        self._parameters = [argument.name for argument in self._operator._schema.arguments]
        self._check(reference)
        if fake is not None:
            self._check(fake)
        torch.library.register_fake(f"eagerq::{self.name}", self.fake, lib=LIBRARY)

    def _check(self, implementation: Callable[..., Any]) -> None:
        parameters = inspect.signature(implementation).parameters.values()
        names = [one.name for one in parameters if one.kind is not one.VAR_POSITIONAL]
        taken = names + self._parameters[len(names) :] if len(names) < len(parameters) else names  # the rest at once
        if taken != self._parameters:
            raise TypeError(f"{self.name}: implementation takes {names}, schema {self._parameters}")

    def _like_first(self, *args: Any) -> Tensor:
        return torch.empty_like(args[0], dtype=args[self._parameters.index("dtype")])

    def register(self, device_type: str, implementation: Callable[..., Any]) -> None:
        """Offer a fast implementation for a device; it may return ``NotImplemented``."""
        self._check(implementation)
        self._fast.setdefault(device_type, []).append(implementation)

    def run(self, *args: Any) -> Tensor:
        """Compute now, with the first implementation that takes these arguments."""
        for implementation in self._fast.get(args[0].device.type, ()):
            result = implementation(*args)
            if result is not NotImplemented:
                computed: Tensor = result
                return computed
        return self.reference(*args)

    def __call__(self, *args: Any) -> Tensor:
        tracing = torch.compiler.is_compiling()
        if _spoken and (words := dialect()) is not None and (tracing or self.name in words.doors):
            said: Tensor = words.doors[self.name](*args)
            return said
        if tracing:
            recorded: Tensor = self._operator(*args)
            return recorded
        return self.run(*args)
