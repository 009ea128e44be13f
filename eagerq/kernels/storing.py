"""How Inductor stores what operators of any layout take."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

__all__ = ["is_exporting", "is_last", "ready", "room_like", "stored", "storing"]


def is_exporting() -> bool:
    """Whether a graph is made for export; torch 2.11's own function says so whenever it is compiled."""
    flag: bool = getattr(torch.compiler, "_is_exporting_flag", False)
    return flag


def is_last(x: Tensor) -> bool:
    """Whether ``x`` is stored channels_last."""
    return x.dim() == 4 and x.stride(1) == 1 and x.is_contiguous(memory_format=torch.channels_last)


def _format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if is_last(x) else torch.contiguous_format


def stored(x: Tensor, like: Tensor) -> Tensor:
    """``x`` as operators give it to the graph: channels_last for an image stored so, otherwise contiguous."""
    return x.contiguous(memory_format=_format(like))


def room_like(x: Tensor) -> Tensor:
    """What a fake implementation gives for a result that is :func:`stored` like ``x``."""
    return torch.empty_like(x, memory_format=_format(x))


def ready(x: Tensor) -> Tensor:
    """``x`` in the order in which the work is done, whatever that of the graph around it: images channels_last."""
    return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.contiguous_format)


def _as_image(ir: Any, x: Any) -> Any:
    """Channels last, for tensors of four axes."""
    return ir.ExternKernel.require_channels_last(x) if len(x.get_size()) == 4 else x


def _as_read(ir: Any, x: Any) -> Any:
    """In the order of what it is computed from: left alone, operators' arguments are stored contiguous."""
    x.realize()
    if ir.is_storage_and_layout(x):
        buffer = ir.as_storage_and_layout(x, freeze=False)[0].data
        if isinstance(buffer, ir.ComputedBuffer):
            buffer.decide_layout()
    return x


_IMAGE_WORK: set[Any] = set()
_ORDERED = (torch.ops.aten.bmm.default,)


def _mark(graph: Any) -> None:
    """What leads to images and comes of them is saved in their layout, too: Inductor's rule for convolutions."""
    nodes, chosen = list(graph.module.graph.nodes), graph.nodes_prefer_channels_last
    last = max((i for i, node in enumerate(nodes) if node.target in _IMAGE_WORK), default=-1)
    if last < 0 or nodes[last] in chosen:
        return
    for node in reversed(nodes):
        if node.target in _IMAGE_WORK or (node.target not in _ORDERED and any(user in chosen for user in node.users)):
            chosen.add(node)
    for node in nodes[: last + 1]:
        if node in chosen:
            chosen.update(user for user in node.users if user.target not in _ORDERED)


_OF_LOWERING = ("config", "fallback_handler", "register_lowering", "V")
_OF_IR = ("ComputedBuffer", "ExternKernel", "as_storage_and_layout", "is_storage_and_layout")


@functools.cache
def _tell(name: str, images: bool) -> None:
    lowering, ir = sys.modules["torch._inductor.lowering"], sys.modules["torch._inductor.ir"]
    # none of this is torch's public interface: an Inductor without it stores as it thinks best, at a cost in copies
    if not all(map(partial(hasattr, lowering), _OF_LOWERING)) or not all(map(partial(hasattr, ir), _OF_IR)):
        return
    operator = getattr(torch.ops.eagerq, name).default
    compute, store = lowering.fallback_handler(operator, add_to_fallback_set=False), _as_image if images else _as_read
    if images:
        _IMAGE_WORK.add(operator)

    def lowered(x: Any, *rest: Any) -> Any:
        if lowering.config.layout_optimization:
            _mark(lowering.V.graph)
            x = store(ir, x)
        return compute(x, *rest)

    lowering.register_lowering(operator, type_promotion_kind=None)(lowered)


def storing(name: str, fake: Callable[..., Any], images: bool) -> Callable[..., Any]:
    """The fake implementation of an operator, which lets Inductor know what layout its first argument should have.

    Args:
        name: the operator's.
        images: channels_last, as ahead of torch's convolutions; otherwise as computed.
    """

    @functools.wraps(fake)
    def call(*args: Any) -> Any:
        if "torch._inductor.lowering" in sys.modules:  # it is there before anything is lowered
            _tell(name, images)
        return fake(*args)

    return call
