"""QConfig: how a module's output and weight are to be quantized, and the defaults per backend."""

from __future__ import annotations

import warnings
from collections import namedtuple
from functools import partial
from typing import Any

import torch
from torch import nn

from eagerq.errors import InvalidArgumentError, InvalidConfigError
from eagerq.fake_quantize import (
    FakeQuantize,
    FusedMovingAvgObsFakeQuantize,
    default_dynamic_fake_quant,
    default_embedding_fake_quant,
    default_embedding_fake_quant_4bit,
    default_fake_quant,
    default_fused_act_fake_quant,
    default_fused_per_channel_wt_fake_quant,
    default_fused_wt_fake_quant,
    default_per_channel_weight_fake_quant,
    default_weight_fake_quant,
    fused_per_channel_wt_fake_quant_range_neg_127_to_127,
    fused_wt_fake_quant_range_neg_127_to_127,
)
from eagerq.observer import (
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    NoopObserver,
    PlaceholderObserver,
    _PartialWrapper,
    default_debug_observer,
    default_dynamic_quant_observer,
    default_float_qparams_observer,
    default_float_qparams_observer_4bit,
    default_observer,
    default_per_channel_weight_observer,
    default_placeholder_observer,
    default_reuse_input_observer,
    default_weight_observer,
    per_channel_weight_observer_range_neg_127_to_127,
    weight_observer_range_neg_127_to_127,
)

__all__ = [
    "QConfig",
    "QConfigAny",
    "QConfigDynamic",
    "default_activation_only_qconfig",
    "default_debug_qconfig",
    "default_dynamic_qat_qconfig",
    "default_dynamic_qconfig",
    "default_embedding_qat_qconfig",
    "default_embedding_qat_qconfig_4bit",
    "default_per_channel_qconfig",
    "default_per_channel_symmetric_qnnpack_qat_qconfig",
    "default_per_channel_symmetric_qnnpack_qconfig",
    "default_qat_qconfig",
    "default_qat_qconfig_v2",
    "default_qconfig",
    "default_quint8_weight_qconfig",
    "default_reuse_input_qconfig",
    "default_symmetric_qnnpack_qat_qconfig",
    "default_symmetric_qnnpack_qconfig",
    "default_weight_only_qconfig",
    "float16_dynamic_qconfig",
    "float16_static_qconfig",
    "float_qparams_weight_only_qconfig",
    "float_qparams_weight_only_qconfig_4bit",
    "get_default_qat_qconfig",
    "get_default_qconfig",
    "per_channel_dynamic_qconfig",
    "qconfig_equals",
]


class QConfig(namedtuple("QConfig", ["activation", "weight"])):
    """Factories of the modules that observe (or fake-quantize) a layer's output and its weight.

    Args:
        activation: factory for the output: an observer or fake-quantize class, or
            ``Class.with_args(…)``.
        weight: factory for the weight; None for modules without one.

    Raises:
        InvalidArgumentError: when an instance is given instead of a class.

    Example:
        >>> from eagerq.observer import MinMaxObserver
        >>> config = QConfig(activation=MinMaxObserver, weight=MinMaxObserver.with_args(dtype=torch.int8))
        >>> config.weight().dtype
        torch.int8
    """

    __slots__ = ()

    def __new__(cls, activation: Any, weight: Any) -> QConfig:
        for role, factory in (("activation", activation), ("weight", weight)):
            if isinstance(factory, nn.Module):
                raise InvalidArgumentError(
                    f"QConfig received observer instance for {role} ({type(factory).__name__}), but every "
                    "layer needs an observer of its own",
                    remedy="please pass observer class instead; MyObserver.with_args(x=1) fills in arguments",
                )
        return super().__new__(cls, activation, weight)


class QConfigDynamic(QConfig):
    """A :class:`QConfig` with nothing observed unless said; an old name, kept for old programs."""

    __slots__ = ()

    def __new__(cls, activation: Any = nn.Identity, weight: Any = nn.Identity) -> QConfigDynamic:
        return super().__new__(cls, activation, weight)  # type: ignore[return-value]


