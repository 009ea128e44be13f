"""From annotations to observers: what they are made with, where they go, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pt2e.flows import EAGERQ, Flow, aten, exported
from pt2e.graphs import calls
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from eagerq.errors import InvalidConfigError
from eagerq.observer import MinMaxObserver, PerChannelMinMaxObserver, PlaceholderObserver
from eagerq.pt2e import (
    DerivedObserverOrFakeQuantize,
    FakeQuantize,
    FixedQParamsObserver,
    FusedMovingAvgObsFakeQuantize,
    MovingAveragePerChannelMinMaxObserver,
    prepare_pt2e,
)
from eagerq.pt2e.prepare import insert_observers
from eagerq.pt2e.quantizer import (
    DerivedQuantizationSpec,
    FixedQParamsQuantizationSpec,
    QuantizationAnnotation,
    QuantizationSpec,
    SharedQuantizationSpec,
)

X = torch.linspace(-1, 1, 12).reshape(3, 4)
UINT8 = QuantizationSpec(torch.uint8, MinMaxObserver, 0, 255, torch.per_tensor_affine)
INT8 = QuantizationSpec(torch.int8, MinMaxObserver, -128, 127, torch.per_tensor_affine)


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(torch.relu(self.linear(x)))


def nodes(model: GraphModule) -> dict[str, Node]:
    return {node.name: node for node in model.graph.nodes}


def prepared(annotations: Callable[[dict[str, Node]], dict[str, Any]], net: nn.Module | None = None) -> GraphModule:
    """A net whose nodes, by name, have these annotations: inputs by name and output."""

    def annotate(flow: Flow, model: GraphModule) -> None:
        by_name = nodes(model)
        for name, (inputs, output) in annotations(by_name).items():
            flow.annotate(by_name[name], {by_name[source]: spec for source, spec in inputs.items()}, output)

    return prepare_pt2e(exported(net or Chain(), X), EAGERQ.made(annotate))


def observers(model: GraphModule) -> dict[str, nn.Module]:
    """By name of what is observed."""
    calls = [node for node in model.graph.nodes if node.op == "call_module" and "post_process" in node.target]
    return {node.args[0].name: model.get_submodule(node.target) for node in calls}


def test_a_spec_tells_its_constructor_what_it_says_and_no_more() -> None:
    narrow = QuantizationSpec(torch.int8, MinMaxObserver.with_args(quant_min=-127, quant_max=127, eps=0.5))
    weight = QuantizationSpec(torch.int8, PerChannelMinMaxObserver, -127, 127, torch.per_channel_symmetric, ch_axis=1)
    found = observers(prepared(lambda by: {"linear": ({"x": narrow, "linear_weight": weight}, INT8)}))
    assert (found["x"].quant_min, found["x"].quant_max, found["x"].eps.item()) == (-127, 127, 0.5)
    assert found["linear_weight"].ch_axis == 1
    assert found["linear_weight"].qscheme is torch.per_channel_symmetric
    assert (found["linear"].quant_min, found["linear"].quant_max) == (-128, 127)


def test_an_axis_is_for_schemes_that_have_one() -> None:
    """Backends write ``ch_axis=0`` into the specification of a per-tensor weight, too."""
    tensor = QuantizationSpec(torch.int8, MinMaxObserver, -127, 127, torch.per_tensor_symmetric, ch_axis=0)
    channel = QuantizationSpec(
        torch.int8,
        FakeQuantize.with_args(observer=MovingAveragePerChannelMinMaxObserver),
        -127,
        127,
        torch.per_channel_symmetric,
        ch_axis=1,
    )
    assert not hasattr(
        observers(prepared(lambda by: {"linear": ({"linear_weight": tensor}, None)}))["linear_weight"], "ch_axis"
    )
    found = observers(prepared(lambda by: {"linear": ({"linear_weight": channel}, None)}))["linear_weight"]
    assert found.ch_axis == 1
    assert found.scale.shape == (1,)


def test_any_callable_makes_observers() -> None:
    spec = QuantizationSpec(torch.uint8, lambda dtype, is_dynamic, qscheme: PlaceholderObserver(dtype), qscheme=None)
    with pytest.raises(InvalidConfigError, match=r"the output of node 'relu'.*missing 1 required.*'qscheme'"):
        prepared(lambda by: {"relu": ({}, spec)})
    spec = QuantizationSpec(torch.uint8, lambda **given: PlaceholderObserver(given["dtype"]))
    assert observers(prepared(lambda by: {"relu": ({}, spec)}))["relu"].dtype is torch.uint8


def test_fixed_parameters_are_rounded_to_in_training() -> None:
    fixed = FixedQParamsQuantizationSpec(torch.uint8, 1 / 256, 0, 0, 255, torch.per_tensor_affine)
    model = exported(Chain(), X)
    by = nodes(model)
    by["tanh"].meta["quantization_annotation"] = QuantizationAnnotation({by["relu"]: fixed}, INT8)
    insert_observers(model, is_qat=True)
    found = observers(model)
    assert type(found["relu"]).__name__ == "FixedQParamsFakeQuantize"
    assert found["relu"](torch.tensor([0.5 / 256, 2.6 / 256])).tolist() == [0.0, 3 / 256]
    assert type(observers(prepared(lambda by: {"tanh": ({"relu": fixed}, None)}))["relu"]) is FixedQParamsObserver


def test_derived_parameters_may_be_said_before_what_they_derive_from() -> None:
    def largest(made: list[Any]) -> tuple[Tensor, Tensor]:
        scales, zeros = zip(*(observer.calculate_qparams() for observer in made), strict=True)
        return torch.cat(scales).amax(0, keepdim=True), zeros[0]

    def annotations(by: dict[str, Node]) -> dict[str, Any]:
        sources = [(by["linear_weight"], by["linear"]), by["relu"]]
        bias = DerivedQuantizationSpec(sources, largest, torch.int32, -(2**31), 2**31 - 1, torch.per_tensor_symmetric)
        return {"linear": ({"linear_bias": bias, "linear_weight": INT8}, None), "relu": ({}, UINT8)}

    model = prepared(annotations)
    found = observers(model)
    assert type(found["linear_bias"]) is DerivedObserverOrFakeQuantize
    assert found["linear_bias"].obs_or_fqs == [found["linear_weight"], found["relu"]]
    model(X)
    scales = [found[name].calculate_qparams()[0] for name in ("linear_weight", "relu")]
    assert found["linear_bias"].calculate_qparams()[0] == max(scales)


def test_one_observer_for_one_tensor() -> None:
    """What the producer and the consumers say alike is one observer, called once."""
    model = prepared(
        lambda by: {"linear": ({}, INT8), "relu": ({"linear": INT8}, INT8), "tanh": ({"relu": INT8}, None)}
    )
    called = [node.target for node in model.graph.nodes if node.op == "call_module" and "post" in node.target]
    assert called == ["activation_post_process_0", "activation_post_process_1"]
    assert calls(model) == [aten.linear.default, aten.relu.default, aten.tanh.default]


def test_a_shared_observer_is_called_wherever_it_looks() -> None:
    def annotations(by: dict[str, Node]) -> dict[str, Any]:
        return {"relu": ({"linear": INT8}, SharedQuantizationSpec((by["linear"], by["relu"])))}

    model = prepared(annotations)
    found = observers(model)
    assert found["linear"] is found["relu"]
    model(X)
    hidden = nn.functional.linear(X, model.get_parameter("linear.weight"), model.get_parameter("linear.bias"))
    low, high = hidden.aminmax()
    assert (found["relu"].min_val, found["relu"].max_val) == (min(low, low.new_zeros(())), high)


def test_a_later_place_may_be_shared_with() -> None:
    """Sharing is followed to its end whatever the order: a chain from the front of the graph to its back."""

    def annotations(by: dict[str, Node]) -> dict[str, Any]:
        first = SharedQuantizationSpec(by["relu"])
        second = SharedQuantizationSpec((by["relu"], by["tanh"]))
        return {"linear": ({"x": first}, None), "relu": ({}, second), "tanh": ({"relu": UINT8}, None)}

    found = observers(prepared(annotations))
    assert found["x"] is found["relu"]
    assert found["x"].dtype is torch.uint8


def test_sharing_with_what_stays_float_is_staying_float() -> None:
    def annotations(by: dict[str, Node]) -> dict[str, Any]:
        return {"tanh": ({"relu": None}, SharedQuantizationSpec((by["relu"], by["tanh"])))}

    assert observers(prepared(annotations)) == {}


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        (
            lambda by: {"relu": ({}, SharedQuantizationSpec(by["tanh"]))},
            r"the output of node 'relu' .* shares the observer of the output of node 'tanh' .*, which has none",
        ),
        (
            lambda by: {
                "relu": ({}, SharedQuantizationSpec(by["tanh"])),
                "tanh": ({}, SharedQuantizationSpec(by["relu"])),
            },
            r"share with each other.*'relu'.*'tanh'",
        ),
        (
            lambda by: {"relu": ({}, DerivedQuantizationSpec([by["tanh"]], max, torch.int32))},
            r"output of node 'relu' .* derived from the output of node 'tanh' .*, which has no observer",
        ),
        (
            lambda by: {
                "relu": ({}, DerivedQuantizationSpec([by["tanh"]], max, torch.int32)),
                "tanh": ({}, DerivedQuantizationSpec([by["relu"]], max, torch.int32)),
            },
            "derived from themselves",
        ),
        (
            lambda by: {"linear": ({"x": QuantizationSpec(torch.int8, MinMaxObserver, 5, 127)}, None)},
            r"the input from node 'x' .* to node 'linear' \(aten.linear.default, in module 'linear'\).*must include 0",
        ),
        (
            lambda by: {
                "linear": ({"x": QuantizationSpec(torch.int8, PerChannelMinMaxObserver, is_dynamic=True)}, None)
            },
            r"does not support dynamic quantization",
        ),
    ],
)
def test_annotations_that_cannot_be_followed(annotations: Any, message: str) -> None:
    with pytest.raises(InvalidConfigError, match=message):
        prepared(annotations)


def test_whatever_fails_the_model_stays_as_it_is() -> None:
    model = exported(Chain(), X)
    before = str(model.graph), dict(model.named_modules())

    def annotate(flow: Flow, given: GraphModule) -> None:
        nodes(given)["relu"].meta["quantization_annotation"] = flow.quantizer.QuantizationAnnotation({}, INT8)
        given.register_buffer("mine", torch.ones(1))
        raise KeyError("the quantizer's own mistake")

    with pytest.raises(KeyError, match="own mistake"):
        prepare_pt2e(model, EAGERQ.made(annotate))
    assert (str(model.graph), dict(model.named_modules())) == before
    assert "mine" not in dict(model.named_buffers())
    assert not any("quantization_annotation" in node.meta for node in model.graph.nodes)


def test_the_callback_gets_the_observers_before_they_are_put_in() -> None:
    seen = {}

    def annotate(flow: Flow, model: GraphModule) -> None:
        by = nodes(model)
        flow.annotate(by["relu"], {by["linear"]: INT8}, UINT8)

    quantizer = EAGERQ.made(annotate)

    def callback(model: GraphModule, places: dict[Any, Any]) -> None:
        assert not observers(model)
        by = nodes(model)
        seen.update(places)
        places[by["linear"], by["relu"]].eps.fill_(0.25)
        places[by["relu"]] = FixedQParamsObserver(0.125, 0)

    quantizer.prepare_obs_or_fq_callback = callback
    found = observers(prepare_pt2e(exported(Chain(), X), quantizer))
    assert len(seen) == 2
    assert found["linear"].eps == 0.25
    assert found["relu"].scale == 0.125


def test_annotations_made_beforehand_hold_for_the_copy() -> None:
    model = exported(Chain(), X)
    by = nodes(model)
    shared = SharedQuantizationSpec((by["linear"], by["relu"]))
    by["relu"].meta["quantization_annotation"] = QuantizationAnnotation({by["linear"]: INT8}, shared)
    found = observers(prepare_pt2e(model, EAGERQ.made(lambda flow, model: None)))
    assert list(found) == ["linear", "relu"]
    assert found["linear"] is found["relu"]


def test_only_tensors_are_observed() -> None:
    class Sizes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            values, places = x.max(1)
            return values + places

    model = exported(Sizes(), X)
    (maximum,) = [node for node in model.graph.nodes if node.target is aten.max.dim]
    maximum.meta["quantization_annotation"] = QuantizationAnnotation({}, INT8)
    assert observers(prepare_pt2e(model, EAGERQ.made(lambda flow, model: None))) == {}


def test_arguments_by_keyword_are_observed() -> None:
    def by_keyword(flow: Flow, model: GraphModule) -> None:
        linear = nodes(model)["linear"]
        x, weight, bias = linear.args
        linear.args, linear.kwargs = (x, weight), {"bias": bias}
        flow.annotate(linear, {x: UINT8, bias: INT8})

    model = prepare_pt2e(exported(Chain(), X), EAGERQ.made(by_keyword))
    assert list(observers(model)) == ["linear_bias", "x"]
    model(X)


def test_fake_quantizers_are_for_prepare_too() -> None:
    spec = QuantizationSpec(torch.int8, FusedMovingAvgObsFakeQuantize, -128, 127, torch.per_tensor_affine)
    model = prepared(lambda by: {"linear": ({"x": spec}, None)})
    found = observers(model)["x"]
    assert type(found) is FusedMovingAvgObsFakeQuantize
    result = model(X)
    weight, bias = model.get_parameter("linear.weight"), model.get_parameter("linear.bias")
    assert torch.equal(result, nn.functional.linear(found(X), weight, bias).relu().tanh())
    assert not torch.equal(found(X), X)
