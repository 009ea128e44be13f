"""The trace of a model in Q/DQ words, each node marked with the call it comes from."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.traceback import annotate, get_current_meta, preserve_node_meta
from torch.utils._pytree import tree_leaves

from eagerq.errors import EagerqError, InvalidInputError, UnsupportedError, calling_module, stamped_name
from eagerq.kernels.dispatch import Dialect, speaking
from eagerq.pt2e.exporting.doors import DOORS
from eagerq.pt2e.exporting.explaining import explained
from eagerq.pt2e.exporting.functions import FUNCTIONS
from eagerq.qtensor import QTensor

__all__ = ["Call", "take_call", "trace"]

_CUSTOM = "custom"  # where torch keeps what `annotate` says of a node
_MARK = "eagerq_call"
_BESIDES = ("original_aten", "seq_nr")  # what torch writes together with it
_numbers = itertools.count()


class Call(NamedTuple):
    """A call of a door, or of a function with a QTensor: its nodes belong together."""

    number: int
    module: str
    """Qualified name of the innermost module that was running; empty for the root."""


def _marked(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _MARK in get_current_meta().get(_CUSTOM, ()):  # part of another call
            return function(*args, **kwargs)
        module = calling_module()
        name = "" if module is None else stamped_name(module)
        with annotate({_MARK: Call(next(_numbers), name)}):
            return function(*args, **kwargs)

    return call


class _Doors(dict[str, Callable[..., Any]]):
    def __missing__(self, name: str) -> Callable[..., Any]:
        raise UnsupportedError(
            f"it calls '{name}', which has no Q/DQ form",
            module=calling_module(),
            remedy="leave this module in float (qconfig None); torch.compile takes it as it is",
        )


def _all_marked(words: Mapping[Any, Callable[..., Any]]) -> dict[Any, Callable[..., Any]]:
    return {word: _marked(function) for word, function in words.items()}


_QDQ = Dialect(_Doors(_all_marked(DOORS)), _all_marked(FUNCTIONS))


def trace(model: nn.Module, example_inputs: tuple[Any, ...], dynamic_shapes: Any) -> ExportedProgram:
    """The program that torch.export makes of an int8 model in Q/DQ words.

    Args:
        model: whose modules have their names stamped on them; it gets a hook.

    Raises:
        EagerqError: what the model's modules say, and for whatever torch.export cannot do.
    """
    model.register_forward_hook(_refuse_integers)
    try:
        with speaking(_QDQ), preserve_node_meta(), torch.no_grad():
            return torch.export.export(model, example_inputs, dynamic_shapes=dynamic_shapes, strict=False)
    except EagerqError:
        raise
    except Exception as error:
        raise explained(error, dynamic_shapes) from error


def _refuse_integers(model: nn.Module, args: Any, output: Any) -> None:
    if any(isinstance(leaf, QTensor) for leaf in tree_leaves(output)):
        raise InvalidInputError(
            "the model returns a quantized tensor (QTensor), which a program cannot",
            module=model,
            remedy="put a DeQuantStub at its end, or return int_repr() for the integers",
        )


def take_call(node: Node) -> Call | None:
    """The call that a node comes from, None for what is computed in float; the mark is gone then."""
    for key in _BESIDES:
        node.meta.pop(key, None)
    custom = node.meta.pop(_CUSTOM, {})
    call: Call | None = custom.pop(_MARK, None)
    others = {key: value for key, value in custom.items() if not key.startswith("_torchdynamo")}
    if others:  # the user's own annotations
        node.meta[_CUSTOM] = others
    return call
