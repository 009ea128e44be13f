"""The ready-made fake quantizers that qconfigs are built from."""

from typing import Any

import torch

from eagerq.fake_quantize.modules import (
    FakeQuantize,
    FixedQParamsFakeQuantize,
    FusedMovingAvgObsFakeQuantize,
)
from eagerq.observer import (
    HistogramObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    default_fixed_qparams_range_0to1_observer,
    default_fixed_qparams_range_neg1to1_observer,
)
from eagerq.scheme import (
    per_channel_affine_float_qparams,
    per_channel_symmetric,
    per_tensor_affine,
    per_tensor_symmetric,
    uint4,
)

_UINT8: dict[str, Any] = {"quant_min": 0, "quant_max": 255, "dtype": torch.uint8}
_INT8: dict[str, Any] = {"quant_min": -128, "quant_max": 127, "dtype": torch.int8}
_INT8_NARROW: dict[str, Any] = {"quant_min": -127, "quant_max": 127, "dtype": torch.int8, "eps": 2**-12}

# activations
default_fake_quant = FakeQuantize.with_args(
    observer=MovingAverageMinMaxObserver, qscheme=per_tensor_affine, reduce_range=True, **_UINT8
)
default_histogram_fake_quant = FakeQuantize.with_args(
    observer=HistogramObserver, qscheme=per_tensor_affine, reduce_range=True, **_UINT8
)
default_dynamic_fake_quant = FakeQuantize.with_args(
    observer=MovingAverageMinMaxObserver, is_dynamic=True, averaging_constant=1, **_UINT8
)
default_fused_act_fake_quant = FusedMovingAvgObsFakeQuantize.with_args(observer=MovingAverageMinMaxObserver, **_UINT8)
default_fixed_qparams_range_neg1to1_fake_quant = FixedQParamsFakeQuantize.with_args(
    observer=default_fixed_qparams_range_neg1to1_observer
)
default_fixed_qparams_range_0to1_fake_quant = FixedQParamsFakeQuantize.with_args(
    observer=default_fixed_qparams_range_0to1_observer
)
default_symmetric_fixed_qparams_fake_quant = default_fixed_qparams_range_neg1to1_fake_quant
default_affine_fixed_qparams_fake_quant = default_fixed_qparams_range_0to1_fake_quant

# weights
default_weight_fake_quant = FakeQuantize.with_args(
    observer=MovingAverageMinMaxObserver, qscheme=per_tensor_symmetric, reduce_range=False, **_INT8
)
default_per_channel_weight_fake_quant = FakeQuantize.with_args(
    observer=MovingAveragePerChannelMinMaxObserver,
    qscheme=per_channel_symmetric,
    reduce_range=False,
    ch_axis=0,
    **_INT8,
)
default_fused_wt_fake_quant = FusedMovingAvgObsFakeQuantize.with_args(
    observer=MovingAverageMinMaxObserver, qscheme=per_tensor_symmetric, **_INT8
)
default_fused_per_channel_wt_fake_quant = FusedMovingAvgObsFakeQuantize.with_args(
    observer=MovingAveragePerChannelMinMaxObserver, qscheme=per_channel_symmetric, **_INT8
)
fused_wt_fake_quant_range_neg_127_to_127 = FusedMovingAvgObsFakeQuantize.with_args(
    observer=MovingAverageMinMaxObserver, qscheme=per_tensor_symmetric, **_INT8_NARROW
)
fused_per_channel_wt_fake_quant_range_neg_127_to_127 = FusedMovingAvgObsFakeQuantize.with_args(
    observer=MovingAveragePerChannelMinMaxObserver, qscheme=per_channel_symmetric, **_INT8_NARROW
)

# embeddings: rows of their own range, always observed afresh
default_embedding_fake_quant = FakeQuantize.with_args(
    observer=MovingAveragePerChannelMinMaxObserver,
    qscheme=per_channel_affine_float_qparams,
    ch_axis=0,
    averaging_constant=1,
    **_UINT8,
)
default_embedding_fake_quant_4bit = FakeQuantize.with_args(
    observer=MovingAveragePerChannelMinMaxObserver,
    qscheme=per_channel_affine_float_qparams,
    ch_axis=0,
    dtype=uint4,
    averaging_constant=1,
)
