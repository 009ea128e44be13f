"""export: the whole way from an eager model to its Q/DQ program."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

from eagerq.errors import InvalidArgumentError, InvalidConfigError, stamp_names
from eagerq.nn.quantized import QuantizedModule
from eagerq.nn.quantized.state import StoredTensors
from eagerq.pt2e.exporting.annotating import annotate
from eagerq.pt2e.exporting.constants import settle_constants
from eagerq.pt2e.exporting.ranges import share_ranges
from eagerq.pt2e.exporting.restating import checked_dtype, restate
from eagerq.pt2e.exporting.tracing import trace
from eagerq.pt2e.exporting.weights import centre_weights, spread_scales
from eagerq.qtensor import QTensor
from eagerq.quantize import convert
from eagerq.quantize.converting import RunWarnings
from eagerq.twins import Observing

__all__ = ["export"]


def export(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    dynamic_shapes: Any = None,
    activation_dtype: torch.dtype | None = None,
) -> ExportedProgram:
    """The program of a prepared or converted model in Q/DQ form, for graph compilers.

    Every quantized operation is a dequantize of its inputs, torch's float operator, and a quantize of its result
    (operators of ``torch.ops.quantized_decomposed``), with the scales and integers of the int8 model; float parts
    stay as they are.  Weights are integer buffers named as in the int8 model's state_dict.  A float operator
    between dequantize and quantize has ``meta["quantization_annotation"]``, and together with them
    ``meta["quantization_tag"]``: its module's qualified name.

    Args:
        model: prepared (then it is converted first, ``as_trained``) or converted, in any mode; left as it is.
        example_inputs: positional arguments of its ``forward``, as a tuple.
        dynamic_shapes: which dimensions may vary, as ``torch.export.export`` takes it:
            ``({0: torch.export.Dim("batch")},)`` for any batch.  Examples have to be at least 2 long there.
        activation_dtype: ``torch.int8`` or ``torch.uint8`` to have all activations in it, with the very same real
            values; by default they keep the model's.  Weights and embedding tables stay.

    Returns:
        An ``ExportedProgram`` without operators of eagerq.

    Raises:
        InvalidConfigError: for a float model that is not prepared.
        InvalidArgumentError: for arguments of another kind, or sizes that the model does not allow.
        UnsupportedError: for what torch.export cannot trace or a graph cannot say, naming the module.

    Example:
        >>> import eagerq
        >>> net = eagerq.QuantWrapper(nn.Linear(2, 2)).train()
        >>> net.qconfig = eagerq.get_default_qat_qconfig("onednn")
        >>> net = eagerq.prepare_qat(net)
        >>> _ = net(torch.randn(8, 2))
        >>> program = export(net, (torch.randn(4, 2),), ({0: torch.export.Dim("batch")},))
        >>> [node.name for node in program.graph.nodes if node.meta.get("quantization_tag") == "module"]
        ['dequantize_per_tensor', 'dequantize_per_channel', 'linear', 'quantize_per_tensor_1']
    """
    if not isinstance(model, nn.Module):
        raise InvalidArgumentError(
            f"got {type(model).__name__}, but an eager model is needed",
            remedy="pass the module that prepare_qat, prepare or convert returned",
        )
    _check_inputs(example_inputs)
    wanted = checked_dtype(activation_dtype)
    int8 = _int8(model)
    for hook in int8._forward_pre_hooks.values():
        if isinstance(hook, RunWarnings):
            hook.tell_unobserved(stacklevel=3)
    program = settle_constants(trace(int8, example_inputs, dynamic_shapes), _state_names(int8))
    share_ranges(program.graph)
    if wanted is not None:
        restate(program, wanted)
    annotate(program)
    return program


def _check_inputs(example_inputs: Any) -> None:
    if not isinstance(example_inputs, tuple):
        raise InvalidArgumentError(
            f"example_inputs is a {type(example_inputs).__name__}, not a tuple",
            remedy="pass the positional arguments of the model's forward as a tuple, such as (x,)",
        )
    if any(isinstance(leaf, QTensor) for leaf in tree_leaves(example_inputs)):
        raise InvalidArgumentError(
            "example_inputs has a quantized tensor (QTensor), which a program cannot take",
            remedy="give the model a QuantStub, and real numbers",
        )


def _int8(model: nn.Module) -> nn.Module:
    """A copy of the model with int8 modules, in eval mode, its modules named."""
    prepared = _observing(model)
    if not prepared and not any(isinstance(module, QuantizedModule) for module in model.modules()):
        raise InvalidConfigError(
            "export got a float model that is not prepared: nothing in it says how to quantize",
            module=model,
            remedy="call prepare_qat (or prepare) with a qconfig and run the model on data first",
        )
    model = copy.deepcopy(model).eval()
    if prepared:
        model = convert(model, inplace=True, as_trained=True)
        if left := _observing(model):
            raise InvalidConfigError(
                "convert leaves it as it is: its class has no int8 form in the default map",
                module=left[0],
                remedy="convert the model with the mapping that it needs, then export the result",
            )
    centre_weights(model)
    spread_scales(model)
    stamp_names(model)
    return model


def _observing(model: nn.Module) -> list[nn.Module]:
    """The modules that have an observer or a fake quantizer, for a weight or an activation."""
    return [module for module in model.modules() if any(isinstance(child, Observing) for child in module.children())]


def _state_names(int8: nn.Module) -> dict[str, str]:
    """The buffers of int8 modules to the names that a state_dict has for them."""
    return {
        f"{path}._{name}".lstrip("."): f"{path}.{name}".lstrip(".")
        for path, module in int8.named_modules()
        if isinstance(module, StoredTensors)
        for name in module._STORED
    }
