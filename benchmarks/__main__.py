"""The command line: ``python -m benchmarks``; ``--help`` lists its options."""

import argparse
import os
import platform
from pathlib import Path
from typing import Any

import torch

from .backends import contenders, engines
from .peers import found
from .report import Row
from .rows import Benchmark, Setup, everything
from .tables import header, line, markdown, write_json
from .workloads import THREADS

_QUICK = {"repeats": 3, "seconds": 1.0}


def _arguments(names: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure eagerq beside torch.ao, other libraries and float; print each figure with its goal.",
        epilog="rows: " + "; ".join(names),
    )
    parser.add_argument("--only", metavar="NAME[,NAME…]", default="", help="only rows whose name holds one of these")
    parser.add_argument("--all", action="store_true", help="also the rows that take minutes each")
    parser.add_argument("--repeats", metavar="N", type=int, default=15, help="rounds for a row (default %(default)s)")
    parser.add_argument(
        "--seconds", metavar="S", type=float, default=8.0, help="end a row's rounds after this (default %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="few rounds, and no peer that compiles: a rough look")
    parser.add_argument(
        "--engine", choices=engines(), default=engines()[0], help="torch.ao's engine (default %(default)s)"
    )
    parser.add_argument("--no-peers", action="store_true", help="float, torch.ao and eagerq alone")
    parser.add_argument("--json", metavar="PATH", type=Path, help="write the tables there too")
    parser.add_argument("--markdown", metavar="PATH", type=Path, help="write them there as the README shows them")
    arguments = parser.parse_args()
    if arguments.quick:
        parser.set_defaults(**_QUICK)
        arguments = parser.parse_args()
    if arguments.repeats < 1:
        parser.error("--repeats: at least 1")
    for option in ("json", "markdown"):
        path = getattr(arguments, option)
        if path and not path.resolve().parent.is_dir():
            parser.error(f"--{option}: no folder {path.parent}")
    return arguments


def _chosen(rows: list[Benchmark], only: str, extra: bool) -> list[Benchmark]:
    """The rows whose name holds one of the texts; an unknown text is a mistake worth hearing of."""
    texts = [text.strip() for text in only.split(",") if text.strip()]
    for text in texts:
        if not any(text in row.name for row in rows):
            names = "; ".join(row.name for row in rows)
            raise SystemExit(f"--only: no row's name holds {text!r}; they are: {names}")
    if texts:
        return [row for row in rows if any(text in row.name for text in texts)]
    return [row for row in rows if extra or not row.extra]


def _environment(engine: str) -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch.ao engine": engine,
    }


def main() -> int:
    """Measure and print, row by row; 1 if a row of eagerq's failed."""
    rows = list(everything())
    arguments = _arguments([row.name for row in rows])
    torch.set_num_threads(THREADS)
    environment = _environment(arguments.engine)
    peers = {} if arguments.no_peers else found(quick=arguments.quick)
    setup = Setup(
        contenders(arguments.engine), arguments.engine, arguments.repeats, arguments.seconds, arguments.quick, peers
    )
    print(", ".join(f"{key} {value}" for key, value in environment.items()))
    done: list[Row] = []
    for benchmark in _chosen(rows, arguments.only, arguments.all):
        if not done or done[-1].section != benchmark.section:
            print(header(benchmark.section), flush=True)
        done.append(benchmark.run(setup))
        print(line(done[-1]), flush=True)
    print("\nspread: by how much the least steady contender's median exceeds its best; trust no row above 10%")
    if arguments.json:
        write_json(arguments.json, environment, done)
    if arguments.markdown:
        arguments.markdown.write_text(markdown(environment, done), encoding="utf-8")
    return int(any(row.failed for row in done))


if __name__ == "__main__":
    raise SystemExit(main())
