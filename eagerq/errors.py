"""The one family of errors that eagerq raises for a user's mistake.

Each message names the module by its qualified name (when a walk has stamped one), says what came,
what was wanted, and how to mend it.  The classes also derive from the built-in type that users of
``torch.ao.quantization`` already catch, so ``except ValueError`` and the like keep working.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from types import FrameType

from torch import nn

__all__ = [
    "CheckpointError",
    "EagerqError",
    "InvalidArgumentError",
    "InvalidConfigError",
    "InvalidInputError",
    "MissingExtraError",
    "NotQuantizedError",
    "UnsupportedError",
    "calling_module",
    "describe",
    "nearest",
    "raising_module",
    "stamp_names",
    "stamped_name",
]

_NAME = "_eagerq_name"
# where users import classes from, the longer path first
_PUBLIC_PACKAGES = (
    "eagerq.intrinsic.qat",
    "eagerq.intrinsic.quantized.dynamic",
    "eagerq.intrinsic.quantized",
    "eagerq.intrinsic",
    "eagerq.nn.qat.dynamic",
    "eagerq.nn.qat",
    "eagerq.nn.quantizable",
    "eagerq.nn.quantized.dynamic",
    "eagerq.nn.quantized",
    "torch.nn",
)


class EagerqError(Exception):
    """Base of every error raised for a user's mistake.

    Args:
        problem: what came and what was wanted, as a sentence without a final full stop.
        module: the module concerned; its qualified name and class open the message.
        remedy: what to do about it.

    Example:
        >>> print(EagerqError("got 3 channels, wanted 4", remedy="check in_channels"))
        got 3 channels, wanted 4. To fix it: check in_channels.
    """

    def __init__(self, problem: str, *, module: nn.Module | None = None, remedy: str | None = None) -> None:
        head = f"{describe(module)}: " if module is not None else ""
        tail = f". To fix it: {remedy}." if remedy else ""
        super().__init__(f"{head}{problem}{tail}")


class InvalidArgumentError(EagerqError, ValueError):
    """An argument whose value cannot be used."""


class InvalidConfigError(EagerqError, AssertionError):
    """A qconfig, observer or module that does not fit; an AssertionError in torch.ao."""


class InvalidInputError(EagerqError, RuntimeError):
    """A tensor of the wrong kind reached a module or an operation."""


class NotQuantizedError(InvalidInputError, ValueError):
    """A float tensor reached a function of quantized ones; a ValueError in torch.ao."""


class UnsupportedError(EagerqError, NotImplementedError):
    """Something that eagerq does not do (on purpose, or not yet)."""


class MissingExtraError(EagerqError, ImportError):
    """An optional package is not installed; the message names the extra that brings it."""


class CheckpointError(EagerqError, RuntimeError):
    """A state_dict that does not fit the model; nothing has been loaded."""


def stamp_names(root: nn.Module) -> None:
    """Write each submodule's qualified name into it, for later messages."""
    for name, module in root.named_modules():
        module.__dict__[_NAME] = name


def describe(module: nn.Module) -> str:
    """``'layer1.conv' (eagerq.nn.quantized.Conv2d)``, or the class alone for a root or unstamped module."""
    cls = type(module)
    package = next((public for public in _PUBLIC_PACKAGES if cls.__module__.startswith(public)), cls.__module__)
    shown = f"{package}.{cls.__name__}"
    name = stamped_name(module)
    return f"'{name}' ({shown})" if name else shown


def stamped_name(module: nn.Module) -> str:
    """The name stamped on a module; empty for a root or an unstamped one."""
    name: str = module.__dict__.get(_NAME, "")
    return name


def calling_module() -> nn.Module | None:
    """The innermost module with a method running, stamped with its name in the outermost one.

    Looks up the stack, which takes a while: for error paths, since foreign modules carry no name otherwise,
    and for tracing.
    """

    def frames() -> Iterator[FrameType]:
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            yield frame
            frame = frame.f_back

    return _innermost(frames())


def raising_module(error: BaseException) -> nn.Module | None:
    """As :func:`calling_module`, where an error was first raised."""
    module, cause = None, error.__cause__ or error.__context__
    if cause is not None:
        module = raising_module(cause)
    if module is None:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        module = _innermost(reversed(frames))
    return module


def _innermost(frames: Iterable[FrameType]) -> nn.Module | None:
    running = []
    for frame in frames:
        first = next(iter(frame.f_code.co_varnames), "")
        module = frame.f_locals.get(first)
        if isinstance(module, nn.Module) and (first == "self" or frame.f_code.co_name == "forward"):
            running.append(module)
    if not running:
        return None
    innermost = running[0]
    if _NAME not in innermost.__dict__:
        stamp_names(running[-1])
    return innermost


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """``'conv1', 'conv2'``: the known names most like ``name`` (the first few when none is)."""
    names = [known_name for known_name in known if known_name]
    close = get_close_matches(name, names, n=count, cutoff=0.4) or names[:count]
    return ", ".join(repr(match) for match in close) or "none"
