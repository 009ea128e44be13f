"""Runs the programs of a folder, each in its turn, and prints what their ``main`` gives as JSON."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import torch

if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.backends.quantized.engine = "onednn"
    programs = sorted(Path(sys.argv[1]).glob("*.py"))
    print(json.dumps({path.stem: runpy.run_path(str(path))["main"]() for path in programs}))
