"""The tables: each module of this folder yields the rows of one."""

from collections.abc import Iterator

from . import accuracy, compiled, gpu, growth, inference, model, training, transformer
from .base import Benchmark, Setup

__all__ = ["Benchmark", "Setup", "everything"]


def everything() -> Iterator[Benchmark]:
    """Every row, table by table."""
    yield from training.benchmarks()
    yield from compiled.benchmarks()
    yield from inference.benchmarks()
    yield from transformer.benchmarks()
    yield from model.benchmarks()
    yield from growth.benchmarks()
    yield from accuracy.benchmarks()
    yield from gpu.benchmarks()
