"""int8 inference beside float and torch.ao."""

from collections.abc import Iterator
from functools import partial

import torch

from ..models import linear
from ..report import Goal
from ..timing import Samples, interleave, repeated
from ..workloads import classifier, converted, inference
from .base import Benchmark, Setup

SECTION = "int8 inference (224×224, channels_last)"
_LIMITS = {"resnet18": 0.85, "mobilenet_v2": 0.55}
_LINEAR_LIMIT = 0.45


def _classifier(net: str, batch: int, setup: Setup) -> Samples:
    models = {name: classifier(backend, net) for name, backend in setup.backends.items()}
    return interleave({name: repeated(inference(model, batch)) for name, model in models.items()}, setup.repeats)


def _linear(setup: Setup) -> Samples:
    """The layer by itself: its input is quantized beforehand."""
    x = torch.randn(128, 3072)
    subjects = {}
    with torch.inference_mode():
        for name, backend in setup.backends.items():
            quant, layer = converted(backend, linear, x).children()
            subjects[name] = repeated(partial(layer, quant(x)))
        return interleave(subjects, setup.repeats)


def benchmarks() -> Iterator[Benchmark]:
    """Every row of this table."""
    for net, limit in _LIMITS.items():
        for batch in (1, 8):
            goal = Goal("eagerq / torch.ao", limit)
            measure = partial(_classifier, net, batch)
            yield Benchmark(SECTION, f"int8 {net} batch {batch}", "ms", goal, measure)
    goal = Goal("eagerq / torch.ao", _LINEAR_LIMIT)
    yield Benchmark(SECTION, "int8 Linear 128×3072→768", "ms", goal, _linear)
