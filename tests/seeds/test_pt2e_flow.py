"""What prepare_pt2e and convert_pt2e make of exported graphs, with eagerq's quantizers and with small ones."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pt2e.flows import aten, exported, ops
from pt2e.graphs import calls
from torch import Tensor, nn
from torch.fx import GraphModule

from eagerq.observer import default_observer, default_weight_observer
from eagerq.pt2e import convert_pt2e, prepare_pt2e
from eagerq.pt2e.quantizer import (
    FixedQParamsQuantizationSpec,
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
)
from eagerq.pt2e.quantizer.composable_quantizer import ComposableQuantizer
from eagerq.pt2e.quantizer.embedding_quantizer import EmbeddingQuantizer
from eagerq.pt2e.quantizer.xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config
from eagerq.pt2e.quantizer.xnnpack_quantizer_utils import OP_TO_ANNOTATOR, QuantizationConfig

Q, DQ = ops.quantize_per_tensor.default, ops.dequantize_per_tensor.default
DQ_PER_CHANNEL = ops.dequantize_per_channel.default


class By(Quantizer):
    """Annotates with a function."""

    def __init__(self, annotate: Callable[[GraphModule], Any]) -> None:
        self._annotate = annotate

    def annotate(self, model: GraphModule) -> None:
        self._annotate(model)

    def validate(self, model: GraphModule) -> None:
        pass


def spec(dtype: torch.dtype, low: int, high: int, observer: Any = default_observer) -> QuantizationSpec:
    scheme = torch.per_tensor_symmetric if observer is default_weight_observer else torch.per_tensor_affine
    return QuantizationSpec(dtype, observer, low, high, scheme)


def quantized(net: nn.Module, quantizer: Quantizer, *inputs: Tensor) -> GraphModule:
    """Prepared, run once, converted; and it runs."""
    prepared = prepare_pt2e(exported(net, *inputs), quantizer)
    expected = prepared(*inputs)
    converted = convert_pt2e(prepared)
    torch.testing.assert_close(converted(*inputs), expected, atol=0.15, rtol=0)
    return converted


def xnnpack(**config: Any) -> XNNPACKQuantizer:
    return XNNPACKQuantizer().set_global(get_symmetric_quantization_config(**config))


def quantized_linear(is_per_channel: bool = False) -> GraphModule:
    return quantized(nn.Linear(2, 2), xnnpack(is_per_channel=is_per_channel), torch.randn(2, 2))


def count(model: GraphModule) -> Counter[Any]:
    return Counter(calls(model))


def test_fixed_qparams_qspec_ptq() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).sigmoid()

    fixed = FixedQParamsQuantizationSpec(torch.uint8, 1 / 256, 0, 0, 255, torch.per_tensor_affine)

    def annotate(model: GraphModule) -> None:
        (sigmoid,) = [node for node in model.graph.nodes if node.target is aten.sigmoid.default]
        sigmoid.meta["quantization_annotation"] = QuantizationAnnotation({sigmoid.args[0]: fixed}, fixed)

    x = torch.rand(1, 3, 5, 5) * 4
    prepared = prepare_pt2e(exported(Net(), x), By(annotate))
    prepared(x)
    converted = convert_pt2e(prepared)
    assert calls(converted) == [aten.conv2d.default, Q, DQ, aten.sigmoid.default, Q, DQ]
    pairs = [node for node in converted.graph.nodes if node.target in (Q, DQ)]
    assert {node.args[1:] for node in pairs} == {(1 / 256, 0, 0, 255, torch.uint8)}


@pytest.mark.parametrize("dtype", [torch.int16, torch.float8_e5m2, torch.float8_e4m3fn])
def test_quantization_dtype(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    activation = spec(dtype, int(limits.min), int(limits.max))
    weight = spec(torch.int8, -128, 127, default_weight_observer)
    config = QuantizationConfig(activation, activation, weight, None)
    net = nn.Conv2d(3, 3, 3)
    x = torch.randn(1, 3, 3, 3)
    prepared = prepare_pt2e(exported(net, x), By(lambda model: OP_TO_ANNOTATOR["conv"](model, config)))
    expected = prepared(x)
    converted = convert_pt2e(prepared)
    assert calls(converted) == [DQ, Q, DQ, aten.conv2d.default, Q, DQ]
    assert [node.args[-1] for node in converted.graph.nodes if node.target is Q] == [dtype, dtype]
    # float8 keeps two or three bits of the mantissa
    torch.testing.assert_close(converted(x), expected, atol=0.5 if dtype.is_floating_point else 0.02, rtol=0)


def test_input_edge_sanity_check() -> None:
    class Six(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 6

    def annotate(model: GraphModule) -> None:
        (add,) = [node for node in model.graph.nodes if node.target is aten.add.Tensor]
        uint8 = spec(torch.uint8, 0, 255)
        add.meta["quantization_annotation"] = QuantizationAnnotation(dict.fromkeys(add.args, uint8), uint8)

    model = exported(Six(), torch.randn(1, 2, 3, 3))
    before = str(model.graph)
    with pytest.raises(Exception, match=r"node 'add' \(aten\.add\.Tensor\) is annotated with an input 6"):
        prepare_pt2e(model, By(annotate))
    assert str(model.graph) == before
    assert not [node for node in model.graph.nodes if "quantization_annotation" in node.meta]


def test_fold_quantize() -> None:
    converted = quantized_linear()
    assert count(converted)[Q] == 2
    assert count(converted)[DQ] == 3
    assert converted.get_buffer("_frozen_param0").dtype is torch.int8


def test_fold_quantize_per_channel() -> None:
    converted = quantized_linear(is_per_channel=True)
    found = count(converted)
    assert (found[Q], found[DQ], found[DQ_PER_CHANNEL]) == (2, 2, 1)
    assert converted.get_buffer("_frozen_param0").dtype is torch.int8
    assert found[ops.quantize_per_channel.default] == 0


def test_dont_fold_other_constant() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)
            self.dont_fold_me = nn.Parameter(torch.randn(2, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) + self.dont_fold_me.t()

    quantizer = XNNPACKQuantizer()
    quantizer.set_module_type(nn.Linear, get_symmetric_quantization_config(is_per_channel=False))
    net = Net()
    converted = quantized(net, quantizer, torch.randn(2, 2))
    found = count(converted)
    assert (found[Q], found[DQ], found[aten.t.default]) == (2, 3, 1)
    assert converted.get_parameter("dont_fold_me") is net.dont_fold_me


def test_fold_all_ops_before_quantize() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.randn(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight.t())

    net = Net()
    converted = quantized(net, xnnpack(is_per_channel=False), torch.randn(2, 2))
    assert count(converted) == {Q: 2, DQ: 3, aten.linear.default: 1}
    (linear,) = [node for node in converted.graph.nodes if node.target is aten.linear.default]
    weight = linear.args[1]
    assert weight.args[0].target == "_frozen_param0"
    real = DQ(converted.get_buffer("_frozen_param0"), *weight.args[1:])
    torch.testing.assert_close(real, net.weight.t(), atol=0.02, rtol=0)


def test_constant_prop_preserve_metadata() -> None:
    x = torch.randn(2, 2)
    model = exported(nn.Sequential(nn.Linear(2, 2)), x)
    weight = next(node for node in model.graph.nodes if node.op == "get_attr" and "weight" in node.target)
    weight.meta.update(stack_trace="where the weight is made", quantization_tag="tag", own="kept as well")
    prepared = prepare_pt2e(model, xnnpack())
    prepared(x)
    converted = convert_pt2e(prepared)
    (frozen,) = [node for node in converted.graph.nodes if node.op == "get_attr" and "frozen_param" in node.target]
    assert {"stack_trace", "quantization_tag", "own", "from_node"} <= frozen.meta.keys()
    for key, value in frozen.meta.items():
        assert value == weight.meta[key]


@pytest.mark.filterwarnings("ignore:The given (buffer|NumPy array) is not writable:UserWarning")  # torch.export.load
def test_save_load(tmp_path: Path) -> None:
    x = torch.randn(2, 2)
    for is_per_channel in (False, True):
        model = quantized_linear(is_per_channel)
        path = tmp_path / f"{is_per_channel}.pt2"
        torch.export.save(torch.export.export(model, (x,)), path)
        loaded = torch.export.load(path).module()
        assert torch.equal(loaded(x), model(x))
        assert {value.dtype for name, value in loaded.state_dict().items() if "frozen" in name} == {torch.int8}


def test_transform_for_annotation() -> None:
    class Three(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 3

    class Multiplying(By):
        def transform_for_annotation(self, model: GraphModule) -> GraphModule:
            for node in model.graph.nodes:
                if node.target is aten.add.Tensor:
                    node.target = aten.mul.Tensor
            return model

    x = torch.randn(1, 2, 3, 3)
    model = exported(Three(), x)
    prepared = prepare_pt2e(model, Multiplying(lambda model: model))
    assert calls(prepared) == [aten.mul.Tensor]
    assert torch.equal(prepared(x), x * 3)
    assert torch.equal(model(x), x + 3)


def test_multi_users_without_output_observer() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.conv(x)
            return x, x + 1

    x = torch.randn(1, 3, 5, 5)
    prepared = prepare_pt2e(exported(Net(), x), xnnpack())
    prepared(x)
    observer = prepared.graph.output_node().args[0][0]
    assert observer.op == "call_module"
    assert observer.target.startswith("activation_post_process_")
    observer.replace_all_uses_with(observer.args[0])
    prepared.graph.erase_node(observer)
    prepared.recompile()
    plain, added = convert_pt2e(prepared)(x)
    torch.testing.assert_close(plain, prepared(x)[0], atol=0.05, rtol=0)
    torch.testing.assert_close(added, plain + 1, atol=0.05, rtol=0)


def test_groupwise_per_channel_quant() -> None:
    converted = quantized(nn.Conv2d(4, 4, 3, groups=2), xnnpack(is_per_channel=True), torch.randn(2, 4, 10, 10))
    assert count(converted)[DQ_PER_CHANNEL] == 1
    assert converted.get_buffer("_scale_0").shape == (4,)


def _work(function: Callable[[], Any]) -> int:
    """How many calls of Python functions it takes."""
    work = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal work
        work += event == "call"

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(before)
    return work


def test_speed() -> None:
    """Each further layer takes as much work as the one before it: what 20 more take is twice what 10 more take."""

    def steps(depth: int) -> tuple[int, int]:
        layers = [layer for _ in range(depth) for layer in (nn.Linear(4, 4), nn.ReLU())]
        net = nn.Sequential(nn.Embedding(8, 4), *layers)
        x = torch.arange(8)
        model = exported(net, x)
        quantizer = ComposableQuantizer([EmbeddingQuantizer(), xnnpack(is_per_channel=True, is_dynamic=True)])
        prepared = []
        preparing = _work(lambda: prepared.append(prepare_pt2e(model, quantizer)))
        prepared[0](x)
        converted = []
        converting = _work(lambda: converted.append(convert_pt2e(prepared[0])))
        assert count(converted[0])[ops.choose_qparams.tensor] == depth
        return preparing, converting

    steps(2)  # what is done once in a process
    small, middle, large = steps(10), steps(20), steps(40)
    for first, second, third in zip(small, middle, large, strict=True):
        assert third - second < 2.05 * (second - first)
