"""The QAT training step beside the float one: time, and memory at its peak."""

from collections.abc import Iterator
from functools import partial

import torch

from ..footprint import measure
from ..models import NETS
from ..report import Goal
from ..timing import Samples, seconds
from ..workloads import training_step
from .base import Benchmark, Setup

SECTION = "QAT training step (batch 8, 3×128×128, SGD, contiguous unless said)"
_LAYOUTS = {"": torch.contiguous_format, ", channels_last": torch.channels_last}


def _time(net: str, frozen: bool, layout: torch.memory_format, setup: Setup) -> Samples:
    task = "" if frozen else "training"
    return setup.race(lambda backend: partial(seconds, training_step(backend, net, frozen, layout)), task)


def footprints(task: str, net: str, setup: Setup) -> Samples:
    """One memory figure for each contender."""
    sizes = {name: measure(task, net, name, setup.engine) for name in setup.backends}
    return {name: [size] for name, size in sizes.items() if size is not None}


def benchmarks() -> Iterator[Benchmark]:
    """Every row of this table."""
    for suffix, layout in _LAYOUTS.items():
        for net in NETS:
            goals = (Goal("eagerq / float", 1.30), Goal("eagerq / best peer", 1.0))
            yield Benchmark(SECTION, f"step {net}{suffix}", "ms", goals, partial(_time, net, False, layout))
        for net in NETS:
            goal = Goal("eagerq / float", 1.20)
            name = f"late step {net} (observers off + BN frozen){suffix}"
            yield Benchmark(SECTION, name, "ms", goal, partial(_time, net, True, layout))
    for net in NETS:
        goal = Goal("eagerq / float", 1.25)
        yield Benchmark(SECTION, f"peak memory of step {net}", "MB", goal, partial(footprints, "step", net))
