"""What torch.export says when it cannot trace a model, in words that lead to the place and the fix."""

from __future__ import annotations

import re
from typing import Any

from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from eagerq.errors import EagerqError, InvalidArgumentError, UnsupportedError, raising_module

__all__ = ["explained"]

_LIST = "'What cannot be exported' in docs/exporting.md lists such cases"
# torch's own reports of what it was told about shapes and what it found
_CONFLICT = re.compile(r"Constraints violated|conflicts between user-specified ranges")
# of those, what follows the conclusions and is for torch's developers
_ASIDE = re.compile(r"If you're using|Suggested fixes|The error above occurred|For more information")
_ONE = re.compile(r"specialized it to be a constant \(1\)|0/1 specialized")


def explained(error: Exception, dynamic_shapes: Any) -> EagerqError:
    """The error to raise from one that torch.export has raised."""
    said = str(error)
    if _CONFLICT.search(said):
        return InvalidArgumentError(
            f"dynamic_shapes asks for sizes that the model does not allow. torch.export says: {_conclusions(said)}",
            remedy=_remedy_of_conflict(said),
        )
    module, first = raising_module(error), f"{type(error).__name__}: {_first_line(said)}"
    if isinstance(error, GuardOnDataDependentSymNode):
        return UnsupportedError(
            f"what it does depends on the data, which a graph cannot hold ({first})",
            module=module,
            remedy="compute both ways and choose with torch.where, or leave the choice to the program's caller; "
            + _LIST,
        )
    if module is None and isinstance(error, TypeError):
        return InvalidArgumentError(
            f"the model's forward cannot take these example_inputs: {_first_line(said)}",
            remedy="pass its positional arguments, all that have no default, as a tuple such as (x,)",
        )
    if module is None and dynamic_shapes is not None:
        return InvalidArgumentError(
            f"torch.export cannot take these example_inputs and dynamic_shapes: {first}",
            remedy="give dynamic_shapes the structure of example_inputs, such as ({0: torch.export.Dim('batch')},)",
        )
    return UnsupportedError(f"torch.export cannot trace it: {first}", module=module, remedy=f"change that; {_LIST}")


def _first_line(said: str) -> str:
    return next(iter(said.strip().splitlines()), "").rstrip(".:")


def _conclusions(said: str) -> str:
    """The first points of torch's list, without advice."""
    points = [_ASIDE.split(line)[0].strip(" -.") for line in said.splitlines() if line.strip().startswith("-")]
    return "; ".join(points[:3])


def _remedy_of_conflict(said: str) -> str:
    if _ONE.search(said):
        return "give example_inputs at least 2 in each dynamic dimension: torch.export takes a 1 for a constant"
    _, _, suggested = said.partition("Suggested fixes:")
    fixes = [line.strip() for line in suggested.partition("\n\n")[0].splitlines() if line.strip()]
    ask = f"ask for what holds ({', '.join(fixes)})" if fixes else "ask for less"
    return f"have the model take sizes from x.shape rather than write them as numbers, or {ask}"
