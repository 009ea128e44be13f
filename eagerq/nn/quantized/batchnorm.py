"""int8 batch norm and instance norm: the normalizations that may have running statistics."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from eagerq import kernels
from eagerq.errors import InvalidConfigError
from eagerq.nn.quantized.base import Output, expect_quantized
from eagerq.nn.quantized.normalization import Normalization, wrong_shape
from eagerq.qtensor import QTensor

__all__ = ["BatchNorm2d", "BatchNorm3d", "InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d"]

_Self = TypeVar("_Self", bound="_WithStatistics")


class _WithStatistics(Normalization):
    """Base of those that may normalise by running statistics, which are saved with the rest."""

    _STORED = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    # files of torch before 1.0 lack it, and int8 layers have no use for it
    _optional_state = (*Normalization._optional_state, "num_batches_tracked")

    num_features: int
    eps: float
    _running_mean: Tensor | None
    _running_var: Tensor | None
    _num_batches_tracked: Tensor | None

    @property
    def running_mean(self) -> Tensor | None:
        """The mean of each channel, or None."""
        return self._running_mean

    @property
    def running_var(self) -> Tensor | None:
        """The variance of each channel, or None."""
        return self._running_var

    @property
    def num_batches_tracked(self) -> Tensor | None:
        """How many batches the statistics come from, or None."""
        return self._num_batches_tracked

    def _configure(self, num_features: int, eps: float, momentum: float | None, affine: bool, track: bool) -> None:
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track

    def _adopt(self: _Self, module: Any) -> _Self:
        """Take the tensors of a float module."""
        self._hold((self.num_features,), *(getattr(module, name) for name in self._STORED))
        return self

    def _by_statistics(self, x: QTensor) -> QTensor:
        statistics = self.running_mean, self.running_var
        return self._requantized(kernels.batch_norm, x, self.weight, self.bias, *statistics, self.eps)

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}, {super().extra_repr()}"
        )


class _BatchNorm(_WithStatistics):
    """Base of the batch norms: ``_DIM`` is how many axes follow the channels'."""

    _DIM: ClassVar[int]

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self._configure(num_features, eps, momentum, True, True)
        ones, zeros = torch.ones(num_features), torch.zeros(num_features)
        values = (ones, zeros, zeros.clone(), ones.clone(), torch.tensor(0))
        self._hold((num_features,), *values, device=device)

    @classmethod
    def _of(cls, module: Any) -> Any:
        if module.running_mean is None:
            raise InvalidConfigError(
                "it has no running statistics to normalise by (track_running_stats=False)",
                module=module,
                remedy="make it with track_running_stats=True, or leave it in float (qconfig = None)",
            )
        new = cls(module.num_features, module.eps, module.momentum)
        new.affine = module.affine
        return new._adopt(module)

    def forward(self, input: QTensor) -> QTensor:
        x = expect_quantized(self, input)
        if x.dim() != self._DIM + 2 or x.shape[1] != self.num_features:
            raise wrong_shape(self, f"[N, {self.num_features}{', …' * self._DIM}]", x, "num_features")
        return self._by_statistics(x)


class BatchNorm2d(_BatchNorm):
    """:class:`torch.nn.BatchNorm2d` on integers, by its running statistics: QTensor ``[N, C, H, W]`` to the same.

    The state has ``weight``, ``bias``, ``running_mean``, ``running_var`` (float32), ``num_batches_tracked``,
    ``scale`` and ``zero_point``.

    Args:
        num_features, eps, momentum: as for :class:`torch.nn.BatchNorm2d`.
        device: where the tensors go.
        dtype: for likeness; they are float32.

    Raises:
        InvalidInputError: in ``forward``, for a float tensor, or one of another shape.

    Example:
        >>> import eagerq
        >>> x = eagerq.quantize_per_tensor(torch.ones(1, 2, 1, 1), 0.5, 0, torch.uint8)
        >>> BatchNorm2d(2)(x).shape
        torch.Size([1, 2, 1, 1])
    """

    _FLOAT_MODULE: ClassVar[Any] = nn.BatchNorm2d
    _DIM = 2


