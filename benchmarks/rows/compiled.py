"""The QAT training step under ``torch.compile``, beside the float one under it.

Compiling takes a minute or two for each contender: rows that are measured when asked for.
"""

from collections.abc import Iterator
from functools import partial

import torch

from ..models import NETS
from ..report import Goal
from ..timing import Samples, seconds
from ..workloads import training_step
from .base import Benchmark, Setup
from .training import footprints

SECTION = "QAT training step, compiled by Inductor (batch 8, 3×128×128, SGD)"
_ROUNDS = 10


def _time(net: str, frozen: bool, setup: Setup) -> Samples:
    torch.compiler.reset()
    make = partial(training_step, net=net, frozen=frozen, compiled=True)
    return setup.race(lambda backend: partial(seconds, make(backend)), rounds=_ROUNDS)


def benchmarks() -> Iterator[Benchmark]:
    """Every row of this table."""
    for frozen, limit, name in ((False, 1.20, "compiled step"), (True, 1.10, "compiled late step")):
        for net in NETS:
            goal = Goal("eagerq / float", limit)
            yield Benchmark(SECTION, f"{name} {net}", "ms", goal, partial(_time, net, frozen), extra=True)
    for net in NETS:
        goal = Goal("eagerq / float", 1.25)
        measure = partial(footprints, "compiled-step", net)
        yield Benchmark(SECTION, f"compiled peak memory of step {net}", "MB", goal, measure, extra=True)
