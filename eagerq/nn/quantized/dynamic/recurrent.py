"""What dynamic recurrent modules share: named weights, and the steps in time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eagerq import kernels
from eagerq.errors import InvalidConfigError, InvalidInputError, UnsupportedError
from eagerq.nn.quantized.base import quantize_weight
from eagerq.nn.quantized.dynamic.base import InputRange
from eagerq.nn.quantized.state import StoredTensors, qtensor_parts, stored_qtensor
from eagerq.qconfig import default_dynamic_qconfig
from eagerq.qtensor import QTensor
from eagerq.scheme import integer_dtype

__all__ = ["Project", "RecurrentModule", "State", "Step", "gru_step", "lstm_step", "relu_step", "tanh_step"]

_Self = TypeVar("_Self", bound="RecurrentModule")

# what a recurrence carries on from step to step, each [batch, hidden]; the first is its output
State = tuple[Tensor, ...]
# a weight's matrix product with rows of activations, bias added
Project = Callable[[Tensor], Tensor]
Step = Callable[[Tensor, State, Project], State]


def tanh_step(x: Tensor, state: State, project: Project) -> State:
    """``h' = tanh(x + W h + b)``, where ``x`` is the input's projection; as in all steps."""
    return ((project(state[0]) + x).tanh(),)


def relu_step(x: Tensor, state: State, project: Project) -> State:
    """``h' = relu(x + W h + b)``."""
    return ((project(state[0]) + x).relu(),)


def lstm_step(x: Tensor, state: State, project: Project) -> State:
    """Formula of :class:`torch.nn.LSTM`; gates input, forget, cell, output; state ``(h, c)``."""
    hidden, cell = state
    # torch sums all gates at once: what is contiguous decides which elements its vector units round
    i, f, g, o = (project(hidden) + x).chunk(4, -1)
    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell


def gru_step(x: Tensor, state: State, project: Project) -> State:
    """Formula of :class:`torch.nn.GRU`; gates reset, update, new; the reset gate scales ``W h + b``."""
    (hidden,) = state
    size = hidden.shape[-1]
    gates = project(hidden)
    r, z = (gates[:, : 2 * size] + x[:, : 2 * size]).chunk(2, -1)
    new = (x[:, 2 * size :] + gates[:, 2 * size :] * r.sigmoid()).tanh()
    return ((hidden - new) * z.sigmoid() + new,)


