"""From eager models to Q/DQ graphs, and the graph flow for models that can be traced."""

from eagerq.pt2e.exporting import export

__all__ = ["export"]
