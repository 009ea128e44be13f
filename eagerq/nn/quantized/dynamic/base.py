"""What dynamic modules share: a weight made small, float tensors in and out."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from eagerq import kernels
from eagerq.errors import InvalidConfigError, InvalidInputError
from eagerq.nn.quantized.base import WeightAndBias, quantize_weight
from eagerq.nn.quantized.state import QuantizedModule
from eagerq.qconfig import default_dynamic_qconfig
from eagerq.qtensor import QTensor
from eagerq.scheme import integer_dtype

__all__ = ["DynamicModule", "InputRange"]

_Self = TypeVar("_Self", bound="DynamicModule")


class InputRange(QuantizedModule):
    """Base of those that quantize their input by its own range.

    Attributes:
        reduce_range: spread the input over 0 to 127 rather than 255.  The state has it (bool) when false.
    """

    _optional_state: ClassVar[tuple[str, ...]] = ("reduce_range",)

    def __init__(self) -> None:
        super().__init__()
        self.reduce_range = True

    def _tensors(self) -> dict[str, Tensor]:
        state = super()._tensors()
        return state if self.reduce_range else {**state, "reduce_range": torch.tensor(False)}

    def _take_tensors(self, state: Mapping[str, Tensor], assign: bool) -> None:
        super()._take_tensors(state, assign)
        self.reduce_range = bool(state.get("reduce_range", True))


class DynamicModule(InputRange, WeightAndBias):
    """Base of dynamic Linear and Conv: the weight is int8, the input is quantized by its own range."""

    _version = 4  # goes on counting where torch.ao's files stopped
    _reduced_since: ClassVar[int] = 0  # files of an earlier version used the full range

    @property
    def dtype(self) -> torch.dtype:
        """What the weight is stored in."""
        return self._weight.dtype

    def weight(self) -> QTensor | Tensor:  # type: ignore[override]
        """The weight: integers with their parameters, or float32 where it is stored in float16."""
        return self._weight.float() if self.dtype.is_floating_point else super().weight()

    def set_weight_bias(self, w: QTensor | Tensor, b: Tensor | None) -> None:
        """Adopt a weight and a float bias (or None).

        Args:
            w: QTensor of int8; where the weight is stored in float16, a float tensor.

        Raises:
            InvalidConfigError: for a weight of the other kind.
        """
        if isinstance(w, QTensor) is self.dtype.is_floating_point:
            got = "a quantized weight" if isinstance(w, QTensor) else f"a weight of {w.dtype}"
            raise InvalidConfigError(
                f"its weight is stored in {self.dtype}, got {got}",
                module=self,
                remedy="make the module with the dtype of the weight",
            )
        if isinstance(w, QTensor):
            super().set_weight_bias(w, b)
        else:
            self._weight, self._bias = kernels.to_float16(w.detach()), None if b is None else b.detach().float()

    def _upgrade_state(self, state: MutableMapping[str, Any], prefix: str, version: int | None) -> None:
        super()._upgrade_state(state, prefix, version)
        # torch.ao's files have an output scale and zero point, which mean nothing here
        of_torch_ao = state.pop(f"{prefix}scale", None) is not None
        state.pop(f"{prefix}zero_point", None)
        if of_torch_ao and (version or 0) < self._reduced_since:
            state[f"{prefix}reduce_range"] = torch.tensor(False)

    def _expect_float(self, x: Any) -> Tensor:
        if isinstance(x, Tensor) and not isinstance(x, QTensor) and x.dtype.is_floating_point:
            return x
        if isinstance(x, QTensor):
            got, remedy = "a quantized tensor", "put a DeQuantStub before it, or convert it to a static int8 layer"
        else:
            got, remedy = str(x.dtype) if isinstance(x, Tensor) else type(x).__name__, "pass a float tensor"
        raise InvalidInputError(f"expected a float tensor, got {got}", module=self, remedy=remedy)

    @staticmethod
    def _in_dtype_of(x: Tensor, y: Tensor) -> Tensor:
        """The float32 result ``y`` in the dtype of the input."""
        return y if x.dtype is y.dtype else y.to(x.dtype)  # exported, even a conversion to nothing new is a node

    @classmethod
    def from_float(
        cls: type[_Self], mod: nn.Module, use_precomputed_fake_quant: bool = False, as_trained: bool = False
    ) -> _Self:
        """The dynamic module that a float or QAT one stands for; ``mod`` is left as it is.

        Args:
            mod: has a ``qconfig``, whose ``weight`` says in which dtype and how to store the weight; None
                (for either) means ``default_dynamic_qconfig``.
            use_precomputed_fake_quant: no difference here.
            as_trained: keep the weight's scale of training (see :func:`eagerq.convert`).

        Raises:
            InvalidConfigError: for another class of module or dtype, or without a qconfig.
        """
        cls._check_float(mod)
        source: Any = mod[0] if isinstance(mod, nn.Sequential) else mod
        observer = cls._weight_observer(mod).to(source.weight.device)
        dtype = integer_dtype(observer.dtype)
        if dtype not in cls._DTYPES:
            raise InvalidConfigError(
                f"The only supported dtypes for {cls.__name__} with dynamic quantization are "
                f"{' and '.join(map(str, cls._DTYPES))}, got: {observer.dtype}",
                module=mod,
                remedy="set its qconfig to eagerq.default_dynamic_qconfig, per_channel_dynamic_qconfig or "
                "float16_dynamic_qconfig",
            )
        weight = source.weight.detach()
        if dtype is not torch.float16:
            if as_trained and hasattr(mod, "weight_fake_quant"):
                observer = mod.weight_fake_quant
            weight = quantize_weight(mod, weight, observer, as_trained, refresh=True)
        options = {} if dtype is torch.int8 else {"dtype": dtype}
        new = cls(**cls._arguments(source), **options)
        new.set_weight_bias(weight, source.bias)
        return new

    @classmethod
    def _weight_observer(cls, mod: Any) -> Any:
        factory = getattr(mod.qconfig, "weight", None) or default_dynamic_qconfig.weight
        return factory()

    @classmethod
    def _check_float(cls, mod: nn.Module) -> None:
        kind = type_before_parametrizations(mod)
        if not issubclass(kind, cls._FLOAT_MODULE):
            raise InvalidConfigError(
                f"nn.quantized.dynamic.{cls.__name__}.from_float only works for {cls._FLOAT_MODULE.__name__}, "
                f"got {kind.__name__}",
                module=mod,
            )
        if not hasattr(mod, "qconfig"):
            raise InvalidConfigError("Input float module must have qconfig defined", module=mod)

    def _get_name(self) -> str:
        return f"DynamicQuantized{type(self).__name__}"

    def extra_repr(self) -> str:
        weight = self.weight()
        scheme = f", qscheme={weight.qscheme()}" if isinstance(weight, QTensor) else ""
        return f"dtype={self.dtype}{scheme}"
