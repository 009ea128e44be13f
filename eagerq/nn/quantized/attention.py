"""int8 multi-head attention."""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn

from torch import Tensor

from eagerq.errors import UnsupportedError
from eagerq.nn.quantizable import attention as quantizable
from eagerq.nn.quantizable.parts import quantized_parts
from eagerq.nn.quantized.base import expect_quantized
from eagerq.nn.quantized.state import QuantizedModule

__all__ = ["MultiheadAttention"]


class MultiheadAttention(QuantizedModule, quantizable.MultiheadAttention):
    """:class:`eagerq.nn.quantizable.MultiheadAttention` on integers; ``convert`` makes it of a prepared one.

    QTensors in and out.  The projections and the mean of the weights run on integers; the attention
    itself runs in float.  The additions to keys and values of ``add_bias_kv`` stay in float, too, and are
    quantized to the parameters of the keys and values.

    Raises:
        InvalidInputError: in ``forward``, for a float tensor.
    """

    _FLOAT_MODULE: ClassVar[Any] = quantizable.MultiheadAttention
    _optional_state: ClassVar[tuple[str, ...]] = quantizable.UNUSED  # old files may have some

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        query, key, value = (expect_quantized(self, x) for x in (query, key, value))
        return super().forward(query, key, value, *args, **kwargs)

    def _get_name(self) -> str:
        return "QuantizedMultiheadAttention"

    @classmethod
    def from_float(cls, other: Any) -> NoReturn:
        raise UnsupportedError(
            "nn.quantized.MultiheadAttention is made of an observed one, not of a float one",
            module=other,
            remedy="convert a prepared model, or call from_observed",
        )

    @classmethod
    def from_observed(cls, other: quantizable.MultiheadAttention, as_trained: bool = False) -> MultiheadAttention:
        """The int8 module that a prepared one stands for; ``other`` is left as it is.

        Args:
            as_trained: keep the scales and ranges of training (see :func:`eagerq.convert`).

        Raises:
            InvalidConfigError: for another class of module, or one that is not prepared.
        """
        new = quantized_parts(other, cls, as_trained)
        for name in quantizable.UNUSED:
            setattr(new, name, None)
        for bias in (new.bias_k, new.bias_v):
            if bias is not None:
                bias.requires_grad_(False)
        return new
