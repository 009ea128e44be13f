"""Forward passes that are made again, and layers that somebody changes between forward and backward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import eagerq
from eagerq import native
from eagerq.functional import in_c
from eagerq.intrinsic.qat import ConvBn1d, ConvBnReLU2d, LinearBn1d
from eagerq.nn.qat import Linear
from eagerq.twins import attach_observer

pytestmark = pytest.mark.skipif(not native.available, reason="the C library was not built: no compiler at installation")

QCONFIG = eagerq.get_default_qat_qconfig("onednn")
IMAGES, ROWS = (4, 3, 7, 9), (16, 12)
LAYERS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "one step": (lambda: ConvBnReLU2d(3, 8, 3, qconfig=QCONFIG), IMAGES),
    "no ReLU": (lambda: ConvBn1d(3, 8, 3, qconfig=QCONFIG), IMAGES[:3]),
    "its own pace": (lambda: ConvBnReLU2d(3, 8, 3, momentum=None, qconfig=QCONFIG), IMAGES),  # type: ignore[arg-type]
    "bias": (lambda: ConvBnReLU2d(3, 8, 3, bias=True, qconfig=QCONFIG), IMAGES),
    "linear, batch norm": (lambda: LinearBn1d(12, 8, qconfig=QCONFIG), ROWS),
    "linear": (lambda: Linear(12, 8, qconfig=QCONFIG), ROWS),
}


def observed(make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    layer = make().train()
    attach_observer(layer)
    for name, parameter in layer.named_parameters():
        if name == "bn.weight":
            nn.init.uniform_(parameter, 0.5, 3)
    return layer


def gradients(layer: Any, run: Callable[[Any, Tensor], Tensor], shape: tuple[int, ...]) -> list[Tensor]:
    found = []
    for step in range(3):
        torch.manual_seed(step)
        x = (torch.randn(shape) * 3).requires_grad_()
        layer.zero_grad()
        run(layer, x).square().sum().backward()
        found += [one.grad.clone() for one in (x, *layer.parameters())]
    return found


@pytest.mark.parametrize("rebuilding", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_both_kinds_of_checkpointing_give_the_same(
    name: str, rebuilding: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both take what the second pass saves, whose weights are scaled by statistics that the first has moved."""
    monkeypatch.setattr(in_c, "_WORTH_REBUILDING", 0 if rebuilding else 1 << 30)
    make, shape = LAYERS[name]
    wanted, got = (
        gradients(observed(make), lambda layer, x: checkpoint(layer, x, use_reentrant=kind), shape)  # noqa: B023
        for kind in (True, False)
    )
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("twice", [False, True])
def test_what_hooks_are_given_is_what_comes_back(twice: bool) -> None:
    """A copy of all that is saved, taken when it is saved, serves as well; the second derivatives too."""
    make, shape = LAYERS["one step"]

    def second(layer: Any, x: Tensor) -> Tensor:
        if not twice:
            total: Tensor = layer(x)
            return total
        (slope,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        return slope

    wanted = gradients(observed(make), second, shape)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda x: x):
        got = gradients(observed(make), second, shape)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["one step", "its own pace"])
@pytest.mark.parametrize("change", [nn.Module.half, nn.Module.double])
def test_a_model_converted_before_its_backward_pass(name: str, change: Any) -> None:
    make, shape = LAYERS[name]
    layer = observed(make)
    out = layer(torch.randn(shape, requires_grad=True))
    change(layer)
    with pytest.raises(RuntimeError, match="by now"):
        out.sum().backward()


def test_a_plain_number_may_say_how_the_window_moves() -> None:
    layer = observed(lambda: ConvBnReLU2d(3, 8, 3, stride=2, padding=1, qconfig=QCONFIG))
    other = copy.deepcopy(layer)
    other.stride, other.padding = 2, 1
    for batch in (2, 1):
        x = torch.randn(batch, 3, 8, 8)
        torch.testing.assert_close(other(x), layer(x))


@pytest.mark.parametrize("name", ["one step", "bias"])
def test_statistics_that_are_not_tracked_stay(name: str) -> None:
    make, shape = LAYERS[name]
    layer = observed(make)
    layer.bn.track_running_stats = False
    before = {key: value.clone() for key, value in layer.bn.named_buffers()}
    layer(torch.randn(shape))
    assert all(torch.equal(value, before[key]) for key, value in layer.bn.named_buffers())


def test_nobody_has_to_count_batches() -> None:
    make, shape = LAYERS["one step"]
    layer, other = observed(make), observed(make)
    other.bn.num_batches_tracked = None
    x = torch.randn(shape)
    torch.testing.assert_close(other(x), layer(x))
