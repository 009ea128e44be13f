"""Faster inference: a converted model's forward as a plan for the shapes seen."""

from eagerq.freeze.module import Frozen, freeze

__all__ = ["Frozen", "freeze"]
