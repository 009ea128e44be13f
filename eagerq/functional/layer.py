"""A convolution with a rounded weight and its batch norm, in one step each way."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from eagerq import native
from eagerq.functional.in_c import in_order, keep, kept, round_in_c, serves_rounding, unmoved, worth_rebuilding
from eagerq.functional.normalizing import apart, normalized_again
from eagerq.functional.rebuilding import Recipe, is_alone
from eagerq.native import Norm, Rounding

__all__ = ["Convolving", "conv_bn_in_c"]

_convolution: Any = torch.convolution  # torch's stubs leave out what moves the window
_autograd: Any = torch._C._autograd
_PLAIN = (Tensor, torch.nn.Parameter)


class Convolving(NamedTuple):
    """How a convolution's window moves."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """The convolution."""
        *window, groups = self
        y: Tensor = _convolution(x, weight, None, *window, False, (0,), groups)
        return y

    def backward(self, grad: Tensor, x: Tensor, weight: Tensor, of_x: bool, of_weight: bool) -> Any:
        """Its gradients for ``x`` and ``weight``, None for what is not wanted."""
        if not (of_x or of_weight):
            return None, None
        *window, groups = self
        wanted = of_x, of_weight, False
        return torch.ops.aten.convolution_backward(grad, x, weight, None, *window, False, (0,), groups, wanted)[:2]

    def gives_several(self, x: Tensor, weight: Tensor) -> bool:
        """Whether an output channel has two values or more."""
        if x.shape[0] > 1:
            return True
        each = zip(x.shape[2:], weight.shape[2:], self.stride, self.padding, self.dilation, strict=True)
        return any((size + 2 * pad - gap * (taps - 1) - 1) // step for size, taps, step, pad, gap in each)


class _ConvBn(torch.autograd.Function):
    """As rounding ``weight·factor``, convolving, and :func:`batch_norm_of_scaled`, where factor = gamma / spread."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        gamma: Tensor,
        beta: Tensor,
        convolving: Convolving,
        norm: Norm,
        relu: bool,
        to: Rounding,
        made: tuple[Tensor, ...],
    ) -> Tensor:
        rounded, inside, factor, spread = made
        y = convolving(x, rounded)
        y = y if native.serves(y) else y.contiguous()
        out, batch, passing = native.batch_norm(y, factor, gamma, beta, norm, relu, True)
        ctx.convolving, ctx.eps, ctx.alone = convolving, norm.eps, is_alone()
        ctx.recipe = Recipe.of(weight, factor, to) if ctx.alone and worth_rebuilding(weight) else None
        copies: tuple[Tensor | None, Tensor, Tensor]
        if ctx.recipe is None:  # the next forward pass writes over scale and zero point
            ctx.to, copies = to._replace(running=None), (rounded, to.scale.clone(), to.zero_point.clone())
        else:
            ctx.to, copies = ctx.recipe.to, (None, ctx.recipe.to.scale, ctx.recipe.to.zero_point)
        keep(ctx, passing, x, weight, gamma, beta, y, inside, factor, spread, *copies, *batch)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        saved, bits = kept(ctx)
        x, weight, gamma, beta, y, inside, factor, spread, rounded, scale, zero_point, *batch = saved
        wanted = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():
            to = ctx.to._replace(scale=scale, zero_point=zero_point)
            found = _to_be_differentiated(ctx, grads[0], bits, (x, weight, gamma, beta), spread, to)
            return *found, *(None,) * 5
        unmoved(weight, gamma)
        grad = in_order(grads[0], y.stride())
        # nobody else has seen y, unless a hook has that saves it
        last = ctx.alone and not _autograd._get_current_graph_task_keep_graph()
        gradients = native.batch_norm_backward(grad, y, factor, gamma, native.Batch(*batch), bits, ctx.eps, over=last)
        of_y, of_factor, of_gamma, of_beta = gradients
        rounded = ctx.recipe() if rounded is None else rounded
        of_x, of_rounded = ctx.convolving.backward(of_y, x, rounded, wanted[0], wanted[1] or wanted[2])
        of_weight = None
        if of_rounded is not None:
            of_rounded = in_order(of_rounded, weight.stride())
            of_weight, other = native.masked_rows(of_rounded, inside, weight, factor, len(weight), over=True)
            assert other is not None
            native.fold_backward_(of_gamma, spread, of_factor, other)
        found = of_x, of_weight, of_gamma, of_beta
        return *(one if wants else None for one, wants in zip(found, wanted, strict=True)), *(None,) * 5


def _to_be_differentiated(
    ctx: Any, grad: Tensor, bits: Tensor | None, inputs: tuple[Tensor, ...], spread: Tensor, to: Rounding
) -> Any:
    """The gradients by operators that have a gradient themselves."""
    x, weight, gamma, beta = inputs = apart(*inputs)
    folded = gamma / spread
    factor = torch.where(folded == 0, 1.0, folded)
    rounded = round_in_c(weight, to, factor)
    assert rounded is not None  # nothing is observed, so nothing can be refused
    y = ctx.convolving(x, rounded)
    return normalized_again(ctx, grad, bits, (y, factor, gamma, beta), inputs)


def conv_bn_in_c(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    to: Rounding,
    convolving: Convolving,
    norm: Norm,
    relu: bool,
) -> Tensor | None:
    """Batch norm in training of the convolution of ``x`` with ``weight``, which is rounded as folding will leave it.

    Args:
        x: float ``[N, C, …]``.
        weight: float ``[out, in / groups, …]``.
        gamma, beta: weight and bias of the batch norm, ``[out]``.
        to: how the rows of the scaled weight are rounded; a running range is updated first.
        norm: the running statistics, which are updated; the variance before that scales the weight.
        relu: cut the result at zero.

    Returns:
        Tensor; None, with nothing changed, where C does not serve: other dtypes, devices or layouts, an image without
        its batch, one value in a channel, weights that are not finite, no gradient to be kept.
    """
    if not _serves(x, weight, to, [gamma, beta, norm.running_mean, norm.running_var]):
        return None
    if not convolving.gives_several(x, weight):
        return None
    of_weight = weight.requires_grad or gamma.requires_grad
    if not torch.is_grad_enabled() or not (of_weight or x.requires_grad or beta.requires_grad):
        return None
    spread = torch.sqrt(norm.running_var.detach() + norm.eps)
    factor = native.fold(gamma, spread)
    rounding = native.fake_quantize(weight, to, factor, mask=of_weight)
    if rounding is None:
        return None
    made = *rounding, factor, spread
    out: Tensor = _ConvBn.apply(x, weight, gamma, beta, convolving, norm, relu, to, made)
    return out


def _serves(x: Tensor, weight: Tensor, to: Rounding, vectors: list[Tensor]) -> bool:
    if x.dim() != weight.dim() or x.dim() < 3 or x.dtype is not torch.float32 or not x.numel():
        return False
    if torch._C._are_functorch_transforms_active() or not native.serves(x):
        return False
    if not to.rows or not serves_rounding(weight, to, vectors[0]):
        return False
    shape = weight.shape[:1]
    return all(
        one.dtype is torch.float32 and one.shape == shape and one.is_contiguous() and type(one) in _PLAIN
        for one in vectors
    )
