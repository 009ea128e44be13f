"""What torch's functions do with QTensors: one handler each, in :data:`eagerq.qtensor.HANDLERS`.

Movements and order-preserving functions run on the integers.  Averages round back to the tensor's own
parameters: ``round(average + zero_point)``.  Whatever is not here raises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eagerq.errors import InvalidInputError, calling_module
from eagerq.kernels.pooling import global_average, max_pool
from eagerq.kernels.reference import reciprocal, single
from eagerq.qtensor import HANDLERS, KEEPING, QTensor
from eagerq.scheme import integer_type

__all__: list[str] = []


def _per_tensor(x: QTensor, func: Callable[..., Any]) -> None:
    if x.axis is not None:
        raise InvalidInputError(
            f"'{getattr(func, '__name__', func)}' is not defined on per-channel QTensors",
            module=calling_module(),
            remedy="call .dequantize() first",
        )


def _rewrap(x: QTensor, result: Any) -> Any:
    """Give the integers in a result (a tensor, tuple, list or named tuple) ``x``'s parameters back."""
    if isinstance(result, Tensor):
        return x.like(result) if result.dtype is x.integers.dtype else result
    if isinstance(result, tuple) and hasattr(result, "values"):  # torch.return_types
        return type(result)([_rewrap(x, part) for part in result])
    if isinstance(result, (tuple, list)):
        return type(result)(_rewrap(x, part) for part in result)
    return result


