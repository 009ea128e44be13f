"""The export tutorial runs with the backends that are installed, and prints what it measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = {
    "ONNX Runtime": ("onnx", ("onnx", "onnxscript", "onnxruntime")),
    "ExecuTorch": ("executorch", ("executorch",)),
}
INSTALLED = [name for name, (_, modules) in EXTRAS.items() if all(map(find_spec, modules))]
if "ExecuTorch" in INSTALLED and torch.torch_version.TorchVersion(torch.__version__) < (2, 13):
    INSTALLED.remove("ExecuTorch")  # its runtime is built for later torch; the tutorial leaves it out


class Run(NamedTuple):
    folder: Path
    figures: dict[str, dict[str, Any]]
    printed: str


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Run:
    for needed in ("matplotlib", "sklearn"):
        pytest.importorskip(needed)
    folder = tmp_path_factory.mktemp("export")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tutorials" / "export.py"), "--quick", "--json", "figures.json"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return Run(folder, json.loads((folder / "figures.json").read_text(encoding="utf-8")), done.stdout)


def test_every_installed_backend_agrees(quick: Run) -> None:
    assert set(quick.figures) - {"Inductor"} == {"float", "eager int8", "graph", *INSTALLED}
    for name, found in quick.figures.items():
        assert found["accuracy"] > 0.9
        assert sum(found["steps"]) == pytest.approx(1)
        assert found["single_ms"] > 0
        assert found["batch_ms"] > 0
        assert found["bytes"] < (0.5 if name != "float" else 2) * quick.figures["float"]["bytes"]
        if name != "float":
            assert found["agreement"] >= 0.99
            assert sum(found["steps"][:2]) > 0.98
    assert quick.figures["eager int8"]["steps"] == [1, 0, 0, 0]
    assert quick.figures["float"]["bytes"] > 4 * 300_000  # parameters


def test_table(quick: Run) -> None:
    rows = {line[:14].strip(): line[14:].split() for line in quick.printed.splitlines()}
    for name, found in quick.figures.items():
        assert rows[name][:2] == [f"{found['accuracy']:.2%}", f"{found['agreement']:.2%}"]
        assert rows[name][-3:] == [f"{found['bytes']:,}", f"{found['single_ms']:.2f}", f"{found['batch_ms']:.2f}"]


def test_what_is_missing_is_named(quick: Run) -> None:
    left_out = {line.split(":")[0]: line for line in quick.printed.splitlines() if "left out" in line}
    assert set(left_out) | set(quick.figures) == {"float", "eager int8", "graph", "Inductor", *EXTRAS}
    for name, line in left_out.items():
        remedies = (f"eagerq[{EXTRAS[name][0]}]",) if name in EXTRAS else ("C++ compiler", "eagerq[torchao]")
        assert any(remedy in line for remedy in remedies)


def test_picture(quick: Run) -> None:
    assert (quick.folder / "export.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in quick.folder.iterdir()) == ["export.png", "figures.json"]
