"""Trained scales and zero points: torch.ao's numbers, and the whole way to int8."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import Oracle
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import eagerq
from eagerq import LearnableFakeQuantize, MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver, QConfig
from eagerq.errors import InvalidConfigError
from eagerq.functional import fake_quantize_learnable

PER_CHANNEL: dict[str, Any] = {
    "observer": MovingAveragePerChannelMinMaxObserver,
    "dtype": torch.int8,
    "quant_min": -128,
    "quant_max": 127,
    "qscheme": torch.per_channel_symmetric,
    "ch_axis": 0,
}
LEARNED = QConfig(
    LearnableFakeQuantize.with_args(quant_min=0, quant_max=255, use_grad_scaling=True),
    LearnableFakeQuantize.with_args(**PER_CHANNEL, use_grad_scaling=True),
)


def twin(ao: Oracle, name: str = "learnable") -> Any:
    module = pytest.importorskip("torch.ao.quantization._learnable_fake_quantize")
    return module._LearnableFakeQuantize


@given(
    st.integers(0, 2**31),
    st.sampled_from([None, 0, 1]),
    st.sampled_from([(0, 255), (0, 15), (-128, 127), (-8, 7)]),
    st.floats(0.01, 0.5),
)
def test_gradients_are_those_of_the_formula(seed: int, axis: int | None, span: tuple[int, int], scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = 4 * torch.randn(3, 4, generator=generator)
    count = 1 if axis is None else x.shape[axis]
    s = (scale * (1 + torch.rand(count, generator=generator))).requires_grad_()
    z = (torch.rand(count, generator=generator) * 8).requires_grad_()
    x.requires_grad_()
    out = fake_quantize_learnable(x, s, z, *span, axis, 0.5)
    upstream = torch.randn(out.shape, generator=generator)
    out.backward(upstream)
    # explicitly, in float64 but for the steps, whose rounding must be the same
    shape = (1, 1) if axis is None else ((-1, 1) if axis == 0 else (1, -1))
    low, high = span
    s_, z_ = s.detach().reshape(shape), z.detach().round().clamp(*span).reshape(shape)
    steps = (x.detach() * (1 / s_)).round() + z_
    inside = (steps >= low) & (steps <= high)
    end = torch.where(steps < low, low, high) - z_
    wanted = ((steps.clamp(low, high) - z_).double() * s_).float()
    torch.testing.assert_close(out.detach(), wanted, rtol=1e-6, atol=0)
    assert torch.equal(x.grad != 0, inside & (upstream != 0))
    torch.testing.assert_close(x.grad, upstream * inside)
    d_scale = torch.where(inside, (wanted.double() - x.detach()) / s_, end.double()) * upstream
    d_zero = torch.where(inside, 0.0, -s_.double()) * upstream
    others = tuple(range(2)) if axis is None else (1 - axis,)
    torch.testing.assert_close(s.grad.double(), 0.5 * d_scale.sum(others).reshape(-1), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(z.grad.double(), 0.5 * d_zero.sum(others).reshape(-1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["affine", "symmetric", "per channel"])
def test_equals_torch_ao(ao: Oracle, kind: str) -> None:
    arguments: dict[str, Any] = {"quant_min": 0, "quant_max": 255}
    if kind == "symmetric":
        arguments = {"quant_min": -128, "quant_max": 127, "dtype": torch.int8, "qscheme": torch.per_tensor_symmetric}
    if kind == "per channel":
        arguments = {**PER_CHANNEL, "channel_len": 4}
    observers = {"observer": getattr(ao.quantization, arguments.get("observer", MovingAverageMinMaxObserver).__name__)}
    ours, theirs = LearnableFakeQuantize(**arguments), twin(ao)(**{**arguments, **observers})
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for fq in (ours, theirs):
        fq.use_grad_scaling = True
    optimizers = [torch.optim.SGD(fq.parameters(), lr=0.05) for fq in (ours, theirs)]
    for step in range(6):
        if step == 3:
            ours.enable_param_learning()
            theirs.enable_param_learning()
        x = torch.randn(4, 50)
        results = []
        for fq, optimizer in zip((ours, theirs), optimizers, strict=True):
            leaf = x.clone().requires_grad_()
            optimizer.zero_grad()
            out = fq(leaf)
            (out * torch.linspace(-1, 1, 200).reshape(4, 50)).sum().backward()
            results.append((out.detach(), leaf.grad, fq.scale.detach().clone(), fq.zero_point.detach().clone()))
            if step >= 3:
                optimizer.step()
        for mine, wanted in zip(*results, strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-5)
    assert (ours.calculate_qparams()[0] - theirs.calculate_qparams()[0]).abs().max() < 1e-5
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())


def model() -> nn.Module:
    layers = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 3))
    net = eagerq.fuse_modules_qat(eagerq.QuantWrapper(layers).train(), [["module.0", "module.1"]])
    net.qconfig = LEARNED
    return eagerq.prepare_qat(net)


def learn(net: nn.Module, steps: int = 4) -> list[float]:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for step in range(steps):
        x, y = torch.randn(16, 1, 8, 8, generator=generator), torch.randint(3, (16,), generator=generator)
        if step == 2:
            for module in net.modules():
                if isinstance(module, LearnableFakeQuantize):
                    module.enable_param_learning()
        loss = nn.functional.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_from_qconfig_to_int8() -> None:
    """Channels are counted before the optimizer is made, learning moves the scales, and int8 keeps them."""
    net = model()
    conv = net.module[0]
    assert conv.weight_fake_quant.scale.shape == (6,)
    learn(net, 2)
    before = conv.weight_fake_quant.scale.detach().clone()
    learn(net, 4)
    learned = conv.weight_fake_quant.scale.detach()
    assert not torch.equal(before, learned)
    net.eval()
    int8 = eagerq.convert(net, as_trained=True)
    assert torch.equal(int8.module[0].weight().q_per_channel_scales(), conv.weight_fake_quant.calculate_qparams()[0])
    assert int8.quant.scale == pytest.approx(net.quant.activation_post_process.scale.item())
    x = torch.randn(8, 1, 8, 8)
    step = int8.module[3].scale
    assert (int8(x) - net(x)).abs().max() <= 1.01 * step


def test_compiled_like_eager() -> None:
    net = model()
    learn(net, 3)
    net.zero_grad()
    twin_net = copy.deepcopy(net)
    compiled = torch.compile(twin_net, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 1, 8, 8)
    results = []
    for run in (net, compiled):
        out = run(x)
        out.square().sum().backward()
        results.append(out.detach())
    torch.testing.assert_close(results[1], results[0])
    for (name, mine), other in zip(net.named_parameters(), twin_net.parameters(), strict=True):
        assert (mine.grad is None) == (other.grad is None), name
        if mine.grad is not None:
            torch.testing.assert_close(other.grad, mine.grad, rtol=1e-4, atol=1e-5)


def test_two_uses_in_one_forward() -> None:
    fq = LearnableFakeQuantize()
    x = torch.randn(8, requires_grad=True)
    for _ in range(2):
        (fq(x) * fq(2 * x)).sum().backward()
        fq.enable_param_learning()
    assert fq.scale.grad is not None


def test_switches() -> None:
    fq = LearnableFakeQuantize()
    x = torch.tensor([0.1, 3.0])
    fq.enable_static_observation()
    assert torch.equal(fq(x), x)
    fq.enable_static_estimate()
    fq(x)
    assert not fq.scale.requires_grad
    fq.apply(eagerq.disable_observer)
    scale = fq.scale.clone()
    fq(100 * x)
    assert torch.equal(fq.scale, scale)
    fq.apply(eagerq.disable_fake_quant)
    assert torch.equal(fq(x), x)
    fq.fake_quant_enabled[0] = 1  # as old programs write it
    fq.learning_enabled[0] = 1
    fq(x)
    assert fq.scale.requires_grad
    other = LearnableFakeQuantize()
    other.load_state_dict(fq.state_dict())
    other(x)
    assert other.scale.requires_grad
    assert torch.equal(other.scale, fq.scale)


def test_a_scale_stays_positive() -> None:
    fq = LearnableFakeQuantize(scale=-1.0).enable_param_learning()
    assert fq(torch.ones(3)).isfinite().all()
    assert fq.calculate_qparams()[0].item() == pytest.approx(torch.finfo(torch.float32).eps)


def test_a_symmetric_scheme_keeps_its_zero_point() -> None:
    arguments: dict[str, Any] = {"quant_min": -8, "quant_max": 7, "dtype": torch.int8, "scale": 0.5}
    fq = LearnableFakeQuantize(**arguments, zero_point=5.0, qscheme=torch.per_tensor_symmetric)
    fq.enable_param_learning()
    assert fq(torch.tensor([3.4, -9.0])).tolist() == [3.5, -4.0]
    assert fq.zero_point.item() == 0
    assert fq.calculate_qparams()[1].item() == 0


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"quant_min": 3, "quant_max": 3}, "strictly less"),
        ({"channel_len": 0}, "positive integer"),
        ({"dtype": torch.int8}, "quant_max out of bound"),
    ],
)
def test_misfits_are_refused(arguments: dict[str, Any], problem: str) -> None:
    with pytest.raises(InvalidConfigError, match=problem):
        LearnableFakeQuantize(**arguments)


def test_per_channel_files_load_into_an_unfitted_one() -> None:
    source = LearnableFakeQuantize(**PER_CHANNEL)
    source(torch.randn(5, 3))
    target = LearnableFakeQuantize(**PER_CHANNEL)
    x: Tensor = torch.randn(5, 3)
    target.load_state_dict(source.state_dict())
    assert torch.equal(source.scale, target.scale)
    source.enable_param_learning(), target.enable_param_learning()
    assert torch.equal(source(x), target(x))
