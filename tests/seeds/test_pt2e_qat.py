"""Quantization-aware training of exported graphs, as tests of torch's pt2e quantization have it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from pt2e.flows import EAGERQ, Flow, aten, ops
from pt2e.graphs import calls, exported
from torch import Tensor, nn
from torch.fx import GraphModule

from eagerq.fake_quantize import FixedQParamsFakeQuantize
from eagerq.observer import default_weight_observer
from eagerq.pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e
from eagerq.pt2e.quantizer import FixedQParamsQuantizationSpec, QuantizationSpec
from eagerq.pt2e.quantizer.xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config
from eagerq.pt2e.quantizer.xnnpack_quantizer_utils import OP_TO_ANNOTATOR, QuantizationConfig

Q, DQ = ops.quantize_per_tensor.default, ops.dequantize_per_tensor.default
DQ_PER_CHANNEL = ops.dequantize_per_channel.default


class ConvBNReLU(nn.Sequential):
    def __init__(self, conv: type[nn.Module] = nn.Conv2d) -> None:
        super().__init__(conv(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU())  # type: ignore[call-arg]


def test_fixed_qparams_qspec_qat() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).sigmoid()

    fixed = FixedQParamsQuantizationSpec(torch.uint8, 1 / 256, 0, 0, 255, torch.per_tensor_affine)

    def annotate(flow: Flow, model: GraphModule) -> None:
        (sigmoid,) = [node for node in model.graph.nodes if node.target is aten.sigmoid.default]
        flow.annotate(sigmoid, {sigmoid.args[0]: fixed}, fixed)

    x = torch.rand(1, 3, 5, 5)
    prepared = prepare_qat_pt2e(exported(Net(), x), EAGERQ.made(annotate))
    kinds = [type(module) for name, module in prepared.named_modules() if name.startswith("activation_post_process_")]
    assert kinds.count(FixedQParamsFakeQuantize) == 2
    prepared(x).sum().backward()
    converted = convert_pt2e(prepared)
    assert calls(converted) == [aten.conv2d.default, Q, DQ, aten.sigmoid.default, Q, DQ]
    pairs = [node for node in converted.graph.nodes if node.target in (Q, DQ)]
    assert {node.args[1:] for node in pairs} == {(1 / 256, 0, 0, 255, torch.uint8)}
    torch.testing.assert_close(converted(x), prepared(x))


def test_reentrant() -> None:
    """A part is trained and converted on its own, the rest with the part in it afterwards."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv_bn_relu: Any = ConvBNReLU()
            self.linear = nn.Linear(3, 8)

        def forward(self, x: Tensor) -> Any:
            return self.linear(self.conv_bn_relu(x).permute(0, 2, 3, 1))

    net = Net()
    x = torch.randn(3, 3, 10, 10)
    config = get_symmetric_quantization_config(is_per_channel=True, is_qat=True)
    part = prepare_qat_pt2e(exported(net.conv_bn_relu, x), XNNPACKQuantizer().set_global(config))
    net.conv_bn_relu = part
    net(x)
    net.conv_bn_relu = convert_pt2e(part)
    quantizer = XNNPACKQuantizer().set_module_type(nn.Linear, get_symmetric_quantization_config(is_per_channel=False))
    prepared = prepare_pt2e(exported(net, x), quantizer)
    expected = prepared(x)
    converted = convert_pt2e(prepared)
    torch.testing.assert_close(converted(x), expected, rtol=0, atol=0.1)
    found = calls(converted)
    assert Counter(found) & Counter({Q: 9, DQ: 9, DQ_PER_CHANNEL: 9}) == {Q: 4, DQ: 5, DQ_PER_CHANNEL: 1}
    assert aten.batch_norm.default not in found
    order = [
        target for target in found if target in (Q, DQ, aten.conv2d.default, aten.relu.default, aten.linear.default)
    ]
    assert order[-10:] == [DQ, aten.conv2d.default, aten.relu.default, Q, DQ, Q, DQ, aten.linear.default, Q, DQ]


def test_conv_transpose_bn_relu() -> None:
    int8 = QuantizationSpec(torch.int8, default_weight_observer, -128, 127, torch.per_tensor_symmetric)
    config = QuantizationConfig(int8, int8, int8, None)
    quantizer = EAGERQ.made(lambda _, model: OP_TO_ANNOTATOR["conv_transpose_relu"](model, config))
    net = ConvBNReLU(nn.ConvTranspose2d).eval()
    nn.init.normal_(net[1].running_mean)  # type: ignore[arg-type]
    x = torch.randn(1, 3, 5, 5)
    prepared = prepare_pt2e(exported(net, x), quantizer)
    torch.testing.assert_close(prepared(x), net(x))
    converted = convert_pt2e(prepared)
    # the batch norm is folded, and the weight is stored as integers
    assert calls(converted) == [DQ, Q, DQ, aten.conv_transpose2d.input, aten.relu.default, Q, DQ]
    torch.testing.assert_close(converted(x), net(x), rtol=0, atol=0.1)
