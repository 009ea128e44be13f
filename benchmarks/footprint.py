"""Memory, each figure from its own process: ``python -m benchmarks.footprint TASK NET CONTENDER ENGINE``.

They are read from Linux's ``/proc/self/status``, and are absent elsewhere. ``ru_maxrss`` would not do: a
child takes over the high-water mark of the parent it was forked from, and building the model raises it beyond
what follows. ``VmHWM`` is the same mark, but writing 5 to ``clear_refs`` brings it down to the present: the
kernel itself then keeps the step's exact peak, and nothing need be sampled. Larger blocks are mapped one by
one (``MALLOC_MMAP_THRESHOLD_``), so that memory given back counts as given back: repeated figures agree
within 1 MB, where the allocator's own habits move them by 20.
"""

import ctypes
import gc
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from .backends import Backend, contenders
from .workloads import THREADS, channels_last, classifier, inference, training_step

ROOT = Path(__file__).resolve().parent.parent
_RESET = Path("/proc/self/clear_refs")
_MAPPED_FROM = 64 * 1024


def measure(task: str, net: str, contender: str, engine: str) -> float | None:
    """Run one of the tasks in a fresh process; its answer in bytes, or None where the system cannot tell."""
    if not os.access(_RESET, os.W_OK):
        return None
    command = [sys.executable, "-m", "benchmarks.footprint", task, net, contender, engine]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(_MAPPED_FROM)}
    answer = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return float(answer.stdout)


def _status(field: str) -> int:
    """A field of this process's status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, kilobytes = line.partition(":")
        if name == field:
            return int(kilobytes.split()[0]) * 1024
    raise LookupError(f"this system's /proc/self/status has no {field}")


def _tidy() -> None:
    """Give back all that is not in use."""
    gc.collect()
    getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # glibc has it; int(0) does nothing elsewhere


def _step(backend: Backend, net: str, compiled: bool = False) -> int:
    """What a training step needs at its peak, beyond the model and the libraries warmed up."""
    step = training_step(backend, net, compiled=compiled)
    step()
    _tidy()
    before = _status("VmRSS")
    _RESET.write_text("5")
    step()
    return _status("VmHWM") - before


def _resident(backend: Backend, net: str) -> int:
    """What a process holds for a converted model that has run: weights, packed ones, kernels made."""
    _tidy()
    before = _status("RssAnon")
    for batch in (1, 8, 1):
        inference(backend, net, batch, deployed=False)()
    _tidy()
    return _status("RssAnon") - before


def _served(backend: Backend, net: str) -> int:
    """What a process holds that does nothing but answer, for batches of 8 and 1: weights and room for activations."""
    _tidy()
    before = _status("RssAnon")
    images = [channels_last(torch.randn(batch, 3, 224, 224)) for batch in (8, 1)]
    run = backend.serve(classifier(backend, net), images)
    with torch.inference_mode():
        for each in (*images, *images):
            run(each)
    del images, each
    _tidy()
    return _status("RssAnon") - before


TASKS: dict[str, Callable[[Backend, str], int]] = {
    "step": _step,
    "compiled-step": partial(_step, compiled=True),
    "resident": _resident,
    "served": _served,
}

if __name__ == "__main__":
    task, net, contender, engine = sys.argv[1:]
    torch.set_num_threads(THREADS)
    print(TASKS[task](contenders(engine)[contender], net))
