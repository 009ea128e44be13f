"""Whole programs, migrated, in a process of their own: the numbers are those that torch.ao gives."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Oracle
from migrate.loading import HERE

from eagerq.migrate.__main__ import main

PROGRAMS = sorted(path.stem for path in (HERE / "programs").glob("*.py"))


def run(folder: Path, warnings: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-W", warnings, str(HERE / "running.py"), str(folder)],
        env={**os.environ, "PYTHONPATH": str(HERE.parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def found(ao: Oracle, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the programs print as they are, and migrated; then a warning is an error."""
    folder = tmp_path_factory.mktemp("migrated") / "programs"
    shutil.copytree(HERE / "programs", folder, ignore=shutil.ignore_patterns("__pycache__"))
    assert main(["--write", str(folder)]) == 0
    assert main(["--check", str(folder)]) == 0
    return run(HERE / "programs", "ignore"), run(folder, "error")


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_numbers_are_the_same(name: str, found: tuple[dict[str, Any], dict[str, Any]]) -> None:
    old, new = found[0][name], found[1][name]
    assert list(new) == list(old)
    for key, value in old.items():
        assert flat(new[key]) == nearly(flat(value)), key


def flat(value: Any) -> list[Any]:
    return [leaf for inner in value for leaf in flat(inner)] if isinstance(value, list) else [value]


def nearly(values: list[Any]) -> Any:
    return values if isinstance(values[0], str) else pytest.approx(values, rel=1e-5, abs=1e-7)