def _handle(*funcs: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        for func in funcs:
            HANDLERS[func] = handler
        return handler

    return register


def _keeping(*funcs: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """As :func:`_handle`, for functions that would do the same on real numbers."""
    KEEPING.update(funcs)
    return _handle(*funcs)


def _on_integers(func: Callable[..., Any], per_channel: bool = False) -> Callable[..., Any]:
    def handler(x: QTensor, *args: Any, **kwargs: Any) -> Any:
        if not per_channel:
            _per_tensor(x, func)
        return _rewrap(x, func(x.integers, *args, **kwargs))

    return handler


def _through_float(func: Callable[..., Any]) -> Callable[..., Any]:
    """Order does not care about the type, and float64 holds every integer."""

    def handler(x: QTensor, *args: Any, **kwargs: Any) -> Any:
        _per_tensor(x, func)
        result = func(x.integers.double(), *args, **kwargs)
        dtype = x.integers.dtype
        if isinstance(result, Tensor):
            return x.like(result.to(dtype))
        values, indices = result
        return x.like(values.to(dtype)), indices

    return handler


def _named(*names: str) -> list[Callable[..., Any]]:
    """Each name as a function of torch and as a method of Tensor, where they exist."""
    found = [*map(vars(torch).get, names), *(getattr(torch.Tensor, name, None) for name in names)]
    return [func for func in found if func is not None]


# movements: the same integers elsewhere
for _func in [
    *_named(
        *("reshape", "flatten", "unflatten", "ravel"),
        *("permute", "transpose", "t", "swapaxes", "swapdims", "movedim", "moveaxis", "adjoint"),
        *("squeeze", "unsqueeze", "expand", "repeat", "tile", "broadcast_to"),
        *("select", "narrow", "index_select", "gather", "take_along_dim", "__getitem__", "diagonal"),
        *("chunk", "split", "split_with_sizes", "tensor_split", "unbind", "unfold"),
        *("flip", "fliplr", "flipud", "roll", "rot90", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle"),
        # order
        *("amax", "amin", "sort", "topk", "kthvalue", "argmax", "argmin", "argsort"),
    ),
    F.pixel_shuffle,
    F.pixel_unshuffle,
    *(getattr(torch.Tensor, name).__get__ for name in ("T", "mT", "H")),
    *(getattr(torch.ops.aten, name) for name in ("numpy_T", "mT", "matrix_H")),  # so torch.compile calls them
]:
    _keeping(_func)(_on_integers(_func))


def _pooled(func: Callable[..., Any], dim: int) -> Callable[..., Any]:
    on_integers, through_float = _on_integers(func), _through_float(func)

    def handler(x: QTensor, *args: Any, return_indices: bool = False, **kwargs: Any) -> Any:
        if return_indices:
            return through_float(x, *args, return_indices=True, **kwargs)
        if x.is_cpu and x.is_contiguous():
            return on_integers(x, *args, **kwargs)
        # integers elsewhere, or with their channels last, torch does not pool
        if x.dim() == dim + 2:
            _per_tensor(x, func)
            return x.like(max_pool(x.integers, *args, **kwargs))
        return through_float(x, *args, **kwargs)

    return handler


for _name, _dim in (("max_pool2d", 2), ("max_pool3d", 3)):
    for _func in (getattr(F, _name), getattr(torch, _name)):
        _keeping(_func)(_pooled(_func, _dim))
for _func in [
    *_named("max_pool1d", "max_pool1d_with_indices", "adaptive_max_pool1d"),
    *(getattr(F, f"max_pool{dim}d_with_indices") for dim in (1, 2, 3)),
    F.max_pool1d,
    *(getattr(F, f"adaptive_max_pool{dim}d{suffix}") for dim in (1, 2, 3) for suffix in ("", "_with_indices")),
]:
    _keeping(_func)(_through_float(_func))

# questions about the stored tensor, and copies of it
for _func in [
    *_named("clone", "detach", "contiguous", "is_floating_point", "is_complex", "numel", "is_inference"),
    *_named("size", "dim", "nelement", "stride", "is_contiguous", "element_size", "storage_offset", "data_ptr"),
    *_named("get_device", "is_pinned"),
    torch.Tensor.__len__,
]:
    HANDLERS[_func] = _on_integers(_func, per_channel=True)
HANDLERS[getattr(torch.Tensor, "data").__get__] = HANDLERS[torch.Tensor.detach]  # noqa: B009


def _same_dtype(x: QTensor, moved: Tensor, func: Callable[..., Any]) -> None:
    if moved.dtype is not x.integers.dtype:
        raise InvalidInputError(
            f"a QTensor of {x.integers.dtype} cannot become {moved.dtype} by .{func.__name__}()",
            module=calling_module(),
            remedy="call .dequantize() for real numbers, .int_repr() for the integers",
        )


def _moved(func: Callable[..., Any]) -> Callable[..., Any]:
    def handler(x: QTensor, *args: Any, **kwargs: Any) -> QTensor:
        other = (arg.integers if isinstance(arg, QTensor) else arg for arg in args)
        moved = func(x.integers, *other, **kwargs)
        _same_dtype(x, moved, func)
        if x.axis is None:
            return x.like(moved)
        return QTensor(moved, x.scale.to(moved.device), x.zero_point.to(moved.device), x.axis)

    return handler


for _func in (torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda, torch.Tensor.pin_memory):
    HANDLERS[_func] = _moved(_func)


@_handle(torch.Tensor.view)
def _view(x: QTensor, *shape: Any) -> Tensor:
    _per_tensor(x, torch.Tensor.view)
    if isinstance(shape[0], torch.dtype):
        _same_dtype(x, x.integers.view(*shape), torch.Tensor.view)
        return x
    # int8 layers leave their channels last in memory, where a view that a float model takes may not exist
    return x.reshape(*shape)


# of either tensor only the shape counts
@_handle(torch.Tensor.view_as)
def _view_as(x: Tensor, other: Tensor) -> Tensor:
    return x.view(other.shape)


@_handle(torch.Tensor.reshape_as)
def _reshape_as(x: Tensor, other: Tensor) -> Tensor:
    return x.reshape(other.shape)


@_handle(torch.Tensor.expand_as)
def _expand_as(x: Tensor, other: Tensor) -> Tensor:
    return x.expand(other.shape)


# several tensors
def _joined(func: Callable[..., Any]) -> Callable[..., Any]:
    def handler(tensors: Sequence[Any], *args: Any, **kwargs: Any) -> QTensor:
        first = next(q for q in tensors if isinstance(q, QTensor))
        for other in tensors:
            _same_parameters(first, other, func.__name__)
        return first.like(func([q.integers for q in tensors], *args, **kwargs))

    return handler


for _func in _named("cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack"):
    _keeping(_func)(_joined(_func))


def _same_parameters(a: Any, b: Any, name: str) -> None:
    for x in (a, b):
        if not isinstance(x, QTensor):
            raise InvalidInputError(
                f"'{name}' got a float tensor beside a quantized one",
                module=calling_module(),
                remedy="quantize it too (QuantStub), or dequantize the other",
            )
        _per_tensor(x, lambda: name)
    if (a.scale, a.zero_point, a.integers.dtype) != (b.scale, b.zero_point, b.integers.dtype):
        raise InvalidInputError(
            f"'{name}' got quantized tensors with different parameters: scale {a.scale} and zero point "
            f"{a.zero_point} beside {b.scale} and {b.zero_point}",
            module=calling_module(),
            remedy="use a FloatFunctional of the model instead (self.ff.cat(…)), which learns the result's range",
        )


# clamping, at the thresholds' own integers
def _integer(x: QTensor, value: float | None) -> int | None:
    if value is None:
        return None
    kind = integer_type(x.integers.dtype)
    finite = max(-(2.0**60), min(2.0**60, float(value)))  # thresholds may be infinite
    steps = single(single(single(finite) * reciprocal(x.scale)) + x.zero_point)  # each step a float32
    return max(kind.minimum, min(kind.maximum, round(steps)))


def _clamped(x: QTensor, low: float | None, high: float | None, inplace: bool, func: Callable[..., Any]) -> QTensor:
    _per_tensor(x, func)
    least, most = _integer(x, low), _integer(x, high)
    if inplace:
        x.integers.clamp_(least, most)
        return x
    return x.like(x.integers.clamp(least, most))


@_keeping(F.relu, torch.relu, torch.Tensor.relu)
def _relu(x: QTensor, inplace: bool = False) -> QTensor:
    return _clamped(x, 0.0, None, inplace, F.relu)


@_keeping(torch.relu_, torch.Tensor.relu_)
def _relu_(x: QTensor) -> QTensor:
    return _clamped(x, 0.0, None, True, F.relu)


@_keeping(F.relu6)
def _relu6(x: QTensor, inplace: bool = False) -> QTensor:
    return _clamped(x, 0.0, 6.0, inplace, F.relu6)


@_keeping(F.hardtanh)
def _hardtanh(x: QTensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> QTensor:
    return _clamped(x, min_val, max_val, inplace, F.hardtanh)


@_keeping(F.hardtanh_)
def _hardtanh_(x: QTensor, min_val: float = -1.0, max_val: float = 1.0) -> QTensor:
    return _clamped(x, min_val, max_val, True, F.hardtanh)


@_keeping(*_named("clamp", "clip"))
def _clamp(x: QTensor, min: float | None = None, max: float | None = None) -> QTensor:
    return _clamped(x, min, max, False, torch.clamp)


@_keeping(*_named("clamp_", "clip_"))
def _clamp_(x: QTensor, min: float | None = None, max: float | None = None) -> QTensor:
    return _clamped(x, min, max, True, torch.clamp)


@_keeping(*_named("clamp_min"))
def _clamp_min(x: QTensor, min: float) -> QTensor:
    return _clamped(x, min, None, False, torch.clamp_min)


@_keeping(*_named("clamp_max"))
def _clamp_max(x: QTensor, max: float) -> QTensor:
    return _clamped(x, None, max, False, torch.clamp_max)


# order
def _extremes(func: Callable[..., Any], pairwise: Callable[..., Any]) -> Callable[..., Any]:
    def handler(x: Any, *args: Any, **kwargs: Any) -> Any:
        other = args[0] if args else kwargs.get("other")
        if isinstance(other, Tensor) or (isinstance(x, Tensor) and not isinstance(x, QTensor)):
            _same_parameters(x, other, func.__name__)
            assert isinstance(other, QTensor)
            return x.like(pairwise(x.integers, other.integers))
        _per_tensor(x, func)
        return _rewrap(x, func(x.integers, *args, **kwargs))

    return handler


for _name, _pairwise in (("max", torch.maximum), ("min", torch.minimum)):
    for _func in _named(_name, f"{_name}imum"):
        _keeping(_func)(_extremes(_func, _pairwise))


def _real(value: Any) -> Any:
    return value.dequantize() if isinstance(value, QTensor) else value


def _on_reals(func: Callable[..., Any]) -> Callable[..., Any]:
    def handler(*args: Any, **kwargs: Any) -> Any:
        return func(*map(_real, args), **{name: _real(value) for name, value in kwargs.items()})

    return handler


for _func in _named(
    *("eq", "ne", "lt", "le", "gt", "ge", "isclose", "allclose", "isnan", "isinf", "isfinite"),
    *("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__contains__"),
    *("item", "tolist", "is_nonzero", "__bool__", "__float__", "__int__"),
):
    HANDLERS[_func] = _on_reals(_func)


_handle(*_named("dequantize"))(QTensor.dequantize)
_handle(*_named("int_repr"))(QTensor.int_repr)


@_handle(torch.Tensor.__format__)
def _format(x: QTensor, spec: str) -> str:
    return format(x.item(), spec) if x.dim() == 0 else object.__format__(x, spec)


@_handle(*_named("equal"))
def _equal(x: Any, other: Any) -> bool:
    both = isinstance(x, QTensor) and isinstance(other, QTensor)
    if not both or x.axis is not None or other.axis is not None:
        return torch.equal(_real(x), _real(other))
    parameters = (x.scale, x.zero_point, x.integers.dtype) == (
        other.scale,
        other.zero_point,
        other.integers.dtype,
    )
    return parameters and torch.equal(x.integers, other.integers)


# averages
def _rounded(func: Callable[..., Any]) -> Callable[..., Any]:
    def handler(x: QTensor, *args: Any, **kwargs: Any) -> QTensor:
        _per_tensor(x, func)
        found = global_average(func, x.integers, x.zero_point, args, kwargs)
        if found is not NotImplemented:
            return x.like(found)
        kind = integer_type(x.integers.dtype)
        average = func(x.integers.to(torch.float32).sub_(x.zero_point), *args, **kwargs)
        steps = average.add(x.zero_point).round_().clamp_(kind.minimum, kind.maximum)
        return x.like(steps.to(x.integers.dtype))

    return handler


_averages: list[Any] = [
    *_named("mean"),
    F.avg_pool1d,
    F.avg_pool2d,
    F.avg_pool3d,
    F.adaptive_avg_pool1d,
    F.adaptive_avg_pool2d,
    F.adaptive_avg_pool3d,
    F.interpolate,
    F.upsample,
]
for _func in _averages:
    _keeping(_func)(_rounded(_func))


@_keeping(F.pad, torch._C._nn.pad)  # the latter is what torch.compile sees
def _pad(x: QTensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> QTensor:
    _per_tensor(x, F.pad)
    if mode != "constant":
        return x.like(F.pad(x.integers, list(pad), mode))
    return x.like(F.pad(x.integers, list(pad), mode, _integer(x, value or 0.0)))


@_handle(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)
def _dropout(x: QTensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> QTensor:
    return x  # integers are not trained on, whatever mode their modules are in
