"""int8 LSTM."""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn

from torch import Tensor

from eagerq.errors import UnsupportedError
from eagerq.nn.quantizable import lstm as quantizable
from eagerq.nn.quantizable.cell import State
from eagerq.nn.quantizable.parts import quantized_parts
from eagerq.nn.quantized.base import expect_quantized
from eagerq.nn.quantized.state import QuantizedModule

__all__ = ["LSTM"]


class LSTM(QuantizedModule, quantizable.LSTM):
    """:class:`eagerq.nn.quantizable.LSTM` on integers; ``convert`` makes it of a prepared one.

    QTensor in, QTensors out.  Results of two directions or layers get the first one's scale.

    Raises:
        InvalidInputError: in ``forward``, for a float tensor.
    """

    _FLOAT_MODULE: ClassVar[Any] = quantizable.LSTM

    def forward(self, x: Tensor, hidden: State | None = None) -> tuple[Tensor, State]:
        return super().forward(expect_quantized(self, x), hidden)

    def _get_name(self) -> str:
        return "QuantizedLSTM"

    @classmethod
    def from_float(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise UnsupportedError(
            "nn.quantized.LSTM is made of an observed LSTM, not of a float one",
            remedy="convert a prepared model, or call from_observed",
        )

    @classmethod
    def from_observed(cls, other: quantizable.LSTM, as_trained: bool = False) -> LSTM:
        """The int8 LSTM that a prepared one stands for; ``other`` is left as it is.

        Args:
            as_trained: keep the scales and ranges of training (see :func:`eagerq.convert`).

        Raises:
            InvalidConfigError: for another class of module, or one that is not prepared.
        """
        return quantized_parts(other, cls, as_trained)
