"""How sequences of float modules are fused into one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.utils import fuse_conv_bn_eval, fuse_linear_bn_eval

from eagerq import intrinsic
from eagerq.errors import InvalidConfigError, UnsupportedError
from eagerq.functional import fold_transposed
from eagerq.quantization_mappings import ROWS

__all__ = [
    "fuse_conv_bn",
    "fuse_conv_bn_relu",
    "fuse_convtranspose_bn",
    "fuse_linear_bn",
    "get_fuser_method",
]

FuserMethod = Callable[..., nn.Module]

_FUSED: dict[tuple[type[nn.Module], ...], type[nn.Module]] = {row.sequence: row.fused for row in ROWS if row.fused}


def _check(is_qat: bool, layer: nn.Module, bn: nn.Module, *rest: nn.Module) -> None:
    modules = (layer, bn, *rest)
    names = ", ".join(type(module).__name__ for module in modules)
    if len({module.training for module in modules}) > 1:
        modes = ", ".join("train" if module.training else "eval" for module in modules)
        raise InvalidConfigError(
            f"{names} must be in the same mode (train or eval) to be fused, but are in {modes}",
            remedy="call model.train() or model.eval() before fusing",
        )
    if bn.training and not is_qat:
        raise InvalidConfigError(
            f"{names} are in training mode, and folding the batch norm away would lose its training",
            remedy="call model.eval() first, or use fuse_modules_qat to train fused",
        )
    width = getattr(layer, "out_features", getattr(layer, "out_channels", None))
    if bn.num_features != width:
        raise InvalidConfigError(
            f"{type(layer).__name__} has {width} outputs, but {type(bn).__name__} takes {bn.num_features}",
            remedy="fuse layers that follow one another",
        )
    for flag in ("track_running_stats", *(["affine"] if is_qat else [])):
        if not getattr(bn, flag):
            raise InvalidConfigError(
                f"{type(bn).__name__} has {flag}=False, without which it cannot be folded into a weight",
                remedy=f"make it with {flag}=True, or leave it unfused",
            )


def _fold_conv(conv: nn.Module, bn: nn.Module) -> nn.Module:
    fold: Any = fuse_conv_bn_eval
    folded: nn.Module = fold(conv, bn)
    return folded


def _fold_conv_transpose(convt: Any, bn: Any) -> nn.Module:
    norm = (bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias)
    new = copy.deepcopy(convt)
    folded = fold_transposed(convt.weight, convt.bias, *norm, groups=convt.groups)
    new.weight, new.bias = map(nn.Parameter, folded)
    return new


def _fused_class(*modules: nn.Module) -> type[nn.Module]:
    kinds = tuple(type(module) for module in modules)
    if kinds not in _FUSED:
        raise NotImplementedError(f"Cannot fuse modules: {kinds}")
    return _FUSED[kinds]


def fuse_conv_bn(is_qat: bool, conv: nn.Module, bn: nn.Module) -> nn.Module:
    """A convolution with its batch norm: kept apart inside one module for training, else folded.

    Args:
        is_qat: fuse for quantization-aware training.

    Raises:
        InvalidConfigError: when modes or widths do not match, or the batch norm cannot be folded.
    """
    _check(is_qat, conv, bn)
    if is_qat:
        return _fused_class(conv, bn)(conv, bn)
    return _fold_conv(conv, bn)


def fuse_conv_bn_relu(is_qat: bool, conv: nn.Module, bn: nn.Module, relu: nn.Module) -> nn.Module:
    """As :func:`fuse_conv_bn`, with the ReLU behind."""
    _check(is_qat, conv, bn, relu)
    if is_qat:
        return _fused_class(conv, bn, relu)(conv, bn, relu)
    return _fused_class(conv, relu)(_fold_conv(conv, bn), relu)


def fuse_linear_bn(is_qat: bool, linear: nn.Module, bn: nn.Module) -> nn.Module:
    """A Linear with its batch norm; see :func:`fuse_conv_bn`."""
    _check(is_qat, linear, bn)
    if is_qat:
        return intrinsic.LinearBn1d(linear, bn)
    fold: Any = fuse_linear_bn_eval
    folded: nn.Module = fold(linear, bn)
    return folded


def fuse_convtranspose_bn(is_qat: bool, convt: nn.Module, bn: nn.Module) -> nn.Module:
    """A transposed convolution with its batch norm folded in; for inference only."""
    if is_qat:
        raise UnsupportedError(
            "Fusing ConvTranspose and BatchNorm is not supported in QAT",
            remedy="leave them apart, or fuse them after training, with model.eval() and fuse_modules",
        )
    _check(is_qat, convt, bn)
    return _fold_conv_transpose(convt, bn)


def _as_they_are(fused: type[nn.Module]) -> FuserMethod:
    def fuse(is_qat: bool, *modules: nn.Module) -> nn.Module:
        return fused(*modules)

    return fuse


def _default_method(sequence: tuple[type[nn.Module], ...], fused: type[nn.Module]) -> FuserMethod:
    with_batch_norm = len(sequence) > 1 and issubclass(sequence[1], nn.modules.batchnorm._BatchNorm)
    if not with_batch_norm:
        return _as_they_are(fused)
    if sequence[0] is nn.Linear:
        return fuse_linear_bn
    return fuse_conv_bn_relu if len(sequence) == 3 else fuse_conv_bn


_METHODS: dict[tuple[Any, ...], FuserMethod] = {
    **{sequence: _default_method(sequence, fused) for sequence, fused in _FUSED.items()},
    (nn.ConvTranspose1d, nn.BatchNorm1d): fuse_convtranspose_bn,
    (nn.ConvTranspose2d, nn.BatchNorm2d): fuse_convtranspose_bn,
    (nn.ConvTranspose3d, nn.BatchNorm3d): fuse_convtranspose_bn,
}


def get_fuser_method(
    op_list: tuple[type[nn.Module], ...],
    additional_fuser_method_mapping: dict[Any, FuserMethod] | None = None,
) -> FuserMethod:
    """The function ``(is_qat, *modules) -> fused module`` for a sequence of module classes.

    Raises:
        InvalidConfigError: when no such sequence can be fused.
    """
    method = {**_METHODS, **(additional_fuser_method_mapping or {})}.get(tuple(op_list))
    if method is None:
        got = ", ".join(
            kind.__name__ if kind.__module__.startswith("torch.") else f"{kind.__module__}.{kind.__name__}"
            for kind in op_list
        )
        known = "; ".join(", ".join(kind.__name__ for kind in sequence) for sequence in _METHODS)
        raise InvalidConfigError(
            f"did not find fuser method for: {got}",
            remedy=f"list modules in the order they run, as one of: {known}; or pass a method of your own in "
            "fuse_custom_config_dict={'additional_fuser_method_mapping': {(…): method}}",
        )
    return method
