"""Whole networks in Q/DQ form: the outputs of their int8 eager models, nearly all equal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from migrate.loading import HERE, load
from nn.recurrences import tensors
from pt2e.exporting.graphs import exported, steps_between
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.functional import cross_entropy

import eagerq
from eagerq.nn.quantized import FloatFunctional

IMAGES = ("inception", "mobilenet", "resnet", "shufflenet")
BATCH = Dim("batch", max=128)


def _last_step(model: nn.Module) -> float:
    return [layer for layer in model.modules() if type(layer).__name__ in ("Linear", "LinearReLU")][-1].scale


@torch.no_grad()
def _nearly_all_equal(
    graph: nn.Module, model: nn.Module, inputs: tuple[Tensor, ...], step: float, apart: float = 0.02
) -> None:
    """All but a share that is ``apart`` by a step."""
    wanted = model(*inputs)
    steps = steps_between(graph(*inputs), wanted, step)
    assert max(one.abs().max() for one in tensors(wanted)) > 5 * step  # there is something to compare
    assert steps.max() <= 1
    assert (steps > 0).float().mean() < apart


def _trained(model: Any, inputs: Callable[[int], tuple[Tensor, ...]], classes: int) -> nn.Module:
    """The int8 model of a prepared one after some training."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for _ in range(4):
        optimizer.zero_grad()
        cross_entropy(model(*inputs(8)), torch.arange(8) % classes).backward()
        optimizer.step()
    return eagerq.convert(model.eval(), as_trained=True)


@pytest.mark.parametrize("name", IMAGES)
def test_networks_for_images(name: str) -> None:
    module = load(HERE / "networks" / f"{name}.py", migrated=True)
    torch.manual_seed(0)
    int8 = _trained(module.prepare(module.build()), lambda batch: (torch.randn(batch, *module.SHAPE),), 4)
    _, graph = exported(int8, (torch.randn(2, *module.SHAPE),), ({0: BATCH},))
    # shufflenet's last means are of four values, of which every fourth lies on a tie: eagerly those go to the even
    # integer, in a graph either way
    apart = 0.3 if name == "shufflenet" else 0.02
    _nearly_all_equal(graph, int8, (torch.randn(64, *module.SHAPE),), _last_step(int8), apart)


class Speech(nn.Module):
    """Frames to classes: convolutions over time, an LSTM, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = eagerq.QuantStub(), eagerq.DeQuantStub()
        self.conv, self.bn, self.relu = nn.Conv1d(8, 12, 3, stride=2), nn.BatchNorm1d(12), nn.ReLU(inplace=True)
        self.lstm, self.classify = nn.LSTM(12, 10, batch_first=True), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.conv(self.quant(x)))).transpose(1, 2)
        out: Tensor = self.dequant(self.classify(self.lstm(x)[0][:, -1]))
        return out


def test_a_network_for_speech() -> None:
    torch.manual_seed(0)
    model: Any = eagerq.fuse_modules_qat(Speech().train(), ["conv", "bn", "relu"])
    model.qconfig = eagerq.get_default_qat_qconfig("onednn")
    int8 = _trained(eagerq.prepare_qat(model), lambda batch: (torch.randn(batch, 8, 11),), 5)
    _, graph = exported(int8, (torch.randn(2, 8, 11),), ({0: BATCH},))
    _nearly_all_equal(graph, int8, (torch.randn(64, 8, 11),), _last_step(int8))


class Encoder(nn.Module):
    """A layer of a transformer, its attention and normalizations quantized, too."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.quant, self.dequant = eagerq.QuantStub(), eagerq.DeQuantStub()
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.widen, self.relu, self.narrow = nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.sums = nn.ModuleList((FloatFunctional(), FloatFunctional()))
        self.classify = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.quant(x)
        x = self.first(self.sums[0].add(x, self.attention(x, x, x, need_weights=False)[0]))
        x = self.second(self.sums[1].add(x, self.narrow(self.relu(self.widen(x)))))
        out: Tensor = self.dequant(self.classify(x[:, 0]))
        return out


def test_a_layer_of_a_transformer() -> None:
    torch.manual_seed(0)
    model: Any = eagerq.fuse_modules_qat(Encoder().train(), ["widen", "relu"])
    model.qconfig = eagerq.get_default_qat_qconfig("onednn")
    int8 = _trained(eagerq.prepare_qat(model), lambda batch: (torch.randn(batch, 6, 16),), 5)
    _, graph = exported(int8, (torch.randn(2, 6, 16),), ({0: BATCH},))
    _nearly_all_equal(graph, int8, (torch.randn(64, 6, 16),), _last_step(int8))


class Recommender(nn.Module):
    """Bags of what was seen, an embedding of who saw it, and numbers, to a score."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.who = nn.EmbeddingBag(50, 8, mode="mean"), nn.Embedding(20, 8)
        self.seen.qconfig = self.who.qconfig = eagerq.default_embedding_qat_qconfig  # type: ignore[assignment]
        self.quant, self.dequant = eagerq.QuantStub(), eagerq.DeQuantStub()
        self.hidden, self.relu, self.score = nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 3)

    def forward(self, seen: Tensor, who: Tensor, numbers: Tensor) -> Tensor:
        x = self.quant(torch.cat([self.seen(seen), self.who(who), numbers], 1))
        out: Tensor = self.dequant(self.score(self.relu(self.hidden(x))))
        return out


def _visits(batch: int) -> tuple[Tensor, ...]:
    return torch.randint(0, 50, (batch, 6)), torch.randint(0, 20, (batch,)), torch.randn(batch, 4)


def test_a_recommender() -> None:
    torch.manual_seed(0)
    model: Any = eagerq.fuse_modules_qat(Recommender().train(), ["hidden", "relu"])
    model.qconfig = eagerq.get_default_qat_qconfig("onednn")
    model = eagerq.prepare_qat(model, eagerq.get_embedding_qat_module_mappings())
    int8 = _trained(model, _visits, 3)
    assert {type(int8.seen), type(int8.who)} == {eagerq.nn.quantized.EmbeddingBag, eagerq.nn.quantized.Embedding}
    _, graph = exported(int8, _visits(2), ({0: BATCH},) * 3)
    _nearly_all_equal(graph, int8, _visits(64), _last_step(int8))
