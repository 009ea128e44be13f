"""The command line: ``python -m benchmarks [--only NAME,…] [--repeats N] [--engine NAME] [--json PATH]``."""

import argparse
import os
import platform
from pathlib import Path
from typing import Any

import torch

from .backends import contenders, engines
from .report import Row, header, line, write_json
from .rows import Benchmark, Setup, everything
from .workloads import THREADS


def _arguments(names: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure eagerq beside torch.ao and the float model; print each figure with its goal.",
        epilog="rows: " + "; ".join(names),
    )
    parser.add_argument("--only", metavar="NAME[,NAME…]", default="", help="only rows whose name holds one of these")
    parser.add_argument("--repeats", metavar="N", type=int, default=15, help="rounds for a row (default %(default)s)")
    parser.add_argument(
        "--engine",
        choices=engines(),
        default=engines()[0],
        help="torch.ao's engine (default %(default)s)",
    )
    parser.add_argument("--json", metavar="PATH", type=Path, help="write the tables there too")
    arguments = parser.parse_args()
    if arguments.repeats < 1:
        parser.error("--repeats: at least 1")
    if arguments.json and not arguments.json.resolve().parent.is_dir():
        parser.error(f"--json: no folder {arguments.json.parent}")
    return arguments


def _chosen(rows: list[Benchmark], only: str) -> list[Benchmark]:
    """The rows whose name holds one of the texts; an unknown text is a mistake worth hearing of."""
    texts = [text.strip() for text in only.split(",") if text.strip()]
    for text in texts:
        if not any(text in row.name for row in rows):
            names = "; ".join(row.name for row in rows)
            raise SystemExit(f"--only: no row's name holds {text!r}; they are: {names}")
    return [row for row in rows if not texts or any(text in row.name for text in texts)]


def _environment(engine: str) -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch.ao engine": engine,
    }


def main() -> None:
    """Measure and print, row by row."""
    rows = list(everything())
    arguments = _arguments([row.name for row in rows])
    torch.set_num_threads(THREADS)
    environment = _environment(arguments.engine)
    setup = Setup(contenders(arguments.engine), arguments.engine, arguments.repeats)
    print(", ".join(f"{key} {value}" for key, value in environment.items()))
    done: list[Row] = []
    for benchmark in _chosen(rows, arguments.only):
        if not done or done[-1].section != benchmark.section:
            print(header(benchmark.section), flush=True)
        done.append(benchmark.run(setup))
        print(line(done[-1]), flush=True)
    print("\nspread: by how much the least steady contender's median exceeds its best; trust no row above 10%")
    if arguments.json:
        write_json(arguments.json, environment, done)


if __name__ == "__main__":
    main()
