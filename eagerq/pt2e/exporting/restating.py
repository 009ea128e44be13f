"""Activations in the other 8-bit type: the same real values, by integers and zero points 128 away."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from eagerq.errors import InvalidArgumentError, UnsupportedError
from eagerq.pt2e import operators
from eagerq.pt2e.graph import (
    choose_qparams_of,
    describe,
    is_choose_qparams,
    is_dequantize,
    is_quantize,
    made_from,
    users_of_values,
)
from eagerq.scheme import integer_dtype, integer_type

__all__ = ["checked_dtype", "restate"]

_aten = torch.ops.aten
# copies: of integers in another type they are the same
_COPYING = frozenset(
    (_aten.alias, _aten.clone, _aten.contiguous, _aten.detach, _aten.detach_, _aten.lift_fresh_copy, _aten.pin_memory)
)
_PER_TENSOR = (operators.QUANTIZE_PER_TENSOR, operators.QUANTIZE_PER_TENSOR_DYNAMIC)
_OTHER = {torch.int8: torch.uint8, torch.uint8: torch.int8}
# the arguments that are integers: the zero point, and the range's ends
_SHIFTED: dict[Any, tuple[int, ...]] = {
    operators.QUANTIZE_PER_TENSOR: (2, 3, 4),
    operators.DEQUANTIZE_PER_TENSOR: (2, 3, 4),
    operators.QUANTIZE_PER_TENSOR_DYNAMIC: (3, 4),
    operators.DEQUANTIZE_PER_TENSOR_DYNAMIC: (3, 4),
    operators.CHOOSE_QPARAMS_AFFINE: (1, 2),
}


def checked_dtype(dtype: torch.dtype | None) -> torch.dtype | None:
    """What ``export`` is asked for, if it can be had."""
    wanted = None if dtype is None else integer_dtype(dtype)
    if wanted is not None and wanted not in _OTHER:
        raise InvalidArgumentError(
            f"activation_dtype is {dtype}", remedy="pass torch.int8, torch.uint8, or None to keep what the model has"
        )
    return wanted


def restate(program: ExportedProgram, dtype: torch.dtype) -> None:
    """Have every activation between a quantize and its dequantizes in ``dtype``; weights and tables stay.

    Raises:
        UnsupportedError: for integers that meet anything else.
    """
    shifts: dict[Node, int] = {}
    for node in program.graph.nodes:
        if is_quantize(node) and node.meta["val"].dtype is not dtype:
            shifts.update(dict.fromkeys(_sharing(node, dtype), _shift(node, dtype)))
    given = {node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs}
    for node in program.graph.nodes:
        other = is_dequantize(node) and node not in shifts and _dtype_of(node.args[0]) is not dtype
        if other and not given.isdisjoint(made_from(node)):  # it is no weight
            raise _refused(node, dtype, "dequantizes integers that the program is given")
    for node, shift in shifts.items():
        _restate(node, shift, dtype)


def _dtype_of(node: Any) -> torch.dtype:
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype


def _sharing(quantize: Node, dtype: torch.dtype) -> Iterator[Node]:
    """A quantize, what finds its parameters, and all that its integers meet."""
    if quantize.target not in _PER_TENSOR or _dtype_of(quantize) is not _OTHER[dtype]:
        raise _refused(quantize, dtype, "quantizes to something else than 8 bits with one scale")
    yield from filter(is_choose_qparams, choose_qparams_of(quantize))
    ahead = [quantize]
    while ahead:
        node = ahead.pop()
        yield node
        for user in users_of_values(node):
            if is_dequantize(user):
                yield user
            elif getattr(user.target, "overloadpacket", None) in _COPYING:
                ahead.append(user)
            else:
                raise _refused(user, dtype, f"takes the integers of {quantize.name!r} as they are")


def _refused(node: Node, dtype: torch.dtype, does: str) -> UnsupportedError:
    return UnsupportedError(
        f"activations cannot be restated in {dtype}: {describe(node)} {does}",
        remedy="leave activation_dtype out, or give the model activations of that type by its qconfig",
    )


def _shift(quantize: Node, dtype: torch.dtype) -> int:
    """What to add to integers; where the range is found as the input comes, it has to hold 0."""
    if not choose_qparams_of(quantize):
        return integer_type(dtype).minimum - integer_type(_OTHER[dtype]).minimum
    arguments: Any = quantize.args
    low, high = arguments[3:5]
    return (-((high - low + 1) // 2) if dtype is torch.int8 else 0) - low


def _restate(node: Node, shift: int, dtype: torch.dtype) -> None:
    arguments: list[Any] = [dtype if isinstance(arg, torch.dtype) else arg for arg in node.args]
    for index in _SHIFTED.get(node.target, ()):
        arguments[index] += shift
    node.args = tuple(arguments)
    node.meta.pop("eager_input_vals", None)  # speaks of the other type
    value = node.meta["val"]
    if isinstance(value, Tensor) and not value.is_floating_point():
        node.meta["val"] = value.to(dtype)
        node.meta["tensor_meta"] = node.meta["tensor_meta"]._replace(dtype=dtype)
