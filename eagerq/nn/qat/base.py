"""What every QAT module shares: a fake-quantized weight in a stock torch module."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import (
    is_parametrized,
    transfer_parametrizations_and_params,
    type_before_parametrizations,
)

from eagerq.bundles import Unit
from eagerq.errors import InvalidConfigError
from eagerq.functional import rebuilt, relu_

__all__ = ["QATMixin", "gives_its_own", "hand_over"]

_Self = TypeVar("_Self", bound="QATMixin")


def hand_over(source: nn.Module, target: nn.Module, *names: str) -> None:
    """Give ``target`` the very parameters of ``source`` (with any parametrizations)."""
    for name in names:
        if is_parametrized(source, name):
            # to register a parametrization is to run it, so it must find values that it can take
            setattr(target, name, nn.Parameter(getattr(source, name).detach()))
            transfer_parametrizations_and_params(source, target, name)
        else:
            setattr(target, name, getattr(source, name))


def gives_its_own(module: nn.Module) -> bool:
    """Whether nobody has seen what a call of ``module`` gives before its hooks do."""
    known = isinstance(module, QATMixin) and type(module).__module__.startswith("eagerq.")
    return known and "forward" not in module.__dict__


class QATMixin(Unit):
    """Mixed into a torch module with a weight: ``forward`` uses the weight as int8 would hold it.

    Attributes:
        weight_fake_quant: fake quantizer of the weight, from ``qconfig.weight()``.
        post_op: the activation fused behind, ``"relu"`` or None.
    """

    _FLOAT_MODULE: ClassVar[Any]
    _FLOAT_RELU: ClassVar[Any] = None  # the fused float module, where a ReLU is fused behind
    _PARAMETERS: ClassVar[tuple[str, ...]] = ("weight", "bias")
    post_op: ClassVar[str | None] = None
    _called: bool = False  # while a call, with its hooks, is being compiled
    _made: Any  # then: what the result was made of, for the hook that rounds it

    qconfig: Any
    weight: Any
    bias: Any
    weight_fake_quant: nn.Module

    def _attach(self, qconfig: Any) -> None:
        """Add the weight's fake quantizer.

        Raises:
            InvalidConfigError: without a qconfig.
        """
        if not qconfig:
            raise InvalidConfigError("qconfig must be provided for QAT module", module=self)
        self.qconfig, self._made = qconfig, None
        self.weight_fake_quant = qconfig.weight()
        fit = getattr(self.weight_fake_quant, "fit", None)  # parameters to train must exist before the optimizer
        if fit is not None:
            fit(self.weight)
        if not self.weight.is_meta:
            self.weight_fake_quant.to(self.weight.device)

    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        """As nn.Module's: a call with its hooks.

        They become one graph by this where the layer is compiled by itself, too, and what is left for a hook is taken.
        """
        if not torch.compiler.is_compiling():
            return super()._call_impl(*args, **kwargs)
        self._called = True
        result = super()._call_impl(*args, **kwargs)
        self._called = False
        return result

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": None}  # left by who calls `forward` itself, past the hook that takes it

    def _affine(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The stock module's own arithmetic, with a weight and bias of the caller's."""
        raise NotImplementedError

    def _computed(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """:meth:`_affine`, without a copy of the rounded weight that lives until the backward pass."""
        if torch.compiler.is_compiling():
            return self._affine(x, weight, bias)
        with rebuilt(weight):
            return self._affine(x, weight, bias)

    def _activated(self, y: Tensor) -> Tensor:
        """``y``, which nobody else has seen, after the activation."""
        if self.post_op != "relu":
            return y
        rectified = relu_(y)
        return F.relu(y) if rectified is None else rectified

    def _convolved(self, x: Tensor, factor: Tensor | None, bias: Tensor | None, relu: bool = True) -> Any:
        """In code that is being compiled, the layer by one operator, if there is one: with scaled, rounded weight."""
        return None

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and (made := self._convolved(x, None, self.bias)) is not None:
            return made.attached(made.relu)
        return self._activated(self._computed(x, self.weight_fake_quant(self.weight), self.bias))

    @classmethod
    def _arguments(cls, module: Any) -> dict[str, Any]:
        """Constructor arguments that rebuild a float module's shape."""
        raise NotImplementedError

    @classmethod
    def _check_float(cls, mod: nn.Module) -> None:
        kind = type_before_parametrizations(mod)
        if kind is not cls._FLOAT_MODULE:
            raise InvalidConfigError(
                f"qat.{cls.__name__}.from_float only works for {cls._FLOAT_MODULE.__name__}, got {kind.__name__}",
                module=mod,
            )
        if not hasattr(mod, "qconfig"):
            raise InvalidConfigError("Input float module must have qconfig defined", module=mod)
        if not mod.qconfig:
            raise InvalidConfigError("Input float module must have a valid qconfig", module=mod)

    @classmethod
    def from_float(cls: type[_Self], mod: nn.Module, use_precomputed_fake_quant: bool = False) -> _Self:
        """The QAT module for a float (or fused) one that has a ``qconfig``; parameters are shared.

        Raises:
            InvalidConfigError: for another class of module, or one without a qconfig.
        """
        cls._check_float(mod)
        inner: Any = mod[0] if isinstance(mod, nn.Sequential) else mod
        # built on the meta device: no memory, no random numbers, as its parameters come from the float one
        new = cls(**cls._arguments(inner), qconfig=mod.qconfig, device="meta")
        hand_over(inner, new, *cls._PARAMETERS)
        new._adopt(mod)
        new.weight_fake_quant.to(inner.weight.device)
        new.train(mod.training)
        return new

    def _adopt(self, mod: nn.Module) -> None:
        """Take over what else a fused float module has."""

    def folded(self, as_trained: bool) -> tuple[Tensor, Tensor | None]:
        """Weight and bias as inference uses them, detached."""
        return self.weight.detach(), None if self.bias is None else self.bias.detach()

    def to_float(self) -> nn.Module:
        """The float module for inference, with the trained parameters (any batch norm folded in)."""
        bases = type_before_parametrizations(self).__mro__
        plain_class = next(base for base in bases if base.__module__.startswith("torch.nn"))
        weight, bias = self.folded(as_trained=False)
        arguments = {**self._arguments(self), "bias": bias is not None, "device": "meta"}
        plain: Any = plain_class(**arguments)
        plain.weight = nn.Parameter(weight)
        plain.bias = None if bias is None else nn.Parameter(bias)
        float_module: nn.Module = self._FLOAT_RELU(plain, nn.ReLU()) if self._FLOAT_RELU else plain
        return float_module.train(self.training)
