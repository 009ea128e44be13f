"""The migration tutorial runs, and the migrated program gives what torch.ao's gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Oracle

ROOT = Path(__file__).resolve().parent.parent
Tutorial = tuple[dict[str, Any], str]


@pytest.fixture(scope="module")
def tutorial(ao: Oracle, tmp_path_factory: pytest.TempPathFactory) -> Tutorial:
    """Its figures, and what it printed."""
    for needed in ("sklearn", "libcst"):
        pytest.importorskip(needed)
    figures = tmp_path_factory.mktemp("migration") / "figures.json"
    done = subprocess.run(
        [sys.executable, str(ROOT / "tutorials" / "migrate_from_torch_ao.py"), "--quick", "--json", str(figures)],
        cwd=figures.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(figures.read_text(encoding="utf-8")), done.stdout


def test_figures(tutorial: Tutorial) -> None:
    figures, _ = tutorial
    old, new = figures["old"], figures["new"]
    assert len(new["losses"]) == len(old["losses"]) == 40
    assert new["losses"] == pytest.approx(old["losses"], rel=1e-2)
    assert new["losses"][-1] < 0.3 < 2 < new["losses"][0]
    assert min(old["accuracy"], new["accuracy"]) > 0.8
    assert figures["same_predictions"] > 0.99
    assert figures["same_predictions_from_file"] == 1
    assert new["int8_bytes"] < old["int8_bytes"]
    assert new["qat_bytes"] == pytest.approx(old["qat_bytes"], rel=0.01)
    assert new["warnings"] == 0 < old["warnings"]


def test_what_it_prints(tutorial: Tutorial) -> None:
    figures, printed = tutorial
    assert "-import torch.ao.nn.quantized as nnq\n+import eagerq.nn.quantized as nnq\n" in printed
    assert "\n-    return torch.ao.quantization.prepare_qat(" in printed
    rows = {line[:34].strip(): line[34:].split() for line in printed.partition("loss of")[2].splitlines()}
    assert rows["int8 accuracy"] == [f"{figures[run]['accuracy']:.2%}" for run in ("old", "new")]
    assert rows["int8 model's file, bytes"] == [f"{figures[run]['int8_bytes']:,}" for run in ("old", "new")]
    assert rows["warnings"][1] == "0"
