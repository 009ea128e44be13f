"""Everything works without the C library, with the same numbers."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from eagerq import native
from eagerq.native import library

FLOW = """
import torch
from torch import nn
import eagerq
from eagerq import native
from eagerq.native import library

torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 4))
model = eagerq.QuantWrapper(model)
model.qconfig = eagerq.get_default_qat_qconfig("onednn")
eagerq.fuse_modules_qat(model, [["module.0", "module.1", "module.2"]], inplace=True)
eagerq.prepare_qat(model, inplace=True)
x = torch.randn(4, 3, 8, 8)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
for _ in range(3):
    loss = model(x).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
scores = eagerq.convert(model.eval(), as_trained=True)(x)
print(native.available, loss.item(), *scores.flatten().tolist())
"""


def answers(**environment: str) -> tuple[str, list[float]]:
    run = subprocess.run(
        [sys.executable, "-c", FLOW], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    there, *numbers = run.stdout.split()
    return there, [float(number) for number in numbers]


def test_the_flow_without_it() -> None:
    there, numbers = answers()
    assert there == str(native.available)
    absent, same = answers(EAGERQ_NATIVE="0")
    assert absent == "False"
    assert same == pytest.approx(numbers, rel=1e-5)  # batch norm sums in another order


@pytest.mark.skipif(not native.available, reason="the C library was not built: no compiler at installation")
def test_one_openmp_runtime() -> None:
    """Torch's own serves the library, so that ``torch.set_num_threads`` holds for both."""
    script = """
import torch
from eagerq import native
out = native.quantize(torch.rand(1_000_000), 0.1, 0, torch.uint8, 0, 255)
print(open("/proc/self/maps").read())
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    runtimes = {line.split()[-1] for line in run.stdout.splitlines() if re.search(r"lib[gi]?omp", line)}
    assert len(runtimes) <= 1


@pytest.mark.skipif(not native.available, reason="the C library was not built: no compiler at installation")
def test_a_library_of_other_sources_is_left_out(tmp_path: Path) -> None:
    """As after an update of a development installation that was not built again."""
    home = Path(library.__file__).parent
    assert not library._is_stale(library.LIBRARY, home)
    assert not library._is_stale(library.LIBRARY, tmp_path)  # installed without sources
    for source in (*home.glob("*.c"), *home.glob("*.h")):
        (tmp_path / source.name).write_bytes(source.read_bytes())
    assert not library._is_stale(library.LIBRARY, tmp_path)
    (tmp_path / "common.h").write_text("/* another */")
    assert library._is_stale(library.LIBRARY, tmp_path)
    assert library._is_stale(ctypes.CDLL(None), home)
