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
            if not (isinstance(value, Tensor) and value.is_floating_point()):
                return value
            new = QTensor(quantize(value, *output), first.scale, first.zero_point)
            return _view(first, new) if any(value._base is real for real in reals) else new

        args, kwargs = tree_map(_real, (given.args, given.kwargs))
        reals = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        result = tree_map(quantized, pure(*args, **kwargs))
        return first.overwrite(result) if overwrite else result

    return handler


def _view(x: QTensor, new: QTensor) -> QTensor:
    """``new``, as what shares ``x``'s memory eagerly."""
    new.base, x.views = x, (*x.views, new)
    return new


def _copied(x: QTensor, *args: Any, **kwargs: Any) -> QTensor:
    """The same values: a graph knows no memory, nor how it is laid out."""
    return x.like(x.integers)


def _detached(x: QTensor) -> QTensor:
    return _view(x, _copied(x))


FUNCTIONS: dict[_Function, _Function] = {
    **{func: _on_reals(func) for func in KEEPING},
    **{func: _copied for func in _named("clone", "contiguous")},
    **{func: _detached for func in _named("detach")},
    getattr(torch.Tensor, "data").__get__: _detached,  # noqa: B009
}
