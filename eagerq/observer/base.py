"""What every observer shares: construction by ``with_args``, the integer range, the formulas."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, MutableMapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from eagerq import functional
from eagerq.checkpoint import UpgradingModule
from eagerq.errors import UnsupportedError
from eagerq.scheme import integer_dtype, per_tensor_affine, quantization_range, sharing, value_type

__all__ = ["ObserverBase", "UniformQuantizationObserverBase", "fill_empty_bounds"]

DEFAULT_EPS = torch.finfo(torch.float32).eps


class _PartialWrapper:
    """A constructor with some arguments filled in; calling it makes a new module each time."""

    def __init__(self, p: Callable[..., Any], callable_args: dict[str, Callable[[], Any]] | None = None) -> None:
        self.p = p
        self.callable_args = callable_args or {}

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        made = {name: make() for name, make in self.callable_args.items() if name not in keywords}
        return self.p(*args, **made, **keywords)

    def __repr__(self) -> str:
        return f"{self.p!r}{self.callable_args!r}"

    def with_args(self, **kwargs: Any) -> _PartialWrapper:
        return _PartialWrapper(partial(self, **kwargs))

    def with_callable_args(self, **kwargs: Callable[[], Any]) -> _PartialWrapper:
        return _PartialWrapper(self.p, {**self.callable_args, **kwargs})


class _WithArgs:
    """Adds the class methods that turn a class into a factory."""

    @classmethod
    def with_args(cls, **kwargs: Any) -> _PartialWrapper:
        """A factory for this class with some constructor arguments given.

        Example:
            >>> from eagerq.observer import MinMaxObserver
            >>> MinMaxObserver.with_args(quant_min=0, quant_max=127)().quant_max
            127
        """
        return _PartialWrapper(partial(cls, **kwargs))

    @classmethod
    def with_callable_args(cls, **kwargs: Callable[[], Any]) -> _PartialWrapper:
        """As :meth:`with_args`, but each argument is computed anew whenever an instance is made."""
        return _PartialWrapper(partial(cls), kwargs)


class ObserverBase(_WithArgs, ABC, UpgradingModule):
    """Base of all observers: looks at tensors, returns them unchanged, and tells parameters.

    Args:
        dtype: what the observed tensor will be quantized to; an old quantized dtype means its
            plain integer dtype.
        is_dynamic: the parameters are to be computed from each tensor at run time.
    """

    def __init__(self, dtype: torch.dtype, is_dynamic: bool = False) -> None:
        super().__init__()
        self.dtype = integer_dtype(dtype)
        self.is_dynamic = is_dynamic

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def calculate_qparams(self) -> tuple[Tensor, Tensor]: ...

    @property
    def observed(self) -> bool:
        """Whether the parameters rest on data; reads the device."""
        return True


class UniformQuantizationObserverBase(ObserverBase):
    """Base of the observers that keep a range ``[min_val, max_val]`` of what they have seen.

    Args:
        dtype: integer dtype to quantize to (``uint8``, ``int8``, ``uint4``, ``int4``, ``int16`` …).
        qscheme: one of torch's qschemes, such as ``torch.per_tensor_affine``.
        reduce_range: give up one bit of the range.
        quant_min, quant_max: the integers to use; all that ``dtype`` has when left out.
        factory_kwargs: ``device`` and ``dtype`` of the buffers.
        eps: the least scale.
        is_dynamic: see :class:`ObserverBase`.

    Attributes:
        nonfinite_batches: int64 tensor, how many ranges were skipped because the batch held a NaN or
            an infinity.

    Raises:
        InvalidConfigError: for a range or dtype that cannot be used.
    """

    _version = 3
    eps: Tensor
    min_val: Tensor
    max_val: Tensor
    nonfinite_batches: Tensor

    def __init__(
        self,
        dtype: torch.dtype = torch.uint8,
        qscheme: Any = per_tensor_affine,
        reduce_range: bool = False,
        quant_min: int | None = None,
        quant_max: int | None = None,
        factory_kwargs: Mapping[str, Any] | None = None,
        eps: float = DEFAULT_EPS,
        is_dynamic: bool = False,
    ) -> None:
        super().__init__(dtype, is_dynamic)
        self.qscheme = qscheme
        self.reduce_range = reduce_range
        self.has_customized_qrange = quant_min is not None and quant_max is not None
        self.quant_min, self.quant_max = quantization_range(self.dtype, quant_min, quant_max, reduce_range)
        self._sharing = sharing(qscheme)
        kind = value_type(self.dtype)
        if self._sharing.symmetric and reduce_range and not kind.signed:
            raise UnsupportedError(
                f"Cannot reduce range for symmetric quantization to {self.dtype}",
                remedy="use a signed dtype, or give quant_min and quant_max without reduce_range",
            )
        if kind.signed:
            self._symmetric_zero_point = 0
        elif self.has_customized_qrange:
            self._symmetric_zero_point = (self.quant_min + self.quant_max) // 2
        else:
            self._symmetric_zero_point = (kind.maximum + 1) // 2
        kwargs = dict(factory_kwargs or {})
        self.register_buffer("eps", torch.tensor([eps], **kwargs))
        device = kwargs.get("device")
        self.register_buffer("nonfinite_batches", torch.zeros((), dtype=torch.int64, device=device), persistent=False)

    def _require(self, per_channel: bool, qscheme: Any) -> None:
        if sharing(qscheme).per_channel != per_channel:
            wanted = "per-channel" if per_channel else "per-tensor"
            raise UnsupportedError(
                f"{type(self).__name__} works with a {wanted} qscheme, not {qscheme}",
                remedy=f"choose a {wanted} qscheme, or the other kind of observer",
            )

    def _finite(self, low: Tensor, high: Tensor) -> Tensor:
        """Mask of the ranges without NaN or infinity; the others are counted."""
        finite = (high - low) < torch.inf
        self.nonfinite_batches += ~finite.all()
        return finite

    def qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of what has been seen; 1 and 0 before. Never waits for the device."""
        return self._qparams_of(self.min_val, self.max_val)

    def _qparams_of(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        eps = self.eps
        if low.numel() == 0:
            return torch.ones(1, device=eps.device), torch.zeros(1, dtype=torch.int64, device=eps.device)
        if self._sharing.symmetric:
            return functional.symmetric_qparams(
                low, high, self.quant_min, self.quant_max, eps, self._symmetric_zero_point
            )
        formula = functional.float_qparams if self._sharing.float_zero_point else functional.affine_qparams
        return formula(low, high, self.quant_min, self.quant_max, eps)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale (float32) and zero point (int64), each ``[1]`` or ``[channels]``; warns when unobserved."""
        if not self.observed:
            warnings.warn(
                f"{type(self).__name__} has seen no data: scale 1 and zero point 0 are used. "
                "Run the prepared model on data before you ask for its parameters.",
                stacklevel=2,
            )
        return self.qparams()

    @property
    def observed(self) -> bool:
        return self.min_val.numel() > 0 and bool((self.min_val < torch.inf).all())

    def reset_min_max_vals(self) -> None:
        """Forget what has been seen."""
        raise UnsupportedError(f"{type(self).__name__} keeps no minimum and maximum to reset")

    def extra_repr(self) -> str:
        return f"min_val={self.min_val}, max_val={self.max_val}"

    def _upgrade_state(self, state: MutableMapping[str, Any], prefix: str, version: int | None) -> None:
        super()._upgrade_state(state, prefix, version)
        if (version or 1) < 2 and f"{prefix}min_val" in state:  # the first format kept eps as a constant
            state.setdefault(f"{prefix}eps", self.eps)


def fill_empty_bounds(state: MutableMapping[str, Any], prefix: str) -> None:
    """Old formats kept ``min_val`` and ``max_val`` empty until data was seen; today they are infinite."""
    for name, start in (("min_val", torch.inf), ("max_val", -torch.inf)):
        value = state.get(prefix + name)
        if isinstance(value, Tensor) and value.numel() == 0:
            state[prefix + name] = value.new_full((), start)
