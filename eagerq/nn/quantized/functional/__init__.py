"""Functions of quantized tensors, with the names and arguments that ``torch.ao.nn.quantized.functional`` had.

They take QTensors and give QTensors.  Pooling and interpolation keep the parameters of their input; the others
are told those of their result.  A float tensor raises :class:`~eagerq.NotQuantizedError`.
"""

from eagerq.nn.quantized.functional.activations import (
    celu,
    clamp,
    dropout,
    elu,
    hardsigmoid,
    hardswish,
    hardtanh,
    leaky_relu,
    threshold,
)
from eagerq.nn.quantized.functional.pooling import (
    adaptive_avg_pool2d,
    adaptive_avg_pool3d,
    avg_pool2d,
    avg_pool3d,
    interpolate,
    max_pool1d,
    max_pool2d,
    upsample,
    upsample_bilinear,
    upsample_nearest,
)
from eagerq.nn.quantized.functional.weighted import conv1d, conv2d, conv3d, linear

__all__ = [
    # pooling and interpolation
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "avg_pool2d",
    "avg_pool3d",
    "interpolate",
    "max_pool1d",
    "max_pool2d",
    "upsample",
    "upsample_bilinear",
    "upsample_nearest",
    # with weights
    "conv1d",
    "conv2d",
    "conv3d",
    "linear",
    # activations
    "celu",
    "clamp",
    "dropout",
    "elu",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
    "leaky_relu",
    "threshold",
]
