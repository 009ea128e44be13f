"""int8 inference beside float and torch.ao."""

from collections.abc import Iterator
from functools import partial

import torch

from ..backends import Backend
from ..models import linear
from ..report import Goal
from ..timing import Samples, Timed, repeated
from ..workloads import converted, inference
from .base import Benchmark, Setup

SECTION = "int8 inference (224×224, channels_last)"
_LIMITS = {"resnet18": 0.85, "mobilenet_v2": 0.55}
_LINEAR_LIMIT = 0.45


def _classifier(net: str, batch: int, setup: Setup) -> Samples:
    return setup.race(lambda backend: repeated(inference(backend, net, batch)), task="inference")


def _linear(setup: Setup) -> Samples:
    """The layer by itself: its input is quantized beforehand."""
    x = torch.randn(128, 3072)

    def subject(backend: Backend) -> Timed:
        quant, layer = converted(backend, linear, x).children()
        return repeated(partial(layer, quant(x)))

    with torch.inference_mode():
        return setup.race(subject)


def benchmarks() -> Iterator[Benchmark]:
    """Every row of this table."""
    for net, limit in _LIMITS.items():
        for batch in (1, 8):
            goals = (Goal("eagerq / torch.ao", limit), Goal("eagerq / best peer", 1.0))
            yield Benchmark(SECTION, f"int8 {net} batch {batch}", "ms", goals, partial(_classifier, net, batch))
    goal = Goal("eagerq / torch.ao", _LINEAR_LIMIT)
    yield Benchmark(SECTION, "int8 Linear 128×3072→768", "ms", goal, _linear)
