"""Nets trained under Inductor give eager's losses and gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from training.compiled import Convolution, Perceptron, Residual, compiled, prepared

import eagerq
from eagerq.intrinsic.qat import freeze_bn_stats

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def losses(model: Any, call: Callable[[Tensor], Tensor], steps: int = 20) -> list[float]:
    """Of SGD with momentum; batch norms and observers are frozen after 12 steps."""
    generator = torch.Generator().manual_seed(12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    found = []
    for step in range(steps):
        if step == 12:
            model.apply(freeze_bn_stats)
            model.apply(eagerq.disable_observer)
        wanted = torch.randint(0, 4, (16,), generator=generator)
        x = torch.randn(16, *model.shape, generator=generator) + wanted.reshape(-1, *[1] * len(model.shape)) / 2
        optimizer.zero_grad()
        loss = F.cross_entropy(call(x), wanted)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize(("kind", "qconfig"), [(Residual, "onednn"), (Perceptron, "qnnpack")])
def test_inductor_follows_eager(kind: Any, qconfig: str) -> None:
    model = prepared(kind, qconfig)
    eager = copy.deepcopy(model)
    call, counter = compiled(model, "inductor")
    expected = losses(eager, eager)
    assert losses(model, call) == pytest.approx(expected, rel=1e-3)
    assert min(expected) < 0.95 * expected[0]  # they did learn something
    assert counter.frame_count == 2  # as at first, and frozen
    for (name, value), other in zip(model.state_dict().items(), eager.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-2, atol=1e-3, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_forward_pass_leaves_alone_what_an_earlier_one_saved(backend: str) -> None:
    model = prepared(Convolution)
    eager = copy.deepcopy(model)
    call, _ = compiled(model, backend)
    batches = [torch.randn(6, *Convolution.shape) * (1 + number * 9) for number in range(2)]
    for net, forward in ((model, call), (eager, eager)):
        inputs = [x.clone().requires_grad_() for x in batches]
        outputs = [forward(x) for x in inputs]
        for output in reversed(outputs):
            output.pow(2).sum().backward()
        net.found = [x.grad for x in inputs] + [p.grad for p in net.parameters()]
    for mine, expected in zip(model.found, eager.found, strict=True):
        assert (mine - expected).norm() <= 1e-4 * expected.norm()
