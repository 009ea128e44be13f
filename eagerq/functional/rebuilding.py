"""Rounded weights are computed again by the backward pass, not kept for it: the weight itself is there anyway."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eagerq import native
from eagerq.native import Rounding

__all__ = ["Recipe", "is_alone", "rebuilt"]

_autograd: Any = torch._C._autograd


class Recipe(NamedTuple):
    """How a weight was rounded: what rounds it once more, to the very same values."""

    weight: Tensor
    version: int
    factor: Tensor | None
    to: Rounding

    @classmethod
    def of(cls, weight: Tensor, factor: Tensor | None, to: Rounding) -> Recipe:
        """With copies of the parameters, which the next forward pass will change."""
        to = to._replace(scale=to.scale.clone(), zero_point=to.zero_point.clone(), running=None)
        return cls(weight.detach(), weight._version, None if factor is None else factor.detach(), to)

    def __call__(self) -> Tensor:
        if self.weight._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a "
                "weight was changed between forward and backward; step the optimizer after backward"
            )
        result = native.fake_quantize(self.weight, self.to, self.factor, mask=False)
        assert result is not None  # nothing is observed, so nothing can be refused
        return result[0]


class _Rebuilt(NamedTuple):
    recipe: Recipe
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def is_alone() -> bool:
    """Whether nobody else has a say about what is saved for backward passes."""
    return _autograd._top_saved_tensors_default_hooks(True) is None


@contextmanager
def rebuilt(value: Tensor) -> Iterator[None]:
    """Within, what is saved for backward of ``value`` is its recipe, if its gradient function knows one.

    Nothing is other than without where somebody's hooks see what is saved: who makes a forward pass again (activation
    checkpointing) has to find all that it saves to be of one pass, and a recipe is of the first.
    """
    recipe: Recipe | None = getattr(value.grad_fn, "recipe", None)
    if recipe is None or not is_alone() or not _autograd._saved_tensors_hooks_is_enabled():
        yield
        return
    address, count = value.data_ptr(), value.numel()

    def pack(saved: Tensor) -> Any:
        if saved.numel() == count and saved.data_ptr() == address:
            return _Rebuilt(recipe, tuple(saved.shape), saved.stride())
        return saved

    def unpack(kept: Any) -> Any:
        return kept.recipe().as_strided(kept.shape, kept.strides) if isinstance(kept, _Rebuilt) else kept

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
