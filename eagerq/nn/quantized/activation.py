"""int8 activation functions: a look-up in a table of 256 answers, quantized to the learned range."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eagerq import kernels
from eagerq.errors import InvalidArgumentError, InvalidInputError
from eagerq.nn.quantized.base import Output, RequantizingModule, expect_quantized, quantize_weight
from eagerq.nn.quantized.state import QuantizedModule, StoredTensors
from eagerq.qtensor import QTensor
from eagerq.qtensor_activations import softmax

__all__ = ["ELU", "Hardswish", "LeakyReLU", "PReLU", "ReLU6", "Sigmoid", "Softmax"]

_Self = TypeVar("_Self", bound="_Activation")


class ReLU6(QuantizedModule, nn.ReLU):
    """``min(max(x, 0), 6)`` on integers; the result keeps the input's parameters.

    Args:
        inplace: write the result into the input.

    Raises:
        InvalidInputError: in ``forward``, for a float tensor.

    Example:
        >>> import eagerq
        >>> q = eagerq.quantize_per_tensor(torch.tensor([-1.0, 2.0, 9.0]), 0.1, 50, torch.uint8)
        >>> ReLU6()(q).dequantize()
        tensor([0., 2., 6.])
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.relu6(expect_quantized(self, input), self.inplace)

    def _get_name(self) -> str:
        return "QuantizedReLU6"

    @classmethod
    def from_float(cls, mod: Any, use_precomputed_fake_quant: bool = False) -> ReLU6:
        """The int8 module that a float one becomes."""
        return cls(mod.inplace)


class _Activation(RequantizingModule):
    """What the functions with a result of their own range share."""

    _FLOAT_MODULE: ClassVar[Any]

    @classmethod
    def _arguments(cls, mod: Any) -> tuple[Any, ...]:
        """What the constructor takes after scale and zero point."""
        return ()

    @classmethod
    def from_float(
        cls: type[_Self], mod: nn.Module, use_precomputed_fake_quant: bool = False, as_trained: bool = False
    ) -> _Self:
        """The int8 module that a prepared float one stands for.

        Args:
            mod: an observed float module, with ``activation_post_process``.
            as_trained: keep the scale and range of training (see :func:`eagerq.convert`).

        Raises:
            InvalidConfigError: when ``mod`` is not prepared.
        """
        output = Output.of(mod, as_trained)
        make: Any = cls
        new: _Self = make(output.scale, output.zero_point, *cls._arguments(mod))
        new.output = output
        return new

    def _get_name(self) -> str:
        return f"Quantized{type(self).__name__}"

    def extra_repr(self) -> str:
        own = self._FLOAT_MODULE.extra_repr(self)
        return f"{own}, {super().extra_repr()}" if own else super().extra_repr()


class _Pointwise(_Activation):
    """Those that treat each value by itself."""

    _function: ClassVar[str]

    def _numbers(self) -> list[float]:
        """What the function takes besides its input."""
        return []

    def forward(self, input: Tensor) -> QTensor:
        x, output = expect_quantized(self, input), self.output
        y = kernels.pointwise(x.integers, self._function, self._numbers(), x.scale, x.zero_point, *output)
        return QTensor(y, output.scale, output.zero_point)


class _ParametersUnknownToOldFiles(_Activation):
    _kept_state: ClassVar[tuple[str, ...]] = ("scale", "zero_point")


