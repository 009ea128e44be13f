"""Operations on two activations, as modules: they learn their result's range, then requantize to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eagerq import kernels
from eagerq.errors import InvalidConfigError
from eagerq.fake_quantize import is_rounding, rounded_over
from eagerq.functional import sum_in_c
from eagerq.nn.quantized.base import Output, RequantizingModule, expect_quantized
from eagerq.qtensor import QTensor
from eagerq.scheme import integer_type

__all__ = ["FXFloatFunctional", "FloatFunctional", "QFunctional"]

# values, below which a sum and its rounding cost less one after the other
_MANY = 1 << 14


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
        return rounded_over(self.activation_post_process, x)

    def _sum(self, x: Tensor, y: Tensor, relu: bool) -> Tensor:
        total = None
        observer = self._modules.get("activation_post_process")
        if isinstance(x, Tensor) and x.numel() >= _MANY and isinstance(y, Tensor) and is_rounding(observer):
            total = sum_in_c(x, y, relu)
        if total is None:
            total = F.relu(torch.add(x, y)) if relu else torch.add(x, y)
        return self._observed(total)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """``x + y``."""
        return self._sum(x, y, relu=False)

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
        return self._sum(x, y, relu=True)

    def matmul(self, x: Tensor, y: Tensor) -> Tensor:
        """``x @ y``."""
        return self._observed(torch.matmul(x, y))


class FXFloatFunctional(FloatFunctional):
    """:class:`FloatFunctional` without an observer of its own."""

    def __init__(self) -> None:
        nn.Module.__init__(self)

    def _observed(self, x: Tensor) -> Tensor:
        return x


def _restated(kernel: Any, q: QTensor, number: float, scale: float, zero_point: int) -> QTensor:
    """A kernel on a tensor and a number; the result's parameters make up for (nearly) all of it."""
    kind = integer_type(q.integers.dtype)
    output = (scale, zero_point, kind.storage, kind.minimum, kind.maximum)
    return QTensor(kernel(q.integers, q.scale, q.zero_point, number, *output), scale, zero_point)


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
        kind, steps = integer_type(q.integers.dtype), round(y / q.scale)
        scale, zero_point = q.scale, q.zero_point - steps
        # the zero point stops at the end of the dtype; one value past it stretches the scale
        span = kind.maximum - kind.minimum
        if zero_point < kind.minimum:
            scale, zero_point = (kind.maximum - zero_point) / span * q.scale, kind.minimum
        elif zero_point > kind.maximum:
            scale, zero_point = (zero_point - kind.minimum) / span * q.scale, kind.maximum
        return _restated(kernels.add_scalar, q, steps, scale, zero_point)

    def mul_scalar(self, x: Tensor, y: float) -> QTensor:
        """``x * y`` for a number: a change of scale, mirrored for a negative one."""
        q = expect_quantized(self, x)
        kind = integer_type(q.integers.dtype)
        if y == 0:
            scale, zero_point = 1.0, 0
        elif y > 0:
            scale, zero_point = q.scale * y, q.zero_point
        else:
            scale, zero_point = -y * q.scale, kind.minimum + kind.maximum - q.zero_point
        return _restated(kernels.mul_scalar, q, y, scale, zero_point)

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
