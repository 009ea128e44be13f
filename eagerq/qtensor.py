"""QTensor: integers together with the scale and zero point that give them meaning."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from eagerq import kernels
from eagerq.errors import InvalidArgumentError, InvalidInputError, UnsupportedError, calling_module
from eagerq.kernels.dispatch import dialect
from eagerq.scheme import (
    integer_dtype,
    integer_type,
    per_channel_affine,
    per_channel_affine_float_qparams,
    per_tensor_affine,
)

__all__ = ["HANDLERS", "KEEPING", "QTensor", "quantize_per_channel", "quantize_per_tensor"]

# what each torch function does with QTensors; filled by eagerq.qtensor_ops
HANDLERS: dict[Callable[..., Any], Callable[..., Any]] = {}
# those of them that treat integers as they do real numbers, and give their results the argument's parameters
KEEPING: set[Callable[..., Any]] = set()

# attributes (shape, device …), and what compilers ask of any tensor
_ANSWERED_BY_TORCH = {"__get__", "__set__", "__dir__", "_is_view", "is_conj", "is_neg", "untyped_storage"}


class QTensor(torch.Tensor):
    """An integer tensor that stands for the real numbers ``scale * (q - zero_point)``.

    It carries one scale and zero point (Python numbers), or one for each index of an axis (1-d
    tensors).  Operations that move or order values work on the integers and keep the parameters;
    pooling and averaging round back to them; anything else raises, saying what to do instead.
    ``dtype`` is the integer dtype; ``str(q)`` shows the real values.

    Args:
        integers: the stored values, ``uint8`` or ``int8``, any shape.
        scale: positive number, or float tensor ``[integers.shape[axis]]``.
        zero_point: integer, or tensor like ``scale``.
        axis: channel axis of per-channel parameters, else None.

    Example:
        >>> q = quantize_per_tensor(torch.tensor([0.0, 1.0, 9.9]), 0.1, 10, torch.uint8)
        >>> q.int_repr()
        tensor([ 10,  20, 109], dtype=torch.uint8)
        >>> torch.relu(q).dequantize()
        tensor([0.0000, 1.0000, 9.9000])
    """

    integers: Tensor
    scale: Any
    zero_point: Any
    axis: int | None

    # what shares its memory eagerly; known only while a graph is made in other words
    base: QTensor | None = None
    views: tuple[QTensor, ...] = ()

    @staticmethod
    def __new__(
        cls, integers: Tensor, scale: float | Tensor, zero_point: int | Tensor, axis: int | None = None
    ) -> QTensor:
        make: Any = torch.Tensor._make_wrapper_subclass
        new: QTensor = make(
            cls,
            integers.shape,
            strides=integers.stride(),
            dtype=integers.dtype,
            device=integers.device,
            requires_grad=False,
        )
        return new

    def __init__(
        self, integers: Tensor, scale: float | Tensor, zero_point: int | Tensor, axis: int | None = None
    ) -> None:
        self.integers = integers
        self.scale = scale
        self.zero_point = zero_point
        self.axis = axis

    # how torch.compile takes it apart and puts it together
    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        if self.axis is None:
            return ["integers"], (self.scale, self.zero_point, None)
        return ["integers", "scale", "zero_point"], (None, None, self.axis)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: Any, size: Any, stride: Any) -> QTensor:
        scale, zero_point, axis = context
        return QTensor(inner["integers"], inner.get("scale", scale), inner.get("zero_point", zero_point), axis)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if not args:  # func(input=x)
            args = tuple(kwargs.pop(name) for name in ("input", "self") if name in kwargs)
        words = dialect()
        handler = (words.functions.get(func) if words else None) or HANDLERS.get(func)
        if handler is not None:
            return handler(*args, **kwargs)
        if getattr(func, "__name__", "") in _ANSWERED_BY_TORCH:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        return _refuse(func)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:  # type: ignore[override]
        _refuse(func)

    def _is_quantized(self) -> bool:
        # torch's makers of fake tensors refuse the quantized tensors of old, for which they would take it
        return not sys._getframe(1).f_globals.get("__name__", "").startswith("torch._subclasses.")

    is_quantized: Any = property(_is_quantized, doc="True.")

    def dequantize(self) -> Tensor:
        """The real values, float32."""
        if self.axis is None:
            return kernels.dequantize(self.integers, self.scale, self.zero_point)
        return kernels.dequantize_per_channel(self.integers, self.scale, self.zero_point, self.axis)

    def int_repr(self) -> Tensor:
        """The stored integers."""
        return self.integers

    def q_scale(self) -> float:
        """The scale, of a per-tensor QTensor."""
        self._require(per_channel=False, asked="q_scale")
        return float(self.scale)

    def q_zero_point(self) -> int:
        """The zero point, of a per-tensor QTensor."""
        self._require(per_channel=False, asked="q_zero_point")
        return int(self.zero_point)

    def q_per_channel_scales(self) -> Tensor:
        """The scales, ``[channels]``, of a per-channel QTensor."""
        self._require(per_channel=True, asked="q_per_channel_scales")
        scale: Tensor = self.scale
        return scale

    def q_per_channel_zero_points(self) -> Tensor:
        """The zero points, ``[channels]``, of a per-channel QTensor."""
        self._require(per_channel=True, asked="q_per_channel_zero_points")
        zero_point: Tensor = self.zero_point
        return zero_point

    def q_per_channel_axis(self) -> int:
        """The channel axis of a per-channel QTensor."""
        self._require(per_channel=True, asked="q_per_channel_axis")
        assert self.axis is not None
        return self.axis

    def qscheme(self) -> Any:
        """``per_tensor_affine``, ``per_channel_affine``, or with float zero points its ``float_qparams`` kind."""
        if self.axis is None:
            return per_tensor_affine
        return per_channel_affine_float_qparams if self.zero_point.is_floating_point() else per_channel_affine

    def _require(self, *, per_channel: bool, asked: str) -> None:
        if (self.axis is not None) != per_channel:
            have, other = (
                ("one scale", "q_scale") if self.axis is None else ("per-channel scales", "q_per_channel_scales")
            )
            raise InvalidInputError(f"{asked}() of a QTensor with {have}", remedy=f"ask for {other}()")

    def like(self, integers: Tensor) -> QTensor:
        """Other integers under the same parameters."""
        return QTensor(integers, self.scale, self.zero_point, self.axis)

    def overwrite(self, other: QTensor) -> QTensor:
        """Take ``other``'s values and parameters, in place."""
        if dialect() is None:
            self.integers.copy_(other.integers)
        else:  # a graph of values knows no memory
            self.integers = other.integers
            self._part()
        self.scale, self.zero_point = other.scale, other.zero_point
        return self

    def _part(self) -> None:
        """Make what shares memory with this, and so had to change with it, refuse to be read."""
        base, views = self.base, list(self.views)
        while base is not None:
            base.integers, base = _Outdated(), base.base  # type: ignore[assignment]
        while views:
            view = views.pop()
            view.integers = _Outdated()  # type: ignore[assignment]
            views += view.views
        self.base, self.views = None, ()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        values = repr(self.dequantize())[len("tensor(") : -1].replace("\n", "\n ")
        where = "" if self.axis is None else f", axis={self.axis}"
        return (
            f"QTensor({values}, dtype={self.integers.dtype}, scale={self.scale}, zero_point={self.zero_point}{where})"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self.integers, self.scale, self.zero_point, self.axis)

    def __deepcopy__(self, memo: dict[int, Any]) -> QTensor:
        def copy(value: Any) -> Any:
            return value.clone() if isinstance(value, Tensor) else value

        return QTensor(self.integers.clone(), copy(self.scale), copy(self.zero_point), self.axis)


