"""What int8 costs in accuracy: the quickstart's network on handwritten digits."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

from ..footprint import ROOT
from ..report import NOT_RUN, Goal
from ..timing import Samples
from .base import Benchmark, Setup

SECTION = "Accuracy (tutorials/quickstart.py, scikit-learn's digits)"
_HALF_A_POINT = 0.5


@cache
def _figures(quick: bool) -> dict[str, float]:
    """What the quickstart tells of itself."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "figures.json")
        command = [sys.executable, "tutorials/quickstart.py", "--json", str(path), "--picture", f"{folder}/it.png"]
        command += ["--quick"] if quick else []
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        told: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
        return told


def _share(above: str, below: str, setup: Setup) -> Samples:
    """By how much one share falls short of another."""
    if not all(map(find_spec, ("sklearn", "matplotlib"))):
        setup.notes["eagerq"] = f"{NOT_RUN}: needs scikit-learn and matplotlib"
        return {}
    told = {"all": 1.0, **_figures(setup.quick)}
    return {"eagerq": [told[above] - told[below]]}


def benchmarks() -> Iterator[Benchmark]:
    """Every row of this table."""
    goal = Goal("eagerq", _HALF_A_POINT)
    yield Benchmark(
        SECTION, "accuracy lost, int8 to float", "%", goal, partial(_share, "float_accuracy", "int8_accuracy")
    )
    yield Benchmark(SECTION, "predictions unlike fake-quant's", "%", goal, partial(_share, "all", "agreement"))