class BatchNorm3d(_BatchNorm):
    """:class:`torch.nn.BatchNorm3d` on integers ``[N, C, D, H, W]``; else as :class:`BatchNorm2d`."""

    _FLOAT_MODULE: ClassVar[Any] = nn.BatchNorm3d
    _DIM = 3


class _InstanceNorm(_WithStatistics):
    """Base of the instance norms: ``_DIM`` is how many axes follow the channels'."""

    _DIM: ClassVar[int]

    def __init__(
        self,
        num_features: int,
        weight: Tensor | None,
        bias: Tensor | None,
        scale: float,
        zero_point: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(Output.given(scale, zero_point))
        self._configure(num_features, eps, momentum, affine, track_running_stats)
        mean, var, count = torch.zeros(num_features), torch.ones(num_features), torch.tensor(0)
        statistics = (mean, var, count) if track_running_stats else (None, None, None)
        self._hold((num_features,), weight, bias, *statistics, device=device)

    @classmethod
    def _of(cls, module: Any) -> Any:
        how = module.eps, module.momentum, module.affine, module.track_running_stats
        new = cls(module.num_features, None, None, 1.0, 0, *how)
        return new._adopt(module)

    def forward(self, input: QTensor) -> QTensor:
        x = expect_quantized(self, input)
        batched: Any = x if x.dim() == self._DIM + 2 else x.unsqueeze(0)
        # without tensors num_features counts for nothing, as in the float module
        known = any(one is not None for one in (self.weight, self.bias, self.running_mean))
        if batched.dim() != self._DIM + 2 or (known and batched.shape[1] != self.num_features):
            channels = self.num_features if known else "C"
            raise wrong_shape(self, f"[N, {channels}{', …' * self._DIM}] (or without N)", x, "num_features")
        if self.track_running_stats:
            y: Any = self._by_statistics(batched)
        else:
            arguments = batched.shape[1], self.weight, self.bias, self.eps
            y = self._requantized(kernels.group_norm, batched, *arguments)
        return y if batched is x else y.squeeze(0)


class InstanceNorm1d(_InstanceNorm):
    """:class:`torch.nn.InstanceNorm1d` on integers: QTensor ``[N, C, L]`` or ``[C, L]`` to the same.

    With ``track_running_stats`` it normalises by the running statistics, as the float module in eval mode.
    The state has ``weight``, ``bias``, ``running_mean``, ``running_var`` (float32, where there are any),
    ``scale`` and ``zero_point``.

    Args:
        num_features: channels.
        weight, bias: float tensors ``[C]``, or None.
        scale, zero_point: parameters of the result.
        eps, momentum, affine, track_running_stats: as for :class:`torch.nn.InstanceNorm1d`.
        device: where the tensors go.
        dtype: for likeness; they are float32.

    Raises:
        InvalidArgumentError: for a weight or bias of another shape.
        InvalidInputError: in ``forward``, for a float tensor, or one of another shape.
    """

    _FLOAT_MODULE: ClassVar[Any] = nn.InstanceNorm1d
    _DIM = 1


class InstanceNorm2d(_InstanceNorm):
    """:class:`torch.nn.InstanceNorm2d` on integers ``[N, C, H, W]``; else as :class:`InstanceNorm1d`."""

    _FLOAT_MODULE: ClassVar[Any] = nn.InstanceNorm2d
    _DIM = 2


class InstanceNorm3d(_InstanceNorm):
    """:class:`torch.nn.InstanceNorm3d` on integers ``[N, C, D, H, W]``; else as :class:`InstanceNorm1d`."""

    _FLOAT_MODULE: ClassVar[Any] = nn.InstanceNorm3d
    _DIM = 3
