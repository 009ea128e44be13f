"""QAT layers under torch.compile: one graph, eager numbers, and no compiling again for what is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from intrinsic.layers import (
    KINDS,
    Kind,
    Phase,
    Step,
    distance,
    gradient_unit,
    plain_layer,
    run,
)
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import eagerq
from eagerq.intrinsic.qat import ConvBn3d, ConvBnReLU3d

pytestmark = pytest.mark.usefixtures("fresh_compiler")

CLOSE = 1e-5


def compiled(module: nn.Module, backend: str = "aot_eager") -> tuple[Any, CompileCounterWithBackend]:
    counter = CompileCounterWithBackend(backend)
    return torch.compile(module, fullgraph=True, backend=counter), counter


def assert_close(ours: Step, eager: Step) -> None:
    assert distance(ours.output, eager.output) <= CLOSE
    for name, value in eager.gradients.items():
        mine = ours.gradients[name]
        assert (mine is None) == (value is None), name
        if mine is not None and value is not None:
            assert (mine - value).norm() <= CLOSE * gradient_unit(name, value, eager), name
    assert list(ours.state) == list(eager.state)
    for name, value in eager.state.items():
        torch.testing.assert_close(ours.state[name], value, rtol=CLOSE, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def step_weights(*modules: nn.Module) -> None:
    """Move the parameters, so that every pass sees other ranges."""
    with torch.no_grad():
        for module in modules:
            for value in module.parameters():
                value.mul_(1.3).add_(0.01)


TRAINED = Phase()
SETTLED = Phase(observer=False, frozen=True)
EVALUATED = Phase(observer=False, training=False)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_equals_eager(kind: Kind) -> None:
    layer = plain_layer(kind)
    module, eager = layer.module(), layer.module()
    call, counter = compiled(module)
    counts = []
    for x, phase in zip(layer.inputs(4), (TRAINED, TRAINED, TRAINED, EVALUATED), strict=True):
        phase.apply(module)
        phase.apply(eager)
        assert_close(run(module, x, call), run(eager, x))
        step_weights(module, eager)
        counts.append(counter.frame_count)
    # the first batch tells how many channels the weight has, and that is a shape
    assert counts == [1, 2, 2, 3]


@pytest.mark.parametrize("qconfig", ["x86-0", "qnnpack-1"])
def test_other_quantizers(qconfig: str) -> None:
    layer = plain_layer("ConvBnReLU2d")
    module, eager = layer.module(qconfig), layer.module(qconfig)
    call, _ = compiled(module)
    for x in layer.inputs(3):
        assert_close(run(module, x, call), run(eager, x))
        step_weights(module, eager)


@pytest.mark.parametrize("kind", ["LinearReLU", "ConvBnReLU2d"])
def test_a_switch_compiles_once(kind: str) -> None:
    layer = plain_layer(kind)
    module, eager = layer.module(), layer.module()
    call, counter = compiled(module)
    x = layer.inputs(1)[0]
    run(module, x, call)
    run(eager, x)
    states = [TRAINED, Phase(frozen=True), SETTLED, Phase(fake_quant=False), EVALUATED]
    for phase in states:
        phase.apply(module)
        phase.apply(eager)
        before = counter.frame_count
        assert_close(run(module, x, call), run(eager, x))
        assert counter.frame_count <= before + 1
    known = counter.frame_count
    for phase in reversed(states):
        phase.apply(module)
        phase.apply(eager)
        assert_close(run(module, x, call), run(eager, x))
    assert counter.frame_count == known


@pytest.mark.parametrize("kind", ["Linear", "ConvBnReLU2d"])
def test_inductor(kind: str) -> None:
    layer = plain_layer(kind)
    module, eager = layer.module(), layer.module()
    first, second, third = layer.inputs(3)
    for each in (module, eager):
        run(each, first)  # the weight's channels are known then
    call, counter = compiled(module, "inductor")
    for x in (second, third):
        step_weights(module, eager)
        assert_close(run(module, x, call), run(eager, x))
    for each in (module, eager):
        EVALUATED.apply(each)
    with torch.no_grad():
        assert distance(call(first), eager(first)) <= CLOSE
    assert counter.frame_count == 2


class LastSoftplus(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.softplus(x).contiguous(memory_format=torch.channels_last_3d)


def test_volumes_with_channels_last() -> None:
    def net() -> Any:
        torch.manual_seed(1)
        layers = [
            ConvBn3d(3, 4, 2, qconfig=eagerq.get_default_qat_qconfig("onednn")),
            LastSoftplus(),
            ConvBnReLU3d(4, 3, 2, padding=1, qconfig=eagerq.get_default_qat_qconfig("onednn")),
        ]
        return nn.Sequential(*layers)

    module, eager = net(), net()
    inputs = [torch.randn(2, 3, 4, 5, 3).contiguous(memory_format=torch.channels_last_3d) for _ in range(3)]
    for each in (module, eager):
        run(each, inputs[0])  # the weight's channels are known then
    call, counter = compiled(module, "inductor")
    for x in inputs[1:]:
        ours, wanted = run(module, x, call), run(eager, x)
        assert distance(ours.output, wanted.output) <= CLOSE
        for name in ("input", "0.weight", "2.weight"):
            assert distance(ours.gradients[name], wanted.gradients[name]) <= CLOSE
    assert counter.frame_count == 1


def test_a_silenced_channel() -> None:
    layer = plain_layer("ConvBn2d")
    module, eager = layer.module(), layer.module()
    for each in (module, eager):
        each.bn.weight.data[1] = 0
    call, _ = compiled(module)
    for x in layer.inputs(2):
        assert_close(run(module, x, call), run(eager, x))
