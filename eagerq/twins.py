"""What is done to one module at a time: its output (or input) is observed, it is swapped for its twin."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from eagerq.fake_quantize import (
    FakeQuantizeBase,
    default_fixed_qparams_range_0to1_fake_quant,
    default_fixed_qparams_range_neg1to1_fake_quant,
    is_ordinary,
    rounded_over,
)
from eagerq.inspection import is_memoryless
from eagerq.nn.qat.base import gives_its_own
from eagerq.nn.quantized.functional_modules import FloatFunctional
from eagerq.observer import ObserverBase
from eagerq.stubs import DeQuantStub
from eagerq.tree import copy_hooks, device_of

__all__ = [
    "DEFAULT_MODULE_TO_ACT_POST_PROCESS",
    "OBSERVER",
    "InputObserverHook",
    "ObserverHook",
    "Observing",
    "attach_observer",
    "fixed_range_observer",
    "is_rounded_first",
    "made_from",
    "remove_observers",
    "swap_module",
]

# the child that observes or fake-quantizes a module's output; checkpoints know it by this name
OBSERVER = "activation_post_process"
Observing = (ObserverBase, FakeQuantizeBase)

# Functions whose results have one range, whatever the data: quantized tensors get it from the float modules
# themselves (eagerq.qtensor_activations), so while training a fake quantizer with that range stands in.
DEFAULT_MODULE_TO_ACT_POST_PROCESS: dict[type[nn.Module], Callable[..., nn.Module]] = {
    nn.Hardsigmoid: default_fixed_qparams_range_0to1_fake_quant,
    nn.Sigmoid: default_fixed_qparams_range_0to1_fake_quant,
    nn.Softmax: default_fixed_qparams_range_0to1_fake_quant,
    nn.Tanh: default_fixed_qparams_range_neg1to1_fake_quant,
}


class ObserverHook:
    """Forward hook that shows a module's output to its ``activation_post_process``."""

    def __call__(self, module: Any, args: Any, output: Tensor) -> Tensor:
        observer = module.activation_post_process
        eager = not torch.compiler.is_compiling()
        if eager and gives_its_own(module) and next(iter(module._forward_hooks.values())) is self:
            return rounded_over(observer, output)
        made = None if eager else getattr(module, "_made", None)
        if made is not None:
            module._made = None
            if is_ordinary(observer) and (rounded := observer.over_made(made)) is not None:
                return rounded
        observed: Tensor = observer(output)
        return observed


def is_rounded_first(module: nn.Module) -> bool:
    """Whether the module's own observer, and no other hook, sees what a call gives."""
    hooks = list(module._forward_hooks.values())
    return len(hooks) == 1 and isinstance(hooks[0], ObserverHook) and gives_its_own(module)


class InputObserverHook:
    """Forward pre-hook that shows a module's input to its ``activation_post_process``."""

    def __call__(self, module: Any, args: Any) -> Any:
        return (module.activation_post_process(args[0]), *args[1:])


_HOOKS = (ObserverHook, InputObserverHook)


def fixed_range_observer(module: nn.Module) -> Callable[..., nn.Module] | None:
    """What makes the observer of a module in training whose range is known, or None."""
    return DEFAULT_MODULE_TO_ACT_POST_PROCESS.get(type_before_parametrizations(module)) if module.training else None


def attach_observer(module: nn.Module, device: torch.device | None = None) -> None:
    """Observe a module's output, if it has a qconfig: as that says, but for ranges that are known.

    An observer without a memory is of a layer that will quantize its input as it comes: it sees that.

    Args:
        device: where the observer goes when the module itself has no tensors.
    """
    config = getattr(module, "qconfig", None)
    if config is None or isinstance(module, DeQuantStub):
        return
    fixed = fixed_range_observer(module)
    observer = (fixed or config.activation)()
    where = device_of(module) or device
    module.add_module(OBSERVER, observer.to(where) if where is not None else observer)
    if isinstance(module, FloatFunctional):
        return
    if is_memoryless(config.activation() if fixed else observer):
        module.register_forward_pre_hook(InputObserverHook(), prepend=True)
    else:
        module.register_forward_hook(ObserverHook(), prepend=True)


def remove_observers(root: nn.Module) -> None:
    """Take away qconfigs, observers and their hooks, of a module and all in it."""
    for module in root.modules():
        module.__dict__.pop("qconfig", None)
        # a fake quantizer keeps its own: that of a QAT layer which stays is still at work
        if isinstance(module._modules.get(OBSERVER), Observing) and not isinstance(module, Observing):
            del module._modules[OBSERVER]
        for table in (module._forward_hooks, module._forward_pre_hooks):
            for number, hook in list(table.items()):
                if isinstance(hook, _HOOKS):
                    del table[number]


def made_from(make: Callable[..., nn.Module], mod: nn.Module, **options: Any) -> nn.Module:
    """``make(mod)`` with the options that it knows, and with hooks, device and mode of ``mod``."""
    accepted = inspect.signature(make).parameters
    new = make(mod, **{name: value for name, value in options.items() if name in accepted})
    copy_hooks(mod, new, leave=_HOOKS)
    device = device_of(mod)
    if device is not None:
        new.to(device)
    new.training = mod.training
    return new


def swap_module(
    mod: nn.Module,
    mapping: dict[Callable[..., Any], Any],
    custom_module_class_mapping: dict[Callable[..., Any], Any] | None = None,
    use_precomputed_fake_quant: bool = False,
    as_trained: bool = False,
) -> nn.Module:
    """The module that ``mapping`` gives for ``mod``, made by its ``from_float``; else ``mod`` itself.

    Only modules with a qconfig are swapped.  Hooks (but for the observer's), device and training mode
    carry over.

    Args:
        custom_module_class_mapping: observed custom class to quantized class, made by
            ``from_observed``.
        use_precomputed_fake_quant, as_trained: see :func:`convert`.
    """
    kind = type_before_parametrizations(mod)
    if getattr(mod, "qconfig", None) is None:
        return mod
    if custom_module_class_mapping and kind in custom_module_class_mapping:
        make = custom_module_class_mapping[kind].from_observed
    elif kind in mapping:
        make = mapping[kind].from_float
    else:
        return mod
    return made_from(make, mod, use_precomputed_fake_quant=use_precomputed_fake_quant, as_trained=as_trained)
