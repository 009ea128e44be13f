"""Convolution with batch norm: against the two unfused, and against an explicitly folded reference."""

from __future__ import annotations

import copy
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import eagerq
from eagerq.intrinsic import qat as intrinsic_qat

DRAWN: dict[str, Any] = {
    "batch_size": st.integers(2, 4),
    "input_channels_per_group": st.sampled_from([2, 3, 4]),
    "height": st.integers(5, 10),
    "width": st.integers(5, 10),
    "output_channels_per_group": st.sampled_from([2, 3]),
    "groups": st.integers(1, 3),
    "kernel": st.tuples(st.integers(1, 3), st.integers(1, 3)),
    "stride": st.tuples(st.integers(1, 2), st.integers(1, 2)),
    "padding": st.tuples(st.integers(0, 2), st.integers(0, 2)),
    "dilation": st.just(1),
    "padding_mode": st.sampled_from(["zeros", "circular"]),
    "eps": st.sampled_from([1e-5, 1e-4, 1e-3]),
    "momentum": st.sampled_from([0.1, 0.2, 0.3]),
    "freeze_bn": st.booleans(),
    "has_bias": st.booleans(),
}
CLOSE: dict[str, float] = {"rtol": 1e-8, "atol": 1e-10}


def module(kind: Any, drawn: dict[str, Any]) -> Any:
    """A QAT module in float64, its fake quantizers off, its batch norm like one in mid-training."""
    groups = drawn["groups"]
    new = kind(
        drawn["input_channels_per_group"] * groups,
        drawn["output_channels_per_group"] * groups,
        drawn["kernel"],
        drawn["stride"],
        drawn["padding"],
        drawn["dilation"],
        groups,
        drawn["has_bias"],
        drawn["padding_mode"],
        drawn["eps"],
        drawn["momentum"],
        freeze_bn=True,
        qconfig=eagerq.default_qat_qconfig,
    ).double()
    with torch.no_grad():
        new.bn.running_mean.normal_()
        new.bn.running_var.uniform_(0.5, 2.0)
        new.bn.weight.uniform_(0.5, 2.0)
        new.bn.bias.normal_()
    new.apply(eagerq.disable_fake_quant)
    return new


def images(drawn: dict[str, Any]) -> Tensor:
    channels = drawn["input_channels_per_group"] * drawn["groups"]
    return torch.randn(drawn["batch_size"], channels, drawn["height"], drawn["width"], dtype=torch.float64)


def apart(fused: Any, relu: bool) -> nn.Sequential:
    """Stock convolution, batch norm and ReLU with copies of the fused module's numbers."""
    conv = nn.Conv2d(
        fused.in_channels,
        fused.out_channels,
        fused.kernel_size,
        fused.stride,
        fused.padding,
        fused.dilation,
        fused.groups,
        fused.bias is not None,
        fused.padding_mode,
    ).double()
    bn = nn.BatchNorm2d(fused.out_channels, fused.bn.eps, fused.bn.momentum).double()
    conv.load_state_dict(
        {name: value.clone() for name, value in fused.state_dict().items() if name in ("weight", "bias")}
    )
    bn.load_state_dict({name: value.clone() for name, value in fused.bn.state_dict().items()})
    return nn.Sequential(conv, bn, nn.ReLU() if relu else nn.Identity())


class Folded(nn.Module):
    """Convolution with the batch norm folded into its weight, written out; the weight goes through ``rounded``.

    While statistics are updated, the convolution's own output is recovered from the folded one, since
    the batch's statistics are those of the former.
    """

    def __init__(self, twin: Any, rounded: Any) -> None:
        super().__init__()
        self.conv = apart(twin, relu=False)[0]
        self.gamma, self.beta = (nn.Parameter(value.detach().clone()) for value in (twin.bn.weight, twin.bn.bias))
        self.mean, self.var = twin.bn.running_mean.clone(), twin.bn.running_var.clone()
        self.eps, self.momentum = twin.bn.eps, twin.bn.momentum
        self.rounded, self.frozen = rounded, False

    def forward(self, x: Tensor) -> Tensor:
        shape = [1, -1, 1, 1]
        factor = self.gamma / torch.sqrt(self.var + self.eps)
        weight = self.rounded(self.conv.weight * factor.reshape(-1, 1, 1, 1))
        y: Tensor = self.conv._conv_forward(x, weight, None)
        bias = self.conv.bias if self.conv.bias is not None else torch.zeros_like(factor)
        if self.frozen:
            return y + ((bias - self.mean) * factor + self.beta).reshape(shape)
        plain = y / factor.reshape(shape) + bias.reshape(shape)
        mean, var = plain.mean((0, 2, 3)), plain.var((0, 2, 3), unbiased=False)
        count = plain.numel() / plain.shape[1]
        self.mean = (1 - self.momentum) * self.mean + self.momentum * mean.detach()
        self.var = (1 - self.momentum) * self.var + self.momentum * var.detach() * count / (count - 1)
        scale = self.gamma / torch.sqrt(var + self.eps)
        return plain * scale.reshape(shape) + (self.beta - scale * mean).reshape(shape)


