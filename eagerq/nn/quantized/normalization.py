"""int8 normalization layers: float parameters and exact integer sums; only what goes in and out is quantized."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from eagerq import kernels
from eagerq.errors import InvalidArgumentError, InvalidInputError
from eagerq.nn.quantized.base import Output, RequantizingModule, expect_quantized
from eagerq.nn.quantized.state import StoredTensors
from eagerq.qtensor import QTensor

__all__ = [
    "GroupNorm",
    "LayerNorm",
    "Normalization",
    "wrong_shape",
]

_Self = TypeVar("_Self", bound="Normalization")


class Normalization(StoredTensors, RequantizingModule):
    """Base of the normalization layers: holds their float32 tensors, whatever the float module's were."""

    _STORED: tuple[str, ...] = ("weight", "bias")

    _weight: Tensor | None
    _bias: Tensor | None

    @property
    def weight(self) -> Tensor | None:
        """The float factor, or None."""
        return self._weight

    @property
    def bias(self) -> Tensor | None:
        """The float summand, or None."""
        return self._bias

    def _hold(self, shape: tuple[int, ...], *values: Tensor | None, device: Any = None) -> None:
        """Keep the values of ``_STORED``, in its order.

        Raises:
            InvalidArgumentError: for a tensor of another shape than ``shape``.
        """
        for name, value in zip(self._STORED, values, strict=False):
            if value is not None and name != "num_batches_tracked" and value.shape != shape:
                raise InvalidArgumentError(
                    f"{name} has shape {tuple(value.shape)}, not {tuple(shape)}",
                    module=self,
                    remedy=f"pass one of shape {tuple(shape)}, or None",
                )
        self._store(*(None if one is None else _plain(one, device) for one in values))

    def _requantized(self, kernel: Any, x: QTensor, *arguments: Any) -> QTensor:
        scale, zero_point, dtype, _, high = self.output
        integers = kernel(x.integers, x.scale, x.zero_point, *arguments, scale, zero_point, dtype, self._low, high)
        return QTensor(integers, scale, zero_point)

    @classmethod
    def _of(cls, module: Any) -> Any:
        """The layer for a float module, its output apart."""
        raise NotImplementedError

    @classmethod
    def from_float(
        cls: type[_Self], mod: nn.Module, use_precomputed_fake_quant: bool = False, as_trained: bool = False
    ) -> _Self:
        """The int8 module that a prepared float one stands for; ``mod`` is left as it is.

        Args:
            mod: an observed float module, with ``activation_post_process``.
            use_precomputed_fake_quant: for likeness; there is no integer weight here.
            as_trained: keep the scales and ranges of training (see :func:`eagerq.convert`).

        Raises:
            InvalidConfigError: when ``mod`` is not prepared, or of another class.
        """
        output = Output.of(mod, as_trained)
        cls._check_float(mod)
        new: _Self = cls._of(mod[0] if isinstance(mod, nn.Sequential) else mod)
        new.output = output
        return new

    def _get_name(self) -> str:
        return f"Quantized{type(self).__name__}"


def _plain(value: Tensor, device: Any) -> Tensor:
    value = value.detach().to(device=device)
    return value.float() if value.is_floating_point() else value


def wrong_shape(module: nn.Module, wanted: str, x: Tensor, check: str) -> InvalidInputError:
    """The error for an input of another shape; ``check`` is the argument to look at."""
    return InvalidInputError(
        f"expected shape {wanted}, got {tuple(x.shape)}",
        module=module,
        remedy=f"check {check}, or the shape of what comes before",
    )


