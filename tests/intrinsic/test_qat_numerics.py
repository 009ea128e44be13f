"""QAT layers against the same pass spelled out in float64, and against the float layers."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from intrinsic.layers import (
    GRADIENT,
    KINDS,
    PHASES,
    QCONFIGS,
    Kind,
    Layer,
    Phase,
    assert_same_pass,
    gradient_unit,
    layers,
    run,
)
from torch import Tensor, nn

# for tests that run for every class
FEWER = settings(max_examples=max(settings.default.max_examples // 3, 1))


def convolve(layer: Layer, x: Tensor, weight: Tensor) -> Tensor:
    """The layer's linear part, whatever the dtype."""
    if not layer.kind.dim:
        return x @ weight.T
    arguments = layer.arguments
    plain = getattr(nn, f"Conv{layer.kind.dim}d")(**{**arguments, "bias": False}).to(weight.dtype)
    return torch.func.functional_call(plain, {"weight": weight}, (x,))


def explicit_fold(
    layer: Layer, module: Any, before: dict[str, Tensor], x: Tensor, single: Tensor, dtype: torch.dtype
) -> tuple[Tensor, dict[str, Tensor]]:
    """The pass that ``module`` has just made, spelled out.

    Args:
        before: the module's state before the pass.
        single: what the module gave its fake quantizer; checked here, and used where it decides.
        dtype: float64 to know the truth, float32 to know how far from it one must be.

    Returns:
        The output, and the tensors that have gradients once it is differentiated.
    """
    leaves = {name: value.detach().to(dtype).requires_grad_() for name, value in module.named_parameters()}
    leaves["input"] = x = x.detach().to(dtype).requires_grad_()
    weight, bias, bn = leaves["weight"], leaves.get("bias"), getattr(module, "bn", None)
    each_out = [-1] + [1] * (weight.dim() - 1)
    each_value = [1, -1] + [1] * (weight.dim() - 2)
    factor = torch.ones(len(weight), dtype=dtype)
    if bn is not None:
        factor = leaves["bn.weight"] / (before["bn.running_var"].to(dtype) + bn.eps).sqrt()
    scaled = weight * factor.reshape(each_out)
    torch.testing.assert_close(single.to(dtype), scaled.detach(), rtol=1e-6, atol=0)

    quantizer = module.weight_fake_quant
    if quantizer.fake_quant_enabled.item():
        scale, zero_point = quantizer.scale, quantizer.zero_point
        if quantizer.is_per_channel:
            scale, zero_point = scale.reshape(each_out), zero_point.reshape(each_out)
        positions = (scaled / scale.to(dtype)).detach()
        # Midway between two integers the last bit decides, and there it is the module's float32 that
        # counts. A symmetric observer's scale puts a channel's largest value midway, so some are usual.
        midway = (positions - positions.floor() - 0.5).abs() < 1e-4
        assert layer.weights == "ties" or midway.sum() <= 2 * len(weight) + 0.02 * weight.numel()
        steps = torch.where(midway, (single * (1 / scale)).to(dtype), positions).round() + zero_point
        low, high = quantizer.quant_min, quantizer.quant_max
        inside = (steps >= low) & (steps <= high)
        rounded = (steps.clamp(low, high) - zero_point) * scale.to(dtype)
        scaled = rounded + (scaled - scaled.detach()) * inside  # the gradient goes straight through
    y = convolve(layer, x, scaled) / factor.reshape(each_value)
    if bias is not None:
        y = y + bias.reshape(each_value)
    if bn is not None:
        axes = [axis for axis in range(y.dim()) if axis != 1]
        if bn.training:
            mean, variance = y.mean(axes), y.var(axes, unbiased=False)
            momentum = 1 / bn.num_batches_tracked.item() if bn.momentum is None else bn.momentum
            for name, new in (("running_mean", mean), ("running_var", y.var(axes))):
                expected = torch.lerp(before[f"bn.{name}"].to(dtype), new.detach(), momentum)
                torch.testing.assert_close(getattr(bn, name).to(dtype), expected, rtol=1e-5, atol=1e-6)
        else:
            mean, variance = before["bn.running_mean"].to(dtype), before["bn.running_var"].to(dtype)
        y = (y - mean.reshape(each_value)) / (variance.reshape(each_value) + bn.eps).sqrt()
        y = y * leaves["bn.weight"].reshape(each_value) + leaves["bn.bias"].reshape(each_value)
    return (y.relu() if layer.kind.relu else y), leaves


@pytest.mark.parametrize("kind", KINDS, ids=str)
@FEWER
@given(data=st.data(), qconfig=st.sampled_from(sorted(QCONFIGS)), later=st.lists(PHASES, min_size=2, max_size=2))
def test_equals_an_explicit_fold(kind: Kind, data: st.DataObject, qconfig: str, later: list[Phase]) -> None:
    layer = data.draw(layers(kind))
    module = layer.module(qconfig)
    seen: list[Tensor] = []
    module.weight_fake_quant.register_forward_hook(lambda _, args, output: seen.append(args[0].detach()))
    for x, phase in zip(layer.inputs(3), [Phase(), *later], strict=True):
        phase.apply(module)
        before = copy.deepcopy(module.state_dict())
        step = run(module, x)
        exact, rounded = (
            explicit_fold(layer, module, before, x, seen[-1], dtype) for dtype in (torch.float64, torch.float32)
        )
        exact[0].backward(step.upstream.double())
        rounded[0].backward(step.upstream)
        noise = (rounded[0] - exact[0]).abs().max()
        shift = module.bn.bias.abs().max() if kind.bn else 0
        assert (step.output - exact[0]).abs().max() <= 1e-5 * (exact[0].abs().max() + shift) + 4 * noise
        for name, value in step.gradients.items():
            if value is not None:
                truth = exact[1][name].grad
                noise = (rounded[1][name].grad - truth).norm()
                assert (value - truth).norm() <= GRADIENT * gradient_unit(name, truth, step) + 4 * noise, name


@pytest.mark.parametrize("kind", KINDS, ids=str)
@FEWER
@given(data=st.data(), frozen=st.booleans())
def test_is_the_float_layer_when_fake_quant_is_off(kind: Kind, data: st.DataObject, frozen: bool) -> None:
    layer = data.draw(layers(kind))
    module, plain = layer.module(), nn.Sequential(*layer.parts())
    Phase(fake_quant=False, frozen=frozen).apply(module)
    if kind.bn:
        plain[1].train(not frozen)
    for x in layer.inputs(3):
        step, expected = run(module, x), run(plain, x)
        named = dict(zip(step.gradients, expected.gradients.values(), strict=True))
        assert_same_pass(step, replace(expected, gradients=named, bn_trains=step.bn_trains))
    if kind.bn:
        for name, value in plain[1].state_dict().items():
            torch.testing.assert_close(module.bn.state_dict()[name], value, rtol=1e-5, atol=1e-6)