def backward(run: Any, x: Tensor, upstream: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output and gradient of the input."""
    leaf = x.clone().requires_grad_()
    y = run(leaf)
    y.backward(torch.ones_like(y) if upstream is None else upstream)
    assert leaf.grad is not None
    return y.detach(), leaf.grad


@given(use_relu=st.booleans(), zero_gamma=st.booleans(), **DRAWN)
def test_conv_bn_relu(use_relu: bool, zero_gamma: bool, **drawn: Any) -> None:
    fused = module(intrinsic_qat.ConvBnReLU2d if use_relu else intrinsic_qat.ConvBn2d, drawn)
    if zero_gamma:  # a channel that is silenced still has its bias, statistics and gradients
        nn.init.zeros_(fused.bn.weight)
    reference = apart(fused, use_relu)
    fused.apply(intrinsic_qat.freeze_bn_stats if drawn["freeze_bn"] else intrinsic_qat.update_bn_stats)
    reference[1].train(not drawn["freeze_bn"])
    for _ in range(2):
        x = images(drawn)
        for one in (fused, reference):
            one.zero_grad()
        upstream = torch.randn_like(reference(x))
        reference[1].load_state_dict(fused.bn.state_dict())  # the call before has moved its statistics
        wanted, mine = backward(reference, x, upstream), backward(fused, x, upstream)
        for got, want in zip(mine, wanted, strict=True):
            torch.testing.assert_close(got, want, **CLOSE)
        conv, bn = reference[0], reference[1]
        gradients = [(fused.weight, conv.weight), (fused.bn.weight, bn.weight), (fused.bn.bias, bn.bias)]
        if fused.bias is not None:
            gradients.append((fused.bias, conv.bias))
        for got, want in gradients:
            torch.testing.assert_close(got.grad, want.grad, **CLOSE)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            torch.testing.assert_close(getattr(fused.bn, name), getattr(bn, name), **CLOSE)


@given(rounding=st.booleans(), **DRAWN)
def test_conv_bn_folded_vs_unfolded(rounding: bool, **drawn: Any) -> None:
    """Five steps of training, the statistics frozen on the way; with the weight's rounding off, and on."""
    fused = module(intrinsic_qat.ConvBn2d, drawn)
    if rounding:
        fused.weight_fake_quant.enable_fake_quant()
    folded = Folded(fused, copy.deepcopy(fused.weight_fake_quant))
    fused.apply(intrinsic_qat.update_bn_stats)
    optimizers = [torch.optim.SGD(fused.parameters(), lr=0.01)]
    optimizers.append(torch.optim.SGD([*folded.conv.parameters(), folded.gamma, folded.beta], lr=0.01))
    for step in range(5):
        fused.train()  # which must not thaw what is frozen
        if drawn["freeze_bn"] and step == 3:
            fused.apply(intrinsic_qat.freeze_bn_stats)
            folded.frozen = True
            fused.train()
        x = images(drawn)
        upstream = torch.randn_like(folded.conv(x)) / 10
        for optimizer in optimizers:
            optimizer.zero_grad()
        mine, wanted = backward(fused, x, upstream), backward(folded, x, upstream)
        for got, want in zip(mine, wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)
        gradients = [(fused.weight, folded.conv.weight), (fused.bn.weight, folded.gamma), (fused.bn.bias, folded.beta)]
        for got, want in gradients:
            torch.testing.assert_close(got.grad, want.grad, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(fused.bn.running_mean, folded.mean, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(fused.bn.running_var, folded.var, rtol=1e-6, atol=1e-8)
        for optimizer in optimizers:
            optimizer.step()
