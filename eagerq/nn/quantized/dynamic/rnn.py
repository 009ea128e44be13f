"""LSTM and GRU whose weights are stored small, and whose activations are quantized as they come."""

from __future__ import annotations

import warnings
from collections.abc import MutableMapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from eagerq.checkpoint import rename
from eagerq.errors import InvalidArgumentError, InvalidInputError, UnsupportedError
from eagerq.kernels.dispatch import dialect
from eagerq.nn.quantized.dynamic.recurrent import Project, RecurrentModule, State, Step, gru_step, lstm_step

__all__ = ["GRU", "LSTM", "RNNBase"]

_GATES = {"LSTM": 4, "GRU": 3}
_PARTS = [(f"weight_{of}", rest) for of in ("ih", "hh") for rest in ("", "_scale", "_zero_point")]
_PARTS += [("bias_ih", ""), ("bias_hh", "")]


def _recur(
    step: Step,
    project: Project,
    pieces: Sequence[Tensor],
    start: State,
    reverse: bool,
) -> tuple[Tensor, State]:
    """Run through time: the outputs of all steps, one below the other, and the final state.

    Args:
        step: one step in time.
        project: the product with the recurrent weight.
        pieces: the projected input of each time step, ``[sequences that go on, gates]``: longest sequences first.
        start: the state before, of all sequences.
        reverse: from the last step to the first.
    """
    outputs: list[Tensor] = []
    ended: list[State] = []
    ordered = pieces[::-1] if reverse else pieces
    state = tuple(part[: ordered[0].shape[0]] for part in start)
    for piece in ordered:
        rows, held = piece.shape[0], state[0].shape[0]
        if rows < held:
            ended.append(tuple(part[rows:] for part in state))
            state = tuple(part[:rows] for part in state)
        elif rows > held:
            state = tuple(torch.cat([part, new[held:rows]]) for part, new in zip(state, start, strict=True))
        state = step(piece, state, project)
        outputs.append(state[0])
    final = tuple(torch.cat(parts) for parts in zip(state, *reversed(ended), strict=True)) if ended else state
    return torch.cat(outputs[::-1] if reverse else outputs), final


