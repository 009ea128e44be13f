"""The configuration that XNNPACK's kernels are made for: symmetric int8 weights, affine int8 activations."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from eagerq.fake_quantize import FakeQuantize, FusedMovingAvgObsFakeQuantize
from eagerq.observer import (
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelMinMaxObserver,
    PlaceholderObserver,
)
from eagerq.pt2e.quantizer.quantizer import QuantizationSpec
from eagerq.pt2e.quantizer.utils import QuantizationConfig

__all__ = ["get_symmetric_quantization_config"]

_EPS = 2**-12  # the least scale of XNNPACK's requantization


def get_symmetric_quantization_config(
    is_per_channel: bool = False,
    is_qat: bool = False,
    is_dynamic: bool = False,
    act_qmin: int = -128,
    act_qmax: int = 127,
    weight_qmin: int = -127,
    weight_qmax: int = 127,
) -> QuantizationConfig:
    """Int8 activations with a zero point, int8 weights without; the bias stays in float.

    Args:
        is_per_channel: one scale for each output channel of a weight, instead of one for all.
        is_qat: fake quantizers, to train with, instead of observers.
        is_dynamic: scale and zero point of activations come from each input as it is seen; outputs stay in float.
        act_qmin, act_qmax: least and greatest stored activation.
        weight_qmin, weight_qmax: least and greatest stored weight.

    Returns:
        the same object for the same arguments: specifications are equal when their constructors are the same object.

    Example:
        >>> get_symmetric_quantization_config(is_per_channel=True).weight.qscheme
        torch.per_channel_symmetric
    """
    return _made(is_per_channel, is_qat, is_dynamic, act_qmin, act_qmax, weight_qmin, weight_qmax)


@lru_cache
def _made(
    is_per_channel: bool,
    is_qat: bool,
    is_dynamic: bool,
    act_qmin: int,
    act_qmax: int,
    weight_qmin: int,
    weight_qmax: int,
) -> QuantizationConfig:
    activation = QuantizationSpec(
        dtype=torch.int8,
        quant_min=act_qmin,
        quant_max=act_qmax,
        qscheme=torch.per_tensor_affine,
        is_dynamic=is_dynamic,
        observer_or_fake_quant_ctr=_activation(is_qat, is_dynamic),
    )
    weight = QuantizationSpec(
        dtype=torch.int8,
        quant_min=weight_qmin,
        quant_max=weight_qmax,
        qscheme=torch.per_channel_symmetric if is_per_channel else torch.per_tensor_symmetric,
        ch_axis=0,
        observer_or_fake_quant_ctr=_weight(is_per_channel, is_qat),
    )
    return QuantizationConfig(activation, None if is_dynamic else activation, weight, None, is_qat)


def _activation(is_qat: bool, is_dynamic: bool) -> Any:
    if not is_qat:
        return (PlaceholderObserver if is_dynamic else HistogramObserver).with_args(eps=_EPS)
    if is_dynamic:
        latest = MovingAverageMinMaxObserver.with_args(averaging_constant=1)
        return FakeQuantize.with_args(observer=latest, eps=_EPS)
    return FusedMovingAvgObsFakeQuantize.with_args(eps=_EPS)


def _weight(is_per_channel: bool, is_qat: bool) -> Any:
    if not is_qat:
        return (PerChannelMinMaxObserver if is_per_channel else MinMaxObserver).with_args(eps=_EPS)
    average = MovingAveragePerChannelMinMaxObserver if is_per_channel else MovingAverageMinMaxObserver
    return FusedMovingAvgObsFakeQuantize.with_args(observer=average, eps=_EPS)
