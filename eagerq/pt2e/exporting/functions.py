"""What torch's functions do with QTensors in Q/DQ form: as with real numbers, the result quantized as the argument."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from eagerq.pt2e.exporting.doors import quantize
from eagerq.qtensor import HANDLERS, KEEPING, QTensor
from eagerq.qtensor_ops import _named, _same_parameters
from eagerq.scheme import integer_type

__all__ = ["FUNCTIONS"]

_Function = Callable[..., Any]


def _real(value: Any) -> Any:
    return value.dequantize() if isinstance(value, QTensor) else value


def _out_of_place(func: _Function) -> _Function:
    """The function that returns what ``func`` (whose name ends so) writes into its argument."""
    for owner in (torch, torch.Tensor, F):
        if getattr(owner, func.__name__, None) is func:
            found: _Function = getattr(owner, func.__name__[:-1])
            return found
    raise AssertionError(func)


def _on_reals(func: _Function) -> _Function:
    name, signature = func.__name__, inspect.signature(HANDLERS[func])
    in_place = name.endswith("_") and not name.endswith("__")
    pure = _out_of_place(func) if in_place else func

    def handler(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        overwrite = given.arguments.pop("inplace", in_place)
        leaves = tree_leaves((args, kwargs))
        first = next(leaf for leaf in leaves if isinstance(leaf, QTensor))
        for leaf in leaves:
            if isinstance(leaf, QTensor) or (isinstance(leaf, Tensor) and leaf.is_floating_point()):
                _same_parameters(first, leaf, name)
        kind = integer_type(first.integers.dtype)
        output = (first.scale, first.zero_point, kind.storage, kind.minimum, kind.maximum)

        def quantized(value: Any) -> Any:
            if isinstance(value, Tensor) and value.is_floating_point():
                return QTensor(quantize(value, *output), first.scale, first.zero_point)
            return value

        result = tree_map(quantized, pure(*tree_map(_real, given.args), **tree_map(_real, given.kwargs)))
        return first.overwrite(result) if overwrite else result

    return handler


def _the_same(x: QTensor, *args: Any, **kwargs: Any) -> QTensor:
    """A copy: a graph of values knows no memory, nor how it is laid out."""
    return x.like(x.integers)


FUNCTIONS: dict[_Function, _Function] = {
    **{func: _on_reals(func) for func in KEEPING},
    **{func: _the_same for func in _named("clone", "detach", "contiguous")},
    getattr(torch.Tensor, "data").__get__: _the_same,  # noqa: B009
}
