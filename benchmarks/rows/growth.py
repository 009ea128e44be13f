"""How the way to an int8 model, and saving and loading, grow with the number of layers."""

import io
from collections.abc import Callable, Iterator
from functools import cache, partial
from statistics import median
from time import perf_counter
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..backends import Backend
from ..models import CHAIN_WIDTH, Parts, chain, conv_chain
from ..report import NOT_RUN, Goal
from ..timing import Samples
from .base import Benchmark, Setup

SECTION = "Growth with the number of layers"
CHAINS = (10, 100, 1000)
NETS: dict[str, tuple[Callable[[Parts, int], nn.Module], Tensor]] = {
    "Linear": (chain, torch.randn(2, CHAIN_WIDTH)),
    "Conv-BN-ReLU": (conv_chain, torch.randn(2, CHAIN_WIDTH, 2, 2)),
}
STAGES = (
    "prepare_qat",
    "QAT state_dict",
    "QAT save",
    "QAT load_state_dict",
    "convert",
    "int8 state_dict",
    "int8 save",
    "int8 load_state_dict",
)
_T = TypeVar("_T")
_FEW = 5  # rounds that are enough where a round is long and steady
_FEWER = 2  # of those of the longest chain, which take many seconds each
_LINEAR = 1.5  # what still counts as linear in the number of layers: were it quadratic, this would be 10


class Road:
    """A chain's way from float to int8, each stage timed; the forward between them is not."""

    def __init__(self, backend: Backend, fused: nn.Module, example: Tensor) -> None:
        self.took: dict[str, list[float]] = {stage: [] for stage in STAGES}
        self._backend, self._fused, self._example = backend, fused, example

    def __call__(self) -> float:
        """Go all the way once; the seconds of all stages."""
        prepared = self._timed("prepare_qat", lambda: self._backend.prepare(self._fused))
        with torch.no_grad():
            prepared(self._example)
        self._saved_and_loaded("QAT", prepared)
        self._saved_and_loaded("int8", self._timed("convert", lambda: self._backend.convert(prepared)))
        return sum(took[-1] for took in self.took.values())

    def _saved_and_loaded(self, kind: str, model: nn.Module) -> None:
        state = self._timed(f"{kind} state_dict", model.state_dict)
        self._timed(f"{kind} save", lambda: torch.save(state, io.BytesIO()))
        self._timed(f"{kind} load_state_dict", lambda: model.load_state_dict(state))

    def _timed(self, stage: str, call: Callable[[], _T]) -> _T:
        start = perf_counter()
        result = call()
        self.took[stage].append(perf_counter() - start)
        return result


@cache
def _roads(net: str, layers: int, setup: Setup) -> dict[str, dict[str, list[float]]]:
    """For each contender what each stage took, round by round."""
    make, example = NETS[net]
    roads: dict[str, Road] = {}

    def road(name: str, backend: Backend) -> Road:
        return roads.setdefault(name, Road(backend, backend.fuse(make(backend, layers)), example))

    makers = {name: partial(road, name, backend) for name, backend in setup.quantizing.items()}
    totals = setup.interleave(makers, _FEW if layers < CHAINS[-1] else _FEWER)
    return {
        name: {stage: took[-len(total) :] for stage, took in roads[name].took.items()} for name, total in totals.items()
    }


def _stage(stage: str, net: str, layers: int, setup: Setup) -> Samples:
    if setup.quick and layers == CHAINS[-1]:
        setup.notes["eagerq"] = f"{NOT_RUN} in a quick look"
        return {}
    return {name: took[stage] for name, took in _roads(net, layers, setup).items()}


def _growth(stage: str, net: str, setup: Setup) -> Samples:
    """What a layer of the longest chain costs, as a multiple of what it costs in a shorter one."""
    long, short = (_stage(stage, net, layers, setup) for layers in (CHAINS[-1], CHAINS[-2]))
    # the rounds of one are not those of the other, and fewer
    return {name: [median(long[name]) / median(short[name]) * CHAINS[-2] / CHAINS[-1]] for name in long}


def benchmarks() -> Iterator[Benchmark]:
    """Every row of this table."""
    for net in NETS:
        for stage in STAGES:
            for layers in CHAINS:
                goal = Goal("eagerq / torch.ao", 1.0)
                name = f"{stage} {layers} {net}"
                yield Benchmark(
                    SECTION, name, "ms", goal, partial(_stage, stage, net, layers), detail=layers < CHAINS[-1]
                )
            name = f"{stage} {net}, per layer: {CHAINS[-1]} ÷ {CHAINS[-2]}"
            yield Benchmark(SECTION, name, "×", Goal("eagerq", _LINEAR), partial(_growth, stage, net))
