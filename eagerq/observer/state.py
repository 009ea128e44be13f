"""The statistics of a model's observers, taken out of its state_dict and put back."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import nn

from eagerq.errors import CheckpointError

__all__ = ["get_observer_state_dict", "load_observer_state_dict"]

_MARK = "activation_post_process"


def get_observer_state_dict(mod: nn.Module) -> OrderedDict[str, Any]:
    """The entries of ``mod.state_dict()`` that belong to observers: the ranges found by calibration.

    Args:
        mod: a prepared model.

    Example:
        >>> import torch, eagerq
        >>> net = eagerq.QuantWrapper(nn.Linear(2, 2))
        >>> net.qconfig = eagerq.default_qconfig
        >>> list(get_observer_state_dict(eagerq.prepare(net)))[:2]
        ['quant.activation_post_process.eps', 'quant.activation_post_process.min_val']
    """
    state: Any = mod.state_dict()
    found = OrderedDict((name, value) for name, value in state.items() if _MARK in name)
    found._metadata = state._metadata  # type: ignore[attr-defined]  # versions of the formats, as in a state_dict
    return found


def load_observer_state_dict(mod: nn.Module, obs_dict: Mapping[str, Any]) -> None:
    """Put the statistics of :func:`get_observer_state_dict` into a model prepared alike.

    Args:
        mod: a prepared model; its weights stay as they are.
        obs_dict: statistics of all its observers.

    Raises:
        CheckpointError: when names or shapes do not fit; the model is then as it was.
    """
    state: Any = mod.state_dict()
    own = [name for name in state if _MARK in name]
    given = [name for name in obs_dict if _MARK in name]
    for problem, names in (
        ("Missing keys for observer", [name for name in own if name not in obs_dict]),
        ("Unexpected keys for observer", [name for name in given if name not in state]),
    ):
        if names:
            raise CheckpointError(
                f"{problem} {', '.join(names[:5])} in state_dict",
                module=mod,
                remedy="prepare the model as the one that the statistics come from: same fuse list and qconfig",
            )
    state.update({name: obs_dict[name] for name in given})
    state._metadata = getattr(obs_dict, "_metadata", state._metadata)
    mod.load_state_dict(state)
