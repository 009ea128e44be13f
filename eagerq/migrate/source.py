"""The one function: source text in, source text out."""

from __future__ import annotations

import re

from eagerq.errors import InvalidInputError, MissingExtraError
from eagerq.migrate.result import Result

__all__ = ["migrate_source"]


def migrate_source(text: str) -> Result:
    """Rename in a program what eagerq has in place of ``torch.ao.quantization`` and its kin.

    Args:
        text: Python source.

    Returns:
        The new source, and the places that need a decision.

    Raises:
        InvalidInputError: when the text is no Python.
        MissingExtraError: when libcst is not installed.

    Example:
        >>> migrate_source("from torch.ao.quantization import QuantStub as Q  # in").text
        'from eagerq import QuantStub as Q  # in'
    """
    try:
        import libcst
    except ModuleNotFoundError as error:
        raise MissingExtraError("migration needs libcst", remedy="pip install 'eagerq[migrate]'") from error
    from eagerq.migrate.loose import plan_loose_ends
    from eagerq.migrate.planning import plan
    from eagerq.migrate.program import read
    from eagerq.migrate.rewriting import rewrite

    if not re.search(r"\btorch", text):
        return Result(text)
    try:
        program = read(text)
    except libcst.ParserSyntaxError as error:
        problem = f"this is no Python 3 that libcst can read: {' '.join(error.message.split())}"
        raise InvalidInputError(problem, remedy="mend or leave out the file") from error
    made = plan(program)
    plan_loose_ends(program, made)
    return Result(rewrite(text, program, made), tuple(sorted(set(made.undecided))))
