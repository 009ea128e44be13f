"""The quantizers, as tests of torch's pt2e quantization have them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pt2e.graphs import calls, exported
from torch import Tensor, nn
from torch.fx import GraphModule

from eagerq.pt2e import convert_pt2e, prepare_pt2e
from eagerq.pt2e.quantizer import (
    ComposableQuantizer,
    EmbeddingQuantizer,
    Quantizer,
    XNNPACKQuantizer,
    get_symmetric_quantization_config,
)

aten: Any = torch.ops.aten
ops: Any = torch.ops.quantized_decomposed


class ConvLinearWPermute(nn.Module):
    """A convolution, and a linear layer over its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 8, 3), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Any:
        return self.linear(self.conv(x).permute(0, 2, 3, 1))


class Swaps(Quantizer):
    """Puts one operator in another's place, and annotates nothing."""

    def __init__(self, before: Any, after: Any) -> None:
        self.before, self.after = before, after

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        for node in model.graph.nodes:
            if node.target is self.before:
                node.target = self.after
        return model

    def annotate(self, model: GraphModule) -> GraphModule:
        return model

    def validate(self, model: GraphModule) -> None:
        pass


def quantized(model: nn.Module, example: Tensor, quantizer: Quantizer) -> GraphModule:
    prepared = prepare_pt2e(exported(model.eval(), example), quantizer)
    prepared(example)
    return convert_pt2e(prepared)


def test_composable_quantizer_throw() -> None:
    class BadQuantizer(Quantizer):
        def annotate(self, model: GraphModule) -> GraphModule:
            for node in model.graph.nodes:
                node.meta["quantization_annotation"] = None
            return model

        def validate(self, model: GraphModule) -> None:
            pass

    good = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    composed = ComposableQuantizer([good, BadQuantizer()])
    with pytest.raises(RuntimeError, match=r"BadQuantizer has removed .* XNNPACKQuantizer on node 'conv_weight'"):
        quantized(ConvLinearWPermute(), torch.randn(2, 3, 4, 4), composed)


def test_composable_quantizer_transform_for_annotation() -> None:
    class AddSub(nn.Module):
        def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Any:
            return x + y - z

    x, y, z = torch.randn(3, 1, 2, 3, 3).unbind()
    composed = ComposableQuantizer([Swaps(aten.add.Tensor, aten.mul.Tensor), Swaps(aten.sub.Tensor, aten.div.Tensor)])
    model = prepare_pt2e(exported(AddSub().eval(), x, y, z), composed)
    assert calls(model) == [aten.mul.Tensor, aten.div.Tensor]
    assert torch.equal(model(x, y, z), x * y / z)


def test_embedding_quantizer() -> None:
    indices = torch.randint(10, (32,))
    model = nn.Sequential(nn.Embedding(10, 12))
    result = quantized(model, indices, EmbeddingQuantizer())
    assert calls(result) == [ops.dequantize_per_channel.default, aten.embedding.default]
    (table,) = [value for value in result.state_dict().values() if value.dim() == 2]
    assert table.dtype is torch.uint8
    torch.testing.assert_close(result(indices), model(indices), atol=0.04, rtol=0)


def test_composable_quantizer_linear_conv() -> None:
    dynamic = XNNPACKQuantizer()  # of linear layers, since convolutions can be dynamic too by now
    dynamic.set_operator_type(aten.linear.default, get_symmetric_quantization_config(is_dynamic=True))
    static = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    model, x = ConvLinearWPermute(), torch.randn(2, 3, 4, 4)
    # the dynamic one first: the static one takes every linear that is left
    result = quantized(model, x, ComposableQuantizer([dynamic, static]))
    found = calls(result)
    counts = {
        ops.choose_qparams.tensor: 1,
        ops.quantize_per_tensor.tensor: 1,
        ops.dequantize_per_tensor.tensor: 1,
        # the convolution's input and output, and the permuted output; the linear layer's weight is folded
        ops.quantize_per_tensor.default: 3,
        ops.dequantize_per_tensor.default: 4,
        ops.quantize_per_channel.default: 0,
        ops.dequantize_per_channel.default: 1,
    }
    assert {operator: found.count(operator) for operator in counts} == counts
    torch.testing.assert_close(result(x), model(x), atol=0.02, rtol=0)
