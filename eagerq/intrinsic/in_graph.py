"""QAT layers with a batch norm in code that is being compiled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eagerq.functional import Norm
from eagerq.kernels.training_norm import Normalized, batch_norm_in_graph
from eagerq.twins import is_rounded_first

__all__ = ["layer_in_graph"]


def layer_in_graph(layer: Any, x: Tensor, folded: Tensor) -> Tensor | None:
    """The layer's forward pass by operators made for that; None where these do not serve.

    Args:
        layer: a :class:`~eagerq.intrinsic.qat.BatchNormMixin`.
        folded: what its batch norm multiplies each channel by, when folded.
    """
    made: Any
    if not layer.bn.training and layer._bn_is_plain(folded):
        made = layer._convolved(x, folded, layer._shift(folded))
        return None if made is None else _left_for_hook(layer, made)
    factor = torch.where(folded == 0, 1.0, folded)
    convolved = layer._convolved(x, factor, None, relu=False)
    if convolved is None:
        return None
    out = convolved.attached(False)
    made = _normed(layer, out, factor)
    if made is None:
        by_the_book: Tensor = layer._by_the_book(out, factor)
        return by_the_book
    return _left_for_hook(layer, made)


def _left_for_hook(layer: Any, made: Any) -> Tensor:
    if layer._called and is_rounded_first(layer):
        layer._made = made
    attached: Tensor = made.attached(made.relu)
    return attached


def _normed(layer: Any, y: Tensor, factor: Tensor) -> Normalized | None:
    bn = layer.bn
    if layer.bias is not None or bn.momentum is None or not bn.training or not layer._bn_is_plain(factor):
        return None
    norm = Norm(bn.running_mean, bn.running_var, bn.eps, bn.momentum)
    made = batch_norm_in_graph(y, factor, bn.weight, bn.bias, norm, layer.post_op == "relu")
    if made is not None:
        bn.num_batches_tracked.add_(1)
    return made
