"""Taking turns on the clock, in one process."""

import gc
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from time import perf_counter

Timed = Callable[[], float]
"""Runs something once and returns the seconds that count."""

Samples = dict[str, list[float]]
"""What each contender took, one figure a round: figures at the same place were taken side by side."""

_TURN = 0.03  # seconds that a turn should last, so that neither the clock nor cold caches count
_FEWEST = 3  # rounds that a row gets, whatever they take


@contextmanager
def _no_collection() -> Iterator[None]:
    """Garbage is collected between turns, never within one."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def seconds(call: Callable[[], object]) -> float:
    """How long one call takes."""
    start = perf_counter()
    call()
    return perf_counter() - start


def repeated(call: Callable[[], object]) -> Timed:
    """Time a call as the mean over enough calls in a row; the first of a row only warms the caches."""
    call()
    calls = math.ceil(_TURN / max(seconds(call), 1e-6))

    def turn() -> float:
        if calls == 1:
            return seconds(call)
        call()
        return seconds(lambda: [call() for _ in range(calls)]) / calls

    return turn


def interleave(subjects: Mapping[str, Timed], rounds: int, most: float = math.inf, warm: bool = False) -> Samples:
    """Let the subjects take turns: one unrecorded round, then ``rounds``, every other one backwards.

    Args:
        most: fewer rounds, but not below a few, once they have taken so many seconds.
        warm: each subject has run already: every round is recorded.
    """
    samples: Samples = {name: [] for name in subjects}
    end = perf_counter() + most
    with _no_collection():
        for number in range(int(warm), rounds + 1):
            if number > _FEWEST and perf_counter() > end:
                break
            for name in list(subjects)[:: -1 if number % 2 else 1]:
                took = subjects[name]()
                if number:
                    samples[name].append(took)
                gc.collect()
    return samples