class RNNBase(RecurrentModule):
    """Base of :class:`LSTM` and :class:`GRU`.

    Args:
        mode: ``"LSTM"`` or ``"GRU"``.
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional: as for
            :class:`torch.nn.LSTM`.
        dtype: of the weights: ``torch.int8`` or ``torch.float16``.

    Raises:
        InvalidArgumentError: for values that :class:`torch.nn.LSTM` would refuse.
        UnsupportedError: for another dtype.
    """

    _FLOAT_MODULE: ClassVar[Any] = nn.RNNBase
    _shown_if_not: ClassVar[dict[str, Any]] = {
        **{"num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0, "bidirectional": False},
        "dtype": torch.int8,
    }

    def __init__(
        self,
        mode: str,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        dtype: torch.dtype = torch.int8,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, dtype)
        self._check_arguments(mode, num_layers, dropout)
        self.mode = mode
        self.num_layers = num_layers
        self.batch_first = batch_first
        self.dropout = float(dropout)
        self.bidirectional = bidirectional
        self.training = False
        gates = _GATES[mode] * hidden_size
        shapes = {}
        for layer in range(num_layers):
            width = input_size if layer == 0 else hidden_size * len(self._suffixes)
            for suffix in self._suffixes:
                shapes[f"weight_ih_l{layer}{suffix}"] = (gates, width)
                shapes[f"weight_hh_l{layer}{suffix}"] = (gates, hidden_size)
        self._allocate(shapes)

    def _check_arguments(self, mode: str, num_layers: int, dropout: float) -> None:
        if mode not in _GATES:
            raise InvalidArgumentError(f"Unrecognized RNN mode: {mode}", module=self, remedy="use 'LSTM' or 'GRU'")
        if min(self.input_size, self.hidden_size, num_layers) <= 0:
            raise InvalidArgumentError(
                f"input_size {self.input_size}, hidden_size {self.hidden_size} and num_layers {num_layers} "
                "have to be greater than zero",
                module=self,
            )
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout <= 1:
            raise InvalidArgumentError(
                f"dropout should be a number in range [0, 1] representing the probability of an element being zeroed, "
                f"got {dropout!r}",
                module=self,
            )
        if dropout > 0 and num_layers == 1:
            warnings.warn(
                "dropout option adds dropout after all but last recurrent layer, so non-zero dropout expects "
                f"num_layers greater than 1, but got dropout={dropout} and num_layers={num_layers}",
                stacklevel=4,
            )

    def _upgrade_state(self, state: MutableMapping[str, Any], prefix: str, version: int | None) -> None:
        """torch.ao counts the directions of all layers: ``_all_weight_values.1.weight_ih``."""
        super()._upgrade_state(state, prefix, version)
        ends = [f"_l{layer}{suffix}" for layer in range(self.num_layers) for suffix in self._suffixes]
        for number, end in enumerate(ends):
            inner = f"_all_weight_values.{number}."
            names = {f"{inner}{what}{rest}": f"{what}{end}{rest}" for what, rest in _PARTS}
            rename(state, prefix, {**names, f"{inner}reduce_range": "reduce_range"})
            state.pop(f"{prefix}{inner}reduce_range", None)  # the same for all

    @property
    def _suffixes(self) -> tuple[str, ...]:
        return ("", "_reverse") if self.bidirectional else ("",)

    @property
    def _states(self) -> int:
        return self.num_layers * len(self._suffixes)

    def set_weight_bias(self, weight_bias_dict: dict[str, Any]) -> None:
        """Adopt weights and biases by name: what :meth:`get_weight` and :meth:`get_bias` return, in one dict.

        Raises:
            InvalidConfigError: when one is missing or does not fit; the module is then as it was.
        """
        self._adopt(weight_bias_dict, weight_bias_dict)

    def forward(self, input: Any, hx: Any = None) -> tuple[Any, Any]:
        """As for the float module.

        Args:
            input: float32 ``[time, batch, input_size]`` (``[batch, time, input_size]`` with ``batch_first``),
                ``[time, input_size]``, or a PackedSequence.
            hx: the state before, each ``[num_layers·directions, batch, hidden_size]``; zeros when left out.

        Returns:
            The last layer's outputs, in the form of the input, and the state after.

        Raises:
            InvalidInputError: for tensors of another dtype or shape, and for sequences without a step.
        """
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx)
        if isinstance(input, Tensor) and input.dim() == 2:  # one sequence
            x = self._expect(input, "input", (None, self.input_size)).unsqueeze(1)
            start = self._start(hx, x, (self._states, self.hidden_size))
            y, state = self._forward_padded(x, tuple(part.unsqueeze(1) for part in start))
            return y.squeeze(1), self._as_hx(tuple(part.squeeze(1) for part in state))
        x = self._expect(input, "input", (None, None, self.input_size))
        x = x.transpose(0, 1) if self.batch_first else x
        y, state = self._forward_padded(x, self._start(hx, x, (self._states, x.shape[1], self.hidden_size)))
        return y.transpose(0, 1) if self.batch_first else y, self._as_hx(state)

    def _forward_padded(self, x: Tensor, start: State) -> tuple[Tensor, State]:
        steps, batch = x.shape[:2]
        y, state = self._run(x.flatten(0, 1), [batch] * steps, start)
        return y.unflatten(0, (steps, batch)), state

    def _forward_packed(self, x: PackedSequence, hx: Any) -> tuple[PackedSequence, Any]:
        if dialect() is not None:
            raise UnsupportedError(
                "a packed sequence has another shape for each batch, and a graph one for all",
                module=self,
                remedy="export it with padded sequences (torch.nn.utils.rnn.pad_packed_sequence)",
            )
        data, sizes, order, back = x
        data = self._expect(data, "input", (None, self.input_size))
        state = self._start(hx, data, (self._states, int(sizes[0]), self.hidden_size))
        if hx is not None and order is not None:
            state = tuple(part.index_select(1, order) for part in state)
        y, state = self._run(data, sizes.tolist(), state)
        if back is not None:
            state = tuple(part.index_select(1, back) for part in state)
        return PackedSequence(y, sizes, order, back), self._as_hx(state)

    def _run(self, x: Tensor, sizes: list[int], start: State) -> tuple[Tensor, State]:
        """All layers: rows ``[sum of sizes, input_size]``, of each time step those of the sequences that go on."""
        if not sizes:
            raise InvalidInputError(
                "Expected sequence length to be larger than 0 in RNN",
                module=self,
                remedy="leave out empty sequences",
            )
        finals: list[State] = []
        for layer in range(self.num_layers):
            outputs = []
            for suffix in self._suffixes:
                # all time steps have one scale, as they have in torch.ao
                projected = self._project(f"weight_ih_l{layer}{suffix}")(x)
                before = tuple(part[len(finals)] for part in start)
                y, final = self._recur(f"weight_hh_l{layer}{suffix}", projected, sizes, before, suffix != "")
                outputs.append(y)
                finals.append(final)
            x = torch.cat(outputs, -1) if self.bidirectional else outputs[0]
            if self.dropout and layer < self.num_layers - 1:
                x = F.dropout(x, self.dropout, self.training)
        return x, tuple(torch.stack(parts) for parts in zip(*finals, strict=True))

    def _recur(self, name: str, x: Tensor, sizes: list[int], start: State, reverse: bool) -> tuple[Tensor, State]:
        """One direction of one layer, whose recurrent weight has that name."""
        done = self._recur_in_c(name, x, sizes, start, reverse)
        return done or _recur(self._step, self._project(name), x.split(sizes), start, reverse)

    @classmethod
    def _arguments(cls, module: Any) -> dict[str, Any]:
        if getattr(module, "proj_size", 0):
            raise UnsupportedError(
                f"a projection of the hidden state (proj_size={module.proj_size}) has no dynamic form",
                module=module,
                remedy="leave this module float (its qconfig None), or train it with proj_size=0",
            )
        names = ("num_layers", "batch_first", "dropout", "bidirectional")
        return {**super()._arguments(module), **{name: getattr(module, name) for name in names}}


