"""Questions about the nodes of a graph, shared by everything that reads one."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.fx import Node

__all__ = [
    "ANNOTATION",
    "EdgeOrNode",
    "argument",
    "choose_qparams_of",
    "describe",
    "erase_unused",
    "has_argument",
    "in_memory_of",
    "is_choose_qparams",
    "is_dequantize",
    "is_quantize",
    "made_from",
    "modules_of",
    "qualified_name",
    "set_argument",
    "users_of_values",
    "writes_buffer",
    "written_by",
]

ANNOTATION = "quantization_annotation"
"""Key of a node's annotation in its ``meta``."""

EdgeOrNode = tuple[Node, Node] | Node
"""A place in a graph: the output of a node, or the input ``(producer, consumer)`` of one."""

# torchao has operators of its own for blocks and groups; what they do is in their names too
_DIALECTS = ("quantized_decomposed", "torchao")
_SIZES = (torch.ops.aten.sym_size, torch.ops.aten.sym_numel)


def _does(node: object, what: str) -> bool:
    if not isinstance(node, Node):
        return False
    packet = getattr(node.target, "overloadpacket", node.target)  # torchao's observers call packets
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return False
    dialect, _, name = packet._qualified_op_name.partition("::")
    return dialect in _DIALECTS and name.startswith(what)


def is_quantize(node: object) -> bool:
    """Whether this is a quantize of any kind: per tensor, channel, token or group; static or dynamic."""
    return _does(node, "quantize_")


def is_dequantize(node: object) -> bool:
    """Whether this is a dequantize of any kind."""
    return _does(node, "dequantize_")


def is_choose_qparams(node: object) -> bool:
    """Whether this finds scale and zero point of the tensor that it is given."""
    return _does(node, "choose_qparams")


def choose_qparams_of(quantize: Node) -> list[Node]:
    """Where a dynamic quantize has its scale and zero point from: its getitems, then choose_qparams; else nothing."""
    items = [node for node in quantize.all_input_nodes if node.target is operator.getitem]
    sources = [item for item in items if is_choose_qparams(item.args[0])]
    return [*sources, *sources[0].all_input_nodes] if sources else []


def modules_of(node: Node) -> list[tuple[str, str]]:
    """Qualified name and class (``torch.nn.modules.linear.Linear``) of the modules that a node comes from, outer first.

    Parameters, inputs and outputs come from none; the root has an empty name.
    """
    found = []
    for entry in (node.meta.get("nn_module_stack") or {}).values():
        path, kind = entry if isinstance(entry, tuple) else (str(entry), "")
        name = path.removeprefix("L['self']").removeprefix("L__self__").lstrip(".")
        found.append((name, f"{kind.__module__}.{kind.__qualname__}" if isinstance(kind, type) else str(kind)))
    return found


def qualified_name(node: Node) -> str:
    """Of the innermost module that the node comes from; empty for the root or where it is not known."""
    stack = modules_of(node)
    return stack[-1][0] if stack else ""


def describe(node: Any) -> str:
    """``node 'conv2d' (aten.conv2d.default, in module 'layer1.conv')``, for messages."""
    if not isinstance(node, Node):
        return repr(node)
    name = qualified_name(node)
    where = f", in module '{name}'" if name else ""
    return f"node '{node.name}' ({node.target}{where})"


def users_of_values(node: Node) -> list[Node]:
    """Users of the tensor's values: those that only ask for its size do not count."""
    return [user for user in node.users if getattr(user.target, "overloadpacket", user.target) not in _SIZES]


def written_by(node: Node) -> Node | None:
    """What an in-place operator writes into: its first argument. None for any other node."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.arguments or not node.args or not isinstance(node.args[0], Node):
        return None
    alias = schema.arguments[0].alias_info
    return node.args[0] if alias is not None and alias.is_write else None


def made_from(*nodes: Node) -> set[Node]:
    """All the nodes that the values of these depend on, themselves among them."""
    return _reached(nodes, lambda node: node.all_input_nodes)


def in_memory_of(*nodes: Node) -> set[Node]:
    """All the nodes whose memory the values of these may lie in, as views of it do; themselves among them."""
    return _reached(nodes, lambda node: node.all_input_nodes if _may_view(node) else [])


def _may_view(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is None or any(result.alias_info is not None for result in schema.returns)


def _reached(nodes: Iterable[Node], sources: Callable[[Node], list[Node]]) -> set[Node]:
    found, ahead = set(nodes), list(nodes)
    while ahead:
        new = [source for source in sources(ahead.pop()) if source not in found]
        found.update(new)
        ahead.extend(new)
    return found


def writes_buffer(node: Node, target: Node) -> bool:
    """Whether a node writes into ``target``, and that is (a view of) what the model keeps."""
    if written_by(node) is not target:
        return False
    operations = {source.op for source in made_from(target)}
    return "get_attr" in operations and "placeholder" not in operations


def _arguments(node: Node) -> list[Any]:
    return node.target._schema.arguments if isinstance(node.target, torch._ops.OpOverload) else []


def has_argument(node: Node, name: str) -> bool:
    """Whether the node calls an operator that has an argument of this name."""
    return any(known.name == name for known in _arguments(node))


def argument(node: Node, name: str) -> Any:
    """An operator's argument by its name in the schema: given by position, by name, or left at its default."""
    if name in node.kwargs:
        return node.kwargs[name]
    index, known = next((index, known) for index, known in enumerate(_arguments(node)) if known.name == name)
    return node.args[index] if index < len(node.args) else known.default_value


def set_argument(node: Node, name: str, value: Any) -> None:
    """Change an operator's argument, named as for :func:`argument`."""
    known = _arguments(node)
    index = next(index for index, one in enumerate(known) if one.name == name)
    if name in node.kwargs or known[index].kwarg_only:
        node.update_kwarg(name, value)
    else:
        before = [argument(node, one.name) for one in known[:index]]
        node.args = (*before, value, *node.args[index + 1 :])


def erase_unused(node: Node) -> None:
    """Erase a node that has no users, then those of its inputs that have none left (but no input of the graph)."""
    ahead, erased = [node], set()
    while ahead:
        node = ahead.pop()
        if not node.users and node.op != "placeholder" and node not in erased:
            erased.add(node)
            ahead.extend(node.all_input_nodes)
            node.graph.erase_node(node)
