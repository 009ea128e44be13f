"""The README's example and commands do what they say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")


def block(marker: str, language: str) -> str:
    found = re.search(rf"^<!-- {marker} -->\n```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    assert found, f"no {language} block marked {marker}"
    return found.group(1)


def test_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(block("example", "python"), "README.md", "exec"), names)
    images, model, loaded = names["images"], names["int8_model"], names["loaded"]
    assert callable(model)
    assert callable(loaded)
    assert torch.equal(model(images), loaded(images))
    assert (tmp_path / "int8.pt").exists()


def test_example_is_short() -> None:
    assert len([line for line in block("example", "python").splitlines() if line.strip()]) <= 24


@pytest.mark.parametrize(
    ("marker", "end"), [("quickstart", "python tutorials/quickstart.py"), ("tests", "python -m pytest")]
)
def test_commands_are_one_line(marker: str, end: str) -> None:
    # .ci/run takes them from here; it appends the quickstart's options to its last word.
    lines = block(marker, "bash").splitlines()
    assert len(lines) == 1
    assert lines[0].endswith(end)
