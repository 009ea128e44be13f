"""Renames in programs: from torch.ao's names to eagerq's. See ``python -m eagerq.migrate --help``."""

from eagerq.migrate.result import Result, Undecided
from eagerq.migrate.source import migrate_source

__all__ = ["Result", "Undecided", "migrate_source"]
