"""The LSTM cell, made of linear layers, additions and multiplications, each with an observer of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from eagerq.errors import InvalidArgumentError, InvalidConfigError
from eagerq.nn.quantizable.parts import qconfig_of
from eagerq.nn.quantized.functional_modules import FloatFunctional
from eagerq.qtensor import QTensor, quantize_per_tensor

__all__ = ["LSTMCell", "State"]

State = tuple[Tensor, Tensor]

_GATES = ("input", "forget", "cell", "output")


def _parameter(value: Tensor) -> nn.Parameter:
    return value if isinstance(value, nn.Parameter) else nn.Parameter(value.detach())


class LSTMCell(nn.Module):
    """:class:`torch.nn.LSTMCell` with an observer on every intermediate result.

    Args:
        input_dim, hidden_dim: sizes of input and state.
        bias: whether both linear layers have one.
        split_gates: one pair of linear layers for each gate, rather than one pair for all four.

    Attributes:
        initial_hidden_state_qparams, initial_cell_state_qparams: scale and zero point of the zeros that an
            int8 cell starts from when no state is given.

    Example:
        >>> cell = LSTMCell(10, 20)
        >>> h, c = cell(torch.randn(3, 10))
        >>> h.shape
        torch.Size([3, 20])
    """

    _FLOAT_MODULE: ClassVar[Any] = nn.LSTMCell

    igates: Any
    hgates: Any
    gates: Any

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        split_gates: bool = False,
    ) -> None:
        super().__init__()
        self.input_size, self.hidden_size = input_dim, hidden_dim
        self.bias, self.split_gates = bias, split_gates

        def linear(size: int, width: int) -> nn.Module:
            return nn.Linear(size, width, bias=bias, device=device, dtype=dtype)

        if split_gates:
            self.igates = nn.ModuleDict({gate: linear(input_dim, hidden_dim) for gate in _GATES})
            self.hgates = nn.ModuleDict({gate: linear(hidden_dim, hidden_dim) for gate in _GATES})
            self.gates = nn.ModuleDict({gate: FloatFunctional() for gate in _GATES})
        else:
            self.igates = linear(input_dim, 4 * hidden_dim)
            self.hgates = linear(hidden_dim, 4 * hidden_dim)
            self.gates = FloatFunctional()
        self.input_gate, self.forget_gate, self.output_gate = nn.Sigmoid(), nn.Sigmoid(), nn.Sigmoid()
        self.cell_gate = nn.Tanh()
        self.fgate_cx, self.igate_cgate = FloatFunctional(), FloatFunctional()
        self.fgate_cx_igate_cgate, self.ogate_cy = FloatFunctional(), FloatFunctional()

        self.initial_hidden_state_qparams: tuple[float, int] = (1.0, 0)
        self.initial_cell_state_qparams: tuple[float, int] = (1.0, 0)
        self.hidden_state_dtype = self.cell_state_dtype = torch.uint8

    def _gate_inputs(self, x: Tensor, h: Tensor) -> Sequence[Tensor]:
        if self.split_gates:
            layers = zip(self.gates.children(), self.igates.children(), self.hgates.children(), strict=True)
            return [gates.add(igates(x), hgates(h)) for gates, igates, hgates in layers]
        total: Tensor = self.gates.add(self.igates(x), self.hgates(h))
        return total.chunk(4, 1)

    def forward(self, x: Tensor, hidden: State | None = None) -> State:
        """One step.

        Args:
            x: ``[batch, input_dim]``.
            hidden: hidden and cell state, each ``[batch, hidden_dim]``; zeros when left out.

        Returns:
            The next hidden and cell state.
        """
        h, c = (None, None) if hidden is None else hidden
        if h is None or c is None:
            h, c = self.initialize_hidden(x.shape[0], isinstance(x, QTensor), x)
        take, keep, new, show = self._gate_inputs(x, h)
        take, keep = self.input_gate(take), self.forget_gate(keep)
        new, show = self.cell_gate(new), self.output_gate(show)
        c = self.fgate_cx_igate_cgate.add(self.fgate_cx.mul(keep, c), self.igate_cgate.mul(take, new))
        return self.ogate_cy.mul(show, torch.tanh(c)), c

    def initialize_hidden(self, batch_size: int, is_quantized: bool = False, like: Tensor | None = None) -> State:
        """The state that a cell starts from when none is given: zeros, float or quantized.

        Args:
            like: the input, whose device (and, of float ones, dtype) they get.
        """
        shape = (batch_size, self.hidden_size)
        real = torch.zeros(shape, dtype=None if is_quantized or like is None else like.dtype)
        if like is not None:
            real = real.to(like.device)
        if not is_quantized:
            return real, real.clone()
        (h_scale, h_zero_point), (c_scale, c_zero_point) = (
            self.initial_hidden_state_qparams,
            self.initial_cell_state_qparams,
        )
        return (
            quantize_per_tensor(real, h_scale, h_zero_point, self.hidden_state_dtype),
            quantize_per_tensor(real, c_scale, c_zero_point, self.cell_state_dtype),
        )

    def _get_name(self) -> str:
        return "QuantizableLSTMCell"

    @classmethod
    def from_params(
        cls, wi: Tensor, wh: Tensor, bi: Tensor | None = None, bh: Tensor | None = None, split_gates: bool = False
    ) -> LSTMCell:
        """A cell with the weights (and biases) of input and hidden state, gates along their first axis.

        Raises:
            InvalidArgumentError: when only one of the biases is given.
        """
        if (bi is None) != (bh is None):
            raise InvalidArgumentError(
                "only one of the two biases was given", remedy="pass both bi and bh, or neither of them"
            )
        cell = cls(wi.shape[1], wh.shape[1], bi is not None, device="meta", split_gates=split_gates)
        for layers, name, value in (
            *((cell.igates, "weight", wi), (cell.igates, "bias", bi)),
            *((cell.hgates, "weight", wh), (cell.hgates, "bias", bh)),
        ):
            if value is None:
                continue
            if not split_gates:
                setattr(layers, name, _parameter(value))
                continue
            for layer, part in zip(layers.children(), value.detach().chunk(4), strict=True):
                setattr(layer, name, nn.Parameter(part.clone()))
        return cell

    @classmethod
    def from_float(
        cls, other: nn.Module, use_precomputed_fake_quant: bool = False, split_gates: bool = False
    ) -> LSTMCell:
        """The cell of an :class:`torch.nn.LSTMCell` with a qconfig; not yet prepared.

        Raises:
            InvalidConfigError: for another class of module, or one without a qconfig.
        """
        if type(other) is not cls._FLOAT_MODULE:
            raise InvalidConfigError(
                f"Expected module type {cls._FLOAT_MODULE.__name__}, got {type(other).__name__}", module=other
            )
        source: Any = other
        config = qconfig_of(other)
        cell = cls.from_params(
            source.weight_ih, source.weight_hh, source.bias_ih, source.bias_hh, split_gates=split_gates
        )
        for part in (cell, *cell.igates.modules(), *cell.hgates.modules()):
            part.qconfig = config
        return cell
