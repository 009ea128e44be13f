"""A float model and its quantized twin, run and compared layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from eagerq.errors import InvalidArgumentError
from eagerq.intrinsic import _FusedModule
from eagerq.nn.qat.base import QATMixin
from eagerq.nn.quantized import FloatFunctional, QFunctional, QuantizedModule
from eagerq.numeric_suite.loggers import (
    LOGGER,
    LoggerHook,
    OutputLogger,
    Shadow,
    ShadowLogger,
    get_logger_dict,
    remove_loggers,
)
from eagerq.numeric_suite.weights import float_key
from eagerq.quantization_mappings import get_default_compare_output_module_list
from eagerq.tree import is_leaf

__all__ = [
    "compare_model_outputs",
    "compare_model_stub",
    "get_matching_activations",
    "prepare_model_outputs",
    "prepare_model_with_stubs",
]


# --- each layer on equal input ----------------------------------------------------------------------


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
        >>> import torch, eagerq
        >>> from torch import nn
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


def _attach_loggers(model: nn.Module, logger_cls: Callable[[], nn.Module], kinds: set[Any]) -> None:
    remove_loggers(model)
    seen: set[nn.Module] = set()

    def visit(module: nn.Module) -> None:
        if module in seen:
            return
        seen.add(module)
        kind = type_before_parametrizations(module)
        if kind in kinds and (kind is not nn.Sequential or is_leaf(module)):
            module.add_module(LOGGER, logger_cls())
            if isinstance(module, (FloatFunctional, QFunctional)):  # those show their results themselves
                return
            if not isinstance(module, nn.Sequential):  # which runs its children, the logger too
                module.register_forward_hook(LoggerHook())
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
        match = float_key(key, float_stats)
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
