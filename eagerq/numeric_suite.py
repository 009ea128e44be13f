"""Where a quantized model parts from its float one: weights, outputs, and each layer on equal input."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from eagerq.errors import InvalidArgumentError
from eagerq.intrinsic import _FusedModule
from eagerq.nn.qat.base import QATMixin
from eagerq.nn.quantized import FloatFunctional, QFunctional, QuantizedModule
from eagerq.qtensor import QTensor
from eagerq.quantization_mappings import get_default_compare_output_module_list
from eagerq.tree import is_leaf

__all__ = [
    "Logger",
    "OutputLogger",
    "Shadow",
    "ShadowLogger",
    "compare_model_outputs",
    "compare_model_stub",
    "compare_weights",
    "compute_error",
    "get_logger_dict",
    "get_matching_activations",
    "prepare_model_outputs",
    "prepare_model_with_stubs",
    "remove_loggers",
]

_LOGGER = "activation_post_process"


def compute_error(x: Tensor, y: Tensor) -> Tensor:
    """Signal-to-noise ratio of ``y`` as a copy of ``x``, in decibels: ``20·log10(‖x‖ / ‖x - y‖)``.

    Example:
        >>> compute_error(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.1]))
        tensor(20.)
    """
    return 20 * torch.log10(torch.linalg.vector_norm(x) / torch.linalg.vector_norm(x - y))


# --- weights ----------------------------------------------------------------------------------------


def _float_key(key: str, names: Mapping[str, Any]) -> str | None:
    """The entry of a float state_dict that ``key`` of a quantized one comes from; it may lie in a fused module."""
    path, _, name = key.rpartition(".")
    dot = f"{path}." if path else ""
    candidates = [key, f"{dot}0.{name}"]
    return next((candidate for candidate in candidates if candidate in names), None)


def compare_weights(float_dict: Mapping[str, Any], quantized_dict: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Pairs of float and quantized weights.

    Args:
        float_dict: state_dict of the float model (fused or not).
        quantized_dict: state_dict of the model converted from it.

    Returns:
        By name in ``quantized_dict``: ``{"float": Tensor, "quantized": QTensor}``.

    Example:
        >>> import eagerq
        >>> net = eagerq.QuantWrapper(nn.Linear(2, 2))
        >>> net.qconfig = eagerq.default_qconfig
        >>> prepared = eagerq.prepare(net)
        >>> _ = prepared(torch.randn(4, 2))
        >>> pairs = compare_weights(net.state_dict(), eagerq.convert(prepared).state_dict())
        >>> pair = pairs["module.weight"]
        >>> bool(compute_error(pair["float"], pair["quantized"].dequantize()) > 30)
        True
    """
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, integers in quantized_dict.items():
        scale, zero_point = (quantized_dict.get(f"{key}_{part}") for part in ("scale", "zero_point"))
        if scale is None or zero_point is None:
            continue
        match = _float_key(key, float_dict)
        if match is None or float_dict[match].shape != integers.shape:
            continue
        one = scale.numel() == 1
        axis = None if one else next(axis for axis, size in enumerate(integers.shape) if size == scale.numel())
        parameters = (scale.item(), zero_point.item()) if one else (scale, zero_point)
        pairs[key] = {"float": float_dict[match], "quantized": QTensor(integers, *parameters, axis)}
    return pairs


# --- loggers ----------------------------------------------------------------------------------------


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


# --- each layer on equal input ----------------------------------------------------------------------


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


def _same_classes(a: nn.Module, b: nn.Module) -> bool:
    return [type(one) for one in a.modules()] == [type(one) for one in b.modules()]


def prepare_model_with_stubs(
    float_module: nn.Module,
    q_module: nn.Module,
    module_swap_list: Iterable[type[nn.Module]],
    logger_cls: Callable[[], nn.Module] = ShadowLogger,
) -> None:
    """Put a :class:`Shadow` in place of each quantized module whose float twin is of a listed class.

    Args:
        float_module: the float model (fused as the quantized one is); left as it is.
        q_module: the model converted from it; changed in place, see :func:`remove_loggers`.
        module_swap_list: float classes.
        logger_cls: makes the loggers.

    Raises:
        InvalidArgumentError: when no module is of a listed class; nothing is changed.
    """
    remove_loggers(q_module)
    kinds = set(module_swap_list)
    plan: list[tuple[nn.Module, str, Shadow]] = []

    def visit(float_parent: nn.Module, q_parent: nn.Module) -> None:
        for name, q_child in q_parent.named_children():
            float_child = getattr(float_parent, name, None)
            if not isinstance(float_child, nn.Module):
                continue
            if type_before_parametrizations(float_child) not in kinds:
                visit(float_child, q_child)
            elif not _same_classes(q_child, float_child):
                plan.append((q_parent, name, Shadow(q_child, float_child, logger_cls)))

    visit(float_module, q_module)
    if not plan:
        here = ", ".join(sorted({type(module).__name__ for module in float_module.modules()}))
        raise InvalidArgumentError(
            f"nothing to compare: no quantized module has a float twin of class "
            f"{', '.join(sorted(kind.__name__ for kind in kinds)) or '(none given)'}; the float model has {here}",
            remedy="list classes of the float model, fused as the quantized one is",
        )
    for parent, name, shadow in plan:
        parent._modules[name] = shadow


