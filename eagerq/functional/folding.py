"""Batch norm folded into weights, where torch's own function does not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import fuse_conv_bn_weights

__all__ = ["fold_transposed"]


def fold_transposed(weight: Tensor, bias: Tensor | None, *norm: Any, groups: int) -> tuple[Tensor, Tensor]:
    """Weight ``[in, out / groups, ...]`` and bias of a transposed convolution with a batch norm folded in.

    Group by group, since torch's ``fuse_conv_bn_weights`` folds transposed convolutions of one group only; ``norm``
    is what that takes: running mean, running variance, eps, weight and bias.
    """
    fuse: Any = fuse_conv_bn_weights
    split = [x.detach().chunk(groups) if isinstance(x, Tensor) else [x] * groups for x in (weight, bias, *norm)]
    weights, biases = zip(*(fuse(*part, transpose=True) for part in zip(*split, strict=True)), strict=True)
    return torch.cat(weights), torch.cat(biases)
