"""What every int8 module shares: parameters taken from a trained module, state, input checks."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from eagerq import kernels
from eagerq.checkpoint import bad_range, bad_scale
from eagerq.errors import InvalidConfigError, InvalidInputError, UnsupportedError
from eagerq.fake_quantize import FakeQuantizeBase
from eagerq.functional import channel_shape, min_max, training_integers
from eagerq.nn.quantized.state import QuantizedModule, StoredTensors, qtensor_parts, stored_qtensor
from eagerq.observer import ObserverBase
from eagerq.qtensor import QTensor
from eagerq.scheme import IntegerType, integer_dtype, integer_type, sharing

__all__ = [
    "IntegerWeight",
    "Output",
    "RequantizingModule",
    "WeightAndBias",
    "WeightedQuantizedModule",
    "expect_quantized",
    "quantize_weight",
]

_Self = TypeVar("_Self", bound="WeightedQuantizedModule")


class Output(NamedTuple):
    """How a module's result is quantized: parameters, dtype, and the integers in use."""

    scale: float = 1.0
    zero_point: int = 0
    dtype: torch.dtype = torch.uint8
    low: int = 0
    high: int = 255

    @staticmethod
    def given(scale: Any, zero_point: Any) -> Output:
        """Of a module built by hand; only signed integers have negative zero points."""
        kind = integer_type(torch.int8 if int(zero_point) < 0 else torch.uint8)
        return Output(float(scale), int(zero_point), kind.storage, kind.minimum, kind.maximum)

    @staticmethod
    def of(module: nn.Module, as_trained: bool) -> Output:
        """The output of a prepared module, as its ``activation_post_process`` learned it.

        Raises:
            InvalidConfigError: when the module has no observer, or one without parameters.
        """
        observer: Any = getattr(module, "activation_post_process", None)
        known = isinstance(observer, (ObserverBase, FakeQuantizeBase))
        if not known:
            raise InvalidConfigError(
                "no observer is attached to its output (activation_post_process)",
                module=module,
                remedy="call prepare or prepare_qat first, with a qconfig that reaches this module",
            )
        try:
            scale, zero_point = _qparams(observer, as_trained)
        except NotImplementedError as error:
            raise InvalidConfigError(
                f"its activation observer {type(observer).__name__} has no scale and zero point to tell",
                module=module,
                remedy="give it a qconfig whose activation observes a range",
            ) from error
        kind = integer_type(observer.dtype)
        low, high = kind.minimum, kind.maximum
        if as_trained:
            low, high = observer.quant_min, observer.quant_max
        return Output(float(scale), int(zero_point), kind.storage, low, high)


def _qparams(observer: Any, as_trained: bool) -> tuple[Tensor, Tensor]:
    if as_trained and isinstance(observer, FakeQuantizeBase):
        return observer.qparams_in_use()
    qparams: tuple[Tensor, Tensor] = getattr(observer, "qparams", observer.calculate_qparams)()
    return qparams


def _has_seen_data(observer: Any) -> bool:
    inner = getattr(observer, "activation_post_process", observer)
    return bool(getattr(inner, "observed", True))


@torch.no_grad()
def quantize_weight(
    module: nn.Module, weight: Tensor, observer: Any, as_trained: bool, refresh: bool, signed: bool = True
) -> QTensor:
    """A float weight in the integers that its observer or fake quantizer stands for.

    Args:
        module: the module concerned, for messages.
        observer: ``weight_fake_quant`` or a new weight observer; left as it is.
        as_trained: keep the scale used while training, rather than compute the observer's own.
        refresh: show the weight to the observer first.
        signed: whether the integers must be signed (those with float zero points need not).

    Raises:
        InvalidConfigError: for a weight observer whose dtype is not signed, if it must be.
    """
    if refresh and not (as_trained and isinstance(observer, FakeQuantizeBase) and _has_seen_data(observer)):
        observer = copy.deepcopy(observer)
        observer(weight)
    kind, shared = integer_type(observer.dtype), sharing(observer.qscheme)
    if signed and not kind.signed and not shared.float_zero_point:
        raise InvalidConfigError(
            f"Weight observer must have dtype torch.int8, got {observer.dtype}",
            module=module,
            remedy="use a weight observer with dtype=torch.int8",
        )
    scale, zero_point = _qparams(observer, as_trained)
    inner = getattr(observer, "activation_post_process", observer)
    axis = observer.ch_axis if shared.per_channel else None
    low, high = inner.quant_min, inner.quant_max
    weight = weight.float()
    if as_trained:
        steps = training_integers(weight, scale, zero_point, low, high, axis)
        if not shared.float_zero_point:
            steps, zero_point = _centred(steps, zero_point, axis, kind)
        integers = steps.to(kind.storage)
    elif axis is None:
        integers = kernels.quantize(weight, float(scale), int(zero_point), kind.storage, low, high)
    else:
        integers = kernels.quantize_per_channel(weight, scale, zero_point, axis, kind.storage, low, high)
    return QTensor(integers, scale.float(), zero_point.to(integers.device), 0 if axis is None else axis)


