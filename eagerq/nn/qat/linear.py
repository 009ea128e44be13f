"""Linear with a fake-quantized weight."""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from eagerq.nn.qat.base import QATMixin

__all__ = ["Linear", "LinearQAT"]


class LinearQAT(QATMixin, nn.Linear):
    """The arithmetic and hyperparameters that every QAT Linear shares."""

    def _affine(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    @classmethod
    def _arguments(cls, module: Any) -> dict[str, Any]:
        return {
            "in_features": module.in_features,
            "out_features": module.out_features,
            "bias": module.bias is not None,
            "dtype": module.weight.dtype,
        }


class Linear(LinearQAT):
    """:class:`torch.nn.Linear` whose weight is fake-quantized in ``forward``.

    Args:
        in_features, out_features, bias, device, dtype: as for :class:`torch.nn.Linear`.
        qconfig: its ``weight`` makes the fake quantizer.

    Raises:
        InvalidConfigError: without a qconfig.

    Example:
        >>> import torch, eagerq
        >>> layer = Linear(20, 30, qconfig=eagerq.get_default_qat_qconfig("onednn"))
        >>> layer(torch.randn(2, 20)).shape
        torch.Size([2, 30])
    """

    _FLOAT_MODULE: ClassVar[Any] = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        qconfig: Any = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._attach(qconfig)
