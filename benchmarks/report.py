"""A row of a table: its figures, their ratios, the goals and whether they are met."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median

from .timing import Samples

BEST_PEER = "best peer"
RATIOS = ("torch.ao / float", "eagerq / float", "eagerq / torch.ao", f"eagerq / {BEST_PEER}")
NOT_RUN = "not run"
_NO_PEER = ("float", "eagerq", "needed")  # how the names of all others begin
_SCALE = {"ms": 1e3, "MB": 1e-6, "×": 1.0, "%": 1e2}


@dataclass(frozen=True)
class Goal:
    """At most ``limit``, for a contender's own figure (``"eagerq"``) or a ratio (``"eagerq / float"``).

    ``"eagerq / best peer"``: to the best of all others that quantize.
    """

    figure: str
    limit: float


@dataclass(frozen=True)
class Reached:
    """A goal, what was reached of it and whether that is enough; None when it was not measured."""

    figure: str
    limit: float
    reached: float | None
    met: bool | None


@dataclass(frozen=True)
class Row:
    """What was measured under one name.

    ``figures`` are medians, ``best`` and ``spread`` tell how steady; ``notes``, why a contender has no figure.
    """

    section: str
    name: str
    unit: str
    rounds: int
    figures: dict[str, float]
    best: dict[str, float]
    ratios: dict[str, float]
    spread: float | None
    goals: tuple[Reached, ...]
    notes: dict[str, str] = field(default_factory=dict)
    detail: bool = False

    @classmethod
    def of(
        cls,
        section: str,
        name: str,
        unit: str,
        goals: Iterable[Goal],
        samples: Samples,
        notes: Mapping[str, str],
        detail: bool = False,
    ) -> "Row":
        """Sum up the samples (in seconds, bytes, or plain numbers)."""
        scale = _SCALE[unit]
        figures = {who: median(taken) * scale for who, taken in samples.items()}
        best = {who: min(taken) * scale for who, taken in samples.items()}
        ratios = dict(_ratios([*RATIOS, *(goal.figure for goal in goals)], samples))
        known = {**figures, **ratios}
        rounds = min(map(len, samples.values()), default=0)
        return cls(
            section,
            name,
            unit,
            rounds=rounds,
            figures=figures,
            best=best,
            ratios=ratios,
            spread=max(figures[who] / best[who] - 1 for who in figures) if rounds > 1 else None,
            goals=tuple(_reached(goal, known.get(goal.figure)) for goal in goals),
            notes=dict(notes),
            detail=detail,
        )

    @property
    def failed(self) -> bool:
        """Whether eagerq itself was to be measured and could not be."""
        return "eagerq" in self.notes and not self.notes["eagerq"].startswith(NOT_RUN)


def _reached(goal: Goal, figure: float | None) -> Reached:
    return Reached(goal.figure, goal.limit, figure, None if figure is None else figure <= goal.limit)


def _ratios(wanted: Iterable[str], samples: Samples) -> Iterator[tuple[str, float]]:
    """Each ratio whose sides were measured: the median over the rounds, pair by pair."""
    peers = {who: median(taken) for who, taken in samples.items() if not who.startswith(_NO_PEER)}
    known = {**samples, BEST_PEER: samples[min(peers, key=peers.__getitem__)]} if peers else samples
    for ratio in dict.fromkeys(wanted):
        above, _, below = ratio.partition(" / ")
        if above in known and below in known:
            pairs = zip(known[above], known[below], strict=True)
            yield ratio, median(a / b for a, b in pairs)