def _centred(steps: Tensor, zero_point: Tensor, axis: int | None, kind: IntegerType) -> tuple[Tensor, Tensor]:
    """The same values with zero point 0, which kernels want, in each channel where they fit the dtype."""
    shape = channel_shape(steps.dim(), axis or 0)
    centred = steps - zero_point.reshape(shape)
    low, high = min_max(centred, axis)
    fits = ((low >= kind.minimum) & (high <= kind.maximum)).reshape(-1)
    return torch.where(fits.reshape(shape), centred, steps), torch.where(fits, 0, zero_point)


def expect_quantized(module: nn.Module, x: Any) -> QTensor:
    """``x``, if it is a QTensor with one scale.

    Raises:
        InvalidInputError: naming the module, for anything else.
    """
    if isinstance(x, QTensor):
        if x.axis is None:
            return x
        raise InvalidInputError(
            f"expected one scale and zero point, got one for each index of axis {x.axis}",
            module=module,
            remedy="quantize activations per tensor; only weights are quantized per channel",
        )
    got = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
    raise InvalidInputError(
        f"expected a quantized tensor (QTensor), got {got}",
        module=module,
        remedy="put a QuantStub before it, or wrap the model in QuantWrapper, then prepare and convert again",
    )


class RequantizingModule(QuantizedModule):
    """Base of those whose result is quantized: holds its parameters as Python numbers.

    The state has ``scale`` (float32) and ``zero_point`` (of the output's integer dtype), both 0-d, and
    ``quant_range`` (int32 ``[low, high]``) when fewer integers are used than the dtype has.
    """

    _optional_state: ClassVar[tuple[str, ...]] = ("quant_range",)
    _FLOAT_MODULE: ClassVar[Any]
    post_op: ClassVar[str | None] = None
    _output: Output
    _scale_text: str

    def __init__(self, output: Output | None = None) -> None:
        super().__init__()
        self.output = output or Output()

    @property
    def output(self) -> Output:
        """How the result is quantized."""
        output = self._output
        if torch.compiler.is_compiling():
            # Dynamo would make a symbol of a float that is another in the next model, and no tensor could carry that
            return Output(float(self._scale_text), output.zero_point, output.dtype, output.low, output.high)
        return output

    @output.setter
    def output(self, value: Output) -> None:
        self._output, self._scale_text = value, repr(float(value.scale))

    @property
    def scale(self) -> float:
        """Scale of the output."""
        return self.output.scale

    @scale.setter
    def scale(self, value: float) -> None:
        self.output = self.output._replace(scale=float(value))

    @property
    def zero_point(self) -> int:
        """Zero point of the output."""
        return self.output.zero_point

    @zero_point.setter
    def zero_point(self, value: int) -> None:
        self.output = self.output._replace(zero_point=int(value))

    def _tensors(self) -> dict[str, Tensor]:
        output = self.output
        kind = integer_type(output.dtype)
        state = {
            "scale": torch.tensor(output.scale, dtype=torch.float32),
            "zero_point": torch.tensor(output.zero_point, dtype=output.dtype),
        }
        if (output.low, output.high) != (kind.minimum, kind.maximum):
            state["quant_range"] = torch.tensor([output.low, output.high], dtype=torch.int32)
        return state

    def _state_problems(self, state: Mapping[str, Any], prefix: str) -> Iterator[str]:
        yield from super()._state_problems(state, prefix)
        yield from bad_scale(f"{prefix}scale", state)
        yield from bad_range(f"{prefix}quant_range", state, integer_type(self.output.dtype))

    def _take_tensors(self, state: Mapping[str, Tensor], assign: bool) -> None:
        kind = integer_type(self.output.dtype)
        low, high = state.get("quant_range", torch.tensor([kind.minimum, kind.maximum])).tolist()
        self.output = self.output._replace(
            scale=float(state["scale"]) if "scale" in state else self.scale,
            zero_point=int(state["zero_point"]) if "zero_point" in state else self.zero_point,
            low=low,
            high=high,
        )

    @property
    def _low(self) -> int:
        """The least integer of the output: a fused ReLU cuts at the zero point."""
        output = self.output
        return max(output.low, output.zero_point) if self.post_op == "relu" else output.low

    @property
    def _clamped_output(self) -> Output:
        """The output with a fused ReLU in its range."""
        return self.output._replace(low=self._low)

    @classmethod
    def _check_float(cls, mod: nn.Module) -> None:
        accepted = cls._FLOAT_MODULE if isinstance(cls._FLOAT_MODULE, tuple) else (cls._FLOAT_MODULE,)
        if not isinstance(mod, accepted):
            names = ", ".join(one.__name__ for one in accepted)
            raise InvalidConfigError(
                f"nnq.{cls.__name__}.from_float only works for {names}, but got {type(mod).__name__}",
                module=mod,
            )
        if getattr(mod, "qconfig", None) is None:
            raise InvalidConfigError("Input float module must have qconfig defined", module=mod)

    def extra_repr(self) -> str:
        return f"scale={self.scale}, zero_point={self.zero_point}"