class LayerNorm(Normalization):
    """:class:`torch.nn.LayerNorm` on integers: QTensor ``[…, *normalized_shape]`` to QTensor of the same shape.

    The state has ``weight`` and ``bias`` (float32, if any), ``scale`` and ``zero_point``.

    Args:
        normalized_shape: the last axes, or the length of the last one.
        weight, bias: float tensors of that shape, or None.
        scale, zero_point: parameters of the result.
        eps, elementwise_affine: as for :class:`torch.nn.LayerNorm`.
        device: where the tensors go.
        dtype: for likeness; they are float32.

    Raises:
        InvalidArgumentError: for a weight or bias of another shape.
        InvalidInputError: in ``forward``, for a float tensor, or one of another shape.

    Example:
        >>> import torch, eagerq
        >>> x = eagerq.quantize_per_tensor(torch.tensor([[-1.0, 0.0, 1.0]]), 0.1, 128, torch.uint8)
        >>> LayerNorm(3, None, None, 0.5, 0)(x).dequantize()
        tensor([[0., 0., 1.]])
    """

    _FLOAT_MODULE: ClassVar[Any] = nn.LayerNorm

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        weight: Tensor | None,
        bias: Tensor | None,
        scale: float,
        zero_point: int,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(Output.given(scale, zero_point))
        shape = (normalized_shape,) if isinstance(normalized_shape, int) else normalized_shape
        self.normalized_shape = tuple(shape)
        self.eps = eps
        self.elementwise_affine = elementwise_affine
        self._hold(self.normalized_shape, weight, bias, device=device)

    @classmethod
    def _of(cls, module: Any) -> Any:
        return cls(module.normalized_shape, module.weight, module.bias, 1.0, 0, module.eps, module.elementwise_affine)

    def forward(self, input: QTensor) -> QTensor:
        x = expect_quantized(self, input)
        if tuple(x.shape[-len(self.normalized_shape) :]) != self.normalized_shape:
            wanted = ", ".join(map(str, self.normalized_shape))
            raise wrong_shape(self, f"[…, {wanted}]", x, "normalized_shape")
        return self._requantized(kernels.layer_norm, x, self.normalized_shape, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return (
            f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}, "
            f"{super().extra_repr()}"
        )


class GroupNorm(Normalization):
    """:class:`torch.nn.GroupNorm` on integers: QTensor ``[N, C, …]`` to QTensor of the same shape.

    The state has ``weight`` and ``bias`` (float32, if any), ``scale`` and ``zero_point``.

    Args:
        num_groups, num_channels: as for :class:`torch.nn.GroupNorm`.
        weight, bias: float tensors ``[C]``, or None.
        scale, zero_point: parameters of the result.
        eps, affine: as for :class:`torch.nn.GroupNorm`.
        device: where the tensors go.
        dtype: for likeness; they are float32.

    Raises:
        InvalidArgumentError: for a weight or bias of another shape, or channels that groups do not divide.
        InvalidInputError: in ``forward``, for a float tensor, or one of another shape.
    """

    _FLOAT_MODULE: ClassVar[Any] = nn.GroupNorm

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        weight: Tensor | None,
        bias: Tensor | None,
        scale: float,
        zero_point: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(Output.given(scale, zero_point))
        if num_groups < 1 or num_channels % num_groups:
            raise InvalidArgumentError(
                f"{num_channels} channels do not make {num_groups} equal groups",
                module=self,
                remedy="choose num_groups among the divisors of num_channels",
            )
        self.num_groups = num_groups
        self.num_channels = num_channels
        self.eps = eps
        self.affine = affine
        self._hold((num_channels,), weight, bias, device=device)

    @classmethod
    def _of(cls, module: Any) -> Any:
        sizes = module.num_groups, module.num_channels
        return cls(*sizes, module.weight, module.bias, 1.0, 0, module.eps, module.affine)

    def forward(self, input: QTensor) -> QTensor:
        x = expect_quantized(self, input)
        if x.dim() < 2 or x.shape[1] != self.num_channels:
            raise wrong_shape(self, f"[N, {self.num_channels}, …]", x, "num_channels")
        return self._requantized(kernels.group_norm, x, self.num_groups, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.num_groups}, {self.num_channels}, eps={self.eps}, affine={self.affine}, {super().extra_repr()}"
