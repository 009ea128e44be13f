"""The inputs of a program that are the model's own: those that count, under the names that users know."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, TensorArgument
from torch.fx import Node

__all__ = ["settle_constants"]


def settle_constants(program: ExportedProgram, names: Mapping[str, str]) -> ExportedProgram:
    """The program without parameters, buffers and constants that nothing uses; the others saved with it.

    Args:
        names: buffers to the names that they shall have.
    """
    tensors = {**program.constants, **program.state_dict}
    graph, signature = program.graph, program.graph_signature
    graph.eliminate_dead_code()
    kept: list[InputSpec] = []
    for node, spec in zip(graph.find_nodes(op="placeholder"), signature.input_specs, strict=True):
        if spec.target in tensors and not node.users:
            graph.erase_node(node)
        elif spec.target in names:
            kept.append(_renamed(node, names[spec.target]))
            tensors[names[spec.target]] = tensors[spec.target]
        else:
            kept.append(spec)
    saved = [spec.target for spec in kept if spec.kind is InputKind.PARAMETER or spec.persistent]
    others = [spec.target for spec in kept if spec.target in tensors and spec.target not in saved]
    objects = {name: value for name, value in program.constants.items() if not isinstance(value, Tensor)}
    return ExportedProgram(
        root=program.graph_module,
        graph=graph,
        graph_signature=ExportGraphSignature(kept, signature.output_specs),
        state_dict={name: tensors[name] for name in saved if name is not None},
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        example_inputs=program.example_inputs,
        constants={**objects, **{name: tensors[name] for name in others if name is not None}},
        verifiers=program.verifiers,
    )


def _renamed(node: Node, target: str) -> InputSpec:
    """What the signature says of a buffer that gets another name, which its node gets too."""
    wanted, taken = f"b_{target.replace('.', '_')}", {other.name for other in node.graph.nodes}
    node.name = node.target = wanted if wanted not in taken else f"{wanted}_{len(taken)}"
    return InputSpec(InputKind.BUFFER, TensorArgument(node.name), target, persistent=True)
