"""Fake quantizers: modules that round as int8 would, for training."""

from eagerq.fake_quantize.base import FakeQuantizeBase
from eagerq.fake_quantize.defaults import (
    default_affine_fixed_qparams_fake_quant,
    default_dynamic_fake_quant,
    default_embedding_fake_quant,
    default_embedding_fake_quant_4bit,
    default_fake_quant,
    default_fixed_qparams_range_0to1_fake_quant,
    default_fixed_qparams_range_neg1to1_fake_quant,
    default_fused_act_fake_quant,
    default_fused_per_channel_wt_fake_quant,
    default_fused_wt_fake_quant,
    default_histogram_fake_quant,
    default_per_channel_weight_fake_quant,
    default_symmetric_fixed_qparams_fake_quant,
    default_weight_fake_quant,
    fused_per_channel_wt_fake_quant_range_neg_127_to_127,
    fused_wt_fake_quant_range_neg_127_to_127,
)
from eagerq.fake_quantize.direct import is_ordinary, is_plain, is_rounding, rounded_over, rounded_scaled
from eagerq.fake_quantize.learnable import LearnableFakeQuantize
from eagerq.fake_quantize.modules import (
    FakeQuantize,
    FixedQParamsFakeQuantize,
    FusedMovingAvgObsFakeQuantize,
)
from eagerq.fake_quantize.switches import disable_fake_quant, disable_observer, enable_fake_quant, enable_observer

__all__ = [
    # classes
    "FakeQuantize",
    "FakeQuantizeBase",
    "FixedQParamsFakeQuantize",
    "FusedMovingAvgObsFakeQuantize",
    "LearnableFakeQuantize",
    # switches, for nn.Module.apply
    "disable_fake_quant",
    "disable_observer",
    "enable_fake_quant",
    "enable_observer",
    # with the same result, in fewer passes
    "is_ordinary",
    "is_plain",
    "is_rounding",
    "rounded_over",
    "rounded_scaled",
    # ready-made
    "default_affine_fixed_qparams_fake_quant",
    "default_dynamic_fake_quant",
    "default_embedding_fake_quant",
    "default_embedding_fake_quant_4bit",
    "default_fake_quant",
    "default_fixed_qparams_range_0to1_fake_quant",
    "default_fixed_qparams_range_neg1to1_fake_quant",
    "default_fused_act_fake_quant",
    "default_fused_per_channel_wt_fake_quant",
    "default_fused_wt_fake_quant",
    "default_histogram_fake_quant",
    "default_per_channel_weight_fake_quant",
    "default_symmetric_fixed_qparams_fake_quant",
    "default_weight_fake_quant",
    "fused_per_channel_wt_fake_quant_range_neg_127_to_127",
    "fused_wt_fake_quant_range_neg_127_to_127",
]
