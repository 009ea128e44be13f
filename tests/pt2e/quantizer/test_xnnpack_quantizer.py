"""XNNPACKQuantizer: which part of a model a setting reaches, and what becomes of each operator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pt2e.graphs import call, exported
from pt2e.quantizer.models import KEY, Linears, plain, said
from torch import Tensor, nn
from torch.fx import GraphModule

from eagerq.errors import InvalidConfigError
from eagerq.fake_quantize import FakeQuantize, FusedMovingAvgObsFakeQuantize
from eagerq.observer import HistogramObserver, MinMaxObserver, PerChannelMinMaxObserver, PlaceholderObserver
from eagerq.pt2e import convert_pt2e, prepare_pt2e
from eagerq.pt2e.quantizer import (
    OP_TO_ANNOTATOR,
    QuantizationConfig,
    XNNPACKQuantizer,
    get_symmetric_quantization_config,
    register_annotator,
)
from eagerq.pt2e.quantizer.xnnpack_quantizer_utils import change_quantization_config

aten: Any = torch.ops.aten
CONFIG = get_symmetric_quantization_config()
IMAGE = torch.linspace(-1, 1, 128).reshape(2, 4, 4, 4)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(4, 4, 1), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        return torch.cat([self.linear(torch.relu(self.conv(x))), x], dim=1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head, self.body = Block(), nn.Sequential(nn.Conv1d(8, 8, 1), nn.ReLU(), nn.Conv1d(8, 4, 1))

    def forward(self, x: Tensor) -> Any:
        return self.body(self.head(x).flatten(2)) + 1


def annotated(quantizer: XNNPACKQuantizer, model: nn.Module | None = None, *inputs: Tensor) -> GraphModule:
    graph = exported((model or Net()).eval(), *(inputs or (IMAGE,)))
    return quantizer.annotate(quantizer.transform_for_annotation(graph))


def operators(graph: GraphModule) -> list[str]:
    """The annotated ones with a quantized input of their own."""
    return [
        node.name
        for node in graph.graph.nodes
        if node.op == "call_function" and KEY in node.meta and any(node.meta[KEY].input_qspec_map.values())
    ]


HEAD = ["conv2d", "linear", "cat"]
BODY = ["conv1d", "conv1d_1"]


@pytest.mark.parametrize(
    ("configure", "wanted"),
    [
        (lambda quantizer: quantizer, []),
        (lambda quantizer: quantizer.set_global(None), []),
        (lambda quantizer: quantizer.set_global(CONFIG), [*HEAD, "flatten", *BODY, "add"]),
        (lambda quantizer: quantizer.set_module_name("head", CONFIG), [*HEAD, "flatten"]),
        (lambda quantizer: quantizer.set_module_name("head.conv", CONFIG), ["conv2d", "relu"]),
        (lambda quantizer: quantizer.set_module_type(nn.Conv2d, CONFIG), ["conv2d", "relu"]),
        (lambda quantizer: quantizer.set_module_name("body.2", CONFIG), ["conv1d_1"]),
        (lambda quantizer: quantizer.set_module_type(nn.Sequential, CONFIG), BODY),
        (lambda quantizer: quantizer.set_module_type(Block, CONFIG), [*HEAD, "flatten"]),
        (lambda quantizer: quantizer.set_module_type(Block, None).set_global(CONFIG), [*BODY, "add"]),
        (lambda quantizer: quantizer.set_operator_type(aten.linear.default, CONFIG), ["linear"]),
        (lambda quantizer: quantizer.set_operator_type(aten.conv1d.default, CONFIG), BODY),
        (lambda quantizer: quantizer.set_operator_type(aten.conv2d, CONFIG), ["conv2d"]),
        (lambda quantizer: quantizer.set_operator_type(aten.convolution.default, CONFIG), ["conv2d", *BODY]),
        (lambda quantizer: quantizer.set_operator_type(aten.add.Tensor, CONFIG), ["add"]),
        (
            lambda quantizer: quantizer.set_module_name("head", CONFIG).set_operator_type(aten.conv2d.default, CONFIG),
            [*HEAD, "flatten"],
        ),
        (
            lambda quantizer: quantizer.set_filter_function(lambda n: n.target is not aten.cat.default).set_global(
                CONFIG
            ),
            ["conv2d", "linear", *BODY, "add"],
        ),
    ],
)
def test_reach(configure: Any, wanted: list[str]) -> None:
    assert operators(annotated(configure(XNNPACKQuantizer()))) == wanted


def test_the_nearest_setting_wins() -> None:
    per_channel, dynamic = (
        get_symmetric_quantization_config(is_per_channel=True),
        get_symmetric_quantization_config(is_dynamic=True),
    )
    quantizer = XNNPACKQuantizer().set_global(CONFIG).set_operator_type(aten.conv1d.default, per_channel)
    notes = said(annotated(quantizer.set_module_type(nn.Linear, per_channel).set_module_name("head", dynamic)))
    schemes = {
        name: spec["qscheme"]
        for name, (inputs, *_) in notes.items()
        for source, spec in inputs.items()
        if source.endswith("weight")
    }
    assert schemes == {
        "linear": torch.per_tensor_symmetric,  # in head: by name, and not by class
        "conv1d": torch.per_channel_symmetric,
        "conv1d_1": torch.per_channel_symmetric,
    }
    # a convolution that ReLU follows has no dynamic kernel
    assert notes["linear"][0]["relu"]["is_dynamic"]
    assert "conv2d" not in notes


@pytest.mark.parametrize("strict", [False, True])
def test_modules_called_twice(strict: bool) -> None:
    """Names and classes are found however torch.export writes them down."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.ModuleDict({"my linear": nn.Linear(4, 4)})

        def forward(self, x: Tensor) -> Any:
            return self.block["my linear"](self.block["my linear"](x))

    graph = torch.export.export(Twice(), (IMAGE,), strict=strict).module()
    by_name = XNNPACKQuantizer().set_module_name("block.my linear", CONFIG)
    assert operators(by_name.annotate(graph)) == ["linear", "linear_1"]  # type: ignore[arg-type]


