"""Late in training, with batch norms frozen, a compiled layer's result is rounded in its own memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo import lookup_backend
from training.compiled import Convolution, Residual, prepared

import eagerq
from eagerq import native
from eagerq.intrinsic.qat import freeze_bn_stats

pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.skipif(not native.available, reason="the C library's work"),
]


def late(kind: Any, observer: bool) -> Any:
    model = prepared(kind)
    for _ in range(3):
        model(torch.randn(4, *kind.shape))
    for name in ("conv", "depthwise"):  # a good part of the values leaves the range
        if rounding := getattr(getattr(model, name, None), "activation_post_process", None):
            ranges = rounding.activation_post_process
            for one in (rounding.scale, ranges.min_val, ranges.max_val):
                one.mul_(0.1)
    model.apply(freeze_bn_stats)
    return model if observer else model.apply(eagerq.disable_observer)


def compare(model: Any, shape: tuple[int, ...], backend: Any, memory_format: torch.memory_format) -> None:
    eager = copy.deepcopy(model)
    call = torch.compile(model, fullgraph=True, backend=backend)
    for scale in (1.0, 3.0):
        x = torch.randn(5, *shape).mul(scale).contiguous(memory_format=memory_format)
        found = []
        for net, forward in ((model, call), (eager, eager)):
            image = x.clone().requires_grad_()
            net.zero_grad()
            output = forward(image)
            output.pow(2).sum().backward()
            found.append(
                [output.detach(), image.grad, *(p.grad.clone() for p in net.parameters() if p.grad is not None)]
            )
        assert len(found[0]) == len(found[1])
        for mine, expected in zip(*found, strict=True):
            assert (mine - expected).norm() <= 1e-4 * expected.norm()
    for one, other in zip(model.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [Convolution, Residual])
@pytest.mark.parametrize(("observer", "memory_format"), [(False, torch.contiguous_format), (True, torch.channels_last)])
def test_is_rounded_in_place(kind: Any, observer: bool, memory_format: torch.memory_format) -> None:
    called: list[str] = []

    def backend(module: Any, inputs: Any) -> Any:
        called.extend(str(node.target) for node in module.graph.nodes)
        return lookup_backend("aot_eager")(module, inputs)

    compare(late(kind, observer), kind.shape, backend, memory_format)
    names = [name for name in called if "over" in name]
    assert names == [f"eagerq.{'observe' if observer else 'round'}_over.default"] * len(names)
    assert len(names) == len(kind.groups)


def test_under_inductor() -> None:
    compare(late(Residual, False), Residual.shape, "inductor", torch.contiguous_format)


def test_a_hook_of_the_users_sees_what_is_not_rounded() -> None:
    model, seen = late(Convolution, False), []
    layer = model.conv
    layer._forward_hooks.clear()
    layer.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    eager = copy.deepcopy(model)
    x = torch.randn(2, *Convolution.shape)
    torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    eager(x)
    assert len(seen) == 2
    assert (seen[0] - seen[1]).norm() <= 1e-5 * seen[1].norm()


def test_results_whose_order_is_in_doubt() -> None:
    """Of one channel or one pixel contiguous and channels_last are the same."""
    for channels, taps in ((1, 3), (4, 6)):
        layers = nn.Sequential(nn.Conv2d(3, channels, taps), nn.BatchNorm2d(channels), nn.ReLU())
        layers.qconfig = eagerq.get_default_qat_qconfig("onednn")  # type: ignore[assignment]
        model: Any = eagerq.prepare_qat(eagerq.fuse_modules_qat(layers.train(), [["0", "1", "2"]]))
        for _ in range(2):
            model(torch.randn(4, 3, 6, 6))
        model.apply(freeze_bn_stats).apply(eagerq.disable_observer)
        compare(model, (3, 6, 6), "aot_eager", torch.channels_last)
