"""Cross-layer equalization: weights of neighbouring layers rescaled so that each channel uses its range.

Between two layers with a piecewise linear function (ReLU, LeakyReLU, none) a channel can be divided
by any positive number on one side and multiplied by it on the other.  That number is chosen so that
both weights span the same range (Nagel et al. 2019, arXiv:1906.04721, section 4.1).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from eagerq.errors import InvalidArgumentError, nearest
from eagerq.functional import channel_shape
from eagerq.intrinsic import _FusedModule

__all__ = ["cross_layer_equalization", "equalize"]

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_MOST_ROUNDS = 1000


def _layer(module: Any) -> Any:
    """The Linear or convolution that a module is, or has fused to a ReLU."""
    inner = module[0] if isinstance(module, _FusedModule) else module
    plain = isinstance(inner, _LAYERS)
    if not plain or (inner is not module and not isinstance(module[1], nn.ReLU)):
        raise InvalidArgumentError(
            f"module type not supported: {type(module).__name__}",
            module=module if isinstance(module, nn.Module) else None,
            remedy="pass Linear or convolutions, plain or fused with a ReLU; fold batch norms into them first "
            "(fuse_modules in eval mode)",
        )
    return inner


def _span(weight: Tensor) -> Tensor:
    """Largest less smallest value of each row."""
    low, high = torch.aminmax(weight.flatten(1), dim=1)
    return high - low


def _by_input(layer: Any) -> Tensor:
    """The weight with its input channels first: ``[in, …]`` (a view)."""
    groups = getattr(layer, "groups", 1)
    return layer.weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


@torch.no_grad()
def cross_layer_equalization(module1: nn.Module, module2: nn.Module) -> None:
    """Rescale the channels between two neighbouring layers, in place.

    Args:
        module1, module2: Linear or convolutions (grouped ones too), plain or fused with a ReLU;
            ``module2`` takes what ``module1`` gives, through a piecewise linear function at most.

    Raises:
        InvalidArgumentError: for other modules, or when their channels do not match.

    Example:
        >>> first, second = nn.Linear(2, 3), nn.Linear(3, 1)
        >>> x = torch.randn(4, 2)
        >>> before = second(first(x))
        >>> cross_layer_equalization(first, second)
        >>> bool(torch.allclose(second(first(x)), before, atol=1e-5))
        True
    """
    first, second = _layer(module1), _layer(module2)
    given, taken = first.weight.shape[0], _by_input(second).shape[0]
    if given != taken:
        raise InvalidArgumentError(
            f"it gives {given} channels, but the next layer takes {taken}",
            module=module1,
            remedy="pair layers that follow one another, without a reshape between them",
        )
    one, other = _span(first.weight), _span(_by_input(second))
    factor = torch.sqrt(one / other)
    # a channel that is constant on either side has nothing to share out
    factor = torch.where((one > 0) & (other > 0), factor, 1.0)
    first.weight.div_(factor.reshape(channel_shape(first.weight.dim(), 0)))
    if first.bias is not None:
        first.bias.div_(factor)
    groups, dim = getattr(second, "groups", 1), second.weight.dim()
    shape = [groups, 1, -1, *[1] * (dim - 2)]
    second.weight.copy_((second.weight.unflatten(0, (groups, -1)) * factor.reshape(shape)).flatten(0, 1))


def _pairs(model: nn.Module, groups: Sequence[Sequence[Any]]) -> list[tuple[nn.Module, nn.Module]]:
    modules = dict(model.named_modules())
    names = {module: name for name, module in modules.items()}
    found: list[tuple[nn.Module, nn.Module]] = []
    for group in groups:
        if len(group) < 2:
            raise InvalidArgumentError(
                f"Group must have at least two modules, got {list(group)}", remedy="list layers that follow one another"
            )
        chain = []
        for item in group:
            name = names.get(item) if isinstance(item, nn.Module) else item
            if name not in modules:
                known = f"; nearest names: {nearest(item, modules)}" if isinstance(item, str) else ""
                raise InvalidArgumentError(
                    f"module {item!r} is not in the model{known}", module=model, remedy="name modules of the model"
                )
            chain.append(modules[name])
        for module in chain:
            _layer(module)
        found.extend(pairwise(chain))
    return found


def equalize(
    model: nn.Module, paired_modules_list: Sequence[Sequence[Any]], threshold: float = 1e-4, inplace: bool = True
) -> nn.Module:
    """Equalize neighbouring layers, again and again until the weights hardly change.

    Args:
        model: float model in which batch norms are folded already.
        paired_modules_list: groups of two or more layers that follow one another, as modules of
            ``model`` or by qualified name.
        threshold: stop when the changes of one round have norms that sum to less.
        inplace: change ``model`` itself rather than a copy.

    Returns:
        The model; it computes what it did, up to rounding.

    Raises:
        InvalidArgumentError: for a group of one, or a module that is not in the model or not
            supported; nothing is changed.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> equalize(net, [["0", "2"]]) is net
        True
    """
    names = {module: name for name, module in model.named_modules()}
    groups = [
        [names.get(item, item) if isinstance(item, nn.Module) else item for item in group]
        for group in paired_modules_list
    ]
    if not inplace:
        model = copy.deepcopy(model)
    pairs = _pairs(model, groups)
    layers = {_layer(module): None for pair in pairs for module in pair}
    for _ in range(_MOST_ROUNDS):
        before = [layer.weight.detach().clone() for layer in layers]
        for first, second in pairs:
            cross_layer_equalization(first, second)
        moved = sum(
            torch.linalg.vector_norm(layer.weight.detach() - old) for layer, old in zip(layers, before, strict=True)
        )
        if moved < threshold:
            return model
    warnings.warn(f"weights still change by {float(moved):.2g} after {_MOST_ROUNDS} rounds", stacklevel=2)
    return model
