"""A fake quantizer whose scale and zero point are trained like weights."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from eagerq.bundles import unbundle
from eagerq.errors import InvalidConfigError
from eagerq.fake_quantize.base import FakeQuantizeBase
from eagerq.functional import fake_quantize_learnable
from eagerq.observer import MovingAverageMinMaxObserver
from eagerq.scheme import integer_type, sharing

__all__ = ["LearnableFakeQuantize"]

_Self = TypeVar("_Self", bound="LearnableFakeQuantize")
_SWITCHES = ("static_enabled", "learning_enabled")


class LearnableFakeQuantize(FakeQuantizeBase):
    """Learned step size quantization: scale and zero point are parameters, trained with the weights.

    At first an observer estimates them from the data (:meth:`enable_static_estimate`); after
    :meth:`enable_param_learning` they get gradients and the optimizer moves them (Esser et al. 2020,
    arXiv:1902.08153; for zero points Bhalgat et al. 2020, arXiv:2004.09576).  Any qconfig can name
    it.  Make the optimizer after ``prepare_qat``, so that it finds these parameters.

    Args:
        observer: class or factory of the observer that makes the first estimate.
        quant_min, quant_max: the integers to use.
        scale, zero_point: where the parameters start.
        channel_len: number of channels, for a per-channel observer; -1 leaves one entry, until
            :meth:`fit` (which QAT modules call for their weight) tells.
        use_grad_scaling: divide the parameters' gradients by ``sqrt(x.numel() · quant_max)``, as the
            paper does, so that they learn at the pace of the weights.
        observer_kwargs: further arguments of the observer, such as ``dtype`` and ``qscheme``.

    Attributes:
        scale, zero_point: float32 parameters, ``[1]`` or ``[channels]``; a symmetric scheme keeps the
            zero point at 0.
        fake_quant_enabled, static_enabled, learning_enabled: the switches, uint8 ``[1]``.

    Raises:
        InvalidConfigError: for an empty range, or one that does not fit the dtype.

    Example:
        >>> fq = LearnableFakeQuantize(quant_min=0, quant_max=255)
        >>> x = torch.tensor([0.0, 1.0, 2.55])
        >>> fq(x).detach()
        tensor([0.0000, 1.0000, 2.5500])
        >>> _ = fq.enable_param_learning()
        >>> fq(x + 0.004).sum().backward()
        >>> fq.scale.grad is not None
        True
    """

    static_enabled: Tensor
    learning_enabled: Tensor
    eps: Tensor

    def __init__(
        self,
        observer: Any = MovingAverageMinMaxObserver,
        quant_min: int = 0,
        quant_max: int = 255,
        scale: float = 1.0,
        zero_point: float = 0.0,
        channel_len: int = -1,
        use_grad_scaling: bool = False,
        **observer_kwargs: Any,
    ) -> None:
        super().__init__()
        if quant_min >= quant_max:
            raise InvalidConfigError(
                f"quant_min must be strictly less than quant_max, got {quant_min} and {quant_max}",
                remedy="swap or widen them",
            )
        if channel_len != -1 and not (isinstance(channel_len, int) and channel_len > 0):
            raise InvalidConfigError(
                f"Channel size must be a positive integer, got {channel_len!r}",
                remedy="pass the number of channels, or -1 to have one entry",
            )
        self.activation_post_process = observer(**observer_kwargs, quant_min=quant_min, quant_max=quant_max)
        self.quant_min: int = quant_min
        self.quant_max: int = quant_max
        self.dtype: torch.dtype = self.activation_post_process.dtype
        kind = integer_type(self.dtype)
        for name, value in (("quant_min", quant_min), ("quant_max", quant_max)):
            if not kind.minimum <= value <= kind.maximum:
                raise InvalidConfigError(
                    f"{name} out of bound: {value} does not fit {self.dtype}",
                    remedy=f"stay within [{kind.minimum}, {kind.maximum}], or pass another dtype",
                )
        self.qscheme = self.activation_post_process.qscheme
        self._sharing = sharing(self.qscheme)
        self.ch_axis: int = getattr(self.activation_post_process, "ch_axis", -1)
        self.use_grad_scaling = use_grad_scaling
        count = max(channel_len, 1)
        self.scale = nn.Parameter(torch.full((count,), float(scale)), requires_grad=False)
        self.zero_point = nn.Parameter(torch.full((count,), float(zero_point)), requires_grad=False)
        self._static_on, self._learning_on = True, False
        for name, enabled in zip(_SWITCHES, (True, False), strict=True):
            self.register_buffer(name, torch.ones(1, dtype=self._switch_dtype))
            self._set_switch(name, enabled)
        self.register_buffer("eps", torch.tensor([torch.finfo(torch.float32).eps]))

    def fit(self, x: Tensor) -> None:
        """Give each channel of tensors like ``x`` its parameters; nothing to do per tensor."""
        if self._sharing.per_channel:
            self._resize(x.shape[self.ch_axis])

    def _resize(self, count: int) -> None:
        if self.scale.numel() == 1 != count:
            for name in ("scale", "zero_point"):
                old = getattr(self, name)
                setattr(self, name, nn.Parameter(old.detach().expand(count).clone(), old.requires_grad))

    def enable_param_learning(self: _Self) -> _Self:
        """Train scale and zero point from here on; the observer rests."""
        return self.toggle_qparam_learning(True).toggle_fake_quant(True).toggle_observer_update(False)

    def enable_static_estimate(self: _Self) -> _Self:
        """Take scale and zero point from the observer, batch by batch."""
        return self.toggle_qparam_learning(False).toggle_fake_quant(True).toggle_observer_update(True)

    def enable_static_observation(self: _Self) -> _Self:
        """Let the observer look, and values pass unrounded."""
        return self.toggle_qparam_learning(False).toggle_fake_quant(False).toggle_observer_update(True)

    def toggle_observer_update(self: _Self, enabled: bool = True) -> _Self:
        """Switch the observer's estimates."""
        self._set_switch("static_enabled", enabled)
        self._static_on = enabled
        return self

    def enable_observer(self, enabled: bool = True) -> None:
        """As :meth:`toggle_observer_update`, by the name that :func:`eagerq.enable_observer` knows."""
        self.toggle_observer_update(enabled)

    def toggle_qparam_learning(self: _Self, enabled: bool = True) -> _Self:
        """Switch the gradients of scale and zero point."""
        self._set_switch("learning_enabled", enabled)
        self._learning_on = enabled
        self.scale.requires_grad = enabled
        self.zero_point.requires_grad = enabled
        return self

    def toggle_fake_quant(self: _Self, enabled: bool = True) -> _Self:
        """Switch the rounding."""
        self.enable_fake_quant(enabled)
        return self

    def _read_switches(self) -> None:
        super()._read_switches()
        if torch.compiler.is_compiling():
            return
        if (buffer := self._changed("static_enabled")) is not None:
            self._static_on = bool(buffer.item())
        if (buffer := self._changed("learning_enabled")) is not None:
            self.toggle_qparam_learning(bool(buffer.item()))

    @torch.no_grad()
    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """The scale (at least eps) and the zero point, rounded into the range, as they stand now."""
        zero_point = torch.zeros_like(self.zero_point) if self._sharing.symmetric else self.zero_point.detach()
        return (
            self.scale.detach().clamp(min=self.eps),
            zero_point.round().clamp(self.quant_min, self.quant_max).to(torch.int64),
        )

    qparams_in_use = calculate_qparams

    @torch.no_grad()
    def _estimate(self, x: Tensor) -> None:
        observer = self.activation_post_process
        observer(x.detach())
        scale, zero_point = getattr(observer, "qparams", observer.calculate_qparams)()
        self._resize(scale.numel())
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)

    def forward(self, x: Tensor) -> Tensor:
        """Float tensor of any shape to the same shape and dtype."""
        self._read_switches()
        if self._static_on:
            self._estimate(x)
        else:
            with torch.no_grad():
                self.scale.clamp_(min=self.eps)
        if not self._fake_quant_on:
            return x
        if self._sharing.symmetric:
            with torch.no_grad():
                self.zero_point.zero_()
        axis = self.ch_axis if self._sharing.per_channel else None
        pace = (x.numel() * self.quant_max) ** -0.5 if self.use_grad_scaling and x.numel() else 1.0
        # copies, since a second use in the same forward pass may write over the parameters
        qparams = self.scale.clone(), self.zero_point.clone()
        return fake_quantize_learnable(x, *qparams, self.quant_min, self.quant_max, axis, pace)

    def extra_repr(self) -> str:
        return (
            f"quant_min={self.quant_min}, quant_max={self.quant_max}, dtype={self.dtype}, qscheme={self.qscheme}, "
            f"scale={self.scale.detach()}, zero_point={self.zero_point.detach()}, learning={self._learning_on}"
        )

    def _load_from_state_dict(
        self, state_dict: MutableMapping[str, Any], prefix: str, local_metadata: Mapping[str, Any], *args: Any
    ) -> None:
        unbundle(state_dict, prefix)
        scale = state_dict.get(f"{prefix}scale")
        if isinstance(scale, Tensor):
            self._resize(scale.numel())
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
