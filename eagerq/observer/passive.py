"""Observers that compute nothing: they carry fixed parameters, a configuration, or a recording."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from eagerq.errors import UnsupportedError
from eagerq.observer.base import DEFAULT_EPS, ObserverBase
from eagerq.scheme import per_tensor_affine

__all__ = [
    "FixedQParamsObserver",
    "NoopObserver",
    "PlaceholderObserver",
    "RecordingObserver",
    "ReuseInputObserver",
]


class FixedQParamsObserver(ObserverBase):
    """Always tells the scale and zero point it was given: for outputs of known range.

    Args:
        scale, zero_point: the parameters.
        dtype, qscheme, quant_min, quant_max: what they are parameters of.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(
        self,
        scale: float,
        zero_point: int,
        dtype: torch.dtype = torch.uint8,
        qscheme: Any = per_tensor_affine,
        quant_min: int = 0,
        quant_max: int = 255,
        is_dynamic: bool = False,
        factory_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if is_dynamic:
            raise UnsupportedError("FixedQParamsObserver does not support dynamic quantization")
        super().__init__(dtype, is_dynamic)
        self.qscheme = qscheme
        self.quant_min, self.quant_max = quant_min, quant_max
        device = (factory_kwargs or {}).get("device")
        self.register_buffer("scale", torch.tensor([scale], dtype=torch.float32, device=device))
        self.register_buffer("zero_point", torch.tensor([zero_point], dtype=torch.int32, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return x

    def qparams(self) -> tuple[Tensor, Tensor]:
        """The given scale (float32) and zero point (int32), each ``[1]``."""
        return self.scale, self.zero_point

    calculate_qparams = qparams


class _Passive(ObserverBase):
    def forward(self, x: Tensor) -> Tensor:
        return x

    def calculate_qparams(self) -> NoReturn:
        raise UnsupportedError(f"{type(self).__name__} observes nothing and has no parameters to tell")


class PlaceholderObserver(_Passive):
    """Carries a configuration to ``from_float``: for float16, and for dynamic quantization.

    Args:
        dtype: dtype of the input that the quantized operator takes.
        custom_op_name: kept for old programs.
        compute_dtype: deprecated spelling of ``is_dynamic=True``.
        quant_min, quant_max, qscheme, eps: configuration of the quantization at run time.
        is_dynamic: parameters are computed from each input.
    """

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        custom_op_name: str = "",
        compute_dtype: torch.dtype | None = None,
        quant_min: int | None = None,
        quant_max: int | None = None,
        qscheme: Any = None,
        eps: float | None = None,
        is_dynamic: bool = False,
    ) -> None:
        super().__init__(dtype, is_dynamic or compute_dtype is not None)
        self.qscheme = per_tensor_affine if qscheme is None else qscheme
        self.quant_min, self.quant_max = quant_min, quant_max
        self.eps = DEFAULT_EPS if eps is None else eps
        self.custom_op = custom_op_name

    def extra_repr(self) -> str:
        return f"dtype={self.dtype}, is_dynamic={self.is_dynamic}"


class NoopObserver(_Passive):
    """Observes nothing: for activations that stay in float.

    Args:
        dtype: dtype of those activations.
        custom_op_name: kept for old programs.
    """

    def __init__(self, dtype: torch.dtype = torch.float16, custom_op_name: str = "") -> None:
        super().__init__(dtype)
        self.custom_op = custom_op_name


class ReuseInputObserver(_Passive):
    """Says that an operator's output keeps the parameters of its input."""

    def __init__(self) -> None:
        super().__init__(torch.uint8)


class RecordingObserver(_Passive):
    """Keeps a copy of every tensor that it sees, for debugging.

    Args:
        dtype: dtype that the recorded tensors would be quantized to.
    """

    def __init__(self, dtype: torch.dtype = torch.uint8) -> None:
        super().__init__(dtype)
        self.tensor_val: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.tensor_val.append(x.clone())
        return x

    def get_tensor_value(self) -> list[Tensor]:
        """The tensors seen so far, oldest first."""
        return self.tensor_val
