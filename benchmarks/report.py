"""A row of a table: its figures, their ratios, the goal and whether it is met."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from .timing import Samples

COLUMNS = ("float", "torch.ao", "eagerq")
RATIOS = ("torch.ao / float", "eagerq / float", "eagerq / torch.ao")
_SCALE = {"ms": 1e3, "MB": 1e-6, "×": 1.0}
_NAME_WIDTH = 54
_GOAL_WIDTH = 24


@dataclass(frozen=True)
class Goal:
    """At most ``limit``, for a contender's own figure (``"eagerq"``) or a ratio (``"eagerq / float"``)."""

    figure: str
    limit: float


@dataclass(frozen=True)
class Row:
    """What was measured under one name: ``figures`` are medians, ``best`` and ``spread`` tell how steady."""

    section: str
    name: str
    unit: str
    rounds: int
    figures: dict[str, float]
    best: dict[str, float]
    ratios: dict[str, float]
    spread: float | None
    goal: Goal
    reached: float | None
    met: bool | None

    @classmethod
    def of(cls, section: str, name: str, unit: str, goal: Goal, samples: Samples) -> "Row":
        """Sum up the samples (in seconds, bytes, or plain numbers)."""
        scale = _SCALE[unit]
        figures = {who: median(taken) * scale for who, taken in samples.items()}
        best = {who: min(taken) * scale for who, taken in samples.items()}
        ratios = dict(_ratios({*RATIOS, goal.figure}, samples))
        reached = {**figures, **ratios}.get(goal.figure)
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
            goal=goal,
            reached=reached,
            met=None if reached is None else reached <= goal.limit,
        )


def _ratios(wanted: set[str], samples: Samples) -> Iterator[tuple[str, float]]:
    """Each ratio whose sides were measured: the median over the rounds, pair by pair."""
    for ratio in wanted:
        above, _, below = ratio.partition(" / ")
        if above in samples and below in samples:
            pairs = zip(samples[above], samples[below], strict=True)
            yield ratio, median(a / b for a, b in pairs)


def header(section: str) -> str:
    """A section's title and the head of its table, in Markdown."""
    rule = "|".join(["", "---"] + ["---:"] * (len(COLUMNS) + len(RATIOS)) + ["---"] * 2 + ["---:", ""])
    return f"\n## {section}\n\n{_cells('', (*COLUMNS, *RATIOS), 'goal', 'met', 'spread')}\n{rule}"


def line(row: Row) -> str:
    """The row as a line of its table."""
    figures = [f"{_number(row.figures.get(title)):>{len(title)}}" for title in COLUMNS]
    ratios = [f"{_number(row.ratios.get(title)):>{len(title)}}" for title in RATIOS]
    goal = f"{row.goal.figure} ≤ {row.goal.limit:g}"
    met = "–" if row.met is None else f"{'yes' if row.met else 'no'} ({_number(row.reached)})"
    spread = "–" if row.spread is None else f"{row.spread:.0%}"
    return _cells(f"{row.name}, {row.unit}", (*figures, *ratios), goal, met, spread)


def _cells(name: str, middle: Iterable[str], goal: str, met: str, spread: str) -> str:
    return f"| {name:{_NAME_WIDTH}} | {' | '.join(middle)} | {goal:{_GOAL_WIDTH}} | {met:11} | {spread:>6} |"


def _number(figure: float | None) -> str:
    """Three digits, or as many as stand before the point."""
    if figure is None:
        return "–"
    return f"{figure:.0f}" if figure >= 100 else f"{figure:#.3g}".rstrip(".")


def write_json(path: Path, environment: dict[str, Any], rows: list[Row]) -> None:
    """Write everything the tables show, and the environment it was measured in."""
    document = {"environment": environment, "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