class _Outdated:
    """Integers that a graph does not know any more."""

    def __getattr__(self, name: str) -> NoReturn:
        raise UnsupportedError(
            "a tensor is read after what shares its memory was changed in place, which a graph cannot say",
            module=calling_module(),
            remedy="change it out of place (inplace=False, relu instead of relu_), or .clone() it before",
        )


def _rebuild(integers: Tensor, scale: Any, zero_point: Any, axis: int | None) -> QTensor:
    return QTensor(integers, scale, zero_point, axis)


torch.serialization.add_safe_globals([_rebuild])


def _refuse(func: Any) -> NoReturn:
    name = getattr(func, "__name__", str(func))
    module = calling_module()
    operation = name.strip("_").lstrip("ri")
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        remedy = "fuse it into the layer before it (fuse_modules_qat), or put a DeQuantStub before it"
    elif type(module).__module__.startswith(("torch.", "eagerq.")):
        remedy = (
            "put a DeQuantStub before this float module; or, if it has an int8 twin, give it a qconfig before "
            "prepare, so that convert swaps it"
        )
    elif operation in ("add", "mul", "matmul"):
        remedy = (
            "replace it by a FloatFunctional of the model (self.ff = FloatFunctional(), then "
            f"self.ff.{operation}(x, y)), which learns the result's range"
        )
    else:
        remedy = "put a DeQuantStub before it, or call .dequantize(), so that it gets real numbers"
    raise InvalidInputError(
        f"'{name}' got a quantized tensor (QTensor), on which it is not defined", module=module, remedy=remedy
    )


