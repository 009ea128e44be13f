"""The same on a GPU, where there is one: training steps, in float32 and in autocast to bfloat16, and int8 inference."""

from collections.abc import Iterator
from functools import partial

import torch

from ..models import NETS
from ..report import Goal
from ..timing import Samples, repeated, seconds
from ..workloads import Where, inference, training_step
from .base import Benchmark, Setup

SECTION = "On a GPU (batch 64, 3×224×224, channels_last)"
_KINDS = {"": None, ", autocast bf16": torch.bfloat16}


def steps(net: str, frozen: bool, where: Where, setup: Setup) -> Samples:
    """A training step of each contender."""
    return setup.race(
        lambda backend: partial(seconds, training_step(backend, net, frozen, torch.channels_last, where)),
    )


def forwards(net: str, batch: int, device: str, setup: Setup) -> Samples:
    """int8 inference of each contender (torch.ao's runs on no GPU)."""
    return setup.race(lambda backend: repeated(inference(backend, net, batch, device)))


def benchmarks() -> Iterator[Benchmark]:
    """Every row of this table."""
    for net in NETS:
        for kind, dtype in _KINDS.items():
            where = Where("cuda", 64, 224, dtype)
            for frozen, limit in ((False, 1.30), (True, 1.20)):
                name = f"GPU {'late ' if frozen else ''}step {net}{kind}"
                goal = Goal("eagerq / float", limit)
                yield Benchmark(SECTION, name, "ms", goal, partial(steps, net, frozen, where), cuda=True)
        for batch in (1, 64):
            goal = Goal("eagerq / float", 1.0)
            measure = partial(forwards, net, batch, "cuda")
            yield Benchmark(SECTION, f"GPU int8 {net} batch {batch}", "ms", goal, measure, cuda=True)
