"""The formulas of training-time quantization, as pure functions of tensors.

Nothing here reads a value back from an accelerator, so a training step never waits for one and the
whole of it can be compiled (the CPU's short cuts are apart).  Per-tensor parameters have shape ``[1]``;
per-channel ones ``[channels]``.
"""

from eagerq.functional.folding import fold_transposed
from eagerq.functional.in_c import Rounding, Running, in_order, relu_, round_in_c, round_over, sum_in_c
from eagerq.functional.layer import Convolving, conv_bn_in_c
from eagerq.functional.normalizing import Norm, batch_norm_of_scaled
from eagerq.functional.qparams import (
    affine_qparams,
    channel_shape,
    dynamic_qparams,
    float_qparams,
    min_max,
    moving_average,
    symmetric_qparams,
    training_qparams,
)
from eagerq.functional.rebuilding import rebuilt
from eagerq.functional.rounding import fake_quantize, fake_quantize_learnable, training_integers
from eagerq.functional.updating import can_update_natively, update_natively

__all__ = [
    # ranges and parameters
    "affine_qparams",
    "channel_shape",
    "dynamic_qparams",
    "float_qparams",
    "min_max",
    "moving_average",
    "symmetric_qparams",
    "training_qparams",
    # batch norm
    "Norm",
    "batch_norm_of_scaled",
    "fold_transposed",
    # several steps at once, in C
    "Convolving",
    "Rounding",
    "Running",
    "conv_bn_in_c",
    "in_order",
    "rebuilt",
    "relu_",
    "round_in_c",
    "round_over",
    "sum_in_c",
    # rounding
    "fake_quantize",
    "fake_quantize_learnable",
    "training_integers",
    # the CPU's short cut
    "can_update_natively",
    "update_natively",
]
