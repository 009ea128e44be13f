"""What is put into models to watch them, and taken out again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from eagerq.nn.quantized import FloatFunctional, QFunctional
from eagerq.qtensor import QTensor

__all__ = [
    "LOGGER",
    "Logger",
    "LoggerHook",
    "OutputLogger",
    "Shadow",
    "ShadowLogger",
    "get_logger_dict",
    "remove_loggers",
]

LOGGER = "activation_post_process"


class Logger(nn.Module):
    """Base of the loggers: what passes is kept in ``stats``, a dict of lists or tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.stats: dict[str, Any] = {}
        self.dtype = torch.uint8

    def clear(self) -> None:
        """Forget what has passed."""
        for name in self.stats:
            self.stats[name] = []


class ShadowLogger(Logger):
    """Keeps the outputs of a quantized module and of its float shadow: ``quantized`` and ``float``, lists."""

    def __init__(self) -> None:
        super().__init__()
        self.stats = {"float": [], "quantized": []}

    def forward(self, x: Any, y: Any) -> None:
        for name, value in (("quantized", x), ("float", y)):
            self.stats[name].append((value[0] if isinstance(value, (tuple, list)) else value).detach())


class OutputLogger(Logger):
    """Keeps a module's outputs: ``tensor_val``, a list."""

    def __init__(self) -> None:
        super().__init__()
        self.stats = {"tensor_val": []}

    def forward(self, x: Any) -> Any:
        self.stats["tensor_val"].append(x)
        return x


def get_logger_dict(mod: nn.Module, prefix: str = "") -> dict[str, dict[str, Any]]:
    """The ``stats`` of all loggers, by name: ``"<module>.stats"``.

    Args:
        prefix: goes before every name.
    """
    return {
        ".".join(filter(None, (prefix, name, "stats"))): child.stats
        for name, module in mod.named_modules()
        for child in module.children()
        if isinstance(child, Logger)
    }


def _real(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_real(part) for part in value)
    return value.dequantize() if isinstance(value, QTensor) else value


class Shadow(nn.Module):
    """A quantized module that lets its float twin run beside it, on the same input, and logs both outputs.

    Args:
        q_module: the quantized module; its output is passed on.
        float_module: the float module it was made from.
        logger_cls: makes the logger, called with both outputs; :class:`ShadowLogger`.
    """

    def __init__(self, q_module: nn.Module, float_module: nn.Module, logger_cls: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.orig_module = q_module
        self.shadow_module = float_module
        self.logger = logger_cls()

    def _both(self, operation: str, *args: Any) -> Any:
        output = getattr(self.orig_module, operation)(*args)
        with torch.no_grad():
            self.logger(output, getattr(self.shadow_module, operation)(*map(_real, args)))
        return output

    def forward(self, *x: Any) -> Any:
        return self._both("__call__", *x)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """:meth:`QFunctional.add` and its shadow."""
        return self._both("add", x, y)

    def add_scalar(self, x: Tensor, y: float) -> Tensor:
        """:meth:`QFunctional.add_scalar` and its shadow."""
        return self._both("add_scalar", x, y)

    def mul(self, x: Tensor, y: Tensor) -> Tensor:
        """:meth:`QFunctional.mul` and its shadow."""
        return self._both("mul", x, y)

    def mul_scalar(self, x: Tensor, y: float) -> Tensor:
        """:meth:`QFunctional.mul_scalar` and its shadow."""
        return self._both("mul_scalar", x, y)

    def matmul(self, x: Tensor, y: Tensor) -> Tensor:
        """:meth:`QFunctional.matmul` and its shadow."""
        return self._both("matmul", x, y)

    def cat(self, x: Any, dim: int = 0) -> Tensor:
        """:meth:`QFunctional.cat` and its shadow."""
        return self._both("cat", x, dim)

    def add_relu(self, x: Tensor, y: Tensor) -> Tensor:
        """:meth:`QFunctional.add_relu` and its shadow."""
        return self._both("add_relu", x, y)


class LoggerHook:
    """Forward hook that shows a module's output to its logger."""

    def __call__(self, module: Any, args: Any, output: Any) -> Any:
        return getattr(module, LOGGER)(output)


def remove_loggers(model: nn.Module) -> None:
    """Take away the loggers and shadows that the functions of this module have put into a model."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Shadow):
                module._modules[name] = child.orig_module
        if isinstance(module._modules.get(LOGGER), Logger):
            del module._modules[LOGGER]
            if isinstance(module, (FloatFunctional, QFunctional)):
                module.activation_post_process = nn.Identity()
        for number, hook in list(module._forward_hooks.items()):
            if isinstance(hook, LoggerHook):
                del module._forward_hooks[number]