class IntegerWeight(StoredTensors):
    """Base of those with one table of integers; the methods have the state's names."""

    _STORED: tuple[str, ...] = ("weight", "weight_scale", "weight_zero_point", "bias")

    _weight: Tensor
    _weight_scale: Tensor
    _weight_zero_point: Tensor
    _bias: Tensor | None

    def weight(self) -> QTensor:
        """The integer weight with its parameters."""
        return stored_qtensor(self._weight, self._weight_scale, self._weight_zero_point, axis=self._axis)


class WeightAndBias(IntegerWeight):
    """Base of those with an integer weight, its scales, and a float bias.

    The state has ``weight`` (int8), ``weight_scale`` (float32 ``[1]`` or ``[out]``), ``weight_zero_point``
    (int32, same shape) and ``bias`` (float32 ``[out]``, if any).
    """

    post_op: ClassVar[str | None] = None
    _FLOAT_MODULE: ClassVar[Any]
    _DTYPES: ClassVar[tuple[torch.dtype, ...]] = (torch.int8,)

    def _allocate(self, shape: tuple[int, ...], out: int | None, device: Any = None, dtype: Any = torch.int8) -> None:
        """Register a weight of zeros of that shape, and a bias of ``out`` zeros, or none."""
        stored = integer_dtype(dtype)
        if stored not in self._DTYPES:
            names = " or ".join(map(str, self._DTYPES))
            raise UnsupportedError(f"weights are stored in {names}, not in {dtype}", module=self)
        weight = torch.zeros(shape, dtype=stored, device=device)
        own_bias = None if out is None else torch.zeros(out, dtype=torch.float32, device=device)
        if stored.is_floating_point:
            self._STORED = ("weight", "bias")
            self._store(weight, own_bias)
        else:
            scale = torch.ones(1, dtype=torch.float32, device=device)
            self._store(weight, scale, torch.zeros(1, dtype=torch.int32, device=device), own_bias)

    def bias(self) -> Tensor | None:
        """The float bias, ``[out]``."""
        return self._bias

    def _weight_bias(self) -> tuple[QTensor, Tensor | None]:
        return self.weight(), self.bias()

    def set_weight_bias(self, w: QTensor, b: Tensor | None) -> None:
        """Adopt a quantized weight and a float bias (or None)."""
        self._weight, self._weight_scale, self._weight_zero_point = qtensor_parts(w)
        self._bias = None if b is None else b.detach().float()

    @classmethod
    def _more_arguments(cls, mod: Any) -> dict[str, Any]:
        """Constructor arguments that a fused float module's other parts tell."""
        return {}

    @classmethod
    def _weight_observer(cls, mod: Any) -> Any:
        """A new observer for the weight of a float module."""
        return mod.qconfig.weight()

    @classmethod
    def _arguments(cls, module: Any) -> dict[str, Any]:
        """Constructor arguments that rebuild a float or QAT module's shape."""
        raise NotImplementedError


class WeightedQuantizedModule(WeightAndBias, RequantizingModule):
    """Base of int8 Linear and Conv: their state is that of :class:`WeightAndBias` and :class:`RequantizingModule`."""

    def _get_name(self) -> str:
        return f"Quantized{type(self).__name__}"

    @classmethod
    def from_float(
        cls: type[_Self], mod: nn.Module, use_precomputed_fake_quant: bool = False, as_trained: bool = False
    ) -> _Self:
        """The int8 module that a prepared float or QAT module stands for; ``mod`` is left as it is.

        Args:
            mod: a QAT module, or an observed float one, with ``activation_post_process``.
            use_precomputed_fake_quant: keep the weight range seen so far (by ``weight_fake_quant``, or by
                the ``weight_post_process`` of a float module), without another look.
            as_trained: keep the scales and ranges of training (see :func:`eagerq.convert`).

        Raises:
            InvalidConfigError: when ``mod`` is not prepared, or of another class.
        """
        output = Output.of(mod, as_trained)
        trained = hasattr(mod, "weight_fake_quant")
        source: Any = mod[0] if isinstance(mod, nn.Sequential) else mod
        # of a float module, an algorithm that chose the weight's range may have left it in weight_post_process
        observer: Any = getattr(source, "weight_fake_quant", getattr(source, "weight_post_process", None))
        refresh = not (observer is not None and use_precomputed_fake_quant)
        if not trained:
            cls._check_float(mod)
            if refresh:
                observer = cls._weight_observer(mod).to(source.weight.device)
        weight, bias = source.folded(as_trained) if trained else (source.weight, source.bias)
        new = cls(**cls._arguments(source), **cls._more_arguments(mod))
        qweight = quantize_weight(mod, weight.detach(), observer, as_trained, refresh)
        new.set_weight_bias(qweight, bias)
        new.output = output
        return new
