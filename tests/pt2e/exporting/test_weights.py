"""Weights of exported programs: int8 around zero, which is all that the kernels of some compilers know."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import eagerq
from eagerq.pt2e import export


class OneSided(nn.Module):
    """A convolution and a linear layer with channels of weights below zero, or above it."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = eagerq.QuantStub(), eagerq.DeQuantStub()
        self.conv, self.classify = nn.Conv2d(2, 4, 3), nn.Linear(4, 3)
        with torch.no_grad():
            self.conv.weight[1] = -self.conv.weight[1].abs()
            self.classify.weight[2] = self.classify.weight[2].abs()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.dequant(self.classify(self.conv(self.quant(x)).mean([2, 3])))
        return out


def _int8() -> OneSided:
    torch.manual_seed(0)
    model = OneSided().train()
    model.qconfig = eagerq.get_default_qat_qconfig("onednn")  # type: ignore[assignment]
    model = eagerq.prepare_qat(model)
    model(torch.randn(8, 2, 8, 8))
    int8 = eagerq.convert(model.eval(), as_trained=True)
    assert int8.conv.weight().zero_point.tolist() == [0, 127, 0, 0]
    assert int8.classify.weight().zero_point.tolist() == [0, 0, -128]
    return int8


def test_no_weight_has_a_zero_point_and_values_are_rounded_by_half_a_step() -> None:
    int8 = _int8()
    before = copy.deepcopy(int8.state_dict())
    graph = export(int8, (torch.randn(4, 2, 8, 8),)).module()
    kept = int8.state_dict()
    assert kept.keys() == before.keys()
    assert all(torch.equal(kept[key], value) for key, value in before.items())

    dequantized = [node for node in graph.graph.nodes if "dequantize_per_channel" in str(node.target)]
    assert len(dequantized) == 2
    for node, layer in zip(dequantized, (int8.conv, int8.classify), strict=True):
        weight, scale, zero_point = (graph.get_buffer(argument.target) for argument in node.args[:3])
        was = layer.weight()
        assert not zero_point.any()
        shape = (-1, *[1] * (weight.dim() - 1))
        steps = (weight - was.dequantize() / scale.reshape(shape)).abs().flatten(1).amax(1)
        odd = was.zero_point != 0
        assert 0.1 < steps[odd].item() <= 0.501
        assert torch.equal(scale[~odd], was.scale[~odd])
        assert steps[~odd].max() < 1e-4
        assert 1.9 < (scale / was.scale)[odd].item() < 2.01


def test_the_graph_stays_near_the_eager_model() -> None:
    int8, x = _int8(), torch.randn(16, 2, 8, 8)
    steps = (export(int8, (x,)).module()(x) - int8(x)) / int8.classify.scale
    assert steps.abs().max().round() <= 1
