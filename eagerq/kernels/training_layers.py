"""Convolutions of compiled training, one operator each way, on the CPU.

Inductor would hold activations and weights in channels_last and turn every rounded weight, and its gradient, by
scalar loops.  Operators keep the layout that the model has, and round the weight once more in the backward pass
instead of keeping a copy.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from eagerq import native
from eagerq.functional import Convolving, in_order
from eagerq.kernels.dispatch import Kernel
from eagerq.kernels.storing import is_exporting, is_last, ready, room_like, stored, storing
from eagerq.kernels.training import observed_rows
from eagerq.native import Rounding, Running

__all__ = ["Convolved", "convolution_in_graph"]


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Any) -> Tensor:
    *window, groups = geometry
    y: Tensor = torch.ops.aten.convolution(x, weight, bias, *window, False, [0], groups)
    return y


def _is_heavy(x: Tensor, weight: Tensor) -> bool:
    """Whether all but the images had better stay contiguous: oneDNN takes long to turn weights from channels_last, and
    torch to turn their gradients into it."""
    return weight.is_contiguous() and weight[0, 0].numel() > 1 and weight.numel() > 8 * x.numel()


def _in_working_order(x: Tensor, heavy: bool) -> Tensor:
    return x.contiguous() if heavy else ready(x)


class _Settings(NamedTuple):
    """The numbers that both ways of a convolution take, in the operators' order."""

    quant_min: int
    quant_max: int
    stride: Any
    padding: Any
    dilation: Any
    groups: int
    relu: bool

    @property
    def geometry(self) -> Convolving:
        return Convolving(self.stride, self.padding, self.dilation, self.groups)


class _Scaled(NamedTuple):
    """A weight, what its channels are multiplied by, and how the product is rounded."""

    weight: Tensor
    factor: Tensor | None
    dead: Tensor | None
    """Channels of factor zero, None if there is none: rounded as of one, then zero."""
    to: Rounding


def _scaled(weight: Tensor, factor: Tensor | None, scale: Tensor, zero_point: Tensor, settings: _Settings) -> _Scaled:
    dead = None
    if factor is not None and not factor.all():
        dead = factor == 0
        factor = torch.where(dead, 1.0, factor)
    to = Rounding(scale, zero_point, settings.quant_min, settings.quant_max, True)
    return _Scaled(in_order(weight, weight.stride()), factor, dead, to)


def _convolved(
    x: Tensor, weight: Tensor, factor: Tensor | None, bias: Tensor | None, scale: Tensor, zero_point: Tensor, *rest: Any
) -> Any:
    """Convolve with the rounded ``weight·factor``.

    Returns the result, a bit for each value that a ReLU let pass (or room for it), and copies of scale and zero point:
    the next forward pass writes over the buffers.
    """
    settings, skipped = _Settings(*rest[:7]), None
    weight, used, dead, to = _scaled(weight, factor, scale, zero_point, settings)
    if len(rest) > 7:
        low, high, skipped, constant, symmetric = rest[7:]
        to = to._replace(running=Running(low, high, constant, symmetric))
    heavy = _is_heavy(x, weight)
    rounded = observed_rows(weight, used, to, skipped, last=not heavy)
    if dead is not None:
        rounded[dead] = 0
    y = ready(_convolution(_in_working_order(x, heavy), rounded, bias, settings.geometry))
    above = native.rectify_(y) if settings.relu else native.room_for_bits(y.numel(), 1).zero_()
    return stored(y, x), above, scale.clone(), zero_point.clone()


