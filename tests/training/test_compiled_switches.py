"""Models trained under torch.compile: one graph, and each state of the switches compiled once."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn
from training.compiled import Convolution, Perceptron, Residual, compiled, prepared

import eagerq
from eagerq.intrinsic.qat import freeze_bn_stats, update_bn_stats

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def switch(model: nn.Module, observer: bool, fake_quant: bool, frozen: bool) -> None:
    model.apply(eagerq.enable_observer if observer else eagerq.disable_observer)
    model.apply(eagerq.enable_fake_quant if fake_quant else eagerq.disable_fake_quant)
    model.apply(freeze_bn_stats if frozen else update_bn_stats)


@pytest.mark.parametrize("kind", [Convolution, Perceptron])
def test_every_state_compiles_once(kind: Any) -> None:
    model = prepared(kind)
    call, counter = compiled(model, "aot_eager")
    states = list(itertools.product([True, False], repeat=3))
    x = torch.randn(6, *kind.shape)
    for known, state in enumerate(states, 1):
        switch(model, *state)
        call(x).sum().backward()
        assert counter.frame_count == known
    for state in [*reversed(states), *states[::3], *states[1::2]]:
        switch(model, *state)
        for parameter in model.parameters():  # as optimizers do, in place
            parameter.data.mul_(0.99)
        call(x).sum().backward()
    assert counter.frame_count == len(states)


def test_a_deep_model_compiles_once_a_state() -> None:
    layers = [layer for _ in range(50) for layer in (nn.Linear(4, 4), nn.ReLU())]
    model = nn.Sequential(eagerq.QuantStub(), *layers, eagerq.DeQuantStub()).train()
    model = eagerq.fuse_modules_qat(model, [[str(1 + i), str(2 + i)] for i in range(0, len(layers), 2)])
    model.qconfig = eagerq.get_default_qat_qconfig("onednn")
    model = eagerq.prepare_qat(model)
    model(torch.randn(3, 4))
    call, counter = compiled(model, "eager")
    for _ in range(2):
        for state in ((True, True, False), (False, True, False)):
            switch(model, *state)
            call(torch.randn(3, 4))
    assert counter.frame_count == 2


def test_nothing_breaks_the_graph() -> None:
    model = prepared(Residual)
    torch._dynamo.utils.counters.clear()
    torch.compile(model, backend="aot_eager")(torch.randn(6, *Residual.shape)).sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


def test_a_batch_that_is_not_finite_is_left_out() -> None:
    model = prepared(Perceptron)
    call, _ = compiled(model, "aot_eager")
    observer = model.quant.activation_post_process.activation_post_process
    before = observer.max_val.clone()
    call(torch.full((4, 10), torch.inf))
    assert torch.equal(observer.max_val, before)
    assert observer.nonfinite_batches == 1
    call(torch.full((4, 10), 9.0))
    assert observer.max_val > before
