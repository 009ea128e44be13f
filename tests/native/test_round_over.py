"""Rounding in a result's own memory: as rounding a copy of it, and only where nobody else looks at it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import eagerq
from eagerq import native
from eagerq.fake_quantize import FakeQuantize
from eagerq.functional import Norm, Rounding, Running, batch_norm_of_scaled, relu_, round_in_c, round_over, sum_in_c
from eagerq.intrinsic.qat import ConvBnReLU2d, freeze_bn_stats
from eagerq.nn.quantized import functional_modules

pytestmark = pytest.mark.skipif(not native.available, reason="the C library was not built: no compiler at installation")

Make = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture(autouse=True)
def whatever_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional_modules, "_MANY", 0)


def normed(relu: bool, x: Tensor, y: Tensor) -> Tensor:
    channels = x.shape[1]
    factor = torch.linspace(-0.7, 1.3, channels)
    norm = Norm(torch.zeros(channels), torch.ones(channels), 1e-5, 0.1)
    out = batch_norm_of_scaled(
        x, factor, torch.linspace(-1, 2, channels), torch.linspace(0.5, -0.5, channels), norm, relu
    )
    assert out is not None
    return out


def summed(relu: bool, x: Tensor, y: Tensor) -> Tensor:
    total = sum_in_c(x, y, relu)
    assert total is not None
    return total


def rectified(x: Tensor, y: Tensor) -> Tensor:
    out = relu_(x * 1)
    assert out is not None
    return out


def last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


MAKES: dict[str, Make] = {
    "batch norm, channels last": lambda x, y: normed(False, last(x), y),
    "batch norm, relu, channels last": lambda x, y: normed(True, last(x), y),
    "sum, relu, channels last": lambda x, y: summed(True, last(x), last(y)),
    "batch norm": lambda x, y: normed(False, x, y),
    "batch norm, relu": lambda x, y: normed(True, x, y),
    "sum": lambda x, y: summed(False, x, y),
    "sum, relu": lambda x, y: summed(True, x, y),
    "relu": rectified,
}


def parameters(observing: bool) -> Rounding:
    running = Running(torch.full((1,), -0.4), torch.full((1,), 0.9), 0.25, False) if observing else None
    return Rounding(torch.full((1,), 0.01), torch.full((1,), 30, dtype=torch.int32), 0, 127, running=running)


def passed(
    make: Make, rounds: Callable[[Tensor, Rounding], Tensor | None], to: Rounding, *inputs: Tensor
) -> list[Tensor]:
    """The rounded result, the gradients, and the parameters after it."""
    leaves = [one.clone().requires_grad_() for one in inputs]
    out = rounds(make(*leaves), to)
    assert out is not None
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    gradients = torch.autograd.grad(out, leaves, upstream, allow_unused=True)
    state = [to.scale, to.zero_point, *(to.running[:2] if to.running else ())]
    return [out.detach(), *(one for one in gradients if one is not None), *state]


@pytest.mark.parametrize("name", MAKES)
@given(
    st.tuples(st.integers(1, 4), st.integers(1, 20), st.integers(1, 9), st.integers(2, 40)),
    st.booleans(),
    st.integers(0, 3),
)
def test_as_rounding_a_copy(name: str, shape: tuple[int, ...], observing: bool, seed: int) -> None:
    torch.manual_seed(seed)
    inputs = torch.randn(shape), torch.randn(shape)
    mine = passed(MAKES[name], round_over, parameters(observing), *inputs)
    theirs = passed(MAKES[name], round_in_c, parameters(observing), *inputs)
    assert len(mine) == len(theirs)
    assert all(map(torch.equal, mine, theirs))


@pytest.mark.parametrize("name", MAKES)
def test_large_results(name: str) -> None:
    """Of several blocks in a row, or several spans of rows."""
    torch.manual_seed(0)
    inputs = torch.randn(2, 4, 150, 151), torch.randn(2, 4, 150, 151)
    inputs[0][0, :, 0, 0], inputs[0][0, :, 0, 1] = 90, -80  # the ends come early
    mine = passed(MAKES[name], round_over, parameters(True), *inputs)
    assert all(map(torch.equal, mine, passed(MAKES[name], round_in_c, parameters(True), *inputs)))


@given(st.integers(1, 20_000), st.booleans(), st.integers(0, 3))
def test_sum(count: int, relu: bool, seed: int) -> None:
    torch.manual_seed(seed)
    x, y, upstream = torch.randn(count), torch.randn(count), torch.randn(count)
    x[::5] = -y[::5]
    leaves = [x.requires_grad_(), y.requires_grad_()]
    wanted = F.relu(x + y) if relu else x + y
    total = summed(relu, x, y)
    assert torch.equal(total, wanted)
    theirs = torch.autograd.grad(wanted, leaves, upstream)
    assert all(map(torch.equal, torch.autograd.grad(total, leaves, upstream), theirs))


def test_sum_declines_what_it_does_not_serve() -> None:
    x = torch.ones(2, 3, 4, 4)
    for y in (torch.ones(4, 4), x.double(), x.to(memory_format=torch.channels_last), x[..., ::2]):
        assert sum_in_c(x, y) is None
    assert sum_in_c(x.double(), x.double()) is None
    assert sum_in_c(torch.ones(0), torch.ones(0)) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", MAKES)
def test_nothing_changes_for_values_that_are_not_finite(name: str, value: float) -> None:
    x = torch.randn(2, 3, 50, 40)
    x[1, 2, 30, 7] = value
    out = MAKES[name](x.requires_grad_(), torch.ones_like(x))
    if name in ("sum, relu", "sum, relu, channels last", "relu") and value == float("-inf"):
        assert round_over(out, parameters(True)) is out  # the ReLU has made zero of it
        return
    before, to = out.detach().clone(), parameters(True)
    assert round_over(out, to) is None
    torch.testing.assert_close(out.detach(), before, rtol=0, atol=0, equal_nan=True)
    assert to.running is not None
    assert all(map(torch.equal, (to.scale, *to.running[:2]), (torch.full((1,), v) for v in (0.01, -0.4, 0.9))))


def test_writing_counts_as_a_change() -> None:
    out = summed(True, torch.randn(4, requires_grad=True), torch.ones(4))
    before = out._version
    round_over(out, parameters(False))
    assert out._version > before


def test_leaves_alone_what_is_not_a_result_of_ours() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    each = Rounding(torch.ones(2), torch.zeros(2, dtype=torch.int32), 0, 127, rows=True)
    assert round_over(summed(True, x, torch.ones(2, 3)), each) is None
    assert round_over(x, parameters(False)) is None
    assert round_over(x * 2, parameters(False)) is None
    assert round_over(F.relu(x * 1), parameters(False)) is None


# --- in modules ---------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.quant = eagerq.QuantStub()
        self.body = nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU())
        self.side = nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5))
        self.plus = eagerq.nn.quantized.FloatFunctional()

    def forward(self, x: Tensor) -> Tensor:
        x = self.quant(x)
        y: Tensor = self.plus.add_relu(self.body(x), self.side(x))
        return y


def prepared() -> Any:
    torch.manual_seed(0)
    model = Block().train()
    eagerq.fuse_modules_qat(model, [["body.0", "body.1", "body.2"], ["side.0", "side.1"]], inplace=True)
    model.qconfig = eagerq.get_default_qat_qconfig("onednn")  # type: ignore[assignment]
    return eagerq.prepare_qat(model, inplace=True)


def trained(model: Any, call: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    """Outputs, gradients and state after three steps."""
    torch.manual_seed(1)
    found = {}
    for step in range(3):
        model.zero_grad()
        out = (call or model)(torch.randn(2, 3, 9, 10))
        out.square().sum().backward()
        found[f"output {step}"] = out.detach().clone()
        found.update({f"{step} {name}": value.grad.clone() for name, value in model.named_parameters()})
    return {**found, **model.state_dict()}


def assert_equal(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=0, msg=lambda text, n=name: f"{n}: {text}")


def never(*arguments: Any) -> None:
    return None


def copying(model: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The model's fake quantizers never round in place."""
    monkeypatch.setattr("eagerq.fake_quantize.modules.round_over", never)
    return model


