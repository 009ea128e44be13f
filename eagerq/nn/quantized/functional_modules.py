"""Operations on two activations, as modules: they learn their result's range, then requantize to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eagerq import kernels
from eagerq.errors import InvalidConfigError
from eagerq.nn.quantized.base import Output, RequantizingModule, expect_quantized
from eagerq.qtensor import QTensor
from eagerq.scheme import integer_type

__all__ = ["FXFloatFunctional", "FloatFunctional", "QFunctional"]


class _Operations(nn.Module):
    def forward(self, x: Any) -> NoReturn:
        raise RuntimeError(f"{type(self).__name__} has no forward: call one of its operations, such as .add(x, y)")


class FloatFunctional(_Operations):
    """Additions and the like with an observer on the result; one instance for each place in a model.

    ``convert`` turns it into :class:`QFunctional`.  Operations: add, add_scalar, mul, mul_scalar, cat,
    add_relu, matmul.

    Example:
        >>> ff = FloatFunctional()
        >>> ff.add(torch.tensor(3.0), torch.tensor(4.0))
        tensor(7.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.activation_post_process: nn.Module = nn.Identity()

    def _observed(self, x: Tensor) -> Tensor:
        y: Tensor = self.activation_post_process(x)
        return y

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """``x + y``."""
        return self._observed(torch.add(x, y))

    def add_scalar(self, x: Tensor, y: float) -> Tensor:
        """``x + y`` for a number; not observed: the result's parameters follow from ``x``'s."""
        return torch.add(x, y)

    def mul(self, x: Tensor, y: Tensor) -> Tensor:
        """``x * y``."""
        return self._observed(torch.mul(x, y))

    def mul_scalar(self, x: Tensor, y: float) -> Tensor:
        """``x * y`` for a number; not observed: the result's parameters follow from ``x``'s."""
        return torch.mul(x, y)

    def cat(self, x: Sequence[Tensor], dim: int = 0) -> Tensor:
        """``torch.cat(x, dim)``."""
        return self._observed(torch.cat(list(x), dim=dim))

    def add_relu(self, x: Tensor, y: Tensor) -> Tensor:
        """``relu(x + y)``."""
        return self._observed(F.relu(torch.add(x, y)))

    def matmul(self, x: Tensor, y: Tensor) -> Tensor:
        """``x @ y``."""
        return self._observed(torch.matmul(x, y))


class FXFloatFunctional(FloatFunctional):
    """:class:`FloatFunctional` without an observer of its own."""

    def __init__(self) -> None:
        nn.Module.__init__(self)

    def _observed(self, x: Tensor) -> Tensor:
        return x


class QFunctional(RequantizingModule, _Operations):
    """The operations of :class:`FloatFunctional` on QTensors, requantized to the learned range.

    Raises:
        InvalidInputError: when an operand is a float tensor.

    Example:
        >>> import eagerq
        >>> a = eagerq.quantize_per_tensor(torch.tensor([3.0]), 1.0, 0, torch.uint8)
        >>> QFunctional().add(a, a).dequantize()
        tensor([6.])
    """

    def __init__(self) -> None:
        super().__init__()
        self.activation_post_process: nn.Module = nn.Identity()

    def _result(self, integers: Tensor) -> QTensor:
        y = QTensor(integers, self.output.scale, self.output.zero_point)
        logger = self.activation_post_process  # of the numeric suite
        return y if type(logger) is nn.Identity else logger(y)

    def _pair(self, kernel: Any, x: Tensor, y: Tensor, low: int | None = None) -> QTensor:
        a, b = expect_quantized(self, x), expect_quantized(self, y)
        output = self.output
        integers = kernel(
            *(a.integers, a.scale, a.zero_point),
            *(b.integers, b.scale, b.zero_point),
            *(output.scale, output.zero_point, output.dtype),
            *(output.low if low is None else low, output.high),
        )
        return self._result(integers)

    def add(self, x: Tensor, y: Tensor) -> QTensor:
        """``x + y``."""
        return self._pair(kernels.add, x, y)

    def add_relu(self, x: Tensor, y: Tensor) -> QTensor:
        """``relu(x + y)``."""
        return self._pair(kernels.add, x, y, max(self.output.low, self.zero_point))

    def mul(self, x: Tensor, y: Tensor) -> QTensor:
        """``x * y``."""
        return self._pair(kernels.mul, x, y)

    def matmul(self, x: Tensor, y: Tensor) -> QTensor:
        """``x @ y``."""
        return self._pair(kernels.matmul, x, y)

    def cat(self, x: Sequence[Tensor], dim: int = 0) -> QTensor:
        """``torch.cat(x, dim)``, each part requantized where its parameters differ."""
        parts = [expect_quantized(self, part) for part in x]
        output = self.output
        integers = kernels.cat(
            [part.integers for part in parts],
            [part.scale for part in parts],
            [part.zero_point for part in parts],
            dim,
            *output,
        )
        return self._result(integers)

    def add_scalar(self, x: Tensor, y: float) -> QTensor:
        """``x + y`` for a number: a shift of the zero point, rescaled where that leaves the dtype."""
        q = expect_quantized(self, x)
        kind = integer_type(q.integers.dtype)
        shifted = q.zero_point - round(y / q.scale)
        if kind.minimum <= shifted <= kind.maximum:
            return QTensor(q.integers, q.scale, shifted)
        # the zero point stops at the end of the dtype; one value past it stretches the scale
        end, reach = (
            (kind.minimum, kind.maximum - shifted) if shifted < kind.minimum else (kind.maximum, shifted - kind.minimum)
        )
        scale = reach / (kind.maximum - kind.minimum) * q.scale
        real = kernels.dequantize(q.integers, q.scale, shifted)
        integers = kernels.quantize(real, scale, end, q.integers.dtype, kind.minimum, kind.maximum)
        return QTensor(integers, scale, end)

    def mul_scalar(self, x: Tensor, y: float) -> QTensor:
        """``x * y`` for a number: a change of scale, mirrored for a negative one."""
        q = expect_quantized(self, x)
        kind = integer_type(q.integers.dtype)
        if y == 0:
            return QTensor(torch.zeros_like(q.integers), 1.0, 0)
        if y > 0:
            return QTensor(q.integers, q.scale * y, q.zero_point)
        ends = kind.minimum + kind.maximum
        return QTensor(ends - q.integers, -y * q.scale, ends - q.zero_point)

    @classmethod
    def from_float(
        cls, mod: nn.Module, use_precomputed_fake_quant: bool = False, as_trained: bool = False
    ) -> QFunctional:
        """The QFunctional that a prepared FloatFunctional stands for."""
        if type(mod) is not FloatFunctional:
            raise InvalidConfigError(
                f"QFunctional.from_float expects an instance of FloatFunctional, got {type(mod).__name__}",
                module=mod,
            )
        new = cls()
        new.output = Output.of(mod, as_trained)
        return new
