"""The QAT training step beside the float one: time, and memory at its peak."""

from collections.abc import Iterator
from functools import partial

from ..footprint import measure
from ..models import NETS
from ..report import Goal
from ..timing import Samples, interleave, seconds
from ..workloads import training_step
from .base import Benchmark, Setup

SECTION = "QAT training step (batch 8, 3×128×128, SGD)"


def _time(net: str, frozen: bool, setup: Setup) -> Samples:
    steps = {name: training_step(backend, net, frozen) for name, backend in setup.backends.items()}
    return interleave({name: partial(seconds, step) for name, step in steps.items()}, setup.repeats)


def footprints(task: str, net: str, setup: Setup) -> Samples:
    """One memory figure for each contender."""
    sizes = {name: measure(task, net, name, setup.engine) for name in setup.backends}
    return {name: [size] for name, size in sizes.items() if size is not None}


def benchmarks() -> Iterator[Benchmark]:
    """Every row of this table."""
    for net in NETS:
        goal = Goal("eagerq / float", 1.30)
        yield Benchmark(SECTION, f"step {net}", "ms", goal, partial(_time, net, False))
    for net in NETS:
        goal = Goal("eagerq / float", 1.20)
        name = f"late step {net} (observers off + BN frozen)"
        yield Benchmark(SECTION, name, "ms", goal, partial(_time, net, True))
    for net in NETS:
        goal = Goal("eagerq / float", 1.25)
        yield Benchmark(SECTION, f"peak memory of step {net}", "MB", goal, partial(footprints, "step", net))
