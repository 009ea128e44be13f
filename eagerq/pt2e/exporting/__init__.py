"""Eager int8 models as Q/DQ graphs."""

from eagerq.pt2e.exporting.program import export

__all__ = ["export"]
