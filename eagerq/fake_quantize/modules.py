"""Fake quantizers: modules that round values as int8 would, while everything stays in float."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from eagerq.checkpoint import bad_qparams
from eagerq.errors import InvalidConfigError
from eagerq.fake_quantize.base import FakeQuantizeBase, buffer_of
from eagerq.functional import (
    Rounding,
    Running,
    can_update_natively,
    channel_shape,
    fake_quantize,
    min_max,
    round_in_c,
    round_over,
    training_qparams,
    update_natively,
)
from eagerq.kernels.training import qparams_in_graph, rounded_in_graph
from eagerq.kernels.training_layers import Convolved
from eagerq.kernels.training_norm import Normalized, round_over_in_graph
from eagerq.observer import (
    FixedQParamsObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
)
from eagerq.scheme import integer_type, sharing

__all__ = ["FakeQuantize", "FixedQParamsFakeQuantize", "FusedMovingAvgObsFakeQuantize"]


class FakeQuantize(FakeQuantizeBase):
    """Observes a tensor, then rounds it to the parameters that follow from what was seen.

    ``out = (clamp(round(x / scale) + zero_point, quant_min, quant_max) - zero_point) * scale``, with
    the gradient passed straight through inside the range (see
    :func:`eagerq.functional.fake_quantize`).

    Args:
        observer: observer class or factory.
        quant_min, quant_max: the integers to use; both or neither.
        is_dynamic: the converted operator computes parameters from each tensor.
        observer_kwargs: further arguments of the observer, such as ``dtype`` and ``qscheme``.

    Attributes:
        scale: float32 and zero_point: int32 (float32 for the embedding scheme), each ``[1]`` or
            ``[channels]``: the parameters last used.
        activation_post_process: the observer.

    Raises:
        InvalidConfigError: for a range that does not fit the dtype.

    Example:
        >>> fq = FakeQuantize(observer=MovingAverageMinMaxObserver, quant_min=0, quant_max=255)
        >>> fq(torch.tensor([0.0, 1.0, 2.55]))
        tensor([0.0000, 1.0000, 2.5500])
    """

    _resizable: ClassVar[tuple[str, ...]] = ("scale", "zero_point")

    scale: Tensor
    zero_point: Tensor

    def __init__(
        self,
        observer: Any = MovingAverageMinMaxObserver,
        quant_min: int | None = None,
        quant_max: int | None = None,
        is_dynamic: bool = False,
        **observer_kwargs: Any,
    ) -> None:
        super().__init__()
        if quant_min is not None and quant_max is not None:
            observer_kwargs.update(quant_min=quant_min, quant_max=quant_max)
        self.activation_post_process = observer(**observer_kwargs, is_dynamic=is_dynamic)
        self.quant_min: int = self.activation_post_process.quant_min
        self.quant_max: int = self.activation_post_process.quant_max
        self.is_dynamic: bool = self.activation_post_process.is_dynamic
        self.dtype: torch.dtype = self.activation_post_process.dtype
        self.qscheme = self.activation_post_process.qscheme
        kind, shared = integer_type(self.dtype), sharing(self.qscheme)
        if self.quant_min < kind.minimum or self.quant_max > kind.maximum:
            bound = "quant_min" if self.quant_min < kind.minimum else "quant_max"
            raise InvalidConfigError(
                f"{bound} out of bound: [{self.quant_min}, {self.quant_max}] does not fit {self.dtype}",
                remedy=f"stay within [{kind.minimum}, {kind.maximum}], or pass another dtype",
            )
        self.is_per_channel = shared.per_channel
        self.ch_axis: int = getattr(self.activation_post_process, "ch_axis", -1)
        device = self._observer_device()
        self.register_buffer("scale", torch.ones(1, device=device))
        dtype = torch.float32 if shared.float_zero_point else torch.int32
        self.register_buffer("zero_point", torch.zeros(1, dtype=dtype, device=device))

    def _observer_device(self) -> torch.device | None:
        return next((buffer.device for buffer in self.activation_post_process.buffers()), None)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """The observer's scale and zero point: what :func:`eagerq.convert` uses by default."""
        qparams: tuple[Tensor, Tensor] = self.activation_post_process.calculate_qparams()
        return qparams

    def qparams_in_use(self) -> tuple[Tensor, Tensor]:
        return self.scale, self.zero_point

    def _training_qparams(self) -> tuple[Tensor, Tensor]:
        observer = self.activation_post_process
        qparams: tuple[Tensor, Tensor] = getattr(observer, "qparams", observer.calculate_qparams)()
        return qparams

    @torch.no_grad()
    def _observe(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Take ``x`` into account; the parameters to round it with."""
        self.activation_post_process(x.detach())
        scale, zero_point = self._training_qparams()
        if self.scale.shape == scale.shape:
            self.scale.copy_(scale)
            self.zero_point.copy_(zero_point)
        else:  # the first batch tells how many channels there are
            self.scale = scale.to(self.scale)
            self.zero_point = zero_point.to(self.zero_point)
        return self.scale, self.zero_point

    def forward(self, x: Tensor) -> Tensor:
        """Float tensor of any shape to the same shape and dtype."""
        return self._forward(x, None)

    def scaled(self, x: Tensor, factor: Tensor) -> Tensor:
        """As ``self(x·factor)``, with a factor for each index of axis 0, in fewer passes over ``x``."""
        return self._forward(x, factor)

    def over(self, x: Tensor) -> Tensor:
        """As ``self(x)``, for an ``x`` that nobody else looks at: its memory may take the result."""
        return self._forward(x, None, own=True)

    def over_made(self, made: Normalized | Convolved) -> Tensor | None:
        """As :meth:`over`, of a layer in code that is being compiled; None where that is no gain."""
        to = self.rounding()
        return None if to is None else round_over_in_graph(made, to, self.nonfinite_batches)

    def _forward(self, x: Tensor, factor: Tensor | None, own: bool = False) -> Tensor:
        rounded = self._in_graph(x, factor) if torch.compiler.is_compiling() else self._in_c(x, factor, own)
        if rounded is not None:
            return rounded
        if factor is not None:
            x = x * factor.reshape(channel_shape(x.dim(), 0))
        qparams = self.scale, self.zero_point
        if self._observer_on:
            if torch.compiler.is_compiling():
                qparams = self._observe(x)
            else:  # what a first evaluation allocates has to serve the training that follows
                with torch.inference_mode(self.scale.is_inference()):
                    qparams = self._observe(x)
        if self._fake_quant_on:
            axis = self.ch_axis if self.is_per_channel else None
            x = fake_quantize(x, *qparams, self.quant_min, self.quant_max, axis)
        return x

    def _in_graph(self, x: Tensor, factor: Tensor | None) -> Tensor | None:
        to = self.rounding()
        if to is None or (factor is not None and not to.rows):
            return None
        return rounded_in_graph(x, to, factor, self.nonfinite_batches)

    def _in_c(self, x: Tensor, factor: Tensor | None, own: bool) -> Tensor | None:
        to = self.rounding_of(x)
        if to is None or (factor is not None and not to.rows):
            return None
        rounded = round_over(x, to) if own else None
        return round_in_c(x, to, factor) if rounded is None else rounded

    def rounding(self) -> Rounding | None:
        """What :meth:`forward` does at present, if that is to round in one pass, by rows or all alike."""
        other = self.is_per_channel and self.ch_axis != 0
        if other or not self._fake_quant_on:
            return None
        running = self._running() if self._observer_on else None
        if self._observer_on and running is None:
            return None
        scale, zero_point = buffer_of(self, "scale"), buffer_of(self, "zero_point")
        return Rounding(scale, zero_point, self.quant_min, self.quant_max, self.is_per_channel, running)

    def rounding_of(self, x: Tensor) -> Rounding | None:
        """As :meth:`rounding`, eagerly, with the switches as they are now, and room for the ranges of ``x``'s rows."""
        self._read_switches()
        to = self.rounding()
        if to is not None and to.rows and to.running and not to.running.low.numel():
            running = self._make_room(x.shape[0]) if x.numel() else None
            to = to._replace(scale=self.scale, zero_point=self.zero_point, running=running)
        return to

    @property
    def nonfinite_batches(self) -> Tensor | None:
        """The observer's count of ranges left out, if it counts."""
        return getattr(self.activation_post_process, "nonfinite_batches", None)

    def _running(self) -> Running | None:
        """The range that scale and zero point follow by the formula of fused kernels, if they do."""
        return None

    def _make_room(self, channels: int) -> Running | None:
        return None

    def extra_repr(self) -> str:
        return (
            f"fake_quant_enabled={self.fake_quant_enabled}, observer_enabled={self.observer_enabled}, "
            f"quant_min={self.quant_min}, quant_max={self.quant_max}, dtype={self.dtype}, "
            f"qscheme={self.qscheme}, ch_axis={self.ch_axis}, scale={self.scale}, "
            f"zero_point={self.zero_point}"
        )

    def _state_problems(self, state: Mapping[str, Any], prefix: str) -> Iterator[str]:
        yield from super()._state_problems(state, prefix)
        kind = None if self.zero_point.is_floating_point() else integer_type(self.dtype)
        yield from bad_qparams(prefix, state, None if self.is_per_channel else (1,), kind)


class FixedQParamsFakeQuantize(FakeQuantize):
    """Rounds to fixed parameters: for outputs of known range, such as a sigmoid's.

    Args:
        observer: :class:`~eagerq.observer.FixedQParamsObserver`, or a factory of one.

    Raises:
        InvalidConfigError: for another observer or a per-channel scheme.
    """

    def __init__(self, observer: Any) -> None:
        super().__init__(observer=observer)
        if type(self.activation_post_process) is not FixedQParamsObserver or self.is_per_channel:
            raise InvalidConfigError(
                f"FixedQParamsFakeQuantize needs a per-tensor FixedQParamsObserver, got {self.activation_post_process}",
                remedy="pass FixedQParamsObserver.with_args(scale=…, zero_point=…)",
            )
        self.scale = self.activation_post_process.scale
        self.zero_point = self.activation_post_process.zero_point

    def _upgrade_state(self, state: MutableMapping[str, Any], prefix: str, version: int | None) -> None:
        super()._upgrade_state(state, prefix, version)
        for name in ("scale", "zero_point"):  # it had no observer before torch 1.11
            if prefix + name in state:
                state.setdefault(f"{prefix}activation_post_process.{name}", state[prefix + name])

    def _observe(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.scale, self.zero_point


class FusedMovingAvgObsFakeQuantize(FakeQuantize):
    """:class:`FakeQuantize` over moving averages, with the parameters of fused training kernels.

    The scale and zero point used *while training* follow
    :func:`eagerq.functional.training_qparams`, as in torch's fused operator of this name;
    ``calculate_qparams`` tells the observer's, which differ a little.  ``convert`` uses the latter,
    ``convert(as_trained=True)`` the former.

    Args:
        observer: a moving-average observer, per tensor or per channel.
        others: as for :class:`FakeQuantize`.

    Raises:
        InvalidConfigError: for another kind of observer.
    """

    _switch_dtype = torch.long

    def __init__(
        self,
        observer: Any = MovingAverageMinMaxObserver,
        quant_min: int = 0,
        quant_max: int = 255,
        **observer_kwargs: Any,
    ) -> None:
        super().__init__(observer, quant_min, quant_max, **observer_kwargs)
        if not isinstance(
            self.activation_post_process,
            (MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver),
        ):
            raise InvalidConfigError(
                "FusedMovingAvgObsFakeQuantize works with moving-average observers only, got "
                f"{type(self.activation_post_process).__name__}",
                remedy="pass MovingAverageMinMaxObserver, or use FakeQuantize",
            )
        self.is_symmetric_quant = sharing(self.qscheme).symmetric

    def _observe(self, x: Tensor) -> tuple[Tensor, Tensor]:
        observer = self.activation_post_process
        single = self.scale.dtype is observer.min_val.dtype is torch.float32
        axis = self.ch_axis if self.is_per_channel else None
        if single and torch.compiler.is_compiling():
            to = Rounding(self.scale, self.zero_point, self.quant_min, self.quant_max, running=self._running())
            found = qparams_in_graph(x, to, observer.nonfinite_batches, axis)
            return super()._observe(x) if found is None else found
        if not single or not can_update_natively(x):
            return super()._observe(x)
        if x.numel() == 0:
            return self.scale, self.zero_point
        low, high = min_max(x.detach(), axis)
        observer.check_channels(low)
        if not update_natively(
            low.float(),
            high.float(),
            observer.min_val,
            observer.max_val,
            self.scale,
            self.zero_point,
            observer.averaging_constant,
            self.quant_min,
            self.quant_max,
            self.is_symmetric_quant,
        ):  # the formulas leave out only the channels concerned, and count
            super()._observe(x)
        return self.scale, self.zero_point

    def _running(self) -> Running | None:
        observer: Any = self._modules["activation_post_process"]
        low, high = buffer_of(observer, "min_val"), buffer_of(observer, "max_val")
        return Running(low, high, observer.averaging_constant, self.is_symmetric_quant)

    def _make_room(self, channels: int) -> Running | None:
        """The first batch tells how many channels there are; none of them is seen yet."""
        observer = self.activation_post_process
        with torch.inference_mode(self.scale.is_inference()):
            observer.min_val = observer.min_val.new_full((channels,), float("inf"))
            observer.max_val = observer.max_val.new_full((channels,), float("-inf"))
            self.scale = self.scale.new_ones(channels)
            self.zero_point = self.zero_point.new_zeros(channels)
        return self._running()

    def _training_qparams(self) -> tuple[Tensor, Tensor]:
        observer = self.activation_post_process
        return self._qparams_of(observer.min_val, observer.max_val)

    def _qparams_of(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return training_qparams(low, high, self.quant_min, self.quant_max, self.is_symmetric_quant)

    def _upgrade_state(self, state: MutableMapping[str, Any], prefix: str, version: int | None) -> None:
        switch = state.get(f"{prefix}fake_quant_enabled")
        if isinstance(switch, Tensor) and switch.dtype is not self._switch_dtype:
            self._restate_qparams(state, prefix)
        super()._upgrade_state(state, prefix, version)

    def _restate_qparams(self, state: MutableMapping[str, Any], prefix: str) -> None:
        """A plain FakeQuantize's parameters follow another formula; torch's fused operator computes them anew."""
        inner = f"{prefix}activation_post_process."
        self.activation_post_process._upgrade_state(state, inner, None)
        low, high = state.get(f"{inner}min_val"), state.get(f"{inner}max_val")
        if isinstance(low, Tensor) and isinstance(high, Tensor) and low.shape == high.shape and low.numel():
            scale, zero_point = self._qparams_of(low, high)
            state[f"{prefix}scale"], state[f"{prefix}zero_point"] = scale, zero_point.to(self.zero_point.dtype)
