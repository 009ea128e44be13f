"""Training and evaluation modes of exported graphs, in which they are constants of the operators."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import nn
from torch.fx import GraphModule, Node

from eagerq.errors import InvalidArgumentError, UnsupportedError
from eagerq.pt2e.graph import argument, has_argument, set_argument

__all__ = [
    "WrapperModule",
    "allow_exported_model_train_eval",
    "disallow_exported_model_train_eval",
    "model_is_exported",
    "move_exported_model_to_eval",
    "move_exported_model_to_train",
]

_aten: Any = torch.ops.aten
# What aten calls it: dropouts and recurrent layers, batch norms and rrelu, instance norm.
_FLAGS = ("train", "training", "use_input_stats")


class WrapperModule(nn.Module):
    """A function as a module, so that it can be exported.

    Args:
        fn: what ``forward`` calls.

    Example:
        >>> program = torch.export.export(WrapperModule(torch.sin), (torch.zeros(2),))
        >>> program.module()(torch.zeros(2))
        tensor([0., 0.])
    """

    def __init__(self, fn: Callable[..., Any]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.fn(*args, **kwargs)


def model_is_exported(m: nn.Module) -> bool:
    """Whether the module comes from ``torch.export`` (and not from symbolic tracing, or from no tracing at all).

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> model_is_exported(torch.export.export(layer, (torch.zeros(1, 2),)).module())
        True
        >>> model_is_exported(layer), model_is_exported(torch.fx.symbolic_trace(layer))
        (False, False)
    """
    return isinstance(m, GraphModule) and any("val" in node.meta for node in m.graph.nodes)


def move_exported_model_to_eval(model: GraphModule) -> GraphModule:
    """Do to an exported graph what ``eval()`` does to the model that it was exported from.

    Dropout, batch and instance norm, rrelu and the dropout of recurrent layers change in place, and batches are no
    longer counted. Python code that reads ``self.training`` was settled by the export, and so was the ``dropout_p``
    of attention: these stay as they are.

    Args:
        model: an exported graph, which may have been prepared or converted since.

    Raises:
        InvalidArgumentError: for a model that is no graph.

    Example:
        >>> graph = torch.export.export(nn.Dropout(0.5), (torch.ones(4),)).module()
        >>> move_exported_model_to_eval(graph)(torch.ones(4))
        tensor([1., 1., 1., 1.])
    """
    return _move(model, training=False)


def move_exported_model_to_train(model: GraphModule) -> GraphModule:
    """Do to an exported graph what ``train()`` does to the model; see :func:`move_exported_model_to_eval`."""
    return _move(model, training=True)


def _move(model: GraphModule, training: bool) -> GraphModule:
    _check_graph(model)
    for module in model.modules():
        module.training = training
        if isinstance(module, GraphModule):  # the branches of a condition are graphs of their own
            for node in module.graph.nodes:
                _switch(node, training)
            module.recompile()
    return model


def _switch(node: Node, training: bool) -> None:
    if node.target is _aten._native_batch_norm_legit_no_training.default and training:
        *tensors, momentum, eps = (argument(node, arg.name) for arg in node.target._schema.arguments)
        node.target, node.kwargs = _aten._native_batch_norm_legit.default, {}
        node.args = (*tensors, True, momentum, eps)
    elif node.target is _aten.add_.Tensor and _counts_batches(node):
        node.update_arg(1, int(training))
    elif not (has_argument(node, "running_mean") and argument(node, "running_mean") is None):
        # (without running statistics a norm uses those of the batch, always)
        for flag in _FLAGS:
            if has_argument(node, flag):
                set_argument(node, flag, training)


def _counts_batches(add: Node) -> bool:
    counter = add.args[0]
    return (
        isinstance(counter, Node)
        and counter.op == "get_attr"
        and str(counter.target).rpartition(".")[2] == "num_batches_tracked"
        and add.args[1] in (0, 1)
    )


def allow_exported_model_train_eval(model: GraphModule) -> GraphModule:
    """Let ``model.train()`` and ``model.eval()`` call the two functions above, for code that cannot be changed.

    Example:
        >>> graph = torch.export.export(nn.Dropout(0.5), (torch.ones(4),)).module()
        >>> allow_exported_model_train_eval(graph).eval()(torch.ones(4))
        tensor([1., 1., 1., 1.])
    """
    return _install(model, allow_exported_model_train_eval, _train, _eval)


def disallow_exported_model_train_eval(model: GraphModule) -> GraphModule:
    """Let ``model.train()`` and ``model.eval()`` raise, since they would change nothing, and say what to call.

    ``prepare_pt2e`` and ``convert_pt2e`` do this to what they return, as ``torch.export`` does.
    """
    return _install(model, disallow_exported_model_train_eval, _refuse_train, _refuse_eval)


def _install(model: GraphModule, installer: Callable[..., Any], train: Any, evaluate: Any) -> GraphModule:
    _check_graph(model)
    methods: dict[str, Any] = {"train": types.MethodType(train, model), "eval": types.MethodType(evaluate, model)}
    model.__dict__.update(methods)
    ours = (allow_exported_model_train_eval, disallow_exported_model_train_eval)
    # a graph's copy has none of the attributes of its original
    model._deepcopy_hooks = [*(hook for hook in model._deepcopy_hooks if hook not in ours), installer]
    return model


def _train(self: GraphModule, mode: bool = True) -> GraphModule:
    return _move(self, mode)


def _eval(self: GraphModule) -> GraphModule:
    return _move(self, training=False)


def _refuse_train(self: GraphModule, mode: bool = True) -> NoReturn:
    _refuse("train" if mode else "eval")


def _refuse_eval(self: GraphModule) -> NoReturn:
    _refuse("eval")


def _refuse(mode: str) -> NoReturn:
    raise UnsupportedError(
        f"{mode}() would leave an exported graph's dropout and batch norm as they are",
        remedy=f"call eagerq.pt2e.move_exported_model_to_{mode}(model), or once "
        "eagerq.pt2e.allow_exported_model_train_eval(model), after which train() and eval() do that",
    )


def _check_graph(model: nn.Module) -> None:
    if not isinstance(model, GraphModule):
        raise InvalidArgumentError(
            "expected an exported graph",
            module=model,
            remedy="call train() and eval() on a model that was not exported",
        )
