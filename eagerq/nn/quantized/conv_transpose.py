"""int8 transposed convolutions in one, two and three dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd as _FloatConvTranspose
from torch.nn.modules.utils import _ntuple

from eagerq import kernels
from eagerq.errors import InvalidArgumentError, InvalidConfigError
from eagerq.nn.quantized.base import WeightedQuantizedModule, expect_quantized
from eagerq.nn.quantized.conv import AnyConv
from eagerq.qtensor import QTensor

__all__ = ["ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d", "TransposedShape"]


class TransposedShape(AnyConv):
    """The constructor of transposed convolutions, and what depends on their shape."""

    transposed = True
    # the weight is [in, out / groups, …]; scales for each of its out / groups serve every group
    _axis = 1

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Any = 1,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if padding_mode != "zeros":
            raise InvalidArgumentError(
                f'Only "zeros" padding mode is supported for {type(self).__name__}, got {padding_mode!r}',
                module=self,
                remedy="leave padding_mode out",
            )
        self._shape(in_channels, out_channels, kernel_size, stride, padding, dilation)
        self._group(groups)
        self.padding_mode = padding_mode
        self.output_padding = _ntuple(self._dim)(output_padding)
        shape = (in_channels, out_channels // groups, *self.kernel_size)
        self._allocate(shape, out_channels if bias else None, device)

    @classmethod
    def _arguments(cls, module: Any) -> dict[str, Any]:
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "output_padding", "groups")
        arguments = {name: getattr(module, name) for name in (*names, "dilation", "padding_mode")}
        return {**arguments, "bias": module.bias is not None}

    @classmethod
    def _weight_observer(cls, mod: Any) -> Any:
        observer = super()._weight_observer(mod)
        # one that counts the channels of ordinary convolutions along axis 0 has them along axis 1 here
        parts: tuple[Any, ...] = (observer, getattr(observer, "activation_post_process", None))
        for one in parts:
            if hasattr(one, "ch_axis"):
                one.ch_axis = cls._axis
        return observer

    def set_weight_bias(self, w: Any, b: Tensor | None) -> None:
        if getattr(w, "axis", None) not in (None, self._axis) and w.scale.numel() > 1:
            raise InvalidConfigError(
                f"the weight has a scale for each index of axis {w.axis}, its inputs",
                module=self,
                remedy="quantize it per tensor, or per channel of axis 1",
            )
        super().set_weight_bias(w, b)

    def _output_padding(self, x: Tensor, output_size: Sequence[int] | None) -> list[int]:
        """What is added to one side of the result, to be of ``output_size`` if that is given."""
        if output_size is None:
            return list(self.output_padding)
        return _FloatConvTranspose._output_padding(
            self,  # type: ignore[arg-type]
            *(x, list(output_size), self._stride, list(self.padding), list(self.kernel_size), self._dim),
            self._dilation,
        )


class _ConvTransposeNd(TransposedShape, WeightedQuantizedModule):
    """Transposed convolutions on integers."""

    def forward(self, x: QTensor, output_size: Sequence[int] | None = None) -> QTensor:
        """QTensor ``[N, in_channels, …]`` to QTensor ``[N, out_channels, …]``.

        Args:
            output_size: of the result, where ``stride`` leaves a choice, as for torch's own.

        Raises:
            InvalidInputError: for a float tensor, or one of another shape.
            ValueError: for an ``output_size`` that cannot be.
        """
        x = expect_quantized(self, x)
        self._check_shape(x.integers)
        output, more = self._clamped_output, self._output_padding(x.integers, output_size)
        parameters = (self._weight, self._weight_scale, self._weight_zero_point, self._bias)
        how = (self._stride, list(self.padding), more, self._dilation, self.groups)
        y = kernels.conv_transpose(x.integers, x.scale, x.zero_point, *parameters, *how, *output)
        return QTensor(y, output.scale, output.zero_point)


class ConvTranspose1d(_ConvTransposeNd):
    """:class:`torch.nn.ConvTranspose1d` on integers; arguments as there.

    The weight is int8 ``[in_channels, out_channels / groups, …]``, with one scale or one for each index
    of axis 1.

    Raises:
        InvalidArgumentError: for a ``padding_mode`` other than ``"zeros"``, or groups that do not fit.
        InvalidInputError: in ``forward``, for a float tensor, or one of another shape.

    Example:
        >>> import torch, eagerq
        >>> x = eagerq.quantize_per_tensor(torch.randn(1, 4, 5), 0.1, 128, torch.uint8)
        >>> ConvTranspose1d(4, 2, 3, stride=2)(x).shape
        torch.Size([1, 2, 11])
    """

    _dim = 1
    _FLOAT_MODULE: ClassVar[Any] = nn.ConvTranspose1d


class ConvTranspose2d(_ConvTransposeNd):
    """:class:`torch.nn.ConvTranspose2d` on integers; see :class:`ConvTranspose1d`."""

    _dim = 2
    _FLOAT_MODULE: ClassVar[Any] = nn.ConvTranspose2d


class ConvTranspose3d(_ConvTransposeNd):
    """:class:`torch.nn.ConvTranspose3d` on integers; see :class:`ConvTranspose1d`."""

    _dim = 3
    _FLOAT_MODULE: ClassVar[Any] = nn.ConvTranspose3d
