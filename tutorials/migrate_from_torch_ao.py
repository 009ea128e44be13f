"""From torch.ao to eagerq by a command: rename, run, compare.

Takes ``torch_ao_script.py``, a program as people have written them for years, shows what
``python -m eagerq.migrate`` changes in it, runs both versions in processes of their own, and compares what they
print and save: losses, predictions, files. At the end torch.ao's int8 file is loaded into eagerq's model.

    python tutorials/migrate_from_torch_ao.py
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

ORIGINAL = Path(__file__).resolve().parent / "torch_ao_script.py"


# --- 1. Rename ---------------------------------------------------------------------------------------
# The same as in a shell: ``python -m eagerq.migrate program.py`` shows the changes, ``--write`` makes them. Folders
# work as well. What the command can't decide it lists, with line and column, and then its exit status is 1.


def migrate(program: Path) -> str:
    """Migrates the file; gives the diff."""
    command = [sys.executable, "-m", "eagerq.migrate"]
    diff = subprocess.run([*command, str(program)], capture_output=True, text=True, check=True).stdout
    subprocess.run([*command, "--write", str(program)], capture_output=True, check=True)
    return diff


# --- 2. Run ------------------------------------------------------------------------------------------


def run(program: Path, epochs: int) -> dict[str, Any]:
    """What the program saved beside itself, and how often it was warned."""
    done = subprocess.run(
        [sys.executable, str(program), "--epochs", str(epochs), "--folder", str(program.parent)],
        env={**os.environ, "PYTHONWARNINGS": "always"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{program.name} failed:\n{done.stderr}")
    figures: dict[str, Any] = json.loads((program.parent / "figures.json").read_text(encoding="utf-8"))
    for name in ("qat", "int8"):
        figures[f"{name}_bytes"] = (program.parent / f"{name}.pt").stat().st_size
    figures["warnings"] = done.stderr.count("Warning: ")
    return figures


# --- 3. Compare --------------------------------------------------------------------------------------


def share_equal(one: list[int], other: list[int]) -> float:
    return sum(a == b for a, b in zip(one, other, strict=True)) / len(one)


def load_program(program: Path) -> ModuleType:
    """The program as a module; it has a ``main`` that runs only as a script."""
    spec = importlib.util.spec_from_file_location("migrated", program)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def predictions_of_file(program: Path, saved: Path) -> list[int]:
    """What the migrated program's int8 model predicts with the numbers of a file, whoever wrote that."""
    module = load_program(program)
    model = module.convert(module.prepare(module.Net()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of the quantized tensors that are in torch.ao's files
        numbers = torch.load(saved, weights_only=True)
    model.load_state_dict(numbers)
    with torch.no_grad():
        found: list[int] = model(module.digits()[2]).argmax(1).tolist()
    return found


def same_keys(one: Path, other: Path) -> bool:
    return list(torch.load(one, weights_only=True)) == list(torch.load(other, weights_only=True))


def compare(old: dict[str, Any], new: dict[str, Any], crossed: list[int]) -> dict[str, float]:
    pairs = list(zip(old["losses"], new["losses"], strict=True))
    return {
        "first_loss_difference": abs(pairs[0][0] - pairs[0][1]),
        "largest_loss_difference": max(abs(a - b) for a, b in pairs),
        "same_predictions": share_equal(old["predictions"], new["predictions"]),
        "same_predictions_from_file": share_equal(old["predictions"], crossed),
    }


def table(old: dict[str, Any], new: dict[str, Any], compared: dict[str, float]) -> str:
    def row(name: str, before: str = "", after: str = "") -> str:
        return f"{name:<34}{before:>14}{after:>14}".rstrip()

    lines = [
        row("", "torch.ao", "migrated"),
        row("loss of the first step", *(f"{run['losses'][0]:.6f}" for run in (old, new))),
        row("loss of the last step", *(f"{run['losses'][-1]:.6f}" for run in (old, new))),
        row("largest difference of a loss", "", f"{compared['largest_loss_difference']:.1e}"),
        row("int8 accuracy", *(f"{run['accuracy']:.2%}" for run in (old, new))),
        row("same int8 predictions", "", f"{compared['same_predictions']:.2%}"),
        row("prepared model's file, bytes", *(f"{run['qat_bytes']:,}" for run in (old, new))),
        row("int8 model's file, bytes", *(f"{run['int8_bytes']:,}" for run in (old, new))),
        row("warnings", *(str(run["warnings"]) for run in (old, new))),
        row("torch.ao's int8 file, loaded:"),
        row("  same int8 predictions", "", f"{compared['same_predictions_from_file']:.2%}"),
    ]
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Migrate a program from torch.ao, run both versions, compare them.")
    parser.add_argument("--quick", action="store_true", help="train for one epoch only")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures here")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    epochs = 1 if options.quick else 5
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        programs = {name: Path(folder, name, ORIGINAL.name) for name in ("old", "new")}
        for program in programs.values():
            program.parent.mkdir()
            program.write_bytes(ORIGINAL.read_bytes())
        print(migrate(programs["new"]))
        runs = {name: run(program, epochs) for name, program in programs.items()}
        crossed = predictions_of_file(programs["new"], programs["old"].parent / "int8.pt")
        if not same_keys(*(program.parent / "qat.pt" for program in programs.values())):
            raise RuntimeError("the prepared models' files do not have the same entries")
    compared = compare(runs["old"], runs["new"], crossed)
    print(table(runs["old"], runs["new"], compared))
    if options.json:
        options.json.write_text(json.dumps({**runs, **compared}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
