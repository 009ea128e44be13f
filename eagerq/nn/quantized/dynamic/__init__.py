"""Modules with small weights that quantize their float input as it comes."""

from eagerq.nn.quantized.dynamic.base import DynamicModule
from eagerq.nn.quantized.dynamic.linear import Linear

__all__ = [
    # base classes
    "DynamicModule",
    # layers
    "Linear",
]
