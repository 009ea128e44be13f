"""The backward pass computes a rounded weight again: same gradients, and errors where the weight has changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import eagerq
from eagerq import intrinsic, native
from eagerq.functional import in_c, rebuilding
from eagerq.nn import qat

pytestmark = pytest.mark.skipif(not native.available, reason="the C library was not built: no compiler at installation")

QCONFIG = eagerq.get_default_qat_qconfig("onednn")
LAYERS: dict[str, Any] = {
    "Conv2d": lambda: qat.Conv2d(3, 4, 3, qconfig=QCONFIG),
    "Linear": lambda: qat.Linear(6, 4, qconfig=QCONFIG),
    "ConvBnReLU2d": lambda: intrinsic.qat.ConvBnReLU2d(3, 4, 3, qconfig=QCONFIG),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


@pytest.fixture(autouse=True)
def whatever_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_c, "_WORTH_REBUILDING", 0)


def test_small_ones_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    calls = counted(monkeypatch)
    gradients(layer("Linear"))
    assert not calls
    large = qat.Linear(6, 11_000, qconfig=QCONFIG)
    gradients(large)
    assert len(calls) == 1


def layer(name: str) -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = LAYERS[name]()
    made(data())
    return made


def data() -> Tensor:
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def gradients(module: nn.Module, run: Any = None) -> list[Tensor]:
    x = data().requires_grad_()
    module.zero_grad()
    (module(x) if run is None else run(module, x)).square().sum().backward()
    return [one.grad.clone() for one in (x, *module.parameters()) if one.grad is not None]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    calls: list[None] = []
    again = rebuilding.Recipe.__call__

    def counting(self: Any) -> Tensor:
        calls.append(None)
        return again(self)

    monkeypatch.setattr(rebuilding.Recipe, "__call__", counting)
    return calls


@every_layer
def test_same_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    rebuilt = gradients(layer(name))
    assert len(calls) == 1
    monkeypatch.setattr(rebuilding.Recipe, "of", lambda *args: None)
    kept = gradients(layer(name))
    assert len(calls) == 1
    assert len(rebuilt) == len(kept) > 1
    assert all(map(torch.equal, rebuilt, kept))


@every_layer
def test_a_second_pass_changes_nothing_of_the_first(name: str) -> None:
    module = layer(name).apply(eagerq.disable_observer).apply(intrinsic.qat.freeze_bn_stats)
    wanted = gradients(module)

    def twice(module: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = module(x)
        module.apply(eagerq.enable_observer)
        with torch.no_grad():
            module(x)  # moves scale and zero point
        return y

    assert all(map(torch.equal, gradients(module, twice), wanted))


@every_layer
def test_a_weight_changed_before_backward_is_refused(name: str) -> None:
    module = layer(name)
    y = module(data().requires_grad_())
    with torch.no_grad():
        module.weight.add_(1)  # type: ignore[operator]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@every_layer
def test_hooks_of_others_see_all_else(name: str) -> None:
    wanted = gradients(layer(name))
    packed: list[Tensor] = []

    def pack(saved: Tensor) -> Tensor:
        packed.append(saved)
        return saved.clone()

    def hooked(module: nn.Module, x: Tensor) -> Tensor:
        with saved_tensors_hooks(pack, lambda kept: kept):
            y: Tensor = module(x)
        return y

    assert all(map(torch.equal, gradients(layer(name), hooked), wanted))
    assert any(saved.numel() == data().numel() for saved in packed)


@every_layer
def test_checkpointing(name: str) -> None:
    module = layer(name).apply(eagerq.disable_observer).apply(intrinsic.qat.freeze_bn_stats)
    wanted = gradients(module)

    def again(module: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(module, x, use_reentrant=False)
        return y

    assert all(map(torch.equal, gradients(module, again), wanted))


@every_layer
def test_second_derivatives(name: str) -> None:
    module = layer(name)
    x = data().requires_grad_()
    (of_x,) = torch.autograd.grad(module(x).pow(3).sum(), x, create_graph=True)
    of_x.square().sum().backward()
    weight: Any = module.weight
    assert weight.grad is not None
    assert weight.grad.isfinite().all()
    assert weight.grad.abs().sum() > 0
