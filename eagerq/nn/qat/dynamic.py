"""QAT for layers that will quantize their input as it comes."""

from __future__ import annotations

from typing import Any

from eagerq.errors import InvalidArgumentError
from eagerq.inspection import activation_is_memoryless
from eagerq.nn import qat

__all__ = ["Linear"]


class Linear(qat.Linear):
    """:class:`eagerq.nn.qat.Linear` to be converted to a dynamic one.

    Args:
        others: as there.
        qconfig: its activation must not remember earlier batches, as ``default_dynamic_qat_qconfig``.

    Raises:
        InvalidConfigError: without a qconfig.
        InvalidArgumentError: for an activation that averages over batches.

    Example:
        >>> import torch, eagerq
        >>> layer = Linear(20, 30, qconfig=eagerq.default_dynamic_qat_qconfig)
        >>> layer(torch.randn(2, 20)).shape
        torch.Size([2, 30])
    """

    def _attach(self, qconfig: Any) -> None:
        super()._attach(qconfig)
        if not activation_is_memoryless(qconfig):
            raise InvalidArgumentError(
                "Dynamic QAT requires a memoryless observer."
                "This means a MovingAverage observer with averaging constant equal to 1",
                module=self,
                remedy="use eagerq.default_dynamic_qat_qconfig",
            )