class Hardswish(_Pointwise, nn.Hardswish):
    """:class:`torch.nn.Hardswish` on integers, ``x·min(max(x + 3, 0), 6)/6``.

    Args:
        scale, zero_point: parameters of the result.
        device, dtype: accepted for the sake of old code; the parameters are Python numbers.

    Raises:
        InvalidInputError: in ``forward``, for a float tensor.

    Example:
        >>> import eagerq
        >>> q = eagerq.quantize_per_tensor(torch.tensor([-4.0, 1.5, 4.0]), 0.1, 50, torch.uint8)
        >>> Hardswish(0.125, 10)(q).int_repr()
        tensor([10, 19, 42], dtype=torch.uint8)
    """

    _FLOAT_MODULE = nn.Hardswish
    _function = "hardswish"

    def __init__(self, scale: float, zero_point: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__(Output.given(scale, zero_point))


class ELU(_ParametersUnknownToOldFiles, _Pointwise, nn.ELU):
    """:class:`torch.nn.ELU` on integers, ``x`` where positive, elsewhere ``alpha·(exp(x) - 1)``.

    Args:
        scale, zero_point: parameters of the result.
        alpha: limit for large negative values, with its sign changed.

    Raises:
        InvalidInputError: in ``forward``, for a float tensor.
    """

    _FLOAT_MODULE = nn.ELU
    _function = "elu"

    def __init__(self, scale: float, zero_point: int, alpha: float = 1.0) -> None:
        super().__init__(Output.given(scale, zero_point))
        self.alpha = alpha

    def _numbers(self) -> list[float]:
        return [float(self.alpha), 1.0]

    @classmethod
    def _arguments(cls, mod: Any) -> tuple[Any, ...]:
        return (mod.alpha,)


class LeakyReLU(_Pointwise, nn.LeakyReLU):
    """:class:`torch.nn.LeakyReLU` on integers, ``x`` where positive, elsewhere ``negative_slope·x``.

    Args:
        scale, zero_point: parameters of the result.
        negative_slope: factor of negative values.
        inplace: accepted for the sake of old code; the result is a new tensor.
        device, dtype: likewise; the parameters are Python numbers.

    Raises:
        InvalidInputError: in ``forward``, for a float tensor.
    """

    _FLOAT_MODULE = nn.LeakyReLU
    _function = "leaky_relu"

    def __init__(
        self,
        scale: float,
        zero_point: int,
        negative_slope: float = 1e-2,
        inplace: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(Output.given(scale, zero_point))
        self.negative_slope = negative_slope
        self.inplace = inplace

    def _numbers(self) -> list[float]:
        return [float(self.negative_slope)]

    @classmethod
    def _arguments(cls, mod: Any) -> tuple[Any, ...]:
        return mod.negative_slope, mod.inplace


class Sigmoid(_ParametersUnknownToOldFiles, _Pointwise, nn.Sigmoid):
    """:class:`torch.nn.Sigmoid` on integers, for maps that ask for it.

    A float Sigmoid that stays in a converted model needs no twin: it gives QTensors of scale 1/256.

    Args:
        output_scale, output_zero_point: parameters of the result.

    Raises:
        InvalidInputError: in ``forward``, for a float tensor.
    """

    _FLOAT_MODULE = nn.Sigmoid
    _function = "sigmoid"

    def __init__(self, output_scale: float, output_zero_point: int) -> None:
        super().__init__(Output.given(output_scale, output_zero_point))

    @property
    def output_scale(self) -> float:
        """Scale of the output."""
        return self.scale

    @property
    def output_zero_point(self) -> int:
        """Zero point of the output."""
        return self.zero_point


class Softmax(_ParametersUnknownToOldFiles, nn.Softmax):
    """:class:`torch.nn.Softmax` of a QTensor, for maps that ask for it.

    A float Softmax that stays in a converted model needs no twin: it gives QTensors of scale 1/256.

    Args:
        dim: the axis whose values sum to 1.
        scale, zero_point: parameters of the result.

    Raises:
        InvalidInputError: in ``forward``, for a float tensor.
    """

    _FLOAT_MODULE = nn.Softmax

    def __init__(self, dim: int | None = None, scale: float = 1.0, zero_point: int = 0) -> None:
        super().__init__(Output.given(scale, zero_point))
        self.dim = dim

    def forward(self, input: Tensor) -> QTensor:
        x, dim = expect_quantized(self, input), self.dim
        if dim is None:
            dim = F._get_softmax_dim("softmax", x.dim(), 3)  # type: ignore[attr-defined]
        return softmax(x, dim, *self.output)

    @classmethod
    def from_float(cls, mod: Any, use_precomputed_fake_quant: bool = False, as_trained: bool = False) -> Softmax:
        """The int8 module that a prepared float one stands for; see :meth:`Hardswish.from_float`."""
        new = cls(mod.dim)
        new.output = Output.of(mod, as_trained)
        return new


class PReLU(StoredTensors, _Activation):
    """:class:`torch.nn.PReLU` on integers, with integer slopes.

    The state has ``weight`` (uint8 ``[num_parameters]``), ``weight_scale`` and ``weight_zero_point``
    (``[1]``, or ``[num_parameters]`` from a per-channel observer), ``scale`` and ``zero_point``.

    Args:
        output_scale, output_zero_point: parameters of the result.
        num_parameters: 1, or the number of channels (axis 1 of the input).

    Raises:
        InvalidInputError: in ``forward``, for a float tensor, or one with another number of channels.

    Example:
        >>> import eagerq
        >>> layer = PReLU(0.1, 100)
        >>> layer.set_weight(eagerq.quantize_per_tensor(torch.tensor([0.5]), 0.01, 0, torch.uint8))
        >>> layer(eagerq.quantize_per_tensor(torch.tensor([-2.0, 3.0]), 0.1, 50, torch.uint8)).dequantize()
        tensor([-1.,  3.])
    """

    _STORED = ("weight", "weight_scale", "weight_zero_point")

    _weight: Tensor
    _weight_scale: Tensor
    _weight_zero_point: Tensor

    def __init__(self, output_scale: float, output_zero_point: int, num_parameters: int = 1) -> None:
        super().__init__(Output.given(output_scale, output_zero_point))
        self.num_parameters = num_parameters
        weight = torch.zeros(num_parameters, dtype=torch.uint8)
        self._store(weight, torch.ones(1), torch.zeros(1, dtype=torch.int32))

    @property
    def weight(self) -> QTensor:
        """The integer slopes with their parameters."""
        if self._weight_scale.numel() == 1:
            return QTensor(self._weight, float(self._weight_scale), int(self._weight_zero_point))
        return QTensor(self._weight, self._weight_scale, self._weight_zero_point, 0)

    def set_weight(self, w: QTensor) -> None:
        """Adopt quantized slopes, ``[num_parameters]``.

        Raises:
            InvalidArgumentError: for another shape.
        """
        integers, zero_point = w.integers, torch.as_tensor(w.zero_point)
        if integers.shape != (self.num_parameters,):
            raise InvalidArgumentError(
                f"got a weight of shape {tuple(integers.shape)}, wanted ({self.num_parameters},)", module=self
            )
        if integers.dtype is torch.int8:  # the same values, kept unsigned
            integers, zero_point = (integers.int() + 128).to(torch.uint8), zero_point + 128
        device = integers.device
        self._weight = integers
        self._weight_scale = torch.as_tensor(w.scale, dtype=torch.float32).reshape(-1).to(device)
        self._weight_zero_point = zero_point.to(device, torch.int32).reshape(-1)

    def forward(self, input: Tensor) -> QTensor:
        x, output = expect_quantized(self, input), self.output
        channels = x.integers.shape[1] if x.dim() > 1 else 1
        if self.num_parameters not in (1, channels):
            raise InvalidInputError(
                f"expected {self.num_parameters} channels, got shape {tuple(x.shape)}",
                module=self,
                remedy="check num_parameters, or the order of the input's axes",
            )
        weight = (self._weight, self._weight_scale, self._weight_zero_point)
        y = kernels.prelu(x.integers, x.scale, x.zero_point, *weight, *output)
        return QTensor(y, output.scale, output.zero_point)

    @classmethod
    def from_float(cls, mod: Any, use_precomputed_fake_quant: bool = False, as_trained: bool = False) -> PReLU:
        """The int8 module that a prepared float one stands for; its slopes go to its qconfig's weight observer."""
        new = cls(1.0, 0, mod.num_parameters)
        new.output = Output.of(mod, as_trained)
        weight = mod.weight.detach()
        observer = mod.qconfig.weight().to(weight.device)
        new.set_weight(quantize_weight(mod, weight, observer, as_trained, refresh=True, signed=False))
        return new

    def extra_repr(self) -> str:
        return f"num_parameters={self.num_parameters}, {RequantizingModule.extra_repr(self)}"
