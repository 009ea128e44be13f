"""int8 layers with what is fused to them."""

from eagerq.intrinsic.quantized.layers import ConvReLU1d, ConvReLU2d, ConvReLU3d, LinearReLU

__all__ = ["ConvReLU1d", "ConvReLU2d", "ConvReLU3d", "LinearReLU"]