class LSTM(RNNBase):
    """:class:`torch.nn.LSTM` on weights of 8 bits (or float16); float32 in and out.

    The input is quantized once for all time steps, the hidden state at each, to 7 bits with the scale
    of the moment.  State: see :class:`~eagerq.nn.quantized.dynamic.recurrent.RecurrentModule`.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional: as for
            :class:`torch.nn.LSTM`.
        dtype: of the weights: ``torch.int8`` or ``torch.float16``.

    Raises:
        InvalidArgumentError: for values that :class:`torch.nn.LSTM` would refuse.
        UnsupportedError: for another dtype.

    Example:
        >>> output, (h_n, c_n) = LSTM(10, 20, num_layers=2)(torch.randn(5, 3, 10))
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]))
    """

    _FLOAT_MODULE: ClassVar[Any] = nn.LSTM
    _step = staticmethod(lstm_step)
    _state_names = ("h", "c")

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        dtype: torch.dtype = torch.int8,
    ) -> None:
        super().__init__("LSTM", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, dtype)


class GRU(RNNBase):
    """:class:`torch.nn.GRU` on weights of 8 bits (or float16); float32 in and out.

    What is quantized when, arguments and errors are as for :class:`LSTM`.

    Example:
        >>> output, h_n = GRU(10, 20, batch_first=True)(torch.randn(3, 5, 10))
        >>> output.shape, h_n.shape
        (torch.Size([3, 5, 20]), torch.Size([1, 3, 20]))
    """

    _FLOAT_MODULE: ClassVar[Any] = nn.GRU
    _step = staticmethod(gru_step)
    _state_names = ("h",)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        dtype: torch.dtype = torch.int8,
    ) -> None:
        super().__init__("GRU", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, dtype)
