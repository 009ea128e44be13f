"""Telling one run of torch's compiler from another."""

from __future__ import annotations

from itertools import count
from typing import Any

import torch

__all__ = ["this_trace"]

_context: Any = getattr(getattr(torch, "_guards", None), "TracingContext", None)  # a private name
_numbers = count(1)


@torch.compiler.assume_constant_result
def this_trace() -> int:
    """In code that is being compiled, a number for what becomes one graph with it; where nobody knows, always another.

    A module that is compiled by itself and the hooks on it are traced one after the other.
    """
    context = None if _context is None else _context.try_get()
    if context is None:
        return next(_numbers)
    number: int | None = getattr(context, "eagerq_number", None)
    if number is None:
        number = context.eagerq_number = next(_numbers)
    return number
