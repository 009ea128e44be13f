"""What a converted model weighs, and what it costs to get there."""

import io
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from time import perf_counter

import torch
from torch import nn

from ..backends import Backend
from ..footprint import ROOT
from ..models import NETS
from ..report import Goal
from ..timing import Samples, Timed, seconds
from ..workloads import classifier
from .base import Benchmark, Setup
from .training import footprints

SECTION = "The converted model, and the way there"
_WAY = "prepare_qat + convert"
_FEW = 5  # rounds that are enough where a round is long and steady


def _checkpoint(net: str, setup: Setup) -> Samples:
    """Bytes of the saved state_dict, beside what its integers, biases and scales need by themselves."""
    sizes: Samples = {}
    for name, backend in setup.backends.items():
        file = io.BytesIO()
        torch.save(classifier(backend, net).state_dict(), file)
        sizes[name] = [float(file.tell())]
    layers = [m for m in NETS[net](Backend()).modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    # a byte for each weight, a float bias and a float scale for each output channel
    sizes["needed"] = [float(sum(layer.weight.numel() + 8 * len(layer.weight) for layer in layers))]
    return sizes


def _way(backend: Backend, net: str, example: torch.Tensor) -> Timed:
    """prepare_qat and convert, each leaving its input as it was; the forward between them is not counted."""
    fused = backend.fuse(NETS[net](backend))

    def way() -> float:
        start = perf_counter()
        prepared = backend.prepare(fused)
        took = perf_counter() - start
        with torch.no_grad():
            prepared(example)
        return took + seconds(lambda: backend.convert(prepared))

    return way


def _ways(net: str, setup: Setup) -> Samples:
    example = torch.randn(2, 3, 64, 64)
    makers = {name: partial(_way, backend, net, example) for name, backend in setup.quantizing.items()}
    return setup.interleave(makers, _FEW)


def _import(setup: Setup) -> Samples:
    """What ``import eagerq`` adds to a process that has imported torch."""
    code = "import time, torch; t = time.perf_counter(); import eagerq; print(time.perf_counter() - t)"

    def once() -> float:
        command = [sys.executable, "-c", code]
        return float(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout)

    return setup.interleave({"eagerq": lambda: once}, _FEW)


def benchmarks() -> Iterator[Benchmark]:
    """Every row of this table."""
    no_worse = Goal("eagerq / torch.ao", 1.0)
    for net in NETS:
        goal = Goal("eagerq / needed", 1.02)
        yield Benchmark(SECTION, f"checkpoint size {net}", "MB", goal, partial(_checkpoint, net))
    for net in NETS:
        yield Benchmark(SECTION, f"resident memory of int8 {net}", "MB", no_worse, partial(footprints, "resident", net))
    for net in NETS:
        yield Benchmark(
            SECTION, f"resident memory of served int8 {net}", "MB", no_worse, partial(footprints, "served", net)
        )
    for net in NETS:
        yield Benchmark(SECTION, f"{_WAY} {net}", "ms", no_worse, partial(_ways, net))
    yield Benchmark(SECTION, "import eagerq over torch", "ms", Goal("eagerq", 300), _import)
