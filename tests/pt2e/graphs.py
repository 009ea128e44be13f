"""What the tests of graphs share: exporting, and what a graph calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node


def exported(model: nn.Module, *inputs: Tensor, dynamic: bool = False) -> GraphModule:
    """The model as a graph, in the mode that it is in; ``dynamic`` leaves the batch size open."""
    shapes: Any = tuple({0: torch.export.Dim.DYNAMIC} for _ in inputs) if dynamic else None
    return torch.export.export(model, inputs, dynamic_shapes=shapes).module()  # type: ignore[return-value]


def calls(model: GraphModule) -> list[Any]:
    """The operators that a graph calls, in order."""
    return [node.target for node in model.graph.nodes if node.op == "call_function"]


def call(model: GraphModule, target: Any) -> Node:
    """The one node that calls this operator."""
    (node,) = [node for node in model.graph.nodes if node.target is target]
    return node


def peer(name: str) -> Any:
    """A module of torchao or ExecuTorch; the releases that there are say other things, or nothing, on older torch."""
    if torch.torch_version.TorchVersion(torch.__version__) < (2, 13):
        pytest.skip("torchao and ExecuTorch are made for torch 2.13 and later")
    return pytest.importorskip(name)
