"""Float layers fused into one module: a Sequential that prepare and convert treat as a unit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from eagerq.errors import InvalidConfigError

__all__ = [
    "BNReLU2d",
    "BNReLU3d",
    "ConvAdd2d",
    "ConvAddReLU2d",
    "ConvBn1d",
    "ConvBn2d",
    "ConvBn3d",
    "ConvBnReLU1d",
    "ConvBnReLU2d",
    "ConvBnReLU3d",
    "ConvReLU1d",
    "ConvReLU2d",
    "ConvReLU3d",
    "LinearBn1d",
    "LinearLeakyReLU",
    "LinearReLU",
    "LinearTanh",
    "_FusedModule",
]


class _FusedModule(nn.Sequential):
    """Base of fused modules, custom ones too: swapped and observed as one.

    Raises:
        InvalidConfigError: when the parts are not of the classes in ``_PARTS`` (if it is given).
    """

    _PARTS: ClassVar[tuple[type[nn.Module], ...]] = ()

    def __init__(self, *parts: nn.Module, **named: nn.Module) -> None:
        parts = (*parts, *named.values())  # conv=…, bn=…, relu=…
        kinds = tuple(type_before_parametrizations(part) for part in parts)
        wanted = self._PARTS
        if wanted and (len(kinds) != len(wanted) or not all(map(issubclass, kinds, wanted))):
            got = ", ".join(kind.__name__ for kind in kinds)
            names = ", ".join(part.__name__ for part in wanted)
            raise InvalidConfigError(f"Incorrect types for input modules of {type(self).__name__}: {got}, not {names}")
        super().__init__(*parts)


class ConvReLU1d(_FusedModule):
    """Conv1d, ReLU."""

    _PARTS = (nn.Conv1d, nn.ReLU)


class ConvReLU2d(_FusedModule):
    """Conv2d, ReLU."""

    _PARTS = (nn.Conv2d, nn.ReLU)


class ConvReLU3d(_FusedModule):
    """Conv3d, ReLU."""

    _PARTS = (nn.Conv3d, nn.ReLU)


class ConvBn1d(_FusedModule):
    """Conv1d, BatchNorm1d."""

    _PARTS = (nn.Conv1d, nn.BatchNorm1d)


class ConvBn2d(_FusedModule):
    """Conv2d, BatchNorm2d."""

    _PARTS = (nn.Conv2d, nn.BatchNorm2d)


class ConvBn3d(_FusedModule):
    """Conv3d, BatchNorm3d."""

    _PARTS = (nn.Conv3d, nn.BatchNorm3d)


class ConvBnReLU1d(_FusedModule):
    """Conv1d, BatchNorm1d, ReLU."""

    _PARTS = (nn.Conv1d, nn.BatchNorm1d, nn.ReLU)


class ConvBnReLU2d(_FusedModule):
    """Conv2d, BatchNorm2d, ReLU."""

    _PARTS = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU)


class ConvBnReLU3d(_FusedModule):
    """Conv3d, BatchNorm3d, ReLU."""

    _PARTS = (nn.Conv3d, nn.BatchNorm3d, nn.ReLU)


class LinearReLU(_FusedModule):
    """Linear, ReLU."""

    _PARTS = (nn.Linear, nn.ReLU)


class LinearBn1d(_FusedModule):
    """Linear, BatchNorm1d."""

    _PARTS = (nn.Linear, nn.BatchNorm1d)


class BNReLU2d(_FusedModule):
    """BatchNorm2d, ReLU."""

    _PARTS = (nn.BatchNorm2d, nn.ReLU)


class BNReLU3d(_FusedModule):
    """BatchNorm3d, ReLU."""

    _PARTS = (nn.BatchNorm3d, nn.ReLU)


class LinearLeakyReLU(_FusedModule):
    """Linear, LeakyReLU."""

    _PARTS = (nn.Linear, nn.LeakyReLU)


class LinearTanh(_FusedModule):
    """Linear, Tanh."""

    _PARTS = (nn.Linear, nn.Tanh)


class _ConvAdd(_FusedModule):
    _PARTS = (nn.Conv2d,)

    def __init__(self, conv: nn.Module, add: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(conv)
        self.add: Any = add

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:  # type: ignore[override]
        """``add(conv(x1), x2)``."""
        total: Tensor = self.add(self[0](x1), x2)
        return total


class ConvAdd2d(_ConvAdd):
    """Conv2d and the addition of a second input; built by hand, since no sequence of modules tells of it.

    Args:
        conv: the convolution of the first input.
        add: adds the two, a function such as :func:`torch.add` or a module.

    Example:
        >>> import torch
        >>> layer = ConvAdd2d(nn.Conv2d(3, 4, 1), torch.add)
        >>> layer(torch.randn(1, 3, 5, 5), torch.randn(1, 4, 5, 5)).shape
        torch.Size([1, 4, 5, 5])
    """


class ConvAddReLU2d(_ConvAdd):
    """As :class:`ConvAdd2d`, with a ReLU behind.

    Args:
        relu: the activation, a function or a module.
    """

    def __init__(
        self, conv: nn.Module, add: Callable[[Tensor, Tensor], Tensor], relu: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__(conv, add)
        self.relu: Any = relu

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:  # type: ignore[override]
        """``relu(add(conv(x1), x2))``."""
        y: Tensor = self.relu(super().forward(x1, x2))
        return y
