"""How many integers are in use, told where they are read as it is where they are made."""

from __future__ import annotations

from torch.fx import Graph

from eagerq.pt2e.operators import DEQUANTIZE_PER_TENSOR, QUANTIZE_PER_TENSOR

__all__ = ["share_ranges"]

_LOW = 3  # of both operators' arguments; what follows is the same, too


def share_ranges(graph: Graph) -> None:
    """Give each dequantize the range of its quantize, which may leave out some of the dtype's integers."""
    for node in graph.nodes:
        if node.target is DEQUANTIZE_PER_TENSOR and node.args[0].target is QUANTIZE_PER_TENSOR:
            node.args = (*node.args[:_LOW], *node.args[0].args[_LOW:])
