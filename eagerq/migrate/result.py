"""What a migration gives back."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Result", "Undecided"]


@dataclass(frozen=True, order=True)
class Undecided:
    """A place that was left as it is.

    Attributes:
        line: from 1.
        column: from 1.
        reason: what stands there, and why it stays.
        remedy: what to do about it.
    """

    line: int
    column: int
    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.line}:{self.column}: {self.reason}; {self.remedy}"


@dataclass(frozen=True)
class Result:
    """A migrated program.

    Attributes:
        text: the new source; the old one, to the byte, where nothing changed.
        undecided: what is left to do by hand, in the order of the text.
    """

    text: str
    undecided: tuple[Undecided, ...] = ()
