"""What a row is before it is measured."""

from collections.abc import Callable
from dataclasses import dataclass

from ..backends import Backend
from ..report import Goal, Row
from ..timing import Samples


@dataclass(frozen=True, eq=False)
class Setup:
    """What a run was asked for: the contenders, torch.ao's engine, how many rounds."""

    backends: dict[str, Backend]
    engine: str
    repeats: int

    @property
    def quantizing(self) -> dict[str, Backend]:
        """The contenders that quantize."""
        return {name: backend for name, backend in self.backends.items() if name != "float"}


@dataclass(frozen=True)
class Benchmark:
    """A row still to be measured, and its goal."""

    section: str
    name: str
    unit: str
    goal: Goal
    measure: Callable[[Setup], Samples]

    def run(self, setup: Setup) -> Row:
        """Measure it."""
        return Row.of(self.section, self.name, self.unit, self.goal, self.measure(setup))
