"""Plans that go image by image give what the model gives, whatever the batch, the threads and what lies between."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import eagerq
from eagerq import native
from eagerq.kernels import activation as tables
from eagerq.nn.quantized import FloatFunctional

programs = importlib.import_module("eagerq.freeze.program")

pytestmark = pytest.mark.skipif(not native.conv_ready(), reason="no compiler at installation, or no AVX-512 VNNI")


class Net(nn.Module):
    """Wide and narrow layers in turn, shortcuts within a group of steps and from one to another."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = eagerq.QuantStub(), eagerq.DeQuantStub()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.widen = nn.ModuleList(nn.Conv2d(16, 96, 1) for _ in range(3))
        self.filter = nn.ModuleList(nn.Conv2d(96, 96, 3, padding=1, groups=96) for _ in range(3))
        self.narrow = nn.ModuleList(nn.Conv2d(96, 16, 1) for _ in range(3))
        self.join = nn.ModuleList(FloatFunctional() for _ in range(4))
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = x = self.stem(self.quant(x))
        for widen, filtered, narrow, join in zip(self.widen, self.filter, self.narrow, self.join, strict=False):
            x = join.add(x, narrow(filtered(widen(x))))
            if join is self.join[0]:
                # by torch: here a group ends; what the next one reads first is room for what it widens
                x = self.join[3].add(first, x.flip(0))
        pooled = torch.flatten(F.adaptive_avg_pool2d(F.max_pool2d(x, 2), 1), 1)
        return self.dequant(self.fc(pooled)), self.dequant(x)


def images(batch: int, seed: int = 0) -> Tensor:
    x = torch.randn(batch, 3, 80, 80, generator=torch.Generator().manual_seed(seed))
    return x.contiguous(memory_format=torch.channels_last)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    net = Net().eval()
    net.qconfig = eagerq.get_default_qconfig("onednn")
    prepared = eagerq.prepare(net)
    with torch.no_grad():
        prepared(images(4))
    return eagerq.convert(prepared).requires_grad_(False)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of each plan's groups, the number of images."""
    seen: list[int] = []
    find = programs.groups

    def groups(*args: object) -> list[programs.Group | None]:
        found = find(*args)
        seen.extend(group.images for group in dict.fromkeys(found) if group)
        return found

    monkeypatch.setattr(importlib.import_module("eagerq.freeze.plan"), "groups", groups)
    return seen


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("planned_with", [1, 2])
@pytest.mark.parametrize("batch", [2, 3, 12])
def test_image_by_image(model: nn.Module, sizes: list[int], batch: int, planned_with: int) -> None:
    torch.set_num_threads(planned_with)
    frozen = eagerq.freeze(model, (images(batch),))
    assert sizes == [batch] * 3  # what follows the flip is parted by what goes at once: a view, a Linear
    for count in (1, 2, 3):  # one image after the other is what shows memory taken again too early
        torch.set_num_threads(count)
        for seed in (1, 2):
            for one, wanted in zip(frozen(images(batch, seed)), model(images(batch, seed)), strict=True):
                assert torch.equal(one, wanted)


