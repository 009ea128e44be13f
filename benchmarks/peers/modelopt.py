"""NVIDIA's ModelOpt: int8 weights and activations with scales that calibration fixes; batch norm stays by itself."""

import copy
import warnings
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import torch
from torch import nn

from ..backends import Backend
from .base import Peer


class _ModelOpt(Backend):
    name = "modelopt"

    def prepare(self, model: nn.Module) -> nn.Module:
        def calibrate(prepared: Any) -> None:
            prepared(torch.randn(8, 3, 64, 64))

        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")  # it, about itself and what it could do besides
            import modelopt.torch.quantization as mtq

            prepared: nn.Module = mtq.quantize(model, copy.deepcopy(mtq.INT8_DEFAULT_CFG), calibrate)
        return prepared.train()


PEERS = (Peer("modelopt", "training", ("modelopt",), _ModelOpt),)
