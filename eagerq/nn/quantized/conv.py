"""int8 convolutions in one, two and three dimensions."""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.utils import _ntuple

from eagerq import kernels
from eagerq.errors import InvalidArgumentError, InvalidInputError
from eagerq.nn.quantized.base import Output, WeightAndBias, WeightedQuantizedModule, expect_quantized
from eagerq.qtensor import QTensor

__all__ = ["AnyConv", "Conv1d", "Conv2d", "Conv3d", "ConvShape"]


class AnyConv(WeightAndBias):
    """What convolutions share, transposed or not, whatever their dimension."""

    _dim: ClassVar[int]
    transposed: ClassVar[bool] = False

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: Any
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str

    def _shape(
        self, in_channels: int, out_channels: int, kernel_size: Any, stride: Any, padding: Any, dilation: Any
    ) -> None:
        """Keep what torch's convolutions keep."""
        each = _ntuple(self._dim)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = each(kernel_size)
        self.stride = each(stride)
        self.padding = padding if isinstance(padding, str) else each(padding)
        self.dilation = each(dilation)
        self._stride, self._dilation = list(self.stride), list(self.dilation)

    def _group(self, groups: int) -> None:
        for name in ("in_channels", "out_channels"):
            if groups < 1 or getattr(self, name) % groups:
                raise InvalidArgumentError(
                    f"{name} must be divisible by groups, got {getattr(self, name)} and {groups}",
                    module=self,
                    remedy="choose another number of groups",
                )
        self.groups = groups

    def _check_shape(self, x: Tensor) -> None:
        if x.dim() != self._dim + 2 or x.shape[1] != self.in_channels:
            raise InvalidInputError(
                f"expected {self._dim + 2} dimensions, [N, {self.in_channels}, …], got shape {tuple(x.shape)}",
                module=self,
                remedy="check its channels, or add the batch dimension with .unsqueeze(0)",
            )

    def extra_repr(self) -> str:
        parts = [
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}",
            super().extra_repr(),
        ]
        plain = _ntuple(self._dim)
        for name, default in (
            ("padding", plain(0)),
            ("output_padding", plain(0)),
            ("dilation", plain(1)),
            ("groups", 1),
            ("padding_mode", "zeros"),
        ):
            if getattr(self, name) != default:
                parts.append(f"{name}={getattr(self, name)}")
        if self._bias is None:
            parts.append("bias=False")
        return ", ".join(parts)


class ConvShape(AnyConv):
    """The constructor of the ordinary ones, and their padding."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self._shape(in_channels, out_channels, kernel_size, stride, padding, dilation)
        self._group(groups)
        self.padding_mode = padding_mode
        self.output_padding = _ntuple(self._dim)(0)
        shape = (out_channels, in_channels // groups, *self.kernel_size)
        self._allocate(shape, out_channels if bias else None, device)
        self._split_padding()

    def _split_padding(self) -> None:
        """Part the padding into what the kernel does and what must be laid around the input before."""
        if self.padding == "valid":
            sides = [(0, 0)] * self._dim
        elif self.padding == "same":  # torch puts the odd one on the far side
            totals = [step * (taps - 1) for step, taps in zip(self.dilation, self.kernel_size, strict=True)]
            sides = [(total // 2, total - total // 2) for total in totals]
        else:
            sides = [(pad, pad) for pad in self.padding]
        even = all(near == far for near, far in sides)
        self._around: list[int] | None = None
        self._padding = [near for near, _ in sides]
        if self.padding_mode != "zeros" or not even:
            self._padding = [0] * self._dim
            self._around = [pad for near, far in reversed(sides) for pad in (near, far)]

    @classmethod
    def _arguments(cls, module: Any) -> dict[str, Any]:
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
        arguments = {name: getattr(module, name) for name in (*names, "padding_mode")}
        return {**arguments, "bias": module.bias is not None}

    def _padded(self, x: Tensor) -> Any:
        """``x`` with what the kernel does not lay around it."""
        if self._around is None:
            return x
        return F.pad(x, self._around, "constant" if self.padding_mode == "zeros" else self.padding_mode)


class _ConvNd(ConvShape, WeightedQuantizedModule):
    """The ordinary ones on integers."""

    def _convolve(self, x: Any, output: Output) -> Tensor:
        """Convolution and bias, requantized to ``output``, or left real in its float dtype."""
        x = expect_quantized(self, x)
        self._check_shape(x.integers)
        x = self._padded(x)
        parameters = (self._weight, self._weight_scale, self._weight_zero_point, self._bias)
        how = (self._stride, self._padding, self._dilation, self.groups)
        return kernels.conv(x.integers, x.scale, x.zero_point, *parameters, *how, *output)

    def forward(self, x: QTensor) -> QTensor:
        output = self._clamped_output
        return QTensor(self._convolve(x, output), output.scale, output.zero_point)


class Conv1d(_ConvNd):
    """:class:`torch.nn.Conv1d` on integers: QTensor ``[N, in_channels, …]`` to QTensor ``[N, out_channels, …]``.

    Arguments as there; every padding mode is taken, and padding with zeros means real zeros.

    Raises:
        InvalidInputError: in ``forward``, for a float tensor, or one of another shape.
    """

    _dim = 1
    _FLOAT_MODULE: ClassVar[Any] = nn.Conv1d


class Conv2d(_ConvNd):
    """:class:`torch.nn.Conv2d` on integers: QTensor ``[N, in_channels, …]`` to QTensor ``[N, out_channels, …]``.

    Arguments as there; every padding mode is taken, and padding with zeros means real zeros.

    Raises:
        InvalidInputError: in ``forward``, for a float tensor, or one of another shape.
    """

    _dim = 2
    _FLOAT_MODULE: ClassVar[Any] = nn.Conv2d


class Conv3d(_ConvNd):
    """:class:`torch.nn.Conv3d` on integers: QTensor ``[N, in_channels, …]`` to QTensor ``[N, out_channels, …]``.

    Arguments as there; every padding mode is taken, and padding with zeros means real zeros.

    Raises:
        InvalidInputError: in ``forward``, for a float tensor, or one of another shape.
    """

    _dim = 3
    _FLOAT_MODULE: ClassVar[Any] = nn.Conv3d
