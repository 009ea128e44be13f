"""Finding, reading and replacing source files."""

from __future__ import annotations

import io
import os
import stat
import tempfile
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from eagerq.errors import InvalidArgumentError, InvalidInputError

__all__ = ["Source", "decode", "find", "read", "replace"]

_SKIPPED = ("__pycache__", "node_modules", "site-packages")


@dataclass(frozen=True)
class Source:
    """Text with all its newlines as they are, and how its bytes were encoded."""

    text: str
    encoding: str


def find(paths: Iterable[Path]) -> Iterator[Path]:
    """The files themselves, and the ``*.py`` under folders but hidden ones, environments and caches.

    Raises:
        InvalidArgumentError: for a path that does not exist.
    """
    for path in paths:
        if path.is_dir():
            yield from _walk(path)
        elif path.exists():
            yield path
        else:
            raise InvalidArgumentError(f"{path} does not exist", remedy="name files or folders")


def _walk(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):
        here = Path(place)
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and name not in _SKIPPED and not (here / name / "pyvenv.cfg").exists()
        )
        yield from (here / name for name in sorted(files) if name.endswith(".py"))


def decode(data: bytes) -> Source:
    """By the declared encoding, as Python would; newlines stay.

    Raises:
        InvalidInputError: when the bytes do not fit it.
    """
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        return Source(data.decode(encoding), encoding)
    except (SyntaxError, UnicodeDecodeError) as error:
        raise InvalidInputError(str(error), remedy="save it in UTF-8, or declare its encoding") from error


def read(path: Path) -> Source:
    """A file's text.

    Raises:
        InvalidInputError: when it cannot be decoded.
        OSError: when it cannot be read.
    """
    return decode(path.read_bytes())


def replace(path: Path, new: Source) -> None:
    """Put new text in a file's place at once, with its mode; through a link, in the place it points to."""
    target = path.resolve()
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(new.text.encode(new.encoding))
        os.chmod(temporary, stat.S_IMODE(target.stat().st_mode))
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise
