"""Convolutions with a fake-quantized weight."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from eagerq.fake_quantize import FakeQuantize, FusedMovingAvgObsFakeQuantize, is_plain
from eagerq.functional import Convolving
from eagerq.kernels.training_layers import Convolved, convolution_in_graph
from eagerq.nn.qat.base import QATMixin

__all__ = ["Conv1d", "Conv2d", "Conv3d", "ConvQAT"]


class ConvQAT(QATMixin, nn.modules.conv._ConvNd):
    """The arithmetic and hyperparameters that every QAT convolution shares."""

    def _affine(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = self._conv_forward(x, weight, bias)
        return y

    def _convolved(self, x: Tensor, factor: Tensor | None, bias: Tensor | None, relu: bool = True) -> Convolved | None:
        rounded: Any = self.weight_fake_quant
        if self.padding_mode != "zeros" or isinstance(self.padding, str):
            return None
        if not is_plain(rounded, FakeQuantize, FusedMovingAvgObsFakeQuantize) or (to := rounded.rounding()) is None:
            return None
        geometry = Convolving(self.stride, self.padding, self.dilation, self.groups)
        relu = relu and self.post_op == "relu"
        return convolution_in_graph(x, self.weight, factor, bias, to, rounded.nonfinite_batches, geometry, relu)

    @classmethod
    def _arguments(cls, module: Any) -> dict[str, Any]:
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
        arguments = {name: getattr(module, name) for name in (*names, "padding_mode")}
        return {**arguments, "bias": module.bias is not None, "dtype": module.weight.dtype}


class _PlainConv(ConvQAT):
    """The constructor of the plain convolutions."""

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
        qconfig: Any = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        init: Any = super().__init__  # past the mixins, the next in line is torch's own class
        init(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        self._attach(qconfig)


class Conv1d(_PlainConv, nn.Conv1d):
    """:class:`torch.nn.Conv1d` whose weight is fake-quantized in ``forward``.

    Args:
        in_channels … padding_mode, device, dtype: as for :class:`torch.nn.Conv1d`.
        qconfig: its ``weight`` makes the fake quantizer.

    Raises:
        InvalidConfigError: without a qconfig.
    """

    _FLOAT_MODULE: ClassVar[Any] = nn.Conv1d


class Conv2d(_PlainConv, nn.Conv2d):
    """:class:`torch.nn.Conv2d` whose weight is fake-quantized in ``forward``.

    Args:
        in_channels … padding_mode, device, dtype: as for :class:`torch.nn.Conv2d`.
        qconfig: its ``weight`` makes the fake quantizer.

    Raises:
        InvalidConfigError: without a qconfig.
    """

    _FLOAT_MODULE: ClassVar[Any] = nn.Conv2d


class Conv3d(_PlainConv, nn.Conv3d):
    """:class:`torch.nn.Conv3d` whose weight is fake-quantized in ``forward``.

    Args:
        in_channels … padding_mode, device, dtype: as for :class:`torch.nn.Conv3d`.
        qconfig: its ``weight`` makes the fake quantizer.

    Raises:
        InvalidConfigError: without a qconfig.
    """

    _FLOAT_MODULE: ClassVar[Any] = nn.Conv3d