def test_stacks_of_older_graphs() -> None:
    graph = exported(Net().eval(), IMAGE)
    call(graph, aten.linear.default).meta["nn_module_stack"] = {"L__self___fc": ("L['self'].fc", nn.Bilinear)}
    quantizer = XNNPACKQuantizer().set_module_name("fc", CONFIG)
    assert operators(quantizer.annotate(graph)) == ["linear"]
    del call(graph, aten.linear.default).meta[KEY]
    assert operators(XNNPACKQuantizer().set_module_type(nn.Bilinear, CONFIG).annotate(graph)) == ["linear"]


def test_linear_says_what_becomes_of_each_tensor() -> None:
    graph = annotated(XNNPACKQuantizer().set_global(CONFIG), nn.Sequential(nn.Linear(4, 2), nn.ReLU()))
    activation, weight = plain(CONFIG.input_activation), plain(CONFIG.weight)
    x, *parameters = (node.name for node in call(graph, aten.linear.default).all_input_nodes)
    assert said(graph) == {
        "linear": ({x: activation, parameters[0]: weight, parameters[1]: None}, None, True, True),
        "relu": ({}, activation, True, True),
        **dict.fromkeys(parameters, ({}, None, True, True)),
    }


@pytest.mark.parametrize(
    ("flags", "activation", "weight"),
    [
        ({}, HistogramObserver, MinMaxObserver),
        ({"is_per_channel": True}, HistogramObserver, PerChannelMinMaxObserver),
        ({"is_dynamic": True}, PlaceholderObserver, MinMaxObserver),
        ({"is_qat": True}, FusedMovingAvgObsFakeQuantize, FusedMovingAvgObsFakeQuantize),
        ({"is_qat": True, "is_dynamic": True}, FakeQuantize, FusedMovingAvgObsFakeQuantize),
    ],
)
def test_symmetric_config(flags: dict[str, bool], activation: type, weight: type) -> None:
    config = get_symmetric_quantization_config(**flags, act_qmin=-120, weight_qmax=100)
    assert config is get_symmetric_quantization_config(**flags, act_qmin=-120, weight_qmax=100)
    assert config.is_qat is flags.get("is_qat", False)
    assert config.output_activation is (None if flags.get("is_dynamic") else config.input_activation)
    for spec, kind, low, high in (
        (config.input_activation, activation, -120, 127),
        (config.weight, weight, -127, 100),
    ):
        assert spec is not None
        assert (spec.dtype, spec.quant_min, spec.quant_max) == (torch.int8, low, high)
        more = {"is_dynamic": True} if spec.is_dynamic else {}
        observer = spec.observer_or_fake_quant_ctr(
            dtype=spec.dtype, quant_min=low, quant_max=high, qscheme=spec.qscheme, **more
        )
        assert type(observer) is kind
        assert float(getattr(observer, "activation_post_process", observer).eps) == 2**-12


