"""QConfigMapping: which modules get which qconfig, by class, by name, or by a pattern of names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from eagerq.errors import InvalidArgumentError
from eagerq.fake_quantize import (
    default_fixed_qparams_range_0to1_fake_quant,
    default_fixed_qparams_range_neg1to1_fake_quant,
    default_weight_fake_quant,
)
from eagerq.observer import (
    default_fixed_qparams_range_0to1_observer,
    default_fixed_qparams_range_neg1to1_observer,
    default_placeholder_observer,
    default_weight_observer,
)
from eagerq.qconfig import (
    QConfig,
    QConfigAny,
    default_quint8_weight_qconfig,
    default_reuse_input_qconfig,
    get_default_qat_qconfig,
    get_default_qconfig,
)

__all__ = [
    "QConfigMapping",
    "get_default_qat_qconfig_dict",
    "get_default_qat_qconfig_mapping",
    "get_default_qconfig_dict",
    "get_default_qconfig_mapping",
]

_NOT_FOUND = object()


class QConfigMapping:
    """Qconfigs for the modules of a model; every method returns the mapping, to be chained.

    From the weakest to the strongest: :meth:`set_global`, :meth:`set_object_type`,
    :meth:`set_module_name_regex`, :meth:`set_module_name`.  :func:`eagerq.propagate_qconfig_` applies
    it to a model.

    Functions and method names (in :meth:`set_object_type`) and
    :meth:`set_module_name_object_type_order` speak of the calls in a traced graph.  They are kept for
    tools that trace; eager mode, which swaps modules only, has no use for them.  A module that nothing
    speaks of has its parent's qconfig.

    Example:
        >>> import eagerq
        >>> mapping = QConfigMapping().set_global(eagerq.default_qconfig).set_module_name("1", None)
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> eagerq.propagate_qconfig_(net, mapping)
        >>> net[0].qconfig is eagerq.default_qconfig, net[1].qconfig is None
        (True, True)
    """

    def __init__(self) -> None:
        self.global_qconfig: QConfigAny = None
        self.object_type_qconfigs: dict[Any, QConfigAny] = {}
        self.module_name_regex_qconfigs: dict[str, QConfigAny] = {}
        self.module_name_qconfigs: dict[str, QConfigAny] = {}
        self.module_name_object_type_order_qconfigs: dict[tuple[str, Callable[..., Any], int], QConfigAny] = {}

    def set_global(self, global_qconfig: QConfigAny) -> QConfigMapping:
        """The qconfig of all modules that nothing else speaks of."""
        self.global_qconfig = global_qconfig
        return self

    def set_object_type(self, object_type: Callable[..., Any] | str, qconfig: QConfigAny) -> QConfigMapping:
        """The qconfig of a module class (or function, or method name)."""
        self.object_type_qconfigs[object_type] = qconfig
        return self

    def set_module_name_regex(self, module_name_regex: str, qconfig: QConfigAny) -> QConfigMapping:
        """The qconfig of modules whose qualified name begins with a match; the pattern set first counts.

        Raises:
            InvalidArgumentError: for a pattern that is no regular expression.
        """
        try:
            re.compile(module_name_regex)
        except re.error as error:
            raise InvalidArgumentError(
                f"{module_name_regex!r} is not a regular expression: {error}",
                remedy="escape what is meant literally (re.escape), or use set_module_name for one module",
            ) from error
        self.module_name_regex_qconfigs[module_name_regex] = qconfig
        return self

    def set_module_name(self, module_name: str, qconfig: QConfigAny) -> QConfigMapping:
        """The qconfig of one module, and of those inside it without a name here of their own."""
        self.module_name_qconfigs[module_name] = qconfig
        return self

    def set_module_name_object_type_order(
        self, module_name: str, object_type: Callable[..., Any], index: int, qconfig: QConfigAny
    ) -> QConfigMapping:
        """The qconfig of the ``index``-th call of a type within a module, in a traced graph."""
        self.module_name_object_type_order_qconfigs[module_name, object_type, index] = qconfig
        return self

    def find(self, name: str, kind: type[nn.Module], inherited: QConfigAny) -> QConfigAny:
        """The qconfig of a module, from its qualified name and class; ``inherited`` is its parent's."""
        outer = name
        while outer:
            if outer in self.module_name_qconfigs:
                return self.module_name_qconfigs[outer]
            outer = outer.rpartition(".")[0]
        for pattern, config in self.module_name_regex_qconfigs.items():
            if re.match(pattern, name):
                return config
        found: Any = self.object_type_qconfigs.get(kind, _NOT_FOUND)
        if found is not _NOT_FOUND:
            return found
        return inherited if name else self.global_qconfig

    def to_dict(self) -> dict[str, Any]:
        """As nested lists: keys ``""``, ``object_type``, ``module_name_regex``, ``module_name`` and
        ``module_name_object_type_order``."""
        return {
            "": self.global_qconfig,
            "object_type": list(self.object_type_qconfigs.items()),
            "module_name_regex": list(self.module_name_regex_qconfigs.items()),
            "module_name": list(self.module_name_qconfigs.items()),
            "module_name_object_type_order": [
                (*key, config) for key, config in self.module_name_object_type_order_qconfigs.items()
            ],
        }

    @classmethod
    def from_dict(cls, qconfig_dict: Mapping[str, Any]) -> QConfigMapping:
        """The mapping that :meth:`to_dict` told of; keys may be left out.

        Raises:
            InvalidArgumentError: for another key.
        """
        setters: dict[str, Callable[..., Any]] = {
            "object_type": cls.set_object_type,
            "module_name_regex": cls.set_module_name_regex,
            "module_name": cls.set_module_name,
            "module_name_object_type_order": cls.set_module_name_object_type_order,
        }
        unknown = [key for key in qconfig_dict if key not in {"", *setters}]
        if unknown:
            raise InvalidArgumentError(
                f"a qconfig dict has no key {unknown[0]!r}",
                remedy=f"use {', '.join(map(repr, ['', *setters]))}, each of the latter with a list of tuples",
            )
        new = cls().set_global(qconfig_dict.get("", None))
        for key, setter in setters.items():
            for entry in qconfig_dict.get(key, ()):
                setter(new, *entry)
        return new

    def __repr__(self) -> str:
        def lines(name: str, value: Any) -> Iterable[str]:
            yield f" {name}"
            if isinstance(value, dict) and value:
                yield from (f"  {key}: {config}" for key, config in value.items())
            else:
                yield f"  {value}"

        return "\n".join(
            [f"{type(self).__name__} (", *(line for item in vars(self).items() for line in lines(*item)), ")"]
        )


