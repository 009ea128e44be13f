"""The tutorial runs as the README says, and its figures are what they are called."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

QUICKSTART = Path(__file__).resolve().parent.parent / "tutorials" / "quickstart.py"

KEYS = [
    *("float_accuracy", "qat_accuracy", "int8_accuracy", "agreement"),
    *("float_bytes", "int8_bytes", "float_ms", "int8_ms"),
]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The folder in which the quickstart has run, and what it printed."""
    for needed in ("matplotlib", "sklearn"):
        pytest.importorskip(needed)
    folder = tmp_path_factory.mktemp("quickstart")
    command = [sys.executable, str(QUICKSTART)]
    done = subprocess.run(
        [*command, "--quick", "--json", "figures.json"],
        cwd=folder,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return folder, done


def test_figures(quick: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    figures = json.loads((quick[0] / "figures.json").read_text(encoding="utf-8"))
    assert list(figures) == KEYS
    assert all(0.9 < figures[name] <= 1 for name in KEYS[:3])
    assert abs(figures["int8_accuracy"] - figures["qat_accuracy"]) < 0.01
    assert figures["agreement"] >= 0.99
    assert figures["int8_bytes"] <= 0.3 * figures["float_bytes"]
    assert figures["float_bytes"] > 4 * 300_000  # parameters
    assert figures["float_ms"] > 0
    assert figures["int8_ms"] > 0


def test_table(quick: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = quick
    figures = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
    rows = {line[:18].strip(): line for line in done.stdout.splitlines()}
    for name in ("float", "qat", "int8"):
        assert f"{figures[f'{name}_accuracy']:.2%}" in rows["accuracy"]
    assert f"{figures['agreement']:.2%}" in rows["same predictions"]
    assert f"{figures['int8_bytes']:,}" in rows["file, bytes"]
    assert f"{figures['int8_ms']:.2f}" in rows["64 images, ms"]
    assert "1 image, ms" in rows
    assert "epoch" not in done.stdout  # progress bars are on stderr
    assert "epoch 1/" in done.stderr


def test_picture(quick: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = quick
    assert (folder / "quickstart.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in folder.iterdir()) == ["figures.json", "quickstart.png"]
