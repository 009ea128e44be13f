"""From observers to Q/DQ: parameters, dtypes, what has seen no data, and what becomes a buffer."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from pt2e.flows import EAGERQ, Flow, aten, exported, ops
from pt2e.graphs import calls
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from eagerq.errors import InvalidArgumentError, UnsupportedError
from eagerq.pt2e import (
    FakeQuantize,
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    NoopObserver,
    PerChannelMinMaxObserver,
    PlaceholderObserver,
    convert_pt2e,
    prepare_pt2e,
)
from eagerq.pt2e.quantizer import DerivedQuantizationSpec, QuantizationSpec

X = torch.linspace(-1, 1, 12).reshape(3, 4)
INT8 = QuantizationSpec(torch.int8, MinMaxObserver, -128, 127, torch.per_tensor_affine)
CHANNELS = QuantizationSpec(torch.int8, PerChannelMinMaxObserver, -127, 127, torch.per_channel_symmetric, ch_axis=0)
Q, DQ = ops.quantize_per_tensor.default, ops.dequantize_per_tensor.default
Q_CHANNEL, DQ_CHANNEL = ops.quantize_per_channel.default, ops.dequantize_per_channel.default


def prepared(net: nn.Module, x: Tensor, inputs: list[Any], output: Any = None) -> GraphModule:
    """The net's linears with these specifications for their inputs and output."""

    def annotate(flow: Flow, model: GraphModule) -> None:
        for node in model.graph.nodes:
            if node.target is aten.linear.default:
                flow.annotate(node, dict(zip(node.args, inputs, strict=False)), output)

    return prepare_pt2e(exported(net, x), EAGERQ.made(annotate))


def converted(net: nn.Module, x: Tensor, inputs: list[Any], output: Any = None) -> GraphModule:
    model = prepared(net, x, inputs, output)
    model(x)
    return convert_pt2e(model)


def first(model: GraphModule, target: Any) -> Node:
    return next(node for node in model.graph.nodes if node.target is target)


def test_parameters_of_a_tensor_are_numbers_and_of_channels_buffers() -> None:
    net = nn.Linear(4, 4)
    model = converted(net, X, [INT8, CHANNELS], INT8)
    assert first(model, Q).args[1:] == (pytest.approx(2 / 255), -1, -128, 127, torch.int8)
    _, scale, zero_point, *rest = first(model, DQ_CHANNEL).args
    assert rest == [0, -127, 127, torch.int8]
    expected = net.weight.detach().abs().amax(1) / 127
    torch.testing.assert_close(model.get_buffer(scale.target), expected)
    assert model.get_buffer(zero_point.target).tolist() == [0] * 4
    assert torch.equal(model.get_buffer("_frozen_param0"), (net.weight / expected[:, None]).round().to(torch.int8))


def test_a_model_that_is_not_float32_stays_what_it_is() -> None:
    x = X.to(torch.bfloat16)
    model = converted(nn.Linear(4, 4).to(torch.bfloat16), x, [INT8, CHANNELS], INT8)
    assert model(x).dtype is torch.bfloat16
    kwargs = [node.kwargs for node in model.graph.nodes if node.target in (DQ, DQ_CHANNEL)]
    assert kwargs == [{"out_dtype": torch.bfloat16}] * 3


@pytest.mark.parametrize("dtype", [torch.uint4, torch.int4])
def test_four_bits_are_stored_in_eight(dtype: torch.dtype) -> None:
    weight = QuantizationSpec(dtype, MinMaxObserver, qscheme=torch.per_tensor_affine)
    model = converted(nn.Linear(4, 4), X, [None, weight])
    low, high, stored = first(model, DQ).args[3:]
    assert (low, high) == ((0, 15) if dtype is torch.uint4 else (-8, 7))
    frozen = model.get_buffer("_frozen_param0")
    assert frozen.dtype is stored
    assert low <= frozen.min() <= frozen.max() <= high


def test_old_dtypes_mean_integers() -> None:
    pytest.importorskip("torch.ao.quantization")
    quint8 = getattr(torch, "quint8", None)
    if quint8 is None:
        pytest.skip("torch has dropped its quantized dtypes")
    model = converted(nn.Linear(4, 4), X, [QuantizationSpec(quint8, MinMaxObserver)])
    assert first(model, Q).args[3:] == (0, 255, torch.uint8)


