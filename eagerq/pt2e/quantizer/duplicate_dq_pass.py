"""A dequantize of its own for each annotated user of a quantized tensor."""

from __future__ import annotations

from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from eagerq.pt2e.graph import choose_qparams_of, is_dequantize, users_of_values
from eagerq.pt2e.quantizer.quantizer import ANNOTATION
from eagerq.pt2e.quantizer.utils import is_valid_annotation

__all__ = ["DuplicateDQPass"]


class DuplicateDQPass(PassBase):
    """Gives each annotated user of a dequantize its own copy, so that backends can match ``dq → operator``.

    A dequantize with parameters found at run time stays shared; so does one with a single user.

    Example:
        >>> from torch.fx import symbolic_trace
        >>> DuplicateDQPass()(symbolic_trace(lambda x: x + 1)).modified
        False
    """

    def call(self, graph_module: GraphModule) -> PassResult:
        modified = False
        for node in [node for node in graph_module.graph.nodes if is_dequantize(node)]:
            users = [user for user in users_of_values(node) if is_valid_annotation(user.meta.get(ANNOTATION))]
            if len(users_of_values(node)) > 1 and not _is_dynamic(node):
                for user in users:
                    with graph_module.graph.inserting_after(node):
                        user.replace_input_with(node, graph_module.graph.node_copy(node))
                modified = modified or bool(users)
        if modified:
            graph_module.graph.eliminate_dead_code()
            graph_module.recompile()
        return PassResult(graph_module, modified)


def _is_dynamic(dequantize: Node) -> bool:
    quantize = dequantize.args[0]
    return isinstance(quantize, Node) and bool(choose_qparams_of(quantize))