_NAMES: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("0to1", (nn.Hardsigmoid, nn.functional.hardsigmoid, "hardsigmoid", "hardsigmoid_")),
    ("0to1", (nn.Sigmoid, torch.sigmoid, "sigmoid", "sigmoid_", nn.Softmax)),
    ("neg1to1", (nn.Tanh, torch.tanh, "tanh", "tanh_")),
)
_FIXED = {
    ("0to1", False): default_fixed_qparams_range_0to1_observer,
    ("neg1to1", False): default_fixed_qparams_range_neg1to1_observer,
    ("0to1", True): default_fixed_qparams_range_0to1_fake_quant,
    ("neg1to1", True): default_fixed_qparams_range_neg1to1_fake_quant,
}
_TRANSPOSED = (
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.functional.conv_transpose1d, nn.functional.conv_transpose2d, nn.functional.conv_transpose3d),
)


def _default_mapping(qconfig: QConfig, backend: str, is_qat: bool) -> QConfigMapping:
    weight = default_weight_fake_quant if is_qat else default_weight_observer
    # some kernels for transposed convolutions take one scale for the whole weight only
    transposed = QConfig(qconfig.activation, weight) if backend in ("fbgemm", "x86") else qconfig
    mapping = QConfigMapping().set_global(qconfig).set_object_type("reshape", default_reuse_input_qconfig)
    for kind in _TRANSPOSED:
        mapping.set_object_type(kind, transposed)
    float_weight = QConfig(qconfig.activation, default_placeholder_observer)
    mapping.set_object_type(nn.functional.layer_norm, float_weight).set_object_type(nn.LayerNorm, float_weight)
    mapping.set_object_type(nn.PReLU, default_quint8_weight_qconfig)
    for span, kinds in _NAMES:
        fixed = QConfig(_FIXED[span, is_qat], weight)
        for kind in kinds:
            mapping.set_object_type(kind, fixed)
    return mapping


def get_default_qconfig_mapping(backend: str = "x86", version: int = 0) -> QConfigMapping:
    """The usual qconfigs for post-training quantization: see :func:`eagerq.get_default_qconfig`.

    Outputs of known range (sigmoid, tanh, softmax …) get fixed parameters.

    Raises:
        InvalidConfigError: for an unknown backend or version.
    """
    return _default_mapping(get_default_qconfig(backend, version), backend, is_qat=False)


def get_default_qat_qconfig_mapping(backend: str = "x86", version: int = 1) -> QConfigMapping:
    """The usual qconfigs for quantization-aware training: see :func:`eagerq.get_default_qat_qconfig`.

    Raises:
        InvalidConfigError: for an unknown backend or version.
    """
    return _default_mapping(get_default_qat_qconfig(backend, version), backend, is_qat=True)


def get_default_qconfig_dict(backend: str = "x86", version: int = 0) -> dict[str, Any]:
    """:func:`get_default_qconfig_mapping` as nested lists."""
    return get_default_qconfig_mapping(backend, version).to_dict()


def get_default_qat_qconfig_dict(backend: str = "x86", version: int = 1) -> dict[str, Any]:
    """:func:`get_default_qat_qconfig_mapping` as nested lists."""
    return get_default_qat_qconfig_mapping(backend, version).to_dict()
