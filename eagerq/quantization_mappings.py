"""The one table of what becomes what: float sequence → fused → QAT → int8; every map derives from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import nn

from eagerq import intrinsic
from eagerq.errors import InvalidConfigError
from eagerq.intrinsic import qat as intrinsic_qat
from eagerq.intrinsic import quantized as intrinsic_quantized
from eagerq.intrinsic.quantized import dynamic as intrinsic_dynamic
from eagerq.nn import qat, quantizable, quantized
from eagerq.nn.qat import dynamic as qat_dynamic
from eagerq.nn.quantized import dynamic, functional
from eagerq.nn.quantized.functional import normalization
from eagerq.stubs import DeQuantStub, QuantStub
from eagerq.twins import DEFAULT_MODULE_TO_ACT_POST_PROCESS

__all__ = [
    "DEFAULT_DYNAMIC_QUANT_MODULE_MAPPINGS",
    "DEFAULT_FLOAT_TO_QUANTIZED_OPERATOR_MAPPINGS",
    "DEFAULT_MODULE_TO_ACT_POST_PROCESS",
    "DEFAULT_QAT_MODULE_MAPPINGS",
    "DEFAULT_STATIC_QUANT_MODULE_MAPPINGS",
    "ROWS",
    "Row",
    "get_combined_dict",
    "get_default_compare_output_module_list",
    "get_default_dynamic_quant_module_mappings",
    "get_default_float_to_quantized_operator_mappings",
    "get_default_qat_module_mappings",
    "get_default_qconfig_propagation_list",
    "get_default_static_quant_module_mappings",
    "get_dynamic_quant_module_class",
    "get_embedding_qat_module_mappings",
    "get_embedding_static_quant_module_mappings",
    "get_quantized_operator",
    "get_static_quant_module_class",
    "no_observer_set",
]

ModuleMap = dict[Callable[..., Any], Any]


class Row(NamedTuple):
    """One kind of layer in its forms; None where a form does not exist.

    Attributes:
        sequence: the float modules, in the order they run.
        fused: the float module that holds them, when there are several.
        qat: the module to train with.
        quantized: the int8 module.
        dynamic: the module with an integer weight that quantizes its float input as it comes.
        trained_by_default: whether the default QAT map has it (embeddings are asked for by their own).
        dynamic_by_default: whether the default dynamic map has it.
        qat_dynamic: the module to train with for the dynamic form.
    """

    sequence: tuple[type[nn.Module], ...]
    fused: type[nn.Module] | None = None
    qat: type[nn.Module] | None = None
    quantized: type[nn.Module] | None = None
    dynamic: type[nn.Module] | None = None
    trained_by_default: bool = True
    dynamic_by_default: bool = True
    qat_dynamic: type[nn.Module] | None = None

    @property
    def float_module(self) -> type[nn.Module]:
        """The float module to swap: the fused one, or the only one."""
        return self.fused or self.sequence[0]


def _convolutions(dim: int) -> list[Row]:
    def named(owner: Any, prefix: str) -> Any:
        return getattr(owner, f"{prefix}{dim}d")

    conv, bn = named(nn, "Conv"), named(nn, "BatchNorm")
    plain, with_relu = named(quantized, "Conv"), named(intrinsic_quantized, "ConvReLU")
    return [
        Row((conv,), None, named(qat, "Conv"), plain, named(dynamic, "Conv"), dynamic_by_default=False),
        Row((conv, nn.ReLU), named(intrinsic, "ConvReLU"), named(intrinsic_qat, "ConvReLU"), with_relu),
        Row((conv, bn), named(intrinsic, "ConvBn"), named(intrinsic_qat, "ConvBn"), plain),
        Row((conv, bn, nn.ReLU), named(intrinsic, "ConvBnReLU"), named(intrinsic_qat, "ConvBnReLU"), with_relu),
        Row(
            (named(nn, "ConvTranspose"),),
            quantized=named(quantized, "ConvTranspose"),
            dynamic=named(dynamic, "ConvTranspose"),
            dynamic_by_default=False,
        ),
    ]


_Linear = quantized.Linear
ROWS: tuple[Row, ...] = (
    Row((QuantStub,), quantized=quantized.Quantize),
    Row((DeQuantStub,), quantized=quantized.DeQuantize),
    Row((quantized.FloatFunctional,), quantized=quantized.QFunctional),
    *(row for dim in (1, 2, 3) for row in _convolutions(dim)),
    Row((nn.Linear,), None, qat.Linear, _Linear, dynamic.Linear, qat_dynamic=qat_dynamic.Linear),
    Row((nn.modules.linear.NonDynamicallyQuantizableLinear,), None, qat.Linear, _Linear, dynamic.Linear),
    Row(
        (nn.Linear, nn.ReLU),
        intrinsic.LinearReLU,
        intrinsic_qat.LinearReLU,
        intrinsic_quantized.LinearReLU,
        intrinsic_dynamic.LinearReLU,
    ),
    Row((nn.Linear, nn.BatchNorm1d), intrinsic.LinearBn1d, intrinsic_qat.LinearBn1d, _Linear),
    Row((nn.BatchNorm2d,), quantized=quantized.BatchNorm2d),
    Row((nn.BatchNorm3d,), quantized=quantized.BatchNorm3d),
    Row((nn.GroupNorm,), quantized=quantized.GroupNorm),
    Row((nn.InstanceNorm1d,), quantized=quantized.InstanceNorm1d),
    Row((nn.InstanceNorm2d,), quantized=quantized.InstanceNorm2d),
    Row((nn.InstanceNorm3d,), quantized=quantized.InstanceNorm3d),
    Row((nn.LayerNorm,), quantized=quantized.LayerNorm),
    Row((nn.BatchNorm2d, nn.ReLU), intrinsic.BNReLU2d, None, intrinsic_quantized.BNReLU2d),
    Row((nn.BatchNorm3d, nn.ReLU), intrinsic.BNReLU3d, None, intrinsic_quantized.BNReLU3d),
    # no fuser makes these: they are built by hand
    Row((intrinsic.ConvAdd2d,), quantized=intrinsic_quantized.ConvAdd2d),
    Row((intrinsic.ConvAddReLU2d,), quantized=intrinsic_quantized.ConvAddReLU2d),
    Row((intrinsic.LinearLeakyReLU,), quantized=intrinsic_quantized.LinearLeakyReLU),
    Row((intrinsic.LinearTanh,), quantized=intrinsic_quantized.LinearTanh),
    # embeddings take no activations that could be quantized: both their forms are the same
    Row((nn.Embedding,), None, qat.Embedding, quantized.Embedding, quantized.Embedding, trained_by_default=False),
    Row(
        (nn.EmbeddingBag,),
        None,
        qat.EmbeddingBag,
        quantized.EmbeddingBag,
        quantized.EmbeddingBag,
        trained_by_default=False,
    ),
    Row((nn.Dropout,), quantized=quantized.Dropout),
    Row((nn.ELU,), quantized=quantized.ELU),
    Row((nn.Hardswish,), quantized=quantized.Hardswish),
    Row((nn.LeakyReLU,), quantized=quantized.LeakyReLU),
    Row((nn.PReLU,), quantized=quantized.PReLU),
    Row((nn.ReLU6,), quantized=quantized.ReLU6),
    Row((nn.LSTM,), dynamic=dynamic.LSTM),
    Row((nn.GRU,), dynamic=dynamic.GRU),
    Row((nn.LSTMCell,), dynamic=dynamic.LSTMCell),
    Row((nn.GRUCell,), dynamic=dynamic.GRUCell),
    Row((nn.RNNCell,), dynamic=dynamic.RNNCell),
)


def _qat_map(rows: tuple[Row, ...]) -> ModuleMap:
    return {row.float_module: row.qat for row in rows if row.qat}


def _static_map(rows: tuple[Row, ...]) -> ModuleMap:
    int8_rows = [row for row in rows if row.quantized]
    from_float: ModuleMap = {row.float_module: row.quantized for row in int8_rows}
    return from_float | {row.qat: row.quantized for row in int8_rows if row.qat}


def _dynamic_map(rows: tuple[Row, ...]) -> ModuleMap:
    dynamic_rows = [row for row in rows if row.dynamic and row.dynamic_by_default]
    from_float: ModuleMap = {row.float_module: row.dynamic for row in dynamic_rows}
    return from_float | {row.qat_dynamic: row.dynamic for row in dynamic_rows if row.qat_dynamic}


DEFAULT_QAT_MODULE_MAPPINGS = _qat_map(tuple(row for row in ROWS if row.trained_by_default))
DEFAULT_STATIC_QUANT_MODULE_MAPPINGS = _static_map(ROWS)
DEFAULT_DYNAMIC_QUANT_MODULE_MAPPINGS = _dynamic_map(ROWS)

# Float function to the one of quantized tensors, which also takes the parameters of its result.
DEFAULT_FLOAT_TO_QUANTIZED_OPERATOR_MAPPINGS: dict[Callable[..., Any] | str, Callable[..., Any]] = {
    F.dropout: functional.dropout,
    F.elu: functional.elu,
    F.hardswish: functional.hardswish,
    F.instance_norm: normalization.instance_norm,
    F.layer_norm: normalization.layer_norm,
    F.leaky_relu: functional.leaky_relu,
}


def get_default_qat_module_mappings() -> ModuleMap:
    """Float module class to QAT module class, as ``prepare_qat`` uses it; a copy to change at will."""
    return dict(DEFAULT_QAT_MODULE_MAPPINGS)


def get_default_static_quant_module_mappings() -> ModuleMap:
    """Float or QAT module class to int8 module class, as ``convert`` uses it; a copy."""
    return dict(DEFAULT_STATIC_QUANT_MODULE_MAPPINGS)


def get_default_dynamic_quant_module_mappings() -> ModuleMap:
    """Float module class to dynamically quantized module class, as ``quantize_dynamic`` uses it; a copy."""
    return dict(DEFAULT_DYNAMIC_QUANT_MODULE_MAPPINGS)


def get_embedding_qat_module_mappings() -> ModuleMap:
    """The default QAT map, with embeddings."""
    return _qat_map(ROWS)


def get_embedding_static_quant_module_mappings() -> ModuleMap:
    """The map that goes with :func:`get_embedding_qat_module_mappings`; the default one has embeddings too."""
    return dict(DEFAULT_STATIC_QUANT_MODULE_MAPPINGS)


def _swapped_class(float_module_class: Callable[..., Any], mapping: ModuleMap, argument: str) -> Any:
    found = mapping.get(float_module_class)
    if found is None:
        raise InvalidConfigError(
            f"Floating point module class {float_module_class} does not have a corresponding quantized module class",
            remedy=f"pass it in {argument}",
        )
    return found


def get_static_quant_module_class(
    float_module_class: Callable[..., Any],
    additional_static_quant_mapping: ModuleMap | None = None,
    is_reference: bool = False,
) -> Any:
    """The int8 class of a float module class.

    Raises:
        InvalidConfigError: when there is none.
    """
    mapping = get_combined_dict(DEFAULT_STATIC_QUANT_MODULE_MAPPINGS, additional_static_quant_mapping or {})
    return _swapped_class(float_module_class, mapping, "additional_static_quant_mapping")


def get_dynamic_quant_module_class(
    float_module_class: Callable[..., Any], additional_dynamic_quant_mapping: ModuleMap | None = None
) -> Any:
    """The dynamically quantized class of a float module class.

    Raises:
        InvalidConfigError: when there is none.
    """
    mapping = get_combined_dict(DEFAULT_DYNAMIC_QUANT_MODULE_MAPPINGS, additional_dynamic_quant_mapping or {})
    return _swapped_class(float_module_class, mapping, "additional_dynamic_quant_mapping")


def get_default_float_to_quantized_operator_mappings() -> dict[Callable[..., Any] | str, Callable[..., Any]]:
    """Float function to the function of quantized tensors that does the same; a copy."""
    return dict(DEFAULT_FLOAT_TO_QUANTIZED_OPERATOR_MAPPINGS)


def get_quantized_operator(float_op: Callable[..., Any] | str) -> Callable[..., Any]:
    """The function of quantized tensors that stands for a float one.

    Raises:
        InvalidConfigError: when there is none.

    Example:
        >>> get_quantized_operator(F.hardswish).__module__
        'eagerq.nn.quantized.functional.activations'
    """
    found = DEFAULT_FLOAT_TO_QUANTIZED_OPERATOR_MAPPINGS.get(float_op)
    if found is None:
        raise InvalidConfigError(
            f"Operator {float_op} does not have corresponding quantized op",
            remedy="use a FloatFunctional for sums and products, or a DeQuantStub before it",
        )
    return found


def get_default_qconfig_propagation_list() -> set[Callable[..., Any]]:
    """The classes whose instances get an observer on their output when they are leaves."""
    return {
        *DEFAULT_STATIC_QUANT_MODULE_MAPPINGS,
        *DEFAULT_QAT_MODULE_MAPPINGS,
        *DEFAULT_DYNAMIC_QUANT_MODULE_MAPPINGS,
        nn.Sequential,
    }


def get_default_compare_output_module_list() -> set[Callable[..., Any]]:
    """The classes, float and quantized, whose outputs are worth comparing between two models."""
    maps = (DEFAULT_STATIC_QUANT_MODULE_MAPPINGS, DEFAULT_QAT_MODULE_MAPPINGS, DEFAULT_DYNAMIC_QUANT_MODULE_MAPPINGS)
    return {kind for one in maps for pair in one.items() for kind in pair} | {nn.Sequential}


def get_combined_dict(default_dict: dict[Any, Any], additional_dict: dict[Any, Any]) -> dict[Any, Any]:
    """A map with the entries of both; the second's count where both have a key.

    Example:
        >>> get_combined_dict({"a": 1, "b": 1}, {"b": 2})
        {'a': 1, 'b': 2}
    """
    return {**default_dict, **additional_dict}


def no_observer_set() -> set[Any]:
    """Observed classes that get no observer on their output: their parts have their own."""
    return {quantizable.LSTM, quantizable.MultiheadAttention}
