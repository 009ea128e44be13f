"""From observers to Q/DQ: what has been seen becomes scales and zero points in the graph."""

from __future__ import annotations

import copy
import operator
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from eagerq.errors import UnsupportedError
from eagerq.pt2e import operators
from eagerq.pt2e.constant_folding import constants_of, value_of
from eagerq.pt2e.graph import describe
from eagerq.pt2e.rewriting import Names, add_buffer, attribute_of
from eagerq.scheme import (
    is_per_channel,
    per_tensor_affine,
    per_tensor_symmetric,
    quantization_range,
    to_underlying_dtype,
)

__all__ = ["is_observer", "observer_nodes", "replace_observers"]

_DYNAMIC = {
    per_tensor_affine: operators.CHOOSE_QPARAMS_AFFINE,
    per_tensor_symmetric: operators.CHOOSE_QPARAMS_SYMMETRIC,
}
_DYNAMIC_DTYPES = (torch.uint8, torch.int8)


def is_observer(module: Any) -> bool:
    """Whether a module of a graph is an observer or a fake quantizer, ours or another's."""
    return isinstance(module, nn.Module) and (hasattr(module, "calculate_qparams") or hasattr(module, "convert"))


def observer_nodes(model: GraphModule) -> list[tuple[Node, Any]]:
    """The nodes that call an observer or fake quantizer, each with its module."""
    calls = ((node, attribute_of(model, node)) for node in model.graph.nodes if node.op == "call_module")
    return [(node, module) for node, module in calls if is_observer(module)]


def replace_observers(model: GraphModule) -> None:
    """Put a quantize and a dequantize where the graph calls an observer or fake quantizer; changes ``model``.

    An observer with a ``convert(model, node)`` of its own does it itself. One that quantizes to nothing
    (a float placeholder) just goes. Those of constants that have seen nothing look at them now; others
    that have seen nothing are named in one warning.

    Raises:
        UnsupportedError: for parameters at run time that there is no operator for.
    """
    found, unseen = _with_constants_seen(model, observer_nodes(model))
    if unseen:
        places = ", ".join(describe(node.args[0]) for node in unseen)
        warnings.warn(
            f"these have seen no data, scale 1 and zero point 0 are used: {places}. "
            "Run the prepared model on data before you convert it.",
            stacklevel=3,
        )
    conversion = _Conversion(model)
    with warnings.catch_warnings():
        if unseen:  # they would say it again, each for itself
            warnings.simplefilter("ignore")
        for node, observer in found:
            conversion.replace(node, observer)


def _with_constants_seen(
    model: GraphModule, found: list[tuple[Node, Any]]
) -> tuple[list[tuple[Node, Any]], list[Node]]:
    """The same, where what had seen nothing has seen its constant; and the nodes that still have seen nothing."""
    if not any(_has_seen_nothing(observer) for _, observer in found):
        return found, []
    # copied together, since some derive their parameters from others
    copies = copy.deepcopy([observer for _, observer in found])
    found = [(node, made) for (node, _), made in zip(found, copies, strict=True)]
    constants = constants_of(model)
    for node, observer in found:
        (source,) = node.all_input_nodes
        if source in constants and _has_seen_nothing(observer):
            observer(value_of(model, source).detach())
    return found, [node for node, observer in found if _has_seen_nothing(observer)]


def _has_seen_nothing(observer: Any) -> bool:
    if getattr(observer, "is_dynamic", False):
        return False
    smallest = getattr(getattr(observer, "activation_post_process", observer), "min_val", None)
    return isinstance(smallest, Tensor) and not bool((smallest < torch.inf).any())


def _eps_of(observer: Any) -> float:
    eps = getattr(observer, "eps", getattr(getattr(observer, "activation_post_process", None), "eps", None))
    return torch.finfo(torch.float32).eps if eps is None else float(eps)


class _Conversion:
    """Puts Q/DQ in the place of observers, one after the other."""

    def __init__(self, model: GraphModule) -> None:
        self.model, self.graph, self.names = model, model.graph, Names(model)

    def replace(self, node: Node, observer: Any) -> None:
        if hasattr(observer, "convert"):
            observer.convert(self.model, node)
            return
        with self.graph.inserting_before(node):
            instead = self._instead(node, observer)
        node.replace_all_uses_with(instead)
        self.graph.erase_node(node)

    def _instead(self, node: Node, observer: Any) -> Node:
        (source,) = node.all_input_nodes
        if observer.dtype is torch.float16:
            half = self.graph.call_function(operators.CONVERT_ELEMENT_TYPE, (source, torch.float16))
            return self.graph.call_function(operators.CONVERT_ELEMENT_TYPE, (half, torch.float32))
        if observer.dtype.is_floating_point and not str(observer.dtype).startswith("torch.float8_"):
            return source
        dtype = to_underlying_dtype(observer.dtype)
        if getattr(observer, "is_dynamic", False):
            return self._dynamic(source, observer, dtype)
        low, high = observer.quant_min, observer.quant_max
        if low is None or high is None:
            low, high = quantization_range(observer.dtype, None, None, reduce_range=False)
        scale, zero_point = observer.calculate_qparams()
        if is_per_channel(observer.qscheme):
            stored = [
                add_buffer(self.model, self.names.new(name), value.detach().clone())
                for name, value in (("_scale_", scale), ("_zero_point_", zero_point))
            ]
            pair = operators.QUANTIZE_PER_CHANNEL, operators.DEQUANTIZE_PER_CHANNEL
            return self._pair(pair, source, *stored, int(observer.ch_axis), low, high, dtype)
        pair = operators.QUANTIZE_PER_TENSOR, operators.DEQUANTIZE_PER_TENSOR
        return self._pair(pair, source, float(scale), int(zero_point), low, high, dtype)

    def _dynamic(self, source: Node, observer: Any, dtype: torch.dtype) -> Node:
        choose = _DYNAMIC.get(getattr(observer, "qscheme", per_tensor_affine))
        if choose is None or dtype not in _DYNAMIC_DTYPES:
            raise UnsupportedError(
                f"{describe(source)} cannot be quantized at run time to {dtype} with {observer.qscheme}",
                remedy="specify uint8 or int8 and a per-tensor qscheme, or leave out is_dynamic",
            )
        limits = (observer.quant_min, observer.quant_max)
        chosen = self.graph.call_function(choose, (source, *limits, _eps_of(observer), dtype))
        qparams = (self.graph.call_function(operator.getitem, (chosen, index)) for index in (0, 1))
        pair = operators.QUANTIZE_PER_TENSOR_DYNAMIC, operators.DEQUANTIZE_PER_TENSOR_DYNAMIC
        return self._pair(pair, source, *qparams, *limits, dtype)

    def _pair(self, operations: tuple[Any, Any], source: Node, *qparams: Any) -> Node:
        value = source.meta.get("val")
        real = value.dtype if isinstance(value, Tensor) else torch.float32
        kwargs: dict[str, Any] = {} if real is torch.float32 else {"out_dtype": real}
        quantize, dequantize = operations
        quantized = self.graph.call_function(quantize, (source, *qparams))
        return self.graph.call_function(dequantize, (quantized, *qparams), kwargs)
