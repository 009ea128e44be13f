"""What a row is before it is measured."""

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from ..backends import Backend
from ..peers import Peer
from ..report import Goal, Row
from ..timing import Samples, Timed, interleave


@dataclass(frozen=True, eq=False)
class Setup:
    """What a run was asked for.

    Attributes:
        backends: float, torch.ao and eagerq, as far as this installation has them.
        engine: torch.ao's.
        repeats: rounds for a row.
        seconds: after which a row ends early.
        quick: a rough look is enough.
        peers: other libraries, by what they can do; a text where one takes no part, and why.
        notes: why a contender has no figure in the row being measured.
    """

    backends: dict[str, Backend]
    engine: str
    repeats: int
    seconds: float = 10.0
    quick: bool = False
    peers: Mapping[str, Mapping[str, Peer | str]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def quantizing(self) -> dict[str, Backend]:
        """The contenders that quantize."""
        return {name: backend for name, backend in self.backends.items() if name != "float"}

    def race(self, make: Callable[[Backend], Timed], task: str = "", rounds: int | None = None) -> Samples:
        """Build each contender's subject and let them take turns; one that fails is noted and left out.

        Args:
            make: what is timed, for one contender.
            task: the peers that can do this ("training", "inference") run, too.
            rounds: at most so many.
        """
        makers = {name: lambda backend=backend: make(backend) for name, backend in self.backends.items()}
        for name, peer in self.peers.get(task, {}).items():
            if isinstance(peer, str):
                self.notes[name] = peer
            else:
                makers[name] = lambda peer=peer: make(peer.backend())
        return self.interleave(makers, rounds)

    def interleave(self, makers: Mapping[str, Callable[[], Timed]], rounds: int | None = None) -> Samples:
        """Like :meth:`race`, for subjects that are made without a backend."""
        subjects: dict[str, Timed] = {}
        for name, maker in makers.items():
            try:
                subject = maker()
                subject()
            except Exception as error:  # whatever a contender raises, the others go on
                self.notes[name] = failure(error)
            else:
                subjects[name] = subject
        return interleave(subjects, min(rounds or self.repeats, self.repeats), self.seconds, warm=True)


def failure(error: Exception) -> str:
    """The error in one line."""
    return " ".join("".join(traceback.format_exception_only(error)).split())[:200]


@dataclass(frozen=True)
class Benchmark:
    """A row still to be measured, and its goal or goals.

    Attributes:
        extra: too slow for every run: measured when asked for by name, or with ``--all``.
        cuda: measured where there is a GPU.
        detail: left out of the Markdown that the README shows.
    """

    section: str
    name: str
    unit: str
    goal: Goal | tuple[Goal, ...]
    measure: Callable[[Setup], Samples]
    extra: bool = False
    cuda: bool = False
    detail: bool = False

    def run(self, setup: Setup) -> Row:
        """Measure it; an error is the row's own affair."""
        setup.notes.clear()
        samples: Samples = {}
        if self.cuda and not torch.cuda.is_available():
            setup.notes["eagerq"] = "not run: no GPU here"
        else:
            try:
                samples = self.measure(setup)
            except Exception as error:  # the other rows go on
                setup.notes["eagerq"] = failure(error)
        goals = self.goal if isinstance(self.goal, tuple) else (self.goal,)
        return Row.of(self.section, self.name, self.unit, goals, samples, dict(setup.notes), self.detail)
