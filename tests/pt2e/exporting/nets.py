"""A small net with a bit of everything, prepared; and what programs are asked in several tests."""

from __future__ import annotations

import io
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node

import eagerq
from eagerq.nn.quantized import FloatFunctional


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = eagerq.QuantStub(), eagerq.DeQuantStub()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pool, self.sum, self.classify = nn.MaxPool2d(2), FloatFunctional(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.conv(self.quant(x))))
        x = self.sum.add(x, self.depthwise(x))
        out: Tensor = self.dequant(self.classify(self.pool(x).mean([2, 3])))
        return out


IMAGES = (4, 3, 16, 16)


def prepared(qconfig: Any = None) -> nn.Module:
    """:class:`Residual` after a look at some data, in eval mode."""
    torch.manual_seed(0)
    model = Residual().train()
    model.qconfig = qconfig or eagerq.get_default_qat_qconfig("onednn")  # type: ignore[assignment]
    model = eagerq.prepare_qat(eagerq.fuse_modules_qat(model, ["conv", "bn", "relu"]))
    model(torch.randn(8, *IMAGES[1:]))
    return model.eval()


def named(program: ExportedProgram, name: str) -> list[Node]:
    """The nodes that call an operator, ``dequantize_per_tensor.default`` or only ``dequantize``."""
    return [node for node in program.graph.nodes if name in str(node.target) and node.op == "call_function"]


def saved_and_loaded(program: ExportedProgram) -> ExportedProgram:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # torch's own, of its own doing
        warnings.filterwarnings("ignore", r".*LeafSpec", FutureWarning)
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        torch.export.save(program, buffer)
        buffer.seek(0)
        return torch.export.load(buffer)
