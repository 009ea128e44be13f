"""Observers that keep the smallest and largest value, overall or averaged over batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from eagerq.checkpoint import rename
from eagerq.errors import InvalidInputError, UnsupportedError
from eagerq.functional import min_max, moving_average
from eagerq.observer.base import DEFAULT_EPS, UniformQuantizationObserverBase, fill_empty_bounds
from eagerq.scheme import per_channel_affine, per_tensor_affine

__all__ = [
    "MinMaxObserver",
    "MovingAverageMinMaxObserver",
    "MovingAveragePerChannelMinMaxObserver",
    "PerChannelMinMaxObserver",
]


class _RangeObserver(UniformQuantizationObserverBase):
    """Observes ranges; subclasses say how many (``ch_axis``) and how batches combine (``_merge``)."""

    _channel_axis: int | None = None

    def _merge(self, old_low: Tensor, old_high: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return torch.minimum(old_low, low), torch.maximum(old_high, high)

    def forward(self, x_orig: Tensor) -> Tensor:
        """Take a batch into account and return it unchanged."""
        if x_orig.numel():
            self._observe(x_orig.detach())
        return x_orig

    def _observe(self, x: Tensor) -> None:
        low, high = min_max(x, self._channel_axis)
        low, high = low.to(self.min_val.dtype), high.to(self.max_val.dtype)
        finite = self._finite(low, high)
        if self.min_val.numel() == 0:  # the first batch tells how many channels there are
            self.min_val, self.max_val = torch.full_like(low, torch.inf), torch.full_like(high, -torch.inf)
        self.check_channels(low)
        merged_low, merged_high = self._merge(self.min_val, self.max_val, low, high)
        self.min_val.copy_(torch.where(finite, merged_low, self.min_val))
        self.max_val.copy_(torch.where(finite, merged_high, self.max_val))

    def check_channels(self, low: Tensor) -> None:
        """Refuse a batch with another number of channels than those seen before."""
        if self.min_val.shape != low.shape and self.min_val.numel() > 0:
            raise InvalidInputError(
                f"got {low.numel()} channels, but {self.min_val.numel()} were observed before",
                module=self,
                remedy="check ch_axis, or call reset_min_max_vals() to observe another tensor",
            )


class MinMaxObserver(_RangeObserver):
    """Smallest and largest value of all batches seen.

    Scale and zero point follow :func:`eagerq.functional.affine_qparams` or
    :func:`~eagerq.functional.symmetric_qparams`.  Batches with a NaN or an infinity are skipped and
    counted in ``nonfinite_batches``.  Arguments as for
    :class:`~eagerq.observer.UniformQuantizationObserverBase`; per-tensor schemes only.

    Example:
        >>> import torch
        >>> observer = MinMaxObserver()
        >>> _ = observer(torch.tensor([-1.0, 1.55]))
        >>> observer.calculate_qparams()
        (tensor([0.0100]), tensor([100]))
    """

    def __init__(
        self,
        dtype: torch.dtype = torch.uint8,
        qscheme: Any = per_tensor_affine,
        reduce_range: bool = False,
        quant_min: int | None = None,
        quant_max: int | None = None,
        factory_kwargs: dict[str, Any] | None = None,
        eps: float = DEFAULT_EPS,
        is_dynamic: bool = False,
    ) -> None:
        super().__init__(dtype, qscheme, reduce_range, quant_min, quant_max, factory_kwargs, eps, is_dynamic)
        self._require(per_channel=False, qscheme=qscheme)
        kwargs = dict(factory_kwargs or {})
        self.register_buffer("min_val", torch.tensor(torch.inf, **kwargs))
        self.register_buffer("max_val", torch.tensor(-torch.inf, **kwargs))

    def _upgrade_state(self, state: MutableMapping[str, Any], prefix: str, version: int | None) -> None:
        fill_empty_bounds(state, prefix)
        super()._upgrade_state(state, prefix, version)

    def reset_min_max_vals(self) -> None:
        self.min_val.fill_(torch.inf)
        self.max_val.fill_(-torch.inf)


class MovingAverageMinMaxObserver(MinMaxObserver):
    """Moving average of each batch's smallest and largest value.

    ``min_val += averaging_constant * (batch.min() - min_val)``, and so for the largest; the first
    batch sets them.  With ``averaging_constant=1`` it only knows the latest batch.

    Args:
        averaging_constant: weight of the newest batch, in (0, 1].
        others: as for :class:`MinMaxObserver`.
    """

    def __init__(
        self,
        averaging_constant: float = 0.01,
        dtype: torch.dtype = torch.uint8,
        qscheme: Any = per_tensor_affine,
        reduce_range: bool = False,
        quant_min: int | None = None,
        quant_max: int | None = None,
        eps: float = DEFAULT_EPS,
        is_dynamic: bool = False,
        factory_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if is_dynamic and averaging_constant != 1:
            raise UnsupportedError(
                "dynamic quantization needs an observer without memory, but averaging_constant is "
                f"{averaging_constant}",
                remedy="pass averaging_constant=1",
            )
        super().__init__(dtype, qscheme, reduce_range, quant_min, quant_max, factory_kwargs, eps, is_dynamic)
        self.averaging_constant = averaging_constant

    def _merge(self, old_low: Tensor, old_high: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        constant = self.averaging_constant
        return moving_average(old_low, low, constant), moving_average(old_high, high, constant)


class PerChannelMinMaxObserver(_RangeObserver):
    """Smallest and largest value of each channel, over all batches seen.

    ``min_val`` and ``max_val`` are empty until the first batch tells the number of channels.

    Args:
        ch_axis: which axis of the observed tensor counts the channels.
        others: as for :class:`MinMaxObserver`, with per-channel schemes only.
    """

    _resizable: ClassVar[tuple[str, ...]] = ("min_val", "max_val")

    def __init__(
        self,
        ch_axis: int = 0,
        dtype: torch.dtype = torch.uint8,
        qscheme: Any = per_channel_affine,
        reduce_range: bool = False,
        quant_min: int | None = None,
        quant_max: int | None = None,
        factory_kwargs: dict[str, Any] | None = None,
        eps: float = DEFAULT_EPS,
        is_dynamic: bool = False,
    ) -> None:
        if is_dynamic:
            raise UnsupportedError(f"{type(self).__name__} does not support dynamic quantization")
        super().__init__(dtype, qscheme, reduce_range, quant_min, quant_max, factory_kwargs, eps, is_dynamic)
        self._require(per_channel=True, qscheme=qscheme)
        self.ch_axis = ch_axis
        kwargs = dict(factory_kwargs or {})
        self.register_buffer("min_val", torch.tensor([], **kwargs))
        self.register_buffer("max_val", torch.tensor([], **kwargs))

    @property
    def _channel_axis(self) -> int:  # type: ignore[override]
        return self.ch_axis

    def _upgrade_state(self, state: MutableMapping[str, Any], prefix: str, version: int | None) -> None:
        rename(state, prefix, {"min_vals": "min_val", "max_vals": "max_val"})  # before version 3
        super()._upgrade_state(state, prefix, version)

    def _state_problems(self, state: Mapping[str, Any], prefix: str) -> Iterator[str]:
        yield from super()._state_problems(state, prefix)
        values = (state.get(prefix + name) for name in self._resizable)
        shapes = [tuple(value.shape) for value in values if isinstance(value, Tensor)]
        if shapes and (len({*shapes}) > 1 or len(shapes[0]) != 1):
            yield f"{prefix}min_val and max_val have shapes {shapes}, but a value for each channel was expected"

    def reset_min_max_vals(self) -> None:
        self.min_val, self.max_val = self.min_val.new_empty(0), self.max_val.new_empty(0)


class MovingAveragePerChannelMinMaxObserver(PerChannelMinMaxObserver):
    """Moving average of each channel's smallest and largest value per batch.

    Args:
        averaging_constant: as for :class:`MovingAverageMinMaxObserver`.
        others: as for :class:`PerChannelMinMaxObserver`.
    """

    def __init__(
        self,
        averaging_constant: float = 0.01,
        ch_axis: int = 0,
        dtype: torch.dtype = torch.uint8,
        qscheme: Any = per_channel_affine,
        reduce_range: bool = False,
        quant_min: int | None = None,
        quant_max: int | None = None,
        eps: float = DEFAULT_EPS,
        is_dynamic: bool = False,
        factory_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(ch_axis, dtype, qscheme, reduce_range, quant_min, quant_max, factory_kwargs, eps, is_dynamic)
        self.averaging_constant = averaging_constant

    _merge = MovingAverageMinMaxObserver._merge