def compare_model_stub(
    float_model: nn.Module,
    q_model: nn.Module,
    module_swap_list: Iterable[type[nn.Module]],
    *data: Any,
    logger_cls: Callable[[], nn.Module] = ShadowLogger,
) -> dict[str, dict[str, Any]]:
    """Outputs of quantized modules and their float twins on equal inputs: each module's own error.

    Args:
        float_model, q_model, module_swap_list, logger_cls: see :func:`prepare_model_with_stubs`.
        data: what the model is called with.

    Returns:
        By name: ``{"float": [Tensor], "quantized": [QTensor or Tensor]}``.

    Example:
        >>> import eagerq
        >>> net = eagerq.QuantWrapper(nn.Linear(2, 2))
        >>> net.qconfig = eagerq.default_qconfig
        >>> prepared = eagerq.prepare(net)
        >>> _ = prepared(torch.randn(4, 2))
        >>> found = compare_model_stub(net, eagerq.convert(prepared), {nn.Linear}, torch.randn(4, 2))
        >>> {name: sorted(stats) for name, stats in found.items()}
        {'module.stats': ['float', 'quantized']}
    """
    prepare_model_with_stubs(float_model, q_model, module_swap_list, logger_cls)
    q_model(*data)
    return get_logger_dict(q_model)


# --- outputs in place -------------------------------------------------------------------------------


class _LoggerHook:
    """Forward hook that shows a module's output to its logger."""

    def __call__(self, module: Any, args: Any, output: Any) -> Any:
        return getattr(module, _LOGGER)(output)


def _attach_loggers(model: nn.Module, logger_cls: Callable[[], nn.Module], kinds: set[Any]) -> None:
    remove_loggers(model)
    seen: set[nn.Module] = set()

    def visit(module: nn.Module) -> None:
        if module in seen:
            return
        seen.add(module)
        kind = type_before_parametrizations(module)
        if kind in kinds and (kind is not nn.Sequential or is_leaf(module)):
            module.add_module(_LOGGER, logger_cls())
            if isinstance(module, (FloatFunctional, QFunctional)):  # those show their results themselves
                return
            if not isinstance(module, nn.Sequential):  # which runs its children, the logger too
                module.register_forward_hook(_LoggerHook())
        if not isinstance(module, (_FusedModule, QATMixin, QuantizedModule)):
            for child in list(module.children()):
                visit(child)

    visit(model)


def prepare_model_outputs(
    float_module: nn.Module,
    q_module: nn.Module,
    logger_cls: Callable[[], nn.Module] = OutputLogger,
    allow_list: Iterable[Any] | None = None,
) -> None:
    """Attach loggers to the outputs of both models' layers, in place; see :func:`remove_loggers`.

    Args:
        float_module, q_module: a float model, and the one converted from it.
        logger_cls: makes the loggers.
        allow_list: classes to log, float and quantized; by default
            :func:`~eagerq.quantization_mappings.get_default_compare_output_module_list`.
    """
    kinds = set(get_default_compare_output_module_list() if allow_list is None else allow_list)
    for model in (float_module, q_module):
        _attach_loggers(model, logger_cls, kinds)


def get_matching_activations(float_module: nn.Module, q_module: nn.Module) -> dict[str, dict[str, Any]]:
    """What the loggers of :func:`prepare_model_outputs` have kept, paired by module name.

    Returns:
        By name: ``{"float": [Tensor], "quantized": [QTensor or Tensor]}``.
    """
    float_stats, pairs = get_logger_dict(float_module), {}
    for key, stats in get_logger_dict(q_module).items():
        match = _float_key(key, float_stats)
        if stats["tensor_val"] and match is not None:
            pairs[key] = {"float": float_stats[match]["tensor_val"], "quantized": stats["tensor_val"]}
    return pairs


def compare_model_outputs(
    float_model: nn.Module,
    q_model: nn.Module,
    *data: Any,
    logger_cls: Callable[[], nn.Module] = OutputLogger,
    allow_list: Iterable[Any] | None = None,
) -> dict[str, dict[str, Any]]:
    """Outputs of both models' layers on the same data: how errors add up on the way.

    Args:
        float_model, q_model, logger_cls, allow_list: see :func:`prepare_model_outputs`.
        data: what both models are called with.

    Returns:
        By name: ``{"float": [Tensor], "quantized": [QTensor or Tensor]}``.
    """
    prepare_model_outputs(float_model, q_model, logger_cls, allow_list)
    float_model(*data)
    q_model(*data)
    return get_matching_activations(float_model, q_model)


def remove_loggers(model: nn.Module) -> None:
    """Take away the loggers and shadows that the functions of this module have put into a model."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Shadow):
                module._modules[name] = child.orig_module
        if isinstance(module._modules.get(_LOGGER), Logger):
            del module._modules[_LOGGER]
            if isinstance(module, (FloatFunctional, QFunctional)):
                module.activation_post_process = nn.Identity()
        for number, hook in list(module._forward_hooks.items()):
            if isinstance(hook, _LoggerHook):
                del module._forward_hooks[number]
