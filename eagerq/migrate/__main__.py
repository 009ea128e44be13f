"""The command: shows what would change, or changes it, and lists what is left to decide."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from eagerq.errors import EagerqError, MissingExtraError
from eagerq.migrate import files
from eagerq.migrate.result import Result
from eagerq.migrate.source import migrate_source

_DONE, _LEFT, _WRONG = 0, 1, 2
_EPILOG = """\
exit status: 0 when nothing is left to do or decide, 1 when a decision is left (or, with --check, a change), 2 for
paths that cannot be read or parsed. '-' reads standard input; with --write its new text goes to standard output."""


class _Outcome(NamedTuple):
    changed: bool
    undecided: int


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m eagerq.migrate",
        description="Rename imports and names from torch.ao.quantization, torch.ao.nn and their older spellings to "
        "eagerq's. Shows a diff; what cannot be decided is listed.",
        epilog=_EPILOG,
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", help="a file, a folder (its *.py), or '-'")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--write", action="store_true", help="change the files")
    mode.add_argument("--check", action="store_true", help="only name the files that would change")
    return parser.parse_args(argv)


def _migrate(name: str, options: argparse.Namespace) -> _Outcome:
    """One file, or '-'."""
    if name == "-":
        source = files.decode(sys.stdin.buffer.read())
    else:
        source = files.read(Path(name))
    result = migrate_source(source.text)
    shown = "<stdin>" if name == "-" else name
    changed = result.text != source.text
    if options.check:
        if changed:
            print(f"{shown}: has names to migrate")
    elif not options.write:
        sys.stdout.writelines(_diff(shown, source.text, result.text))
    elif name == "-":
        sys.stdout.buffer.write(result.text.encode(source.encoding))
    elif changed:
        files.replace(Path(name), files.Source(result.text, source.encoding))
        print(f"{shown}: migrated")
    _list(shown, result)
    return _Outcome(changed, len(result.undecided))


def _diff(name: str, old: str, new: str) -> list[str]:
    before, after = (re.findall("[^\n]*\n|[^\n]+", text) for text in (old, new))
    lines = difflib.unified_diff(before, after, f"{name} (torch.ao)", f"{name} (eagerq)")
    return [line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines]


def _list(name: str, result: Result) -> None:
    for undecided in result.undecided:
        print(f"{name}:{undecided}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; gives its exit status."""
    options = _arguments(argv)
    outcomes: list[_Outcome] = []
    failed = False
    try:
        paths = [path for given in options.paths for path in _expand(given)]
    except EagerqError as error:
        print(error, file=sys.stderr)
        return _WRONG
    for name in paths:
        try:
            outcomes.append(_migrate(name, options))
        except MissingExtraError as error:
            print(error, file=sys.stderr)
            return _WRONG
        except (EagerqError, OSError) as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed = True
    changed = sum(outcome.changed for outcome in outcomes)
    left = sum(outcome.undecided for outcome in outcomes)
    verb = "migrated" if options.write else "to migrate"
    print(f"{len(outcomes)} files read, {changed} {verb}, {left} places to decide", file=sys.stderr)
    if failed:
        return _WRONG
    return _LEFT if left or (options.check and changed) else _DONE


def _expand(given: str) -> list[str]:
    return [given] if given == "-" else [str(path) for path in files.find([Path(given)])]


if __name__ == "__main__":
    sys.exit(main())