@pytest.mark.parametrize("scheme", [torch.per_tensor_affine, torch.per_tensor_symmetric])
def test_parameters_at_run_time(scheme: torch.qscheme) -> None:
    spec = QuantizationSpec(torch.int8, PlaceholderObserver.with_args(eps=2**-12), -127, 127, scheme, is_dynamic=True)
    model = converted(nn.Linear(4, 4), X, [spec, CHANNELS])
    symmetric = scheme is torch.per_tensor_symmetric
    choose = ops.choose_qparams_symmetric.tensor if symmetric else ops.choose_qparams.tensor
    assert first(model, choose).args[1:] == (-127, 127, 2**-12, torch.int8)
    (chosen,) = [node for node in model.graph.nodes if node.target is choose]
    scale, zero_point = chosen.users
    for operator in (ops.quantize_per_tensor.tensor, ops.dequantize_per_tensor.tensor):
        assert first(model, operator).args[1:] == (scale, zero_point, -127, 127, torch.int8)
    for size in (1.0, 100.0):
        plain = nn.functional.linear(X * size, *(value.detach() for value in _float_linear(model)))
        torch.testing.assert_close(model(X * size), plain, atol=0.02 * size, rtol=0)


@pytest.mark.parametrize("scheme", [torch.per_tensor_affine, torch.per_tensor_symmetric])
def test_parameters_at_run_time_are_found_once_for_all_users(scheme: torch.qscheme) -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.query(x) * self.key(x)

    spec = QuantizationSpec(torch.int8, PlaceholderObserver, -127, 127, scheme, is_dynamic=True)
    model = converted(Heads(), X, [spec])
    assert calls(model).count(ops.quantize_per_tensor.tensor) == 1
    dequantize = first(model, ops.dequantize_per_tensor.tensor)
    assert [user.target for user in dequantize.users] == [aten.linear.default] * 2


def _float_linear(model: GraphModule) -> tuple[Tensor, Tensor]:
    frozen, scale, zero_point, *rest = first(model, DQ_CHANNEL).args
    values = [model.get_buffer(node.target) for node in (frozen, scale, zero_point)]
    return DQ_CHANNEL(*values, *rest), model.get_parameter("bias")


def test_a_dynamic_fake_quantizer_brings_its_eps() -> None:
    constructor = FakeQuantize.with_args(observer=MovingAverageMinMaxObserver, averaging_constant=1, eps=2**-12)
    spec = QuantizationSpec(torch.uint8, constructor, 0, 255, torch.per_tensor_affine, is_dynamic=True)
    model = converted(nn.Linear(4, 4), X, [spec])
    assert first(model, ops.choose_qparams.tensor).args[1:] == (0, 255, 2**-12, torch.uint8)


@pytest.mark.parametrize(
    ("dtype", "scheme"), [(torch.int16, torch.per_tensor_affine), (torch.int8, torch.per_channel_affine)]
)
def test_parameters_at_run_time_that_no_operator_finds(dtype: torch.dtype, scheme: torch.qscheme) -> None:
    spec = QuantizationSpec(dtype, PlaceholderObserver, -100, 100, scheme, is_dynamic=True)
    model = prepared(nn.Sequential(nn.Linear(4, 4)), X, [spec])
    with pytest.raises(UnsupportedError, match=r"node 'input_1' .*cannot be quantized at run time.*uint8 or int8"):
        convert_pt2e(model)
    assert len([node for node in model.graph.nodes if node.op == "call_module" and "post" in node.target]) == 1


def test_float_observers_just_go() -> None:
    spec = QuantizationSpec(torch.bfloat16, lambda dtype, is_dynamic: NoopObserver(dtype))
    net = nn.Linear(4, 4)
    model = converted(net, X, [spec], spec)
    assert calls(model) == [aten.linear.default]
    assert torch.equal(model(X), net(X))


def test_what_has_seen_no_data_is_named_in_one_warning() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model = prepared(net, X, [INT8, CHANNELS], INT8)
    with pytest.warns(UserWarning, match="seen no data") as caught:
        result = convert_pt2e(model)
    (warning,) = caught
    assert warning.filename == __file__
    message = str(warning.message)
    assert "node 'linear' (aten.linear.default, in module '0')" in message
    assert "node 'linear_1' (aten.linear.default, in module '2')" in message
    assert "weight" not in message
    assert first(result, Q).args[1:3] == (1.0, 0)


