"""Fused layers for quantization-aware training: with batch norm folded into the weight, with ReLU."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_weights, fuse_linear_bn_weights

from eagerq import native
from eagerq.checkpoint import UpgradingModule, rename
from eagerq.fake_quantize import is_plain, rounded_scaled
from eagerq.functional import Norm, batch_norm_of_scaled, channel_shape
from eagerq.intrinsic import fused
from eagerq.intrinsic.in_graph import layer_in_graph
from eagerq.intrinsic.in_one import layer_in_one
from eagerq.kernels.dispatch import Kernel
from eagerq.nn.qat import Conv1d, Conv2d, Conv3d, Linear
from eagerq.nn.qat.base import QATMixin
from eagerq.nn.qat.conv import ConvQAT
from eagerq.nn.qat.linear import LinearQAT

__all__ = [
    "ConvBn1d",
    "ConvBn2d",
    "ConvBn3d",
    "ConvBnReLU1d",
    "ConvBnReLU2d",
    "ConvBnReLU3d",
    "ConvReLU1d",
    "ConvReLU2d",
    "ConvReLU3d",
    "LinearBn1d",
    "LinearReLU",
    "freeze_bn_stats",
    "update_bn_stats",
]

_BATCH_NORMS: dict[int, Any] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_Self = TypeVar("_Self", bound="BatchNormMixin")


def _copy(x: Tensor) -> Tensor:
    return x.clone()


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x)


# A compiled backward pass may compute a value again instead of saving it.  For what the forward pass
# read from a buffer and then wrote over, that is wrong (torch up to 2.15).  The result of an operator of
# our own it always saves.
kept = Kernel("kept(Tensor x) -> Tensor", _copy, _like)


class BatchNormMixin(QATMixin):
    """A layer and its batch norm: fake quantization sees the weight as folding will leave it.

    The weight is scaled by ``bn.weight / sqrt(running_var + eps)`` and fake-quantized; the result is
    scaled back, then normalised by ``bn``, so that batch statistics stay what they would be unfolded
    (Krishnamoorthi 2018, arXiv:1806.08342, section 3.2.2).

    Attributes:
        bn: the batch norm.
        freeze_bn: its statistics stay as they are, in training mode too.
    """

    bn: Any
    freeze_bn: bool

    def _attach_bn(self, features: int, eps: float, momentum: float, freeze_bn: bool, device: Any, dtype: Any) -> None:
        kind = _BATCH_NORMS[self.weight.dim()]
        self.bn = kind(features, eps, momentum, device=device, dtype=dtype)
        self.freeze_bn = freeze_bn
        self.bn.train(not freeze_bn)

    def _adopt(self, mod: nn.Module) -> None:
        self.bn = mod[1]  # type: ignore[index]

    def update_bn_stats(self: _Self) -> _Self:
        """Let training update the statistics (again)."""
        self.freeze_bn = False
        self.bn.training = True
        return self

    def freeze_bn_stats(self: _Self) -> _Self:
        """Normalise by the running statistics from now on, and leave them as they are."""
        self.freeze_bn = True
        self.bn.training = False
        return self

    def reset_running_stats(self) -> None:
        """Forget the running statistics."""
        self.bn.reset_running_stats()

    @torch.no_grad()
    def reset_bn_parameters(self) -> None:
        """Forget the running statistics; draw the batch norm's weight from [0, 1) and the layer's bias anew."""
        self.reset_running_stats()
        nn.init.uniform_(self.bn.weight)
        nn.init.zeros_(self.bn.bias)
        if self.bias is not None:
            bound = self.weight[0].numel() ** -0.5
            nn.init.uniform_(self.bias, -bound, bound)

    def train(self: _Self, mode: bool = True) -> _Self:
        self.training = mode
        if not self.freeze_bn:
            for child in self.children():
                child.train(mode)
        return self

    def _fold_factor(self) -> Tensor:
        variance = self.bn.running_var
        if self.bn.training and torch.compiler.is_compiling():
            variance = kept(variance)
        factor: Tensor = self.bn.weight / torch.sqrt(variance + self.bn.eps)
        return factor

    def forward(self, x: Tensor) -> Tensor:
        if (out := layer_in_one(self, x)) is not None:
            return out
        folded = self._fold_factor()
        if torch.compiler.is_compiling() and (out := layer_in_graph(self, x, folded)) is not None:
            return out
        # a channel that the batch norm multiplies by zero still has statistics and gradients
        factor = torch.where(folded == 0, 1.0, folded)
        weight = rounded_scaled(self.weight_fake_quant, self.weight, factor)
        if torch.compiler.is_compiling() or not self._bn_is_plain(factor):
            return self._by_the_book(self._computed(x, weight, None), factor)
        if not self.bn.training:
            return self._frozen(x, weight, factor, folded)
        return self._trained(self._computed(x, weight, None), factor)

    def _shift(self, folded: Tensor) -> Tensor:
        """All that is left of a frozen batch norm beside the folded weight."""
        shift = -self.bn.running_mean if self.bias is None else self.bias - self.bn.running_mean
        return torch.addcmul(self.bn.bias, shift, folded)

    def _by_the_book(self, y: Tensor, factor: Tensor) -> Tensor:
        shape = channel_shape(y.dim(), 1)
        y = y / factor.reshape(shape)
        y = self.bn(y if self.bias is None else y + self.bias.reshape(shape))
        return F.relu(y) if self.post_op == "relu" else y

    def _bn_is_plain(self, factor: Tensor) -> bool:
        """Whether the batch norm can be computed another way, with the same result."""
        bn = self.bn
        return (
            is_plain(bn, _BATCH_NORMS[self.weight.dim()])
            and bn.affine
            and bn.track_running_stats
            and bn.running_mean is not None
            and bn.num_batches_tracked is not None
            and factor.dtype is torch.float32
        )

    def _frozen(self, x: Tensor, weight: Tensor, factor: Tensor, folded: Tensor) -> Tensor:
        """By the running statistics."""
        if not native.serves(folded) or not folded.all():  # no other device is waited for
            weight = weight * (folded / factor).reshape(channel_shape(weight.dim(), 0))
        return self._activated(self._computed(x, weight, self._shift(folded)))

    def _trained(self, y: Tensor, factor: Tensor) -> Tensor:
        """By the batch's statistics, which become part of the running ones."""
        bn, out = self.bn, None
        # with a bias the values' own rounding is seen in the mean; of one value the batch norm says it is too few
        batched = y.dim() == self.weight.dim()
        if self.bias is None and batched and y.numel() > y.shape[1] and native.serves(y):
            pace = bn.momentum
            if pace is None:
                pace = 1.0 / (1 + int(bn.num_batches_tracked))
            norm = Norm(bn.running_mean, bn.running_var, bn.eps, pace)
            out = batch_norm_of_scaled(y, factor, bn.weight, bn.bias, norm, self.post_op == "relu")
        if out is None:
            return self._by_the_book(y, factor)
        with torch.no_grad():
            bn.num_batches_tracked.add_(1)
        return out

    def folded(self, as_trained: bool) -> tuple[Tensor, Tensor]:
        """Weight and bias with the batch norm folded in.

        Args:
            as_trained: round as :meth:`forward` does, so that the weight's integers are the ones
                trained with; otherwise as :func:`torch.nn.utils.fuse_conv_bn_weights` does.
        """
        bn, weight, bias = self.bn, self.weight.detach(), self.bias
        if not as_trained:
            fold: Any = fuse_linear_bn_weights if weight.dim() == 2 else fuse_conv_bn_weights
            new_weight, new_bias = fold(weight, bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias)
            return new_weight.detach(), new_bias.detach()
        factor = self._fold_factor().detach()
        shift = bn.running_mean if bias is None else bn.running_mean - bias.detach()
        return weight * factor.reshape(channel_shape(weight.dim(), 0)), bn.bias.detach() - shift * factor