class Gated(nn.Module):
    """Activations by tables, and a factor for each channel of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.widen, self.gate, self.narrow = nn.Conv2d(3, 48, 1), nn.Conv2d(48, 48, 1), nn.Conv2d(48, 8, 1)
        self.act, self.open, self.scale = nn.Hardswish(), nn.Hardsigmoid(), FloatFunctional()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.widen(x))
        return self.narrow(self.scale.mul(self.open(self.gate(F.adaptive_avg_pool2d(x, 1))), x))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("batch", [1, 3, 4])
def test_tables_and_gates(batch: int) -> None:
    torch.manual_seed(0)
    net = eagerq.QuantWrapper(Gated()).eval()
    net.qconfig = eagerq.get_default_qconfig("onednn")  # type: ignore[assignment]
    prepared = eagerq.prepare(net)
    prepared(images(4))
    model = eagerq.convert(prepared)
    frozen = eagerq.freeze(model, (images(batch),))
    (_, plan) = next(iter(frozen._plans.values()))
    assert len(plan._calls) == 1
    wanted = [model(images(batch, seed)) for seed in (1, 2)]
    tables._table.cache_clear()  # the plan keeps those that it reads
    junk = [torch.full((256,), 7, dtype=torch.uint8) for _ in range(64)]
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        assert all(torch.equal(frozen(images(batch, seed)), one) for seed, one in zip((1, 2), wanted, strict=True))
    del junk


def test_a_table_made_in_the_forward() -> None:
    """The plan keeps the one that it reads, though the forward makes another each time."""
    act = eagerq.nn.quantized.Hardswish(0.05, 10)

    class Forgetful(nn.Module):
        def forward(self, x: eagerq.QTensor) -> eagerq.QTensor:
            tables._table.cache_clear()
            return act(x)

    def quantized(seed: int) -> eagerq.QTensor:
        return eagerq.quantize_per_tensor(images(2, seed), 0.05, 128, torch.uint8)

    frozen = eagerq.freeze(Forgetful().eval(), (quantized(0),))
    tables._table.cache_clear()
    junk = [torch.full((256,), 7, dtype=torch.uint8) for _ in range(500)]
    for seed in (1, 2):
        assert torch.equal(frozen(quantized(seed)), act(quantized(seed)))
    del junk


def test_a_table_for_a_part() -> None:
    """What lies apart is copied first, at each call."""
    act = eagerq.nn.quantized.Hardswish(0.05, 10)

    def quantized(seed: int) -> eagerq.QTensor:
        return eagerq.quantize_per_tensor(images(2, seed), 0.05, 128, torch.uint8)

    class Half(nn.Module):
        def forward(self, x: eagerq.QTensor) -> eagerq.QTensor:
            return act(x[..., ::2])

    frozen = eagerq.freeze(Half().eval(), (quantized(0),))
    for seed in (1, 2):
        assert torch.equal(frozen(quantized(seed)), Half()(quantized(seed)))


def test_one_image_goes_whole(model: nn.Module, sizes: list[int]) -> None:
    frozen = eagerq.freeze(model, (images(1),))
    assert not sizes
    assert all(map(torch.equal, frozen(images(1, 1)), model(images(1, 1))))


def test_results_are_new_each_time(model: nn.Module) -> None:
    frozen = eagerq.freeze(model, (images(2),))
    before = frozen(images(2, 1))
    kept = [x.clone() for x in before]
    after = frozen(images(2, 2))
    assert all(map(torch.equal, before, kept))
    assert not any(x.data_ptr() == y.data_ptr() for x, y in zip(before, after, strict=True))


class Sliced(nn.Module):
    """Each layer looks at a part of what the one before gave."""

    def __init__(self) -> None:
        super().__init__()
        widths = (4, 32, 8, 64, 4, 48)
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)[:, : layer.out_channels]
        return x


def test_a_view_parts_groups(threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is taken again as if all images were done before it, so they have to be."""
    listed: list[list[native.Step]] = []

    def noted(steps: list[native.Step], count: int) -> Any:
        listed.append(list(steps))
        return native.runner(steps, count)

    monkeypatch.setattr(programs, "native", SimpleNamespace(**{**vars(native), "runner": noted}))
    torch.set_num_threads(4)
    torch.manual_seed(0)
    x = torch.randn(8, 4, 64, 64)
    net = eagerq.QuantWrapper(Sliced()).eval()
    net.qconfig = eagerq.get_default_qconfig("onednn")  # type: ignore[assignment]
    prepared = eagerq.prepare(net)
    prepared(x)
    model = eagerq.convert(prepared)
    frozen = eagerq.freeze(model, (x,))
    together = [step.group for step in max(listed, key=len) if step.images]
    assert len(together) >= 5
    assert len(set(together)) >= 4
    wanted = model(x)
    assert all(torch.equal(frozen(x), wanted) for _ in range(20))


def test_memory_within_a_group() -> None:
    """While some images have not read what lies there, other images' results do not go there."""
    whole, own, next_own, other = (torch.zeros(4, 16, 40, 40) for _ in range(4))
    last = {programs.storage(x): number for number, x in enumerate((whole, own, next_own, other))}
    memory, group = programs.Memory(last, 2, []), programs.Group(4)

    def place(x: Tensor) -> int:
        return programs.storage(x)

    memory.enter(group)
    first = place(memory.whole(whole))
    memory.release(0)
    memory.enter(group)
    second = place(memory.own(own, 4))
    assert second != first
    memory.release(1)
    memory.enter(group)
    assert place(memory.own(next_own, 4)) == second
    memory.release(2)
    memory.enter(programs.Group(4))
    assert place(memory.whole(other)) == first
