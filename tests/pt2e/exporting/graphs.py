"""What the tests ask of exported programs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from eagerq.pt2e import export
from eagerq.pt2e.operators import DEQUANTIZE_PER_TENSOR, QUANTIZE_PER_TENSOR


def used(program: ExportedProgram) -> Counter[Any]:
    """How often each function is called."""
    return Counter(node.target for node in program.graph.nodes if node.op == "call_function")


def quantized_as(node: Node) -> tuple[Any, ...]:
    """Scale, zero point and integers in use, of a Q or DQ node."""
    return node.args[1:]


def check_form(program: ExportedProgram) -> None:
    """Torch's operators only; integers mean the same where they are made and used, and are not rounded twice."""
    assert not [target for target in used(program) if "eagerq" in str(target)]
    for node in program.graph.nodes:
        if node.target is DEQUANTIZE_PER_TENSOR:
            assert node.args[0].target is QUANTIZE_PER_TENSOR, node.args[0]
            assert quantized_as(node) == quantized_as(node.args[0])
        if node.target is QUANTIZE_PER_TENSOR:
            assert node.args[0].target is not DEQUANTIZE_PER_TENSOR


@torch.no_grad()
def steps_between(got: Any, wanted: Any, step: float) -> Tensor:
    """By how many steps of the result each value differs."""
    pairs = zip(tree_leaves(got), tree_leaves(wanted), strict=True)
    differences = []
    for a, b in pairs:
        assert a.shape == b.shape
        assert a.dtype is b.dtype
        differences.append(((a.double() - b.double()) / step).abs().round().flatten())
    return torch.cat(differences)


@torch.no_grad()
def exported(
    model: nn.Module, inputs: tuple[Tensor, ...], dynamic_shapes: Any = None
) -> tuple[ExportedProgram, nn.Module]:
    """The program, checked, and what runs it."""
    program = export(model, inputs, dynamic_shapes=dynamic_shapes)
    check_form(program)
    return program, program.module()
