"""LSTM made of cells that run over the sequence."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eagerq.errors import InvalidArgumentError, InvalidConfigError, InvalidInputError, UnsupportedError
from eagerq.nn.quantizable.cell import LSTMCell, State
from eagerq.nn.quantizable.in_c import sequence_in_c
from eagerq.nn.quantizable.parts import cat, prepare_parts, qconfig_of, stack, zeros
from eagerq.qtensor import QTensor

__all__ = ["LSTM"]


class _LSTMSingleLayer(nn.Module):
    """A cell run over a sequence, in one direction."""

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
        self.cell = LSTMCell(input_dim, hidden_dim, bias, device, dtype, split_gates=split_gates)

    def forward(self, x: Tensor, hidden: State | None = None) -> tuple[Tensor, State]:
        """Hidden states ``[length, batch, hidden_dim]`` of an input ``[length, batch, input_dim]``, and the last."""
        if x.shape[0] == 0:
            raise InvalidInputError("the sequence has no elements", module=self, remedy="pass at least one")
        if isinstance(x, QTensor) and (all_at_once := sequence_in_c(self.cell, x, hidden)) is not None:
            return all_at_once
        results = []
        for step in x.unbind(0):
            hidden = self.cell(step, hidden)
            results.append(hidden[0])
        assert hidden is not None
        return torch.stack(results, 0), hidden

    @classmethod
    def from_params(cls, *args: Any, **kwargs: Any) -> _LSTMSingleLayer:
        cell = LSTMCell.from_params(*args, **kwargs)
        layer = cls(cell.input_size, cell.hidden_size, cell.bias, device="meta", split_gates=cell.split_gates)
        layer.cell = cell
        return layer


class _LSTMLayer(nn.Module):
    """One layer of an LSTM: ``layer_fw``, and ``layer_bw`` when it is bidirectional."""

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int,
        bias: bool = True,
        batch_first: bool = False,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        split_gates: bool = False,
    ) -> None:
        super().__init__()
        self.batch_first, self.bidirectional = batch_first, bidirectional
        self.layer_fw: Any
        self.layer_bw: Any
        for name in ("layer_fw", "layer_bw")[: 1 + bidirectional]:
            layer = _LSTMSingleLayer(input_dim, hidden_dim, bias, device, dtype, split_gates=split_gates)
            self.add_module(name, layer)

    def forward(self, x: Tensor, hidden: State | None = None) -> tuple[Tensor, State]:
        """As :class:`_LSTMSingleLayer`; with two directions, states are ``[2, batch, hidden_dim]``."""
        if self.batch_first:
            x = x.transpose(0, 1)
        if self.bidirectional:
            states = (None, None) if hidden is None else tuple(zip(*hidden, strict=True))
            ahead, state_fw = self.layer_fw(x, states[0])
            back, state_bw = self.layer_bw(x.flip(0), states[1])
            y = cat([ahead, back.flip(0)], 2)
            state = (stack([state_fw[0], state_bw[0]]), stack([state_fw[1], state_bw[1]]))
        else:
            y, state = self.layer_fw(x, hidden)
        return (y.transpose(0, 1) if self.batch_first else y), state

    @classmethod
    def from_float(
        cls,
        other: Any,
        layer_idx: int = 0,
        qconfig: Any = None,
        batch_first: bool | None = None,
        split_gates: bool = False,
    ) -> _LSTMLayer:
        """Layer ``layer_idx`` of an :class:`torch.nn.LSTM`, sharing its parameters where gates are not split."""
        sizes = (other.input_size, other.hidden_size, other.bias)
        batch_first = other.batch_first if batch_first is None else batch_first
        layer = cls(*sizes, batch_first, other.bidirectional, device="meta", split_gates=split_gates)
        layer.qconfig = qconfig_of(other, qconfig)
        for name, suffix in (("layer_fw", ""), ("layer_bw", "_reverse"))[: 1 + other.bidirectional]:
            found = (f"{kind}_l{layer_idx}{suffix}" for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
            values = [getattr(other, key, None) for key in found]
            setattr(layer, name, _LSTMSingleLayer.from_params(*values, split_gates=split_gates))
        return layer


class LSTM(nn.Module):
    """:class:`torch.nn.LSTM` made of :class:`LSTMCell`: ``prepare`` puts it in the place of ``nn.LSTM``.

    Same arguments, inputs and results as :class:`torch.nn.LSTM`, but for ``proj_size`` and packed
    sequences.

    Args:
        split_gates: see :class:`LSTMCell`.

    Attributes:
        layers: one for each layer, with a cell at ``layers[i].layer_fw.cell`` (and ``layer_bw``).

    Raises:
        InvalidArgumentError: for a dropout that is not a probability.

    Example:
        >>> lstm = LSTM(10, 20, num_layers=2)
        >>> y, (h, c) = lstm(torch.randn(5, 3, 10))
        >>> y.shape, h.shape
        (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]))
    """

    _FLOAT_MODULE: ClassVar[Any] = nn.LSTM

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        split_gates: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout <= 1:
            raise InvalidArgumentError(
                f"dropout should be a number in range [0, 1], got {dropout}", remedy="pass a probability"
            )
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.bidirectional = bias, batch_first, bidirectional
        self.dropout = float(dropout)
        inputs = [input_size] + [hidden_size * (1 + bidirectional)] * (num_layers - 1)
        self.layers = nn.ModuleList(
            _LSTMLayer(size, hidden_size, bias, False, bidirectional, device, dtype, split_gates=split_gates)
            for size in inputs
        )

    def _states(self, x: Tensor, hidden: Any) -> list[State]:
        """The initial states of each layer, ``[batch, hidden_size]`` or, with two directions, one more axis."""
        directions = (2,) if self.bidirectional else ()
        shape = (*directions, x.shape[1], self.hidden_size)
        if hidden is None:
            start = zeros(x, shape, 1.0, 0)
            return [(start, start)] * self.num_layers
        if not isinstance(hidden[0], Tensor):  # a pair for each layer
            return list(hidden)
        wanted = (self.num_layers * (1 + self.bidirectional), *shape[-2:])
        for state in hidden:
            if state.numel() != wanted[0] * wanted[1] * wanted[2]:
                raise InvalidInputError(
                    f"the state has shape {tuple(state.shape)}, expected {wanted}",
                    module=self,
                    remedy="pass hidden and cell state of all layers and directions, or none",
                )
        h, c = (state.reshape(self.num_layers, *shape) for state in hidden)
        return list(zip(h.unbind(0), c.unbind(0), strict=True))

    def forward(self, x: Tensor, hidden: State | None = None) -> tuple[Tensor, State]:
        """The whole sequence.

        Args:
            x: ``[length, batch, input_size]``, with ``batch_first`` ``[batch, length, input_size]``; or one
                sequence ``[length, input_size]``.
            hidden: hidden and cell state, each ``[layers * directions, batch, hidden_size]``.

        Returns:
            The hidden states of the last layer, ``[length, batch, directions * hidden_size]`` (laid out as
            ``x`` is), and the last hidden and cell state of all layers, laid out as ``hidden``.

        Raises:
            InvalidInputError: for a packed or empty sequence, or other shapes.
        """
        if not isinstance(x, Tensor):
            raise InvalidInputError(
                f"expected a tensor, got a {type(x).__name__}",
                module=self,
                remedy="pad the sequences to one length (torch.nn.utils.rnn.pad_packed_sequence)",
            )
        if x.dim() not in (2, 3) or x.shape[-1] != self.input_size:
            raise InvalidInputError(
                f"expected shape [length, batch, {self.input_size}] or [length, {self.input_size}], "
                f"got {tuple(x.shape)}",
                module=self,
                remedy="check input_size and batch_first",
            )
        batched = x.dim() == 3
        time_first = not (self.batch_first and batched)
        x = x if time_first else x.transpose(0, 1)
        x = x if batched else x.unsqueeze(1)
        states = []
        for number, (layer, state) in enumerate(zip(self.layers, self._states(x, hidden), strict=True)):
            if number and self.dropout and self.training:
                x = F.dropout(x, self.dropout)
            x, state = layer(x, state)
            states.append(state)
        h, c = (stack(values).reshape(-1, *x.shape[1:2], self.hidden_size) for values in zip(*states, strict=True))
        if not batched:
            return x.squeeze(1), (h.squeeze(1), c.squeeze(1))
        return (x if time_first else x.transpose(0, 1)), (h, c)

    def _get_name(self) -> str:
        return "QuantizableLSTM"

    @classmethod
    def from_float(cls, other: nn.Module, qconfig: Any = None, split_gates: bool = False) -> LSTM:
        """The prepared twin of an :class:`torch.nn.LSTM`: to calibrate, or in training mode to train.

        Parameters are shared (but for split gates, which copy them).

        Args:
            qconfig: used when ``other`` has none.
            split_gates: see :class:`LSTMCell`.

        Raises:
            InvalidConfigError: for another class of module, or without a qconfig.
            UnsupportedError: for an LSTM with ``proj_size``.
        """
        if not isinstance(other, cls._FLOAT_MODULE):
            raise InvalidConfigError(
                f"Expected module type {cls._FLOAT_MODULE.__name__}, got {type(other).__name__}", module=other
            )
        source: Any = other
        if source.proj_size:
            raise UnsupportedError(
                f"an LSTM with proj_size={source.proj_size} has no quantizable form",
                module=other,
                remedy="set its qconfig to None, so that it stays in float",
            )
        config = qconfig_of(other, qconfig)
        observed = cls(
            *(source.input_size, source.hidden_size, source.num_layers, source.bias, source.batch_first),
            *(source.dropout, source.bidirectional),
            device="meta",
            split_gates=split_gates,
        )
        for number in range(source.num_layers):
            observed.layers[number] = _LSTMLayer.from_float(
                other, number, config, batch_first=False, split_gates=split_gates
            )
        observed.train(other.training)
        prepare_parts(observed, config)
        return observed