def _checked(dtype: torch.dtype) -> torch.dtype:
    kind = integer_type(dtype)
    if kind.dtype is not kind.storage:
        raise InvalidArgumentError(f"a QTensor cannot store {dtype}", remedy=f"use {kind.storage}")
    return integer_dtype(dtype)


def quantize_per_tensor(x: Tensor, scale: float | Tensor, zero_point: int | Tensor, dtype: torch.dtype) -> QTensor:
    """Round ``x`` to integers: ``clamp(round(x·(1/scale) + zero_point))``.

    Args:
        x: float tensor of any shape.
        scale: positive number (or tensor of one).
        zero_point: integer that 0.0 becomes (or tensor of one).
        dtype: ``torch.uint8``, ``torch.int8``, ``torch.int16`` or ``torch.int32``.

    Returns:
        QTensor of ``x``'s shape.

    Raises:
        InvalidInputError: when ``x`` is not a float tensor.
        InvalidArgumentError: for a scale that is not positive and finite.
    """
    scale, zero_point, dtype = float(scale), int(zero_point), _checked(dtype)
    kind = integer_type(dtype)
    _check_real(x)
    if not 0.0 < scale < float("inf"):
        raise InvalidArgumentError(f"scale is {scale}", remedy="pass a positive, finite scale")
    if not kind.minimum <= zero_point <= kind.maximum:
        raise InvalidArgumentError(
            f"zero_point {zero_point} does not fit {dtype}",
            remedy=f"stay within [{kind.minimum}, {kind.maximum}]",
        )
    integers = kernels.quantize(x, scale, zero_point, dtype, kind.minimum, kind.maximum)
    return QTensor(integers, scale, zero_point)


def quantize_per_channel(x: Tensor, scales: Tensor, zero_points: Tensor, axis: int, dtype: torch.dtype) -> QTensor:
    """As :func:`quantize_per_tensor`, with ``scales`` and ``zero_points`` for each index of ``axis``.

    Args:
        scales, zero_points: 1-d tensors of ``x.shape[axis]`` entries.

    Raises:
        InvalidArgumentError: when their lengths do not match the axis.
    """
    dtype = _checked(dtype)
    kind = integer_type(dtype)
    _check_real(x)
    channels = x.shape[axis]
    for name, values in (("scales", scales), ("zero_points", zero_points)):
        if values.shape != (channels,):
            raise InvalidArgumentError(
                f"{name} has shape {tuple(values.shape)}, but axis {axis} of the tensor has {channels} entries",
                remedy=f"pass a 1-d tensor of {channels}",
            )
    scales = scales.to(torch.float32)
    integers = kernels.quantize_per_channel(x, scales, zero_points, axis, dtype, kind.minimum, kind.maximum)
    return QTensor(integers, scales, zero_points, axis % x.dim())


def _check_real(x: Tensor) -> None:
    if isinstance(x, QTensor):
        raise InvalidInputError("the tensor is already quantized", remedy="drop one of the two QuantStubs")
    if not x.is_floating_point():
        raise InvalidInputError(f"cannot quantize a tensor of {x.dtype}", remedy="pass a float tensor")
