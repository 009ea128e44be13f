"""export: the whole way from an eager model to its Q/DQ program."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from eagerq.errors import InvalidArgumentError, InvalidConfigError, stamp_names
from eagerq.nn.quantized import QuantizedModule
from eagerq.nn.quantized.state import StoredTensors
from eagerq.pt2e.exporting.annotating import annotate
from eagerq.pt2e.exporting.constants import settle_constants
from eagerq.pt2e.exporting.restating import checked_dtype, restate
from eagerq.pt2e.exporting.tracing import trace
from eagerq.pt2e.exporting.weights import centre_weights, spread_scales
from eagerq.quantize import convert
from eagerq.twins import Observing

__all__ = ["export"]


def export(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    dynamic_shapes: Any = None,
    activation_dtype: torch.dtype | None = None,
) -> ExportedProgram:
    """The program of a prepared or converted model in Q/DQ form, for graph compilers."""
    if not isinstance(example_inputs, tuple):
        raise InvalidArgumentError(
            f"example_inputs is a {type(example_inputs).__name__}, not a tuple",
            remedy="pass the positional arguments of the model's forward as a tuple, such as (x,)",
        )
    wanted = checked_dtype(activation_dtype)
    int8 = _int8(model)
    program = settle_constants(trace(int8, example_inputs, dynamic_shapes), _state_names(int8))
    if wanted is not None:
        restate(program, wanted)
    annotate(program)
    return program


def _int8(model: nn.Module) -> nn.Module:
    """A copy of the model with int8 modules, in eval mode, its modules named."""
    kinds = [type(module) for module in model.modules()]
    prepared = any(issubclass(kind, Observing) for kind in kinds)
    if not prepared and not any(issubclass(kind, QuantizedModule) for kind in kinds):
        raise InvalidConfigError(
            "export got a float model that is not prepared: nothing in it says how to quantize",
            module=model,
            remedy="call prepare_qat (or prepare) with a qconfig and run the model on data first",
        )
    model = copy.deepcopy(model).eval()
    if prepared:
        model = convert(model, inplace=True, as_trained=True)
    centre_weights(model)
    spread_scales(model)
    stamp_names(model)
    return model


def _state_names(int8: nn.Module) -> dict[str, str]:
    """The buffers of int8 modules to the names that a state_dict has for them."""
    return {
        f"{path}._{name}".lstrip("."): f"{path}.{name}".lstrip(".")
        for path, module in int8.named_modules()
        if isinstance(module, StoredTensors)
        for name in module._STORED
    }