class RecurrentModule(InputRange, StoredTensors):
    """Base of dynamic LSTM, GRU and cells: weights in 8-bit integers or float16, activations float32.

    The state has the names of the float module: each ``weight…`` is int8 beside ``weight…_scale``
    (float32 ``[1]`` or ``[out]``) and ``weight…_zero_point`` (int32, same shape), or float16 alone;
    each ``bias…`` is float32.
    """

    _FLOAT_MODULE: ClassVar[Any]
    _step: Step
    _state_names: ClassVar[tuple[str, ...]] = ("h",)
    _shown_if_not: ClassVar[dict[str, Any]] = {"bias": True, "dtype": torch.int8}

    def __init__(self, input_size: int, hidden_size: int, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.bias = bias
        self.dtype = integer_dtype(dtype)
        if self.dtype not in (torch.int8, torch.float16):
            raise UnsupportedError(
                f"Unsupported dtype for dynamic RNN quantization: {dtype}",
                module=self,
                remedy="use a qconfig whose weights are torch.int8 or torch.float16, "
                "such as eagerq.default_dynamic_qconfig",
            )
        self._shapes: dict[str, tuple[int, int]] = {}

    def _allocate(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Zeros for weights of these names and shapes, and for their biases."""
        self._shapes = dict(shapes)
        weights: dict[str, Any] = {}
        for name, shape in shapes.items():
            zeros = torch.zeros(shape, dtype=self.dtype)
            weights[name] = zeros if self.dtype is torch.float16 else QTensor(zeros, 1.0, 0)
        self._adopt(weights, {_bias_of(name): torch.zeros(shape[0]) for name, shape in shapes.items()})

    def _adopt(self, weights: Mapping[str, Any], biases: Mapping[str, Any]) -> None:
        """Store weights (QTensor, or float for float16) and biases by name; all are checked before."""
        parts: dict[str, Tensor | None] = {}
        for name in self._shapes:
            parts |= self._parts(name, self._given(weights, name))
            if self.bias:
                parts[_bias_of(name)] = self._bias(name, self._given(biases, _bias_of(name)))
        self._STORED = tuple(parts)
        self._store(*parts.values())

    def _given(self, values: Mapping[str, Any], name: str) -> Any:
        if name not in values:
            raise InvalidConfigError(f"{name} is missing", module=self, remedy=f"give all of {list(self._shapes)}")
        return values[name]

    def _parts(self, name: str, weight: Any) -> dict[str, Tensor]:
        kind = QTensor if self.dtype is torch.int8 else Tensor
        stored = weight.integers.dtype if isinstance(weight, QTensor) else self.dtype
        if not isinstance(weight, kind) or stored is not self.dtype or tuple(weight.shape) != self._shapes[name]:
            shape = tuple(getattr(weight, "shape", ()))
            raise InvalidConfigError(
                f"{name} has to be a {kind.__name__} of shape {self._shapes[name]} for weights of {self.dtype}, "
                f"got {type(weight).__name__} of shape {shape}",
                module=self,
                remedy="quantize weights with eagerq.quantize_per_tensor(w, scale, 0, torch.int8), "
                "or build the module with the dtype of the weights",
            )
        if isinstance(weight, QTensor):
            return dict(zip((name, f"{name}_scale", f"{name}_zero_point"), qtensor_parts(weight), strict=True))
        return {name: kernels.to_float16(weight.detach())}

    def _bias(self, name: str, bias: Any) -> Tensor:
        wanted = self._shapes[name][:1]
        if not isinstance(bias, Tensor) or tuple(bias.shape) != wanted:
            got = tuple(bias.shape) if isinstance(bias, Tensor) else type(bias).__name__
            raise InvalidConfigError(f"{_bias_of(name)} has to be a tensor of shape {wanted}, got {got}", module=self)
        return bias.detach().float()

    def get_weight(self) -> dict[str, Any]:
        """The weights by name: QTensors, or float32 tensors of float16 values."""
        if self.dtype is torch.float16:
            return {name: self._tensor(name).float() for name in self._shapes}
        return {
            name: stored_qtensor(*(self._tensor(name + end) for end in ("", "_scale", "_zero_point")))
            for name in self._shapes
        }

    def get_bias(self) -> dict[str, Tensor | None]:
        """The float32 biases by name; None where there are none."""
        return {_bias_of(name): getattr(self, f"_{_bias_of(name)}", None) for name in self._shapes}

    def _weight_bias(self) -> dict[str, dict[str, Any]]:
        return {"weight": self.get_weight(), "bias": self.get_bias()}

    def _tensor(self, name: str) -> Tensor:
        value: Tensor = getattr(self, f"_{name}")
        return value

    def _project(self, name: str) -> Project:
        """The product with a weight, for many calls."""
        bias = self._tensor(_bias_of(name)) if self.bias else None
        weight = self._tensor(name)
        if self.dtype is torch.float16:
            return partial(F.linear, weight=weight.float(), bias=bias)
        scale, zero_point = self._tensor(f"{name}_scale"), self._tensor(f"{name}_zero_point")
        reduce_range = self.reduce_range
        return lambda x: kernels.linear_dynamic(x, weight, scale, zero_point, bias, reduce_range)

    def _recur_in_c(
        self, name: str, x: Tensor, sizes: list[int], start: State, reverse: bool = False
    ) -> tuple[Tensor, State] | None:
        """As :func:`eagerq.kernels.recur`, with the recurrent weight of that name."""
        weight = self._tensor(name)
        bias = self._tensor(_bias_of(name)) if self.bias else None
        if self.dtype is torch.float16:
            return kernels.recur(x, sizes, start, weight.float(), None, None, bias, False, reverse)
        qparams = (self._tensor(f"{name}_scale"), self._tensor(f"{name}_zero_point"))
        return kernels.recur(x, sizes, start, weight, *qparams, bias, self.reduce_range, reverse)

    def _expect(self, x: Any, what: str, shape: tuple[int | None, ...]) -> Tensor:
        """``x``, if it is a float32 tensor of that shape, in which None is any length."""
        if not isinstance(x, Tensor) or isinstance(x, QTensor) or x.dtype is not torch.float32:
            got = str(x.dtype) if type(x) is Tensor else type(x).__name__
            raise InvalidInputError(
                f"{what} has to be a float32 tensor, got {got}",
                module=self,
                remedy="put a DeQuantStub before it: dynamic modules quantize their input themselves"
                if isinstance(x, QTensor)
                else "convert it with .float()",
            )
        fits = x.dim() == len(shape) and all(
            wanted is None or got == wanted for got, wanted in zip(x.shape, shape, strict=True)
        )
        if not fits:
            wanted = "[" + ", ".join("any" if length is None else str(length) for length in shape) + "]"
            raise InvalidInputError(
                f"{what} has to be of shape {wanted}, got {list(x.shape)}",
                module=self,
                remedy="check input_size, hidden_size, batch_first and the batch of the hidden state",
            )
        return x

    def _start(self, hx: Any, like: Tensor, shape: tuple[int, ...]) -> State:
        """The state to start from: the given one, checked, or zeros."""
        if hx is None:
            return (like.new_zeros(shape),) * len(self._state_names)
        parts = tuple(hx) if isinstance(hx, (tuple, list)) else (hx,)
        if len(parts) != len(self._state_names):
            raise InvalidInputError(
                f"expected a hidden state of {len(self._state_names)} tensors {self._state_names}, got {len(parts)}",
                module=self,
                remedy="pass (h_0, c_0) to an LSTM, h_0 alone to the others",
            )
        pairs = zip(parts, self._state_names, strict=True)
        return tuple(self._expect(part, f"hidden state {name}", shape) for part, name in pairs)

    def _as_hx(self, state: State) -> Any:
        return state if len(self._state_names) > 1 else state[0]

    @classmethod
    def _arguments(cls, module: Any) -> dict[str, Any]:
        """Constructor arguments that rebuild a float module's shape."""
        return {name: getattr(module, name) for name in ("input_size", "hidden_size", "bias")}

    @classmethod
    def from_float(cls: type[_Self], mod: nn.Module, use_precomputed_fake_quant: bool = False) -> _Self:
        """The dynamic module of a float one; ``mod`` is left as it is.

        Args:
            mod: the float module, with a ``qconfig``; one without ``weight`` means ``default_dynamic_qconfig``.
            use_precomputed_fake_quant: of no effect; there are no such fake quantizers.

        Raises:
            InvalidConfigError: for a module of another class, or without ``qconfig``.
            UnsupportedError: for weights that are not to be int8 or float16, and for projections.
        """
        if not isinstance(mod, cls._FLOAT_MODULE):
            raise InvalidConfigError(
                f"{cls.__name__}.from_float only works for nn.{cls._FLOAT_MODULE.__name__}, got {type(mod).__name__}",
                module=mod,
            )
        if not hasattr(mod, "qconfig"):
            raise InvalidConfigError("Input float module must have qconfig defined", module=mod)
        factory: Any = getattr(mod.qconfig, "weight", None) or default_dynamic_qconfig.weight
        new = cls(**cls._arguments(mod), dtype=factory().dtype)
        weights = {name: getattr(mod, name).detach() for name in new._shapes}
        if new.dtype is torch.int8:
            weights = {
                name: quantize_weight(mod, weight, factory().to(weight.device), as_trained=False, refresh=True)
                for name, weight in weights.items()
            }
        new._adopt(weights, {_bias_of(name): getattr(mod, _bias_of(name), None) for name in new._shapes})
        return new

    def _get_name(self) -> str:
        return f"DynamicQuantized{type(self).__name__}"

    def extra_repr(self) -> str:
        values = {name: getattr(self, name) for name in self._shown_if_not}
        others = (f", {name}={value}" for name, value in values.items() if value != self._shown_if_not[name])
        return f"{self.input_size}, {self.hidden_size}{''.join(others)}"


def _bias_of(weight_name: str) -> str:
    return weight_name.replace("weight", "bias", 1)
