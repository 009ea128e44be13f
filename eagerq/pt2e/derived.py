"""The observer of tensors whose parameters follow from other observers'."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eagerq.errors import InvalidConfigError
from eagerq.fake_quantize import FakeQuantizeBase
from eagerq.observer import ObserverBase, _PartialWrapper
from eagerq.scheme import is_per_channel

__all__ = ["DerivedObserverOrFakeQuantize", "ObserverOrFakeQuantize", "ObserverOrFakeQuantizeConstructor"]

ObserverOrFakeQuantize = ObserverBase | FakeQuantizeBase
ObserverOrFakeQuantizeConstructor = _PartialWrapper | type[ObserverBase] | type[FakeQuantizeBase]


class DerivedObserverOrFakeQuantize(ObserverBase):
    """Tells the scale and zero point that a function makes of other observers: a bias's, for example.

    Args:
        dtype: what the tensor will be quantized to.
        obs_or_fqs: the observers or fake quantizers concerned.
        derive_qparams_fn: takes that list, returns scale and zero point.
        quant_min, quant_max, qscheme, ch_axis: what they are parameters of.

    Raises:
        InvalidConfigError: for a per-channel scheme without an axis.

    Example:
        >>> from eagerq.observer import FixedQParamsObserver
        >>> inputs = [FixedQParamsObserver(0.5, 0), FixedQParamsObserver(0.25, 0)]
        >>> def product(observers):
        ...     (x, _), (w, _) = (observer.calculate_qparams() for observer in observers)
        ...     return x * w, torch.zeros(1, dtype=torch.int32)
        >>> DerivedObserverOrFakeQuantize(torch.int32, inputs, product).calculate_qparams()[0]
        tensor([0.1250])
    """

    def __init__(
        self,
        dtype: torch.dtype,
        obs_or_fqs: list[Any],
        derive_qparams_fn: Callable[[list[Any]], tuple[Tensor, Tensor]],
        quant_min: int | None = None,
        quant_max: int | None = None,
        qscheme: Any = None,
        ch_axis: int | None = None,
    ) -> None:
        super().__init__(dtype)
        if is_per_channel(qscheme) and ch_axis is None:
            raise InvalidConfigError(
                f"parameters derived with {qscheme} need a channel axis", remedy="give the specification a ch_axis"
            )
        self.obs_or_fqs = obs_or_fqs  # a plain list: they are registered where they observe
        self.derive_qparams_fn = derive_qparams_fn
        self.quant_min, self.quant_max = quant_min, quant_max
        self.qscheme, self.ch_axis = qscheme, ch_axis

    def forward(self, x: Tensor) -> Tensor:
        return x

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        return self.derive_qparams_fn(self.obs_or_fqs)