QConfigAny = QConfig | None

# post-training
default_qconfig = QConfig(default_observer, default_weight_observer)
default_debug_qconfig = QConfig(default_debug_observer, default_weight_observer)
default_per_channel_qconfig = QConfig(default_observer, default_per_channel_weight_observer)
default_quint8_weight_qconfig = QConfig(HistogramObserver, MinMaxObserver)
default_reuse_input_qconfig = QConfig(default_reuse_input_observer, NoopObserver)

# weights only, activations at run time
default_dynamic_qconfig = QConfig(default_dynamic_quant_observer, default_weight_observer)
per_channel_dynamic_qconfig = QConfig(default_dynamic_quant_observer, default_per_channel_weight_observer)
float16_dynamic_qconfig = QConfig(
    PlaceholderObserver.with_args(dtype=torch.float16, is_dynamic=True),
    PlaceholderObserver.with_args(dtype=torch.float16),
)
float16_static_qconfig = QConfig(
    PlaceholderObserver.with_args(dtype=torch.float16), PlaceholderObserver.with_args(dtype=torch.float16)
)
float_qparams_weight_only_qconfig = QConfig(default_placeholder_observer, default_float_qparams_observer)
float_qparams_weight_only_qconfig_4bit = QConfig(default_placeholder_observer, default_float_qparams_observer_4bit)

# training
default_qat_qconfig = QConfig(default_fake_quant, default_weight_fake_quant)
default_qat_qconfig_v2 = QConfig(default_fused_act_fake_quant, default_fused_wt_fake_quant)
default_dynamic_qat_qconfig = QConfig(default_dynamic_fake_quant, default_weight_fake_quant)
default_weight_only_qconfig = QConfig(nn.Identity, default_weight_fake_quant)
default_activation_only_qconfig = QConfig(default_fake_quant, nn.Identity)
default_embedding_qat_qconfig = QConfig(NoopObserver.with_args(dtype=torch.float32), default_embedding_fake_quant)
default_embedding_qat_qconfig_4bit = QConfig(
    NoopObserver.with_args(dtype=torch.float32), default_embedding_fake_quant_4bit
)

# signed activations and narrow weights, as XNNPACK wants them
_XNNPACK_ACTIVATION: dict[str, Any] = {"dtype": torch.int8, "reduce_range": False, "eps": 2**-12}
default_symmetric_qnnpack_qconfig = QConfig(
    HistogramObserver.with_args(**_XNNPACK_ACTIVATION), weight_observer_range_neg_127_to_127
)
default_per_channel_symmetric_qnnpack_qconfig = QConfig(
    HistogramObserver.with_args(**_XNNPACK_ACTIVATION), per_channel_weight_observer_range_neg_127_to_127
)
_XNNPACK_FAKE_QUANT = FusedMovingAvgObsFakeQuantize.with_args(
    observer=MovingAverageMinMaxObserver, quant_min=-128, quant_max=127, **_XNNPACK_ACTIVATION
)
default_symmetric_qnnpack_qat_qconfig = QConfig(_XNNPACK_FAKE_QUANT, fused_wt_fake_quant_range_neg_127_to_127)
default_per_channel_symmetric_qnnpack_qat_qconfig = QConfig(
    _XNNPACK_FAKE_QUANT, fused_per_channel_wt_fake_quant_range_neg_127_to_127
)

# whether the backend's kernels need activations in 7 bits, and whether they take per-channel weights
_BACKENDS = {
    "x86": (True, True),
    "fbgemm": (True, True),
    "qnnpack": (False, False),
    "onednn": (False, True),
}


