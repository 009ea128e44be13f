"""QAT layers with a batch norm in eager training: all of a layer's steps as one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eagerq import native
from eagerq.fake_quantize import is_ordinary
from eagerq.functional import Convolving, Norm, conv_bn_in_c

__all__ = ["layer_in_one"]


def layer_in_one(layer: Any, x: Tensor) -> Tensor | None:
    """The layer's forward pass in training, the same numbers in fewer steps; None, with nothing changed, where it
    is any other than everything being as these classes have it.

    Args:
        layer: a :class:`~eagerq.intrinsic.qat.BatchNormMixin`.
    """
    if torch.compiler.is_compiling() or not native.available or not _is_as_built(layer):
        return None
    bn, rounding, weight = layer.bn, layer.weight_fake_quant, layer.weight
    if layer.bias is not None or bn.momentum is None or not bn.training or torch.is_autocast_enabled("cpu"):
        return None
    if not is_ordinary(rounding) or not layer._bn_is_plain(weight):
        return None
    to = rounding.rounding_of(weight)
    if to is None:
        return None
    convolving = Convolving(layer.stride, layer.padding, layer.dilation, layer.groups)
    norm = Norm(bn.running_mean, bn.running_var, bn.eps, bn.momentum)
    relu = layer.post_op == "relu"
    out = conv_bn_in_c(x, weight, bn.weight, bn.bias, to, convolving, norm, relu)
    if out is not None:
        bn.num_batches_tracked.add_(1)
    return out


def _is_as_built(layer: Any) -> bool:
    """Whether it is a convolution of a class of ours, none of whose steps somebody has replaced."""
    if type(layer).__module__ != "eagerq.intrinsic.qat" or getattr(layer, "padding_mode", None) != "zeros":
        return False
    axes = layer.weight.dim() - 2
    window = layer.stride, layer.padding, layer.dilation  # numbers and names, too, where somebody has set them
    return all(type(one) is tuple and len(one) == axes for one in window) and "_conv_forward" not in layer.__dict__