def _like_convolved(
    x: Tensor, weight: Tensor, factor: Any, bias: Any, scale: Tensor, zero_point: Tensor, *rest: Any
) -> Any:
    settings = _Settings(*rest[:7])
    y = stored(_convolution(x, weight, bias, settings.geometry), x)
    above = x.new_empty((y.numel() + 7) // 8, dtype=torch.uint8)
    return y, above, torch.empty_like(scale), torch.empty_like(zero_point)


def _rounded_again(weight: Tensor, to: Rounding, factor: Tensor | None, last: bool) -> tuple[Tensor, Tensor]:
    result = native.fake_quantize(weight, to, factor, mask=True, last=last)
    assert result is not None
    assert result[1] is not None
    return result[0], result[1]


def _convolved_backward(
    grad: Tensor,
    above: Tensor,
    x: Tensor,
    weight: Tensor,
    factor: Tensor | None,
    scale: Tensor,
    zero_point: Tensor,
    *rest: Any,
) -> Any:
    settings, wanted = _Settings(*rest[:7]), rest[7]
    heavy = _is_heavy(x, weight)
    grad = native.masked(ready(grad), above) if settings.relu else grad
    grad = _in_working_order(grad, heavy)
    weight, used, dead, to = _scaled(weight, factor, scale, zero_point, settings)
    rounded, inside = _rounded_again(weight, to, used, last=not heavy)
    effective = rounded if dead is None else rounded.masked_fill(dead.reshape(-1, *[1] * (weight.dim() - 1)), 0)
    *window, groups = settings.geometry
    how = *window, False, [0] * len(settings.stride), groups
    found = torch.ops.aten.convolution_backward(
        grad, _in_working_order(x, heavy), effective, [len(weight)], *how, wanted
    )
    of_x, of_rounded, of_bias = (grad.new_empty(0) if one is None else one for one in found)
    of_x = stored(of_x, x) if wanted[0] else of_x
    if not wanted[1]:
        return of_x, of_rounded, grad.new_empty(0), of_bias
    of_rounded = in_order(of_rounded, rounded.stride())
    of_dead = None
    if dead is not None:
        of_dead = (of_rounded[dead] * rounded[dead]).flatten(1).sum(1)
        of_rounded[dead] = 0
    of_weight, of_factor = native.masked_rows_(of_rounded, inside, weight, used)
    if of_factor is None:
        return of_x, of_weight, grad.new_empty(0), of_bias
    if of_dead is not None:
        of_factor[dead] = of_dead
    return of_x, of_weight, of_factor, of_bias


def _like_convolved_backward(grad: Tensor, above: Tensor, x: Tensor, weight: Tensor, factor: Any, *rest: Any) -> Any:
    of_x, of_weight, of_bias = rest[-1]
    return (
        room_like(x) if of_x else x.new_empty(0),
        torch.empty_like(weight) if of_weight else x.new_empty(0),
        x.new_empty(len(weight) if of_weight and factor is not None else 0),
        x.new_empty(len(weight) if of_bias else 0),
    )


_GEOMETRY = "int quant_min, int quant_max, int[] stride, int[] padding, int[] dilation, int groups, bool relu"
_INPUTS = "(Tensor x, Tensor weight, Tensor? factor, Tensor? bias, "
_FOUR = " -> (Tensor, Tensor, Tensor, Tensor)"
_CONVOLVED = Kernel(
    f"convolved{_INPUTS}Tensor scale, Tensor zero_point, {_GEOMETRY}){_FOUR}",
    _convolved,
    storing("convolved", _like_convolved, images=True),
    any_layout=True,
)
_OBSERVED = Kernel(
    f"observed_convolved{_INPUTS}Tensor(a!) scale, Tensor(b!) zero_point, {_GEOMETRY}, "
    f"Tensor(c!) low, Tensor(d!) high, Tensor(e!) skipped, float constant, bool symmetric){_FOUR}",
    _convolved,
    storing("observed_convolved", _like_convolved, images=True),
    any_layout=True,
)
_BACKWARD = Kernel(
    "convolved_backward(Tensor grad, Tensor above, Tensor x, Tensor weight, Tensor? factor, Tensor scale, "
    f"Tensor zero_point, {_GEOMETRY}, bool[] wanted){_FOUR}",
    _convolved_backward,
    storing("convolved_backward", _like_convolved_backward, images=True),
    any_layout=True,
)


class _Convolved(torch.autograd.Function):
    """Attaches the gradient to what was computed apart from autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        factor: Tensor | None,
        bias: Tensor | None,
        computed: tuple[Tensor, ...],
        numbers: tuple[Any, ...],
        wanted: list[bool],
    ) -> Tensor:
        y, above, scale, zero_point = computed
        ctx.numbers, ctx.wanted = numbers, wanted
        ctx.save_for_backward(above, x, weight, factor, scale, zero_point)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        of = _BACKWARD(grads[0], *ctx.saved_tensors, *ctx.numbers, ctx.wanted)
        of_x, of_weight, of_bias = ctx.wanted
        with_factor = of_weight and ctx.saved_tensors[3] is not None
        return (
            of[0] if of_x else None,
            of[1] if of_weight else None,
            of[2] if with_factor else None,
            of[3] if of_bias else None,
            *(None,) * 3,
        )


class Convolved(NamedTuple):
    """What a convolution in a graph was made of and gave, for who rounds it before anybody else looks at it."""

    inputs: tuple[Tensor | None, ...]
    computed: tuple[Tensor, ...]
    settings: _Settings
    wanted: list[bool]

    @property
    def relu(self) -> bool:
        return self.settings.relu

    def to_be_rounded(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """The result, its bits, and no ends, as these are not known; None if the bits might lie in another order."""
        y, above, *_ = self.computed
        images = y.dim() == 4 and y.shape[1] > 1 and y[0, 0].numel() > 1
        return (y, above, y.new_empty(0)) if images else None

    def attached(self, masked: bool) -> Tensor:
        """The result with its gradient, which passes where the bits are set, if they are to mask it."""
        settings = self.settings._replace(relu=masked)
        out: Tensor = _Convolved.apply(*self.inputs, self.computed, tuple(settings), self.wanted)
        return out


def _dense(weight: Tensor) -> bool:
    return weight.is_contiguous() or is_last(weight)


def _vectors(one: Any, length: int) -> bool:
    return one is None or (one.dtype is torch.float32 and one.numel() == length)


def convolution_in_graph(
    x: Tensor,
    weight: Tensor,
    factor: Tensor | None,
    bias: Tensor | None,
    to: Rounding,
    skipped: Tensor | None,
    geometry: Convolving,
    relu: bool,
) -> Convolved | None:
    """The convolution with the rounded ``weight·factor``, and ReLU, in code that is being compiled.

    Args:
        x: float ``[N, C, …]``.
        weight: float ``[out, in / groups, …]``.
        factor: ``[out]``; a channel of factor zero is rounded as if it were one, and then zero.
        bias: ``[out]``.
        to: how each output channel's weights are rounded; a running range is updated first.
        skipped: counts the ranges that are not finite.
        relu: cut the result at zero.

    Returns:
        The result, channels_last if ``x`` is so, to be attached; None, with nothing changed, where the CPU's operator
        does not serve: other devices, dtypes and layouts, autocast, parameters that are not one for each channel,
        export.
    """
    rows = len(weight)
    numbers = [to.scale] if to.running is None else [to.scale, to.running.low, to.running.high]
    if not (native.available and to.rows and rows > 1 and x.dim() == weight.dim() and x.numel() and weight.numel()):
        return None
    if is_exporting() or torch.is_autocast_enabled("cpu") or to.zero_point.dtype is not torch.int32:
        return None
    if x.device.type != "cpu" or weight.device.type != "cpu" or not _dense(weight):
        return None
    if not all(_vectors(one, rows) for one in (*numbers, factor, bias)):
        return None
    if x.dtype is not torch.float32 or weight.dtype is not torch.float32:
        return None
    settings = _Settings(to.quant_min, to.quant_max, *geometry, relu)
    with torch.no_grad():
        values = x, weight, factor, bias, to.scale, to.zero_point, *settings
        if to.running is None:
            computed: Any = _CONVOLVED(*values)
        else:
            running = to.running
            computed = _OBSERVED(*values, running.low, running.high, skipped, running.constant, running.symmetric)
    of_weight = weight.requires_grad or (factor is not None and factor.requires_grad)
    wanted = [x.requires_grad, of_weight, bias is not None and bias.requires_grad]
    return Convolved((x, weight, factor, bias), computed, settings, wanted)
