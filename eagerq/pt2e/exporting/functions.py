"""What torch's functions do with QTensors in Q/DQ form: as with real numbers, the result quantized as the argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from eagerq.pt2e.exporting.doors import quantize
from eagerq.qtensor import HANDLERS, QTensor
from eagerq.scheme import integer_type

__all__ = ["FUNCTIONS"]

# questions about a tensor and copies of it are answered by the QTensor itself, in integers
_KEPT = frozenset(
    (
        *("clone", "detach", "contiguous", "is_floating_point", "is_complex", "numel", "is_inference", "size", "dim"),
        *("nelement", "stride", "is_contiguous", "element_size", "storage_offset", "data_ptr", "get_device"),
        *("is_pinned", "__len__", "to", "cpu", "cuda", "pin_memory", "dequantize", "int_repr", "__format__", "__get__"),
        *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"),
    )
)


def _on_reals(func: Callable[..., Any]) -> Callable[..., Any]:
    def handler(*args: Any, **kwargs: Any) -> Any:
        leaves, _ = tree_flatten((args, kwargs))
        first = next(leaf for leaf in leaves if isinstance(leaf, QTensor))
        kind = integer_type(first.integers.dtype)
        output = (first.scale, first.zero_point, kind.storage, kind.minimum, kind.maximum)

        def real(value: Any) -> Any:
            return value.dequantize() if isinstance(value, QTensor) else value

        def quantized(value: Any) -> Any:
            if isinstance(value, Tensor) and value.is_floating_point():
                return QTensor(quantize(value, *output), first.scale, first.zero_point)
            return value

        args, kwargs = tree_map(real, (args, kwargs))
        return tree_map(quantized, func(*args, **kwargs))

    return handler


FUNCTIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    func: _on_reals(func)
    for func, handler in HANDLERS.items()
    if handler.__module__ == "eagerq.qtensor_ops" and getattr(func, "__name__", "") not in _KEPT
}
