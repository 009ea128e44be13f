"""export: the whole way from an eager model to its Q/DQ program."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from eagerq.kernels.dispatch import Dialect, speaking
from eagerq.pt2e.exporting.doors import DOORS
from eagerq.pt2e.exporting.functions import FUNCTIONS
from eagerq.pt2e.exporting.weights import centre_weights, spread_scales
from eagerq.quantize import convert
from eagerq.twins import OBSERVER, Observing

__all__ = ["export"]

_QDQ = Dialect(DOORS, FUNCTIONS)


def export(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    dynamic_shapes: Any = None,
    activation_dtype: torch.dtype | None = None,
) -> ExportedProgram:
    """The program of a prepared or converted model in Q/DQ form, for graph compilers."""
    model = copy.deepcopy(model).eval()
    if any(isinstance(getattr(module, OBSERVER, None), Observing) for module in model.modules()):
        model = convert(model, inplace=True, as_trained=True)
    centre_weights(model)
    spread_scales(model)
    with speaking(_QDQ), torch.no_grad():
        return torch.export.export(model, example_inputs, dynamic_shapes=dynamic_shapes, strict=False)
