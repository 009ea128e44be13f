"""Single steps in time: cells whose weights are stored small."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from eagerq.errors import InvalidArgumentError
from eagerq.nn.quantized.dynamic.recurrent import RecurrentModule, Step, gru_step, lstm_step, relu_step, tanh_step

__all__ = ["GRUCell", "LSTMCell", "RNNCell", "RNNCellBase"]

_STEPS: dict[str, Step] = {"tanh": tanh_step, "relu": relu_step}


class RNNCellBase(RecurrentModule):
    """Base of the cells.

    Args:
        input_size, hidden_size, bias: as for :class:`torch.nn.LSTMCell`.
        num_chunks: how many gates there are.
        dtype: of the weights: ``torch.int8`` or ``torch.float16``.

    Raises:
        UnsupportedError: for another dtype.
    """

    _FLOAT_MODULE: ClassVar[Any] = nn.RNNCellBase

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        num_chunks: int = 4,
        dtype: torch.dtype = torch.int8,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, dtype)
        rows = num_chunks * hidden_size
        self._allocate({"weight_ih": (rows, input_size), "weight_hh": (rows, hidden_size)})

    @property
    def weight_dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.dtype

    def set_weight_bias(self, weight_bias_dict: dict[str, dict[str, Any]]) -> None:
        """Adopt ``{"weight": {"weight_ih": …, "weight_hh": …}, "bias": {"bias_ih": …, "bias_hh": …}}``.

        Raises:
            InvalidConfigError: when one is missing or does not fit; the module is then as it was.
        """
        self._adopt(weight_bias_dict["weight"], weight_bias_dict["bias"])

    def forward(self, input: Any, hx: Any = None) -> Any:
        """One step, as the float module's.

        Args:
            input: float32 ``[batch, input_size]`` or ``[input_size]``.
            hx: the state before, each ``[batch, hidden_size]`` or ``[hidden_size]``; zeros when left out.

        Returns:
            The state after.

        Raises:
            InvalidInputError: for tensors of another dtype or shape.
        """
        batch: tuple[int | None, ...] = () if isinstance(input, Tensor) and input.dim() == 1 else (None,)
        x = self._expect(input, "input", (*batch, self.input_size))
        state = self._start(hx, x, (*x.shape[:-1], self.hidden_size))
        if not batch:
            x, state = x.unsqueeze(0), tuple(part.unsqueeze(0) for part in state)
        state = self._step(self._project("weight_ih")(x), state, self._project("weight_hh"))
        if not batch:
            state = tuple(part.squeeze(0) for part in state)
        return self._as_hx(state)


class RNNCell(RNNCellBase):
    """:class:`torch.nn.RNNCell` on weights of 8 bits (or float16); float32 in and out.

    Input and state are quantized at each call, to 7 bits with the scale of the moment.

    Args:
        input_size, hidden_size, bias, nonlinearity: as for :class:`torch.nn.RNNCell`.
        dtype: of the weights: ``torch.int8`` or ``torch.float16``.

    Raises:
        InvalidArgumentError: for another ``nonlinearity`` than ``"tanh"`` and ``"relu"``.
        UnsupportedError: for another dtype.

    Example:
        >>> RNNCell(10, 20, nonlinearity="relu")(torch.randn(3, 10)).shape
        torch.Size([3, 20])
    """

    _FLOAT_MODULE: ClassVar[Any] = nn.RNNCell
    _shown_if_not: ClassVar[dict[str, Any]] = {"bias": True, "nonlinearity": "tanh", "dtype": torch.int8}

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        dtype: torch.dtype = torch.int8,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, 1, dtype)
        if nonlinearity not in _STEPS:
            raise InvalidArgumentError(
                f"Unknown nonlinearity: {nonlinearity}", module=self, remedy="use 'tanh' or 'relu'"
            )
        self.nonlinearity = nonlinearity
        self._step = _STEPS[nonlinearity]

    @classmethod
    def _arguments(cls, module: Any) -> dict[str, Any]:
        return {**super()._arguments(module), "nonlinearity": module.nonlinearity}


class LSTMCell(RNNCellBase):
    """:class:`torch.nn.LSTMCell`; what is quantized when, and arguments, as for :class:`RNNCell`.

    Example:
        >>> h, c = LSTMCell(10, 20)(torch.randn(3, 10))
        >>> h.shape, c.shape
        (torch.Size([3, 20]), torch.Size([3, 20]))
    """

    _FLOAT_MODULE: ClassVar[Any] = nn.LSTMCell
    _step = staticmethod(lstm_step)
    _state_names = ("h", "c")

    def __init__(self, input_size: int, hidden_size: int, bias: bool = True, dtype: torch.dtype = torch.int8) -> None:
        super().__init__(input_size, hidden_size, bias, 4, dtype)


class GRUCell(RNNCellBase):
    """:class:`torch.nn.GRUCell`; what is quantized when, and arguments, as for :class:`RNNCell`.

    Example:
        >>> GRUCell(10, 20)(torch.randn(3, 10)).shape
        torch.Size([3, 20])
    """

    _FLOAT_MODULE: ClassVar[Any] = nn.GRUCell
    _step = staticmethod(gru_step)

    def __init__(self, input_size: int, hidden_size: int, bias: bool = True, dtype: torch.dtype = torch.int8) -> None:
        super().__init__(input_size, hidden_size, bias, 3, dtype)
