"""Rows as tables, for people (Markdown) and for programs (JSON)."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .report import BEST_PEER, RATIOS, Reached, Row

_COLUMNS = ("float", "torch.ao", "eagerq")
_WIDTHS = (48, *(8 for _ in _COLUMNS), *(len(ratio) for ratio in RATIOS), 30, 22, 6, 0)
_FOLLOWS = ("torch.ao / float", f"eagerq / {BEST_PEER}", "spread")  # what a reader of the README can do without
_TITLES = ("", *_COLUMNS, *RATIOS, "goal", "met (reached)", "spread", "others")


def header(section: str) -> str:
    """A section's title and the head of its table, padded for a terminal."""
    rule = "|".join(["", "---", *(["---:"] * (len(_COLUMNS) + len(RATIOS))), *(["---"] * 4), ""])
    return f"\n## {section}\n\n{_joined(_padded(_TITLES))}\n{rule}"


def line(row: Row) -> str:
    """The row as a line of its table, padded for a terminal."""
    return _joined(_padded(_cells(row)))


def markdown(environment: dict[str, Any], rows: Iterable[Row]) -> str:
    """All tables, as they stand in the README: without padding, fewer columns, and none that a table leaves empty."""
    parts = [", ".join(f"{key} {value}" for key, value in environment.items())]
    sections: dict[str, list[Row]] = {}
    for row in rows:
        if row.detail:
            continue
        sections.setdefault(row.section, []).append(row)
    for section, members in sections.items():
        table = [_cells(row) for row in members]
        kept = [n for n, title in enumerate(_TITLES) if n == 0 or (title not in _FOLLOWS and _used(table, n))]
        head = [section, *(_TITLES[n] for n in kept[1:])]
        rule = ["---", *("---:" if 0 < n <= len(_COLUMNS) + len(RATIOS) else "---" for n in kept[1:])]
        parts.append("\n".join(_joined(cells) for cells in (head, rule, *([row[n] for n in kept] for row in table))))
    return "\n\n".join(parts) + "\n"


def write_json(path: Path, environment: dict[str, Any], rows: list[Row]) -> None:
    """Write everything the tables show, and the environment it was measured in."""
    document = {"environment": environment, "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _cells(row: Row) -> list[str]:
    return [
        f"{row.name}, {row.unit}",
        *(_number(row.figures.get(who)) for who in _COLUMNS),
        *(_number(row.ratios.get(ratio)) for ratio in RATIOS),
        ", ".join(f"{goal.figure} ≤ {goal.limit:g}" for goal in row.goals) or "–",
        ", ".join(map(_met, row.goals)) or "–",
        "–" if row.spread is None else f"{row.spread:.0%}",
        "; ".join(_others(row)) or "–",
    ]


def _others(row: Row) -> Iterator[str]:
    """The contenders without a column, and those without a figure."""
    for who, figure in row.figures.items():
        if who not in _COLUMNS:
            yield f"{who} {_number(figure)}"
    for who, note in row.notes.items():
        yield f"{who}: {note}".replace("|", "/")


def _met(goal: Reached) -> str:
    return "–" if goal.met is None else f"{'yes' if goal.met else 'no'} ({_number(goal.reached)})"


def _used(table: list[list[str]], column: int) -> bool:
    return any(row[column] != "–" for row in table)


def _padded(cells: Iterable[str]) -> list[str]:
    """Names to the left, numbers to the right."""
    numbers = range(1, 1 + len(_COLUMNS) + len(RATIOS))
    return [
        f"{cell:>{width}}" if n in numbers else f"{cell:{width}}"
        for n, (cell, width) in enumerate(zip(cells, _WIDTHS, strict=True))
    ]


def _joined(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(figure: float | None) -> str:
    """Three digits, or as many as stand before the point."""
    if figure is None:
        return "–"
    return f"{figure:.0f}" if figure >= 100 else f"{figure:#.3g}".rstrip(".")
