"""The quantizer for XNNPACK: linear, convolutions, sums, products, cat and pooling, in int8."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node

from eagerq.errors import InvalidConfigError, nearest
from eagerq.pt2e.graph import modules_of
from eagerq.pt2e.quantizer.activation_annotators import ADAPTIVE_AVG_POOLS, ADDS, CATS, MULS
from eagerq.pt2e.quantizer.annotation import FilterType
from eagerq.pt2e.quantizer.quantizer import Quantizer
from eagerq.pt2e.quantizer.symmetric_config import get_symmetric_quantization_config
from eagerq.pt2e.quantizer.utils import (
    OperatorConfig,
    OperatorPatternType,
    QuantizationConfig,
    get_module_name_filter,
)
from eagerq.pt2e.quantizer.weighted_annotators import CONV_TRANSPOSES, CONVS, LINEARS
from eagerq.pt2e.quantizer.xnnpack_quantizer_utils import (
    OP_TO_ANNOTATOR,
    convert_scalars_to_attrs,
    propagate_annotation,
)

__all__ = ["QuantPattern", "XNNPACKQuantizer", "get_symmetric_quantization_config"]


@dataclass(frozen=True)
class QuantPattern:
    """A pattern that the quantizer looks for.

    Attributes:
        name: its key in ``OP_TO_ANNOTATOR``.
        is_dynamic: whether it is annotated when activations are quantized dynamically.
        is_qat: whether it is annotated then, too, if the configuration is for training.
        op_overloads: the operators that it begins with.
    """

    name: str
    is_dynamic: bool
    is_qat: bool
    op_overloads: frozenset[Any]

    def is_for(self, config: QuantizationConfig) -> bool:
        """Whether it is annotated under a configuration."""
        activation = config.input_activation
        is_static = activation is None or not activation.is_dynamic
        return is_static or self.is_dynamic or (self.is_qat and config.is_qat)


def _supported() -> list[OperatorConfig]:
    operators: list[list[OperatorPatternType]] = [
        [[conv, relu] for conv in (nn.Conv2d, F.conv2d) for relu in (nn.ReLU, F.relu)],
        [[nn.Linear], [F.linear]],
        [[torch.add]],
        [[nn.AdaptiveAvgPool2d], [F.adaptive_avg_pool2d]],
    ]
    configs = [
        get_symmetric_quantization_config(is_per_channel=is_per_channel, is_qat=is_qat)
        for is_per_channel in (False, True)
        for is_qat in (False, True)
    ]
    return [OperatorConfig(config, patterns) for config in configs for patterns in operators]


class XNNPACKQuantizer(Quantizer):
    """Annotates a graph for XNNPACK, the CPU library that ExecuTorch runs int8 models with.

    A configuration is set for the whole model, or for parts of it. Where several fit, that of a module's name
    comes before that of its class, then that of the operator, then the global one; modules that are set by name
    or class are no business of the latter two.

    Example:
        >>> model = torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)).module()
        >>> quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config())
        >>> for node in quantizer.annotate(model).graph.nodes:
        ...     if node.meta.get("quantization_annotation") and node.op == "call_function":
        ...         print(node, list(node.meta["quantization_annotation"].input_qspec_map))
        linear [input_1, weight, bias]
    """

    supported_config_and_operators = _supported()
    SUPPORTED_PATTERNS = [
        QuantPattern("conv_bn_relu", False, True, CONVS),
        QuantPattern("conv_bn", False, True, CONVS),
        QuantPattern("conv_transpose_bn_relu", False, True, CONV_TRANSPOSES),
        QuantPattern("conv_transpose_bn", False, True, CONV_TRANSPOSES),
        QuantPattern("linear_relu", False, False, LINEARS),
        QuantPattern("linear", True, False, LINEARS),
        QuantPattern("conv", True, False, CONVS),
        QuantPattern("conv_transpose", True, False, CONV_TRANSPOSES),
        QuantPattern("conv_relu", False, False, CONVS),
        QuantPattern("conv_transpose_relu", False, False, CONV_TRANSPOSES),
        QuantPattern("adaptive_avg_pool2d", False, False, ADAPTIVE_AVG_POOLS),
        QuantPattern("add_relu", False, False, ADDS),
        QuantPattern("add", False, False, ADDS),
        QuantPattern("mul_relu", False, False, MULS),
        QuantPattern("mul", False, False, MULS),
        QuantPattern("cat", False, False, CATS),
    ]

    def __init__(self) -> None:
        super().__init__()
        self.global_config: QuantizationConfig | None = None
        self.operator_type_config: dict[Any, QuantizationConfig | None] = {}
        self.module_type_config: dict[Callable[..., Any], QuantizationConfig | None] = {}
        self.module_name_config: dict[str, QuantizationConfig | None] = {}
        self.filter_fn: FilterType | None = None

    # --- what is supported ---

    @classmethod
    def get_supported_operators(cls) -> list[OperatorConfig]:
        """Configurations and operators that XNNPACK is known to run together."""
        return cls.supported_config_and_operators

    @classmethod
    def get_supported_quantization_configs(cls) -> list[QuantizationConfig]:
        """The configurations among them."""
        return list(dict.fromkeys(config for config, _ in cls.supported_config_and_operators))

    @classmethod
    def get_supported_operator_for_quantization_config(
        cls, quantization_config: QuantizationConfig | None
    ) -> list[OperatorPatternType]:
        """The operators that go with a configuration; all for None."""
        return [
            pattern
            for config, patterns in cls.supported_config_and_operators
            for pattern in patterns
            if quantization_config is None or config == quantization_config
        ]

    # --- what is wanted ---

    def set_global(self, quantization_config: QuantizationConfig | None) -> XNNPACKQuantizer:
        """Quantize all that no other setting is for."""
        self.global_config = _checked(quantization_config)
        return self

    def set_operator_type(self, operator_type: Any, quantization_config: QuantizationConfig | None) -> XNNPACKQuantizer:
        """Quantize one operator, with what is fused into it.

        Args:
            operator_type: such as ``torch.ops.aten.linear.default``. Its other overloads and its in-place form are
                meant too, and ``torch.ops.aten.convolution.default`` means all convolutions but transposed ones.
        """
        known = {_family(operator) for pattern in self.SUPPORTED_PATTERNS for operator in pattern.op_overloads}
        family = _family(operator_type)
        if family not in known and family != _ANY_CONV:
            warnings.warn(
                f"set_operator_type({operator_type}): the quantizer does not know this operator and will not quantize "
                f"it. It knows {', '.join(sorted(known))}",
                stacklevel=2,
            )
        self.operator_type_config[operator_type] = _checked(quantization_config)
        return self

    def set_module_type(
        self, module_type: Callable[..., Any], quantization_config: QuantizationConfig | None
    ) -> XNNPACKQuantizer:
        """Quantize what is in modules of a class (not of its subclasses); None leaves it in float."""
        self.module_type_config[module_type] = _checked(quantization_config)
        return self

    def set_module_name(self, module_name: str, quantization_config: QuantizationConfig | None) -> XNNPACKQuantizer:
        """Quantize what is in the module of a qualified name, such as ``"blocks.sub"``.

        Raises:
            InvalidConfigError: for None, which cannot be set for a name.
        """
        if quantization_config is None:
            raise InvalidConfigError(
                f"set_module_name({module_name!r}, None): a configuration is wanted",
                remedy="leave modules in float by their class, or with set_filter_function",
            )
        self.module_name_config[module_name] = _checked(quantization_config)
        return self

    def set_filter_function(self, filter_fn: FilterType) -> XNNPACKQuantizer:
        """Quantize only operators that the function returns True for (each, in a fused pattern)."""
        self.filter_fn = filter_fn
        return self

    # --- the work ---

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        """Turn the numbers in float sums and products into buffers, so that they can be quantized."""
        return convert_scalars_to_attrs(model)

    def annotate(self, model: GraphModule) -> GraphModule:
        """Put annotations on the graph, and pass them on through operators such as reshape.

        Warns:
            UserWarning: where a module's name or class was set that nothing in the graph comes from.
        """
        self._report_unknown_modules(model)
        for config, filter_fn in self._settings():
            for pattern in self.SUPPORTED_PATTERNS:
                if config is not None and pattern.is_for(config):
                    OP_TO_ANNOTATOR[pattern.name](model, config, _both(self.filter_fn, filter_fn))
        propagate_annotation(model)
        return model

    def validate(self, model: GraphModule) -> None:
        """All that this quantizer annotates is supported."""

    def _settings(self) -> Iterator[tuple[QuantizationConfig | None, FilterType]]:
        """Each configuration, with a function that tells which nodes it is for; the first to fit has a node."""
        by_name = [(config, get_module_name_filter(name)) for name, config in self.module_name_config.items()]
        by_type = [(config, _module_type_filter(kind)) for kind, config in self.module_type_config.items()]
        yield from by_name
        yield from by_type

        def is_other(node: Node) -> bool:
            return not any(filter_fn(node) for _, filter_fn in by_name + by_type)

        for operator, config in self.operator_type_config.items():
            yield config, _both(is_other, self._operator_filter(operator))
        yield self.global_config, is_other

    def _operator_filter(self, operator: Any) -> FilterType:
        """True for the operator, and for what is no beginning of a pattern: BatchNorm, ReLU."""
        wanted = _family(operator)
        families = {_family(known): known for pattern in self.SUPPORTED_PATTERNS for known in pattern.op_overloads}
        others = set(families) - {wanted}
        if wanted == _ANY_CONV:
            others -= {_family(conv) for conv in CONVS}
        return lambda node: _family(node.target) not in others

    def _report_unknown_modules(self, model: GraphModule) -> None:
        stacks = [entry for node in model.graph.nodes for entry in modules_of(node)]
        names, kinds = ({entry[part]: None for entry in stacks} for part in (0, 1))
        wanted = [(f"set_module_name({name!r})", name, names) for name in self.module_name_config]
        wanted += [(f"set_module_type({name})", name, kinds) for name in map(_type_name, self.module_type_config)]
        for setting, name, known in wanted:
            if name not in known:
                warnings.warn(
                    f"{setting}: nothing in the graph comes from such a module, so nothing is quantized for it. "
                    f"Nearest in the graph: {nearest(name, known)}",
                    stacklevel=3,
                )


_ANY_CONV = "aten.convolution"


def _family(operator: Any) -> str:
    """``aten.add`` for each overload of ``add`` and ``add_``, and for ``torch.ops.aten.add`` itself."""
    return str(getattr(operator, "overloadpacket", operator)).removesuffix("_")


def _checked(config: Any) -> Any:
    parts = ("input_activation", "output_activation", "weight", "bias", "is_qat")
    if config is not None and not all(hasattr(config, part) for part in parts):
        raise InvalidConfigError(
            f"a QuantizationConfig is wanted, got {config!r}",
            remedy="pass one, such as get_symmetric_quantization_config()",
        )
    return config


def _both(first: FilterType | None, second: FilterType) -> FilterType:
    return second if first is None else lambda node: first(node) and second(node)


def _type_name(module_type: Callable[..., Any]) -> str:
    return f"{module_type.__module__}.{module_type.__qualname__}"


def _module_type_filter(module_type: Callable[..., Any]) -> FilterType:
    name = _type_name(module_type)
    return lambda node: any(kind == name for _, kind in modules_of(node))