def _backend(name: str, version: int, versions: tuple[int, ...]) -> tuple[bool, bool]:
    if name not in _BACKENDS:
        raise InvalidConfigError(
            f"backend: {name} not supported", remedy=f"choose one of {', '.join(map(repr, _BACKENDS))}"
        )
    if version not in versions:
        raise InvalidConfigError(f"Version number: {version} is not supported", remedy=f"choose one of {versions}")
    return _BACKENDS[name]


def get_default_qconfig(backend: str = "x86", version: int = 0) -> QConfig:
    """The qconfig for post-training quantization.

    Args:
        backend: ``x86``, ``fbgemm``, ``qnnpack`` or ``onednn``.  The first two keep activations in
            7 bits, for processors without VNNI; ``onednn`` uses all 8.
        version: 0.

    Raises:
        InvalidConfigError: for an unknown backend or version.
    """
    reduce_range, per_channel = _backend(backend, version, (0,))
    if backend == "onednn" and not torch.cpu._is_vnni_supported():
        warnings.warn(
            "this processor lacks VNNI: 8-bit activations may saturate in int8 kernels. "
            "The 'x86' qconfig keeps them in 7 bits.",
            stacklevel=2,
        )
    weight = default_per_channel_weight_observer if per_channel else default_weight_observer
    return QConfig(HistogramObserver.with_args(reduce_range=reduce_range), weight)


def get_default_qat_qconfig(backend: str = "x86", version: int | None = 1) -> QConfig:
    """The qconfig for quantization-aware training.

    Args:
        backend: as for :func:`get_default_qconfig`.
        version: 1 (or None) for fused observers and fake quantizers, 0 for separate ones.

    Raises:
        InvalidConfigError: for an unknown backend or version.

    Example:
        >>> get_default_qat_qconfig("onednn").activation().quant_max
        255
    """
    version = 1 if version is None else version
    reduce_range, per_channel = _backend(backend, version, (0, 1))
    fake_quantize = FusedMovingAvgObsFakeQuantize if version else FakeQuantize
    activation = fake_quantize.with_args(
        observer=MovingAverageMinMaxObserver, quant_min=0, quant_max=255, reduce_range=reduce_range
    )
    if version:
        weight = default_fused_per_channel_wt_fake_quant if per_channel else default_fused_wt_fake_quant
    else:
        weight = default_per_channel_weight_fake_quant if per_channel else default_weight_fake_quant
    return QConfig(activation, weight)


def _flatten(factory: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any], dict[str, Any]]:
    """The class behind nested factories, its arguments, and the callables that make arguments."""
    arguments: tuple[Any, ...] = ()
    keywords: dict[str, Any] = {}
    callables: dict[str, Any] = {}
    while isinstance(factory, (_PartialWrapper, partial)):
        if isinstance(factory, _PartialWrapper):
            callables = {**factory.callable_args, **callables}
            factory = factory.p
        else:
            arguments = (*factory.args, *arguments)
            keywords = {**factory.keywords, **keywords}
            factory = factory.func
    return factory, arguments, keywords, callables


def _same_factory(first: Any, second: Any) -> bool:
    first_class, first_arguments, first_keywords, first_callables = _flatten(first)
    second_class, second_arguments, second_keywords, second_callables = _flatten(second)
    return (
        first_class == second_class
        and first_arguments == second_arguments
        and first_callables == second_callables
        and first_keywords.keys() == second_keywords.keys()
        and all(_same_factory(value, second_keywords[name]) for name, value in first_keywords.items())
    )


def qconfig_equals(q1: QConfigAny, q2: QConfigAny) -> bool:
    """Whether two qconfigs make the same modules, however their factories were written.

    Example:
        >>> qconfig_equals(get_default_qat_qconfig("onednn"), get_default_qat_qconfig("onednn"))
        True
        >>> qconfig_equals(get_default_qat_qconfig("onednn"), get_default_qat_qconfig("x86"))
        False
    """
    if q1 is None or q2 is None:
        return q1 is q2
    return _same_factory(q1.activation, q2.activation) and _same_factory(q1.weight, q2.weight)