def test_a_model_trains_as_without(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(
        "eagerq.fake_quantize.modules.round_over", lambda x, to: calls.append(x.shape) or round_over(x, to)
    )
    mine = trained(prepared())
    assert len(calls) == 9  # of both layers and of the sum, in each of three steps
    assert_equal(mine, trained(copying(prepared(), monkeypatch)))


def test_with_frozen_batch_norm_and_observers_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def late() -> Any:
        model = prepared()
        model(torch.randn(2, 3, 9, 10, generator=torch.Generator().manual_seed(4)))
        model.apply(eagerq.disable_observer)
        return model.apply(freeze_bn_stats)

    assert_equal(trained(late()), trained(copying(late(), monkeypatch)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_activation_checkpointing(reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def steady() -> Any:
        """Nothing that the first of the two forward passes changes is seen in the second."""
        model = prepared()
        model(torch.randn(2, 3, 9, 10, generator=torch.Generator().manual_seed(4)))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.0
        return model.apply(eagerq.disable_observer)

    def call(model: Any) -> Callable[[Tensor], Tensor]:
        return lambda x: checkpoint(model, x.requires_grad_(), use_reentrant=reentrant)

    ours, theirs = steady(), steady()
    mine, other = trained(ours, call(ours)), trained(copying(theirs, monkeypatch), call(theirs))
    for found in (mine, other):  # how far the second forward pass goes depends on what there is to save
        for name in [name for name in found if "tracked" in name]:
            del found[name]
    assert_equal(mine, other)


def test_the_first_step_may_be_checkpointed() -> None:
    """What it saves is no other than what is saved once there are ranges."""
    model = prepared()
    checkpoint(model, torch.randn(2, 3, 9, 10, requires_grad=True), use_reentrant=False).sum().backward()
    assert all(value.grad is not None for value in model.parameters())


def test_what_a_hook_saw_stays() -> None:
    model, seen = prepared(), []
    model.body[0].register_forward_hook(lambda module, args, out: seen.append(out), prepend=True)
    model(torch.randn(2, 3, 9, 10))
    assert len(seen[0].unique()) > 256
    later: list[Tensor] = []
    model.side[0].register_forward_hook(lambda module, args, out: later.append(out))
    model(torch.randn(2, 3, 9, 10))
    assert len(later[0].unique()) <= 256


def test_what_a_global_hook_saw_stays() -> None:
    model, seen = prepared(), {}
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.update({module: out}))
    try:
        model(torch.randn(2, 3, 9, 10))
    finally:
        handle.remove()
    assert len(seen[model.body[0]].unique()) > 256


def test_what_a_fake_quantizer_s_own_hook_saw_stays() -> None:
    model, seen = prepared(), []
    model.body[0].activation_post_process.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(torch.randn(2, 3, 9, 10))
    assert len(seen[0].unique()) > 256


def test_what_a_subclass_kept_stays() -> None:
    class Keeps(ConvBnReLU2d):
        kept: Tensor

        def forward(self, x: Tensor) -> Tensor:
            self.kept = super().forward(x)
            return self.kept

    model = prepared()
    model.body[0].__class__ = Keeps
    model(torch.randn(2, 3, 9, 10))
    assert len(model.body[0].kept.unique()) > 256


def test_a_float_model_adds_as_torch_does() -> None:
    """By an operator that can be differentiated in all of torch's ways."""
    plus = eagerq.nn.quantized.FloatFunctional()
    assert type(plus.add(torch.ones(3, requires_grad=True), torch.ones(3)).grad_fn).__name__ == "AddBackward0"


@pytest.mark.parametrize("height", [4, 8])
def test_an_image_without_its_batch_is_refused_as_by_torch(height: int) -> None:
    layer = ConvBnReLU2d(3, 4, 3, padding=1, qconfig=eagerq.get_default_qat_qconfig("onednn"))
    before = layer.bn.running_mean.clone()
    with pytest.raises((ValueError, RuntimeError)):
        layer(torch.randn(3, height, 8))
    assert torch.equal(layer.bn.running_mean, before)


def test_a_sum_that_is_not_rounded_is_torch_s() -> None:
    plus = prepared().plus
    plus.apply(eagerq.disable_fake_quant)
    out = plus.add(torch.ones(3, requires_grad=True), torch.ones(3))
    assert type(out.grad_fn).__name__ == "AddBackward0"


def test_a_small_sum_and_its_rounding_are_two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    plus, x = prepared().plus, torch.randn(1 << 14, requires_grad=True)
    small, large = plus.add(x[1:], x[1:]), plus.add(x, x)
    assert type(small.grad_fn).__name__ == "_RoundedBackward"
    assert type(large.grad_fn).__name__ == "_SumBackward"


def test_forward_itself_does_not_round() -> None:
    layer = prepared().body[0]
    assert isinstance(layer.activation_post_process, FakeQuantize)
    x = torch.randn(2, 3, 9, 10)
    assert len(layer.forward(x).unique()) > 256
    assert len(layer(x).unique()) <= 256