class _ConvBn(BatchNormMixin, UpgradingModule, ConvQAT):
    """The constructor of the convolutions with batch norm."""

    _version = 2

    def _upgrade_state(self, state: MutableMapping[str, Any], prefix: str, version: int | None) -> None:
        names = {name: f"bn.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
        rename(state, prefix, {"gamma": "bn.weight", "beta": "bn.bias", **names})  # the first format
        super()._upgrade_state(state, prefix, version)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool | None = None,
        padding_mode: str = "zeros",
        eps: float = 1e-05,
        momentum: float = 0.1,
        freeze_bn: bool = False,
        qconfig: Any = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        init: Any = super().__init__  # past the mixins, the next in line is torch's own class
        init(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bool(bias),
            padding_mode,
            device,
            dtype,
        )
        self._attach_bn(out_channels, eps, momentum, freeze_bn, device, dtype)
        self._attach(qconfig)


class ConvBn1d(_ConvBn, nn.Conv1d):
    """Conv1d and BatchNorm1d.

    Args:
        in_channels … padding_mode: as for torch's convolution, with ``bias`` off by default.
        eps, momentum: of the batch norm.
        freeze_bn: keep its statistics as they are from the start.
        qconfig: its ``weight`` makes the fake quantizer.

    Raises:
        InvalidConfigError: without a qconfig.
    """

    _FLOAT_MODULE: ClassVar[Any] = fused.ConvBn1d


class ConvBn2d(_ConvBn, nn.Conv2d):
    """Conv2d and BatchNorm2d.

    Args:
        in_channels … padding_mode: as for torch's convolution, with ``bias`` off by default.
        eps, momentum: of the batch norm.
        freeze_bn: keep its statistics as they are from the start.
        qconfig: its ``weight`` makes the fake quantizer.

    Raises:
        InvalidConfigError: without a qconfig.
    """

    _FLOAT_MODULE: ClassVar[Any] = fused.ConvBn2d


class ConvBn3d(_ConvBn, nn.Conv3d):
    """Conv3d and BatchNorm3d.

    Args:
        in_channels … padding_mode: as for torch's convolution, with ``bias`` off by default.
        eps, momentum: of the batch norm.
        freeze_bn: keep its statistics as they are from the start.
        qconfig: its ``weight`` makes the fake quantizer.

    Raises:
        InvalidConfigError: without a qconfig.
    """

    _FLOAT_MODULE: ClassVar[Any] = fused.ConvBn3d


class _ReLU(QATMixin):
    """Cuts the result at zero; see the class it is mixed into for the arguments."""

    post_op = "relu"


class ConvBnReLU1d(_ReLU, ConvBn1d):
    """Conv1d, BatchNorm1d and ReLU; arguments and errors as for :class:`ConvBn1d`."""

    _FLOAT_MODULE = fused.ConvBnReLU1d
    _FLOAT_RELU = fused.ConvReLU1d


class ConvBnReLU2d(_ReLU, ConvBn2d):
    """Conv2d, BatchNorm2d and ReLU; arguments and errors as for :class:`ConvBn2d`."""

    _FLOAT_MODULE = fused.ConvBnReLU2d
    _FLOAT_RELU = fused.ConvReLU2d


class ConvBnReLU3d(_ReLU, ConvBn3d):
    """Conv3d, BatchNorm3d and ReLU; arguments and errors as for :class:`ConvBn3d`."""

    _FLOAT_MODULE = fused.ConvBnReLU3d
    _FLOAT_RELU = fused.ConvReLU3d


class ConvReLU1d(_ReLU, Conv1d):
    """Conv1d and ReLU; arguments and errors as for :class:`eagerq.nn.qat.Conv1d`."""

    _FLOAT_MODULE = fused.ConvReLU1d
    _FLOAT_RELU = fused.ConvReLU1d


class ConvReLU2d(_ReLU, Conv2d):
    """Conv2d and ReLU; arguments and errors as for :class:`eagerq.nn.qat.Conv2d`."""

    _FLOAT_MODULE = fused.ConvReLU2d
    _FLOAT_RELU = fused.ConvReLU2d


class ConvReLU3d(_ReLU, Conv3d):
    """Conv3d and ReLU; arguments and errors as for :class:`eagerq.nn.qat.Conv3d`."""

    _FLOAT_MODULE = fused.ConvReLU3d
    _FLOAT_RELU = fused.ConvReLU3d


class LinearReLU(_ReLU, Linear):
    """Linear and ReLU; arguments and errors as for :class:`eagerq.nn.qat.Linear`."""

    _FLOAT_MODULE = fused.LinearReLU
    _FLOAT_RELU = fused.LinearReLU


class LinearBn1d(BatchNormMixin, LinearQAT):
    """A Linear with its batch norm folded in while training.

    Args:
        in_features, out_features, bias: as for :class:`torch.nn.Linear`.
        eps, momentum: of the batch norm.
        freeze_bn: keep its statistics as they are from the start.
        qconfig: its ``weight`` makes the fake quantizer.

    Raises:
        InvalidConfigError: without a qconfig.
    """

    _FLOAT_MODULE: ClassVar[Any] = fused.LinearBn1d

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        eps: float = 1e-05,
        momentum: float = 0.1,
        freeze_bn: bool = False,
        qconfig: Any = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._attach_bn(out_features, eps, momentum, freeze_bn, device, dtype)
        self._attach(qconfig)


def update_bn_stats(mod: nn.Module) -> None:
    """Let a fused batch norm update its statistics; ``model.apply(update_bn_stats)``."""
    if isinstance(mod, BatchNormMixin):
        mod.update_bn_stats()


def freeze_bn_stats(mod: nn.Module) -> None:
    """Freeze a fused batch norm's statistics; ``model.apply(freeze_bn_stats)``."""
    if isinstance(mod, BatchNormMixin):
        mod.freeze_bn_stats()