def test_a_functional_pool_shares_its_parameters() -> None:
    class Pool(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return F.adaptive_avg_pool2d(F.adaptive_avg_pool2d(x, 2), 1)

    notes = said(annotated(XNNPACKQuantizer().set_global(CONFIG), Pool()))
    activation = plain(CONFIG.input_activation)
    first, second = "adaptive_avg_pool2d", "adaptive_avg_pool2d_1"
    assert notes[first] == ({"x": activation}, f"(x, {first})", True, True)
    assert notes[second] == ({first: first}, f"({first}, {second})", True, True)


def test_cat_of_integers_stays() -> None:
    class Cat(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return torch.cat([x, x + 1])

    graph = annotated(XNNPACKQuantizer().set_global(CONFIG), Cat(), torch.tensor([1, 2]))
    assert said(graph) == {}
    assert graph(torch.tensor([1, 2])).tolist() == [1, 2, 2, 3]  # the number is no float buffer
    assert graph(torch.tensor([1, 2])).dtype is torch.int64


def test_numbers_become_buffers(device: torch.device) -> None:
    class Numbers(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Any:
            return x * 0.1 + 3, (y + 0.1) * x

    x, y = torch.randn(3, dtype=torch.float64, device=device), torch.tensor([1, 2, 3], device=device)
    graph = exported(Numbers(), x, y)
    wanted = graph(x, y)
    transformed = XNNPACKQuantizer().transform_for_annotation(graph)
    assert {name: value.item() for name, value in transformed.named_buffers()} == {
        "_tensor_constant_0": 0.1,
        "_tensor_constant_1": 3.0,
        "_tensor_constant_2": pytest.approx(0.1),
    }
    assert {value.device.type for value in transformed.buffers()} == {device.type}
    for got, value in zip(transformed(x, y), wanted, strict=True):
        assert torch.equal(got, value)


@pytest.mark.filterwarnings("ignore:The tensor attributes self.gru._flat_weights:UserWarning")  # of torch's export
def test_a_gru_at_its_ends() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRU(4, 4)

        def forward(self, x: Tensor, state: Tensor | None = None) -> Any:
            return self.gru(x, state)

    activation = plain(CONFIG.input_activation)
    for inputs in ((IMAGE[0],), (IMAGE[0], torch.zeros(1, 4, 4))):
        graph = exported(Recurrent(), *inputs)
        (found,) = OP_TO_ANNOTATOR["gru_io_only"](graph, CONFIG)
        notes = said(graph)
        assert notes["gru"] == (dict.fromkeys(("x", "state")[: len(inputs)], activation), None, True, True)
        outputs = [notes[node.name] for node in call(graph, aten.gru.input).users]
        assert outputs == [({}, activation, True, True)] * 2
        assert len(found) == 4 + 1 + 2
        assert OP_TO_ANNOTATOR["gru_io_only"](graph, CONFIG) == []


def test_weights_alone() -> None:
    config = QuantizationConfig(None, None, CONFIG.weight, None)
    notes = said(annotated(XNNPACKQuantizer().set_global(config)))
    quantized = {source for inputs, *_ in notes.values() for source, spec in inputs.items() if spec is not None}
    assert quantized == {"head_conv_weight", "head_linear_weight", "body_0_weight", "body_2_weight"}
    assert not any(output for _, output, *_ in notes.values())


@pytest.mark.parametrize("dynamic_batch", [False, True])
def test_an_open_batch_size(dynamic_batch: bool) -> None:
    quantizer = XNNPACKQuantizer().set_global(CONFIG)
    graph = exported(Linears().eval(), IMAGE[0], dynamic=dynamic_batch)
    assert operators(quantizer.annotate(graph))[:3] == ["linear", "linear_1", "dropout"]


def test_transposed_convolutions_by_output_channel() -> None:
    """Also where BatchNorm follows."""
    config = get_symmetric_quantization_config(is_per_channel=True, is_qat=True)
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.ConvTranspose2d(6, 4, 2))
    graph = XNNPACKQuantizer().set_global(config).annotate(exported(model.train(), IMAGE))
    convs = [node for node in graph.graph.nodes if node.target is aten.conv_transpose2d.input]
    assert [node.meta[KEY].input_qspec_map[node.args[1]].ch_axis for node in convs] == [1, 1]


def test_the_whole_way() -> None:
    """Prepared, calibrated and converted, the model is near what it was."""
    model = Net().eval()
    prepared = prepare_pt2e(exported(model, IMAGE), XNNPACKQuantizer().set_global(CONFIG))
    prepared(IMAGE)
    quantized = convert_pt2e(prepared)
    wanted = model(IMAGE)
    assert 0 < (quantized(IMAGE) - wanted).abs().max() < 0.05 * wanted.abs().max()


def test_patterns_of_ones_own() -> None:
    @register_annotator("mine")
    def annotate_nothing(model: GraphModule, config: Any, filter_fn: Any = None) -> list[Any]:
        return []

    assert OP_TO_ANNOTATOR.pop("mine") is annotate_nothing
    assert OP_TO_ANNOTATOR["linear"](exported(nn.Linear(4, 4), IMAGE), CONFIG, lambda node: False) == []


def test_supported() -> None:
    configs = XNNPACKQuantizer.get_supported_quantization_configs()
    assert len(configs) == 4
    assert CONFIG in configs
    assert [nn.Linear] in XNNPACKQuantizer.get_supported_operator_for_quantization_config(CONFIG)
    assert (
        XNNPACKQuantizer.get_supported_operator_for_quantization_config(
            get_symmetric_quantization_config(is_dynamic=True)
        )
        == []
    )


def test_changed_specifications() -> None:
    weight: Any = CONFIG.weight
    changed = change_quantization_config(weight, quant_min=0, ch_axis=0, is_dynamic=False)
    assert (changed.quant_min, changed.quant_max, changed.dtype) == (0, 127, torch.int8)
    assert change_quantization_config(weight) == weight


def test_mistakes() -> None:
    quantizer = XNNPACKQuantizer()
    with pytest.raises(InvalidConfigError, match="set_filter_function"):
        quantizer.set_module_name("head", None)  # type: ignore[arg-type]
    for configure in (quantizer.set_global, lambda config: quantizer.set_module_type(nn.Linear, config)):
        with pytest.raises(InvalidConfigError, match=r"a QuantizationConfig is wanted, got .*get_symmetric"):
            configure(CONFIG.weight)
    with pytest.warns(UserWarning, match=r"set_operator_type\(aten.sigmoid.default\).*aten.linear"):
        quantizer.set_operator_type(aten.sigmoid.default, CONFIG)
    with pytest.warns(UserWarning, match=r"set_module_name\('haed'\): nothing .* Nearest in the graph: 'head'"):
        annotated(XNNPACKQuantizer().set_module_name("haed", CONFIG))
    with pytest.warns(UserWarning, match=r"set_module_type\(torch.nn.modules.rnn.GRU\): nothing in the graph"):
        annotated(XNNPACKQuantizer().set_module_type(nn.GRU, CONFIG))
