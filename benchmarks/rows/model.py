"""What a converted model weighs, and what it costs to get there."""

import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from time import perf_counter

import torch
from torch import nn

from ..backends import Backend
from ..footprint import ROOT
from ..models import CHAIN_WIDTH, NETS, Parts, chain
from ..report import Goal
from ..timing import Samples, Timed, interleave, seconds
from ..workloads import classifier
from .base import Benchmark, Setup
from .training import footprints

SECTION = "The converted model, and the way there"
_WAY = "prepare_qat + convert"
CHAINS = (10, 100, 1000)
_FEW = 5  # rounds that are enough where a round is long and steady
_LINEAR = 1.5  # what still counts as linear in the number of layers: were it quadratic, this would be 10


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


def _way(backend: Backend, net: Callable[[Parts], nn.Module], example: torch.Tensor) -> Timed:
    """prepare_qat and convert, each leaving its input as it was; the forward between them is not counted."""
    fused = backend.fuse(net(backend))

    def way() -> float:
        start = perf_counter()
        prepared = backend.prepare(fused)
        took = perf_counter() - start
        with torch.no_grad():
            prepared(example)
        return took + seconds(lambda: backend.convert(prepared))

    return way


def _ways(net: Callable[[Parts], nn.Module], example: torch.Tensor, setup: Setup) -> Samples:
    subjects = {name: _way(backend, net, example) for name, backend in setup.quantizing.items()}
    return interleave(subjects, min(setup.repeats, _FEW))


@cache
def _chain(layers: int, setup: Setup) -> Samples:
    return _ways(partial(chain, layers=layers), torch.randn(2, CHAIN_WIDTH), setup)


def _growth(setup: Setup) -> Samples:
    """What a layer of the longest chain costs, as a multiple of what it costs in a tenth of the chain."""
    long, short = _chain(CHAINS[-1], setup), _chain(CHAINS[-1] // 10, setup)
    return {name: [a / b / 10 for a, b in zip(long[name], short[name], strict=True)] for name in long}


def _import(setup: Setup) -> Samples:
    """What ``import eagerq`` adds to a process that has imported torch."""
    code = "import time, torch; t = time.perf_counter(); import eagerq; print(time.perf_counter() - t)"

    def once() -> float:
        command = [sys.executable, "-c", code]
        return float(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout)

    return interleave({"eagerq": once}, min(setup.repeats, _FEW))


def benchmarks() -> Iterator[Benchmark]:
    """Every row of this table."""
    no_worse = Goal("eagerq / torch.ao", 1.0)
    for net in NETS:
        goal = Goal("eagerq / needed", 1.02)
        yield Benchmark(SECTION, f"checkpoint size {net}", "MB", goal, partial(_checkpoint, net))
    for net in NETS:
        yield Benchmark(SECTION, f"resident memory of int8 {net}", "MB", no_worse, partial(footprints, "resident", net))
    images = torch.randn(2, 3, 64, 64)
    yield Benchmark(SECTION, f"{_WAY} resnet18", "ms", no_worse, partial(_ways, NETS["resnet18"], images))
    for layers in CHAINS:
        yield Benchmark(SECTION, f"{_WAY} {layers} layers", "ms", no_worse, partial(_chain, layers))
    name = f"{_WAY} per layer: {CHAINS[-1]} ÷ {CHAINS[-1] // 10}"
    yield Benchmark(SECTION, name, "×", Goal("eagerq", _LINEAR), _growth)
    yield Benchmark(SECTION, "import eagerq over torch", "ms", Goal("eagerq", 300), _import)
