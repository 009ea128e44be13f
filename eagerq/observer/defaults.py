"""The ready-made observers that qconfigs are built from."""

import torch

from eagerq.observer.histogram import HistogramObserver
from eagerq.observer.minmax import MinMaxObserver, PerChannelMinMaxObserver
from eagerq.observer.passive import (
    FixedQParamsObserver,
    PlaceholderObserver,
    RecordingObserver,
    ReuseInputObserver,
)
from eagerq.scheme import per_channel_affine_float_qparams, per_channel_symmetric, per_tensor_symmetric, uint4

# activations in 7 bits, so that 8-bit products cannot saturate on any processor
default_observer = MinMaxObserver.with_args(quant_min=0, quant_max=127)
default_histogram_observer = HistogramObserver.with_args(quant_min=0, quant_max=127)

default_placeholder_observer = PlaceholderObserver
default_debug_observer = RecordingObserver
default_reuse_input_observer = ReuseInputObserver
default_dynamic_quant_observer = PlaceholderObserver.with_args(
    dtype=torch.uint8, quant_min=0, quant_max=255, is_dynamic=True
)

default_weight_observer = MinMaxObserver.with_args(dtype=torch.int8, qscheme=per_tensor_symmetric)
default_per_channel_weight_observer = PerChannelMinMaxObserver.with_args(
    dtype=torch.int8, qscheme=per_channel_symmetric
)

# -128 is left out, and eps keeps requantization scales within what XNNPACK takes
_XNNPACK_RANGE = {"quant_min": -127, "quant_max": 127, "eps": 2**-12}
weight_observer_range_neg_127_to_127 = MinMaxObserver.with_args(
    dtype=torch.int8, qscheme=per_tensor_symmetric, **_XNNPACK_RANGE
)
per_channel_weight_observer_range_neg_127_to_127 = PerChannelMinMaxObserver.with_args(
    dtype=torch.int8, qscheme=per_channel_symmetric, **_XNNPACK_RANGE
)

# embeddings: a float zero point for each row
default_float_qparams_observer = PerChannelMinMaxObserver.with_args(
    dtype=torch.uint8, qscheme=per_channel_affine_float_qparams, ch_axis=0
)
default_float_qparams_observer_4bit = PerChannelMinMaxObserver.with_args(
    dtype=uint4, qscheme=per_channel_affine_float_qparams, ch_axis=0
)

# outputs of tanh and of sigmoid, hardsigmoid, softmax
default_fixed_qparams_range_neg1to1_observer = FixedQParamsObserver.with_args(
    scale=2.0 / 256.0, zero_point=128, dtype=torch.uint8, quant_min=0, quant_max=255
)
default_fixed_qparams_range_0to1_observer = FixedQParamsObserver.with_args(
    scale=1.0 / 256.0, zero_point=0, dtype=torch.uint8, quant_min=0, quant_max=255
)
default_symmetric_fixed_qparams_observer = default_fixed_qparams_range_neg1to1_observer
default_affine_fixed_qparams_observer = default_fixed_qparams_range_0to1_observer