def test_weights_need_no_data() -> None:
    """A model that only has weights to quantize is converted unseen, and its observers are left alone."""
    scales = QuantizationSpec(torch.int8, HistogramObserver, -127, 127, torch.per_tensor_symmetric)
    fake = QuantizationSpec(torch.int8, FakeQuantize, -127, 127, torch.per_tensor_symmetric)
    for spec in (CHANNELS, scales, fake):
        net = nn.Linear(4, 4)
        seen, unseen = (prepared(net, X, [None, spec]) for _ in range(2))
        seen(X)
        before = str(unseen.state_dict())
        assert torch.equal(convert_pt2e(unseen)(X), convert_pt2e(seen)(X))
        assert str(unseen.state_dict()) == before


def test_a_bias_is_derived_from_a_weight_that_needed_no_data() -> None:
    def same(observers: list[Any]) -> tuple[Tensor, Tensor]:
        scale, _ = observers[0].calculate_qparams()
        return scale * 0.5, torch.zeros_like(scale, dtype=torch.int32)

    def annotate(flow: Flow, model: GraphModule) -> None:
        node = first(model, aten.linear.default)
        _, weight, bias = node.args
        derived = DerivedQuantizationSpec(
            [(weight, node)], same, torch.int32, -(2**31), 2**31 - 1, torch.per_channel_symmetric, 0
        )
        flow.annotate(node, {weight: CHANNELS, bias: derived})

    model = convert_pt2e(prepare_pt2e(exported(nn.Linear(4, 4), X), EAGERQ.made(annotate)))
    scales = [model.get_buffer(node.args[1].target) for node in model.graph.nodes if node.target is DQ_CHANNEL]
    assert torch.equal(scales[0] * 0.5, scales[1])
    assert (scales[0] < 0.01).all()
    assert model.get_buffer("_frozen_param1").dtype is torch.int32


class Doubling(nn.Module):
    """An observer that says itself what becomes of it."""

    def forward(self, x: Tensor) -> Tensor:
        return x

    def convert(self, model: GraphModule, node: Node) -> None:
        with model.graph.inserting_before(node):
            node.replace_all_uses_with(model.graph.call_function(aten.mul.Tensor, (node.args[0], 2)))
        model.graph.erase_node(node)


def test_an_observer_may_convert_itself() -> None:
    spec = QuantizationSpec(torch.int8, lambda **given: Doubling())
    net = nn.Linear(4, 4)
    model = converted(net, X, [spec])
    assert calls(model) == [aten.mul.Tensor, aten.linear.default]
    assert torch.equal(model(X), net(X * 2))


def test_what_a_model_keeps_out_of_its_state_stays_out() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("kept_out", torch.ones(4), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) + self.kept_out

    model = prepared(Net(), X, [INT8, CHANNELS])
    assert "kept_out" not in model.state_dict()
    model(X)
    assert "kept_out" not in convert_pt2e(model).state_dict()


def test_unused_weights_are_gone_and_others_are_the_very_same() -> None:
    net = nn.Linear(4, 4)
    model = converted(net, X, [INT8, CHANNELS])
    assert sorted(model.state_dict()) == ["_frozen_param0", "_scale_0", "_zero_point_0", "bias"]
    assert model.get_parameter("bias") is net.bias
    assert not dict(model.named_modules()).keys() & {"activation_post_process_0", "activation_post_process_1"}


def test_random_and_written_values_are_not_constants() -> None:
    class Net(nn.Module):
        counter: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("counter", torch.zeros(4, 4))
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            noisy = self.weight + torch.randn(4, 4)
            results = nn.functional.linear(x, self.counter * 2) + nn.functional.linear(x, noisy)
            self.counter.add_(1)
            return results

    model = prepared(Net(), X, [INT8, INT8])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = convert_pt2e(model)
    assert not [name for name in result.state_dict() if "frozen" in name]


def test_only_graphs_are_converted() -> None:
    with pytest.raises(InvalidArgumentError, match="got Linear"):
        convert_pt2e(nn.Linear(2, 2))  # type: ignore[arg-type]
