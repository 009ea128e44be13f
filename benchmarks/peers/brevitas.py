"""Brevitas: layers swapped for its own, int8 weights and activations; batch norm stays by itself."""

import warnings

from torch import nn

from ..backends import Backend
from .base import Peer


class _Brevitas(Backend):
    name = "brevitas"

    def prepare(self, model: nn.Module) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it, about what it could do besides
            from brevitas.graph.quantize import layerwise_quantize

        prepared: nn.Module = layerwise_quantize(model)
        return prepared.train()


PEERS = (Peer("brevitas", "training", ("brevitas",), _Brevitas),)
