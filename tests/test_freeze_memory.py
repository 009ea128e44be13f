"""What a frozen model holds in memory."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading

import pytest
import torch
from torch import Tensor, nn

import eagerq
from eagerq import native

in_c = pytest.mark.skipif(not native.conv_ready(), reason="no compiler at installation, or no AVX-512 VNNI")


def converted(net: nn.Module, *shape: int) -> nn.Module:
    torch.manual_seed(0)
    model = eagerq.QuantWrapper(net).eval()
    model.qconfig = eagerq.get_default_qconfig("onednn")
    prepared = eagerq.prepare(model)
    with torch.no_grad():
        prepared(torch.randn(shape))
    return eagerq.convert(prepared)


def held() -> int:
    """Bytes of all tensors of this process."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) in (Tensor, nn.Parameter) and x.layout is torch.strided]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


@in_c
def test_nothing_of_the_recording_is_kept() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), *(nn.Conv2d(8, 8, 3, padding=1) for _ in range(6)))
    x = torch.randn(2, 3, 64, 64)
    model = converted(net, *x.shape)
    model(x)
    before, activation = held(), 2 * 8 * 64 * 64
    frozen = eagerq.freeze(model, (x,))
    assert held() - before < 3 * activation
    assert torch.equal(frozen(x), model(x))


@in_c
def test_plans_share_memory() -> None:
    """They run one at a time, so each but the largest finds all that it needs; results are nobody else's."""
    x = torch.randn(4, 3, 48, 48)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 64, 1), nn.ReLU(), nn.Conv2d(64, 4, 3))
    model = converted(net, *x.shape)
    frozen = eagerq.freeze(model, (x,))
    results = {4: frozen(x)}
    before = held()
    for batch in (3, 1):
        frozen.add((x[:batch],))
        results[batch] = frozen(x[:batch])
    again = frozen(x)
    assert held() - before < 4 * results[4].numel() * 3 + 1024
    for batch, result in results.items():
        assert torch.equal(result, model(x[:batch]))
    assert torch.equal(again, model(x))


@in_c
def test_planning_while_others_call() -> None:
    """Whoever plans has the plans' memory to itself."""
    x = torch.randn(8, 3, 48, 48)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 64, 1), nn.ReLU(), nn.Conv2d(64, 4, 3))
    model = converted(net, *x.shape)
    frozen, wanted = eagerq.freeze(model, (x,)), model(x)
    wrong: list[int] = []
    done = threading.Event()

    def call() -> None:
        while not done.is_set():
            if not torch.equal(frozen(x), wanted):
                wrong.append(1)

    thread = threading.Thread(target=call)
    thread.start()
    for batch in (7, 6, 5, 4, 3, 2, 1) * 3:
        frozen.add((x[:batch],))
    done.set()
    thread.join()
    assert not wrong
    assert torch.equal(frozen(x[:5]), model(x[:5]))


def test_the_compiler_is_not_loaded() -> None:
    program = (
        "import sys, torch, eagerq\n"
        "frozen = eagerq.freeze(torch.nn.Linear(2, 2).eval().requires_grad_(False), (torch.ones(1, 2),))\n"
        "frozen(torch.ones(1, 2))\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
