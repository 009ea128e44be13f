"""Float layers fused into one module: a Sequential that prepare and convert treat as a unit."""

from __future__ import annotations

from typing import ClassVar

from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from eagerq.errors import InvalidConfigError

__all__ = [
    "BNReLU2d",
    "BNReLU3d",
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
    "LinearReLU",
    "_FusedModule",
]


class _FusedModule(nn.Sequential):
    """Base of fused modules, custom ones too: swapped and observed as one.

    Raises:
        InvalidConfigError: when the parts are not of the classes in ``_PARTS`` (if it is given).
    """

    _PARTS: ClassVar[tuple[type[nn.Module], ...]] = ()

    def __init__(self, *parts: nn.Module) -> None:
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
