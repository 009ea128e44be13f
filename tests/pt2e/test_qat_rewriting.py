"""What training in the graph does to a graph: which batch norms take part, and what is kept of the nodes around."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pt2e.flows import EAGERQ, Flow, aten, ops
from pt2e.graphs import call, calls, exported
from pt2e.test_qat import CONVOLUTIONS, QCONFIG, QUANTIZER, annotate, conv_bn, inputs, random_norm, spec, trained
from torch import Tensor, nn
from torch.fx import GraphModule

from eagerq.pt2e import convert_pt2e, move_exported_model_to_eval, prepare_qat_pt2e

KEPT = torch.ops.eagerq.kept.default
SCALING = [KEPT, aten.add.Tensor, aten.sqrt.default, aten.div.Tensor, aten.eq.Scalar, aten.where.ScalarSelf]
SCALED = [*SCALING, aten.reshape.default, aten.mul.Tensor]
BACK = [aten.reshape.default, aten.div.Tensor]


def prepared(model: nn.Module, x: Tensor, annotate: Any = annotate) -> GraphModule:
    return prepare_qat_pt2e(exported(model, x), EAGERQ.made(annotate))


def without_counters(model: GraphModule) -> list[Any]:
    return [target for target in calls(model) if target is not aten.add_.Tensor]


def test_the_nodes_put_in() -> None:
    conv, bn = aten.conv2d.default, aten.batch_norm.default
    plain = prepared(conv_bn(2, bias=False), inputs(2))
    assert without_counters(plain) == [*SCALED, conv, *BACK, bn]
    biased = prepared(conv_bn(2), inputs(2))
    assert without_counters(biased) == [*SCALED, conv, *BACK, aten.reshape.default, aten.add.Tensor, bn]


def test_metadata() -> None:
    graph = exported(conv_bn(2), inputs(2))
    for node in graph.graph.nodes:
        node.meta["quantization_tag"] = node.name
    before = {node.name: node.meta for node in graph.graph.nodes}
    after = prepare_qat_pt2e(graph, QUANTIZER)
    for node in after.graph.nodes:
        if node.op == "call_function" and node.target is not aten.add_.Tensor:
            kept = before.get(node.name, before["conv2d"])
            for key in ("nn_module_stack", "stack_trace", "torch_fn", "quantization_tag"):
                assert node.meta[key] == kept[key], (node.name, key)
    (scaled,) = [node for node in after.graph.nodes if node.target is aten.mul.Tensor]
    assert scaled.meta["val"].shape == (6, 4, 3, 3)
    assert set(call(after, aten.conv2d.default).meta["quantization_annotation"].input_qspec_map) >= {scaled}


def test_converted_metadata() -> None:
    """The convolution is the one that was exported, and its result is quantized as the batch norm's was."""
    graph = exported(conv_bn(2), inputs(2))
    conv = call(graph, aten.conv2d.default)
    model = prepare_qat_pt2e(graph, QUANTIZER)
    model(inputs(2))
    converted = convert_pt2e(model)
    left = call(converted, aten.conv2d.default)
    assert left.name == conv.name
    assert left.meta["nn_module_stack"] == conv.meta["nn_module_stack"]
    assert left.meta["quantization_annotation"].output_qspec is not None
    (quantize,) = left.users
    assert quantize.target is ops.quantize_per_tensor.default
    assert quantize.meta["nn_module_stack"] == conv.meta["nn_module_stack"]


def test_shared_specifications_follow() -> None:
    """The second convolution's weight has the first one's parameters."""

    def sharing(flow: Flow, model: GraphModule) -> None:
        annotate(flow, model)
        first, second = [node for node in model.graph.nodes if node.target in CONVOLUTIONS]
        inputs = [node.meta["quantization_annotation"].input_qspec_map for node in (first, second)]
        inputs[0][first.args[1]] = spec(QCONFIG.activation)  # of weights, but one scale for them all
        inputs[1][second.args[1]] = flow.shared((first.args[1], first))

    model = nn.Sequential(*conv_bn(2), nn.Conv2d(6, 4, 1), random_norm(4, 2))
    x = inputs(2)
    graph = exported(model, x)
    after = prepare_qat_pt2e(graph, EAGERQ.made(sharing))
    weights = [node.args[1].target for node in after.graph.nodes if node.target is aten.conv2d.default]
    one, other = (after.get_submodule(str(name)) for name in weights)
    assert one is other
    # and what the quantizer was given speaks of its own nodes still
    assert not [node for node in graph.graph.nodes if "quantization_annotation" in node.meta]


def test_a_channel_that_the_batch_norm_multiplies_by_zero() -> None:
    model = conv_bn(2, bias=False)
    norm: Any = model[1]
    nn.init.zeros_(norm.weight[:2])
    x = inputs(2)
    after = prepared(model, x)
    y = after(x)
    y.square().sum().backward()
    assert y.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in after.parameters())  # type: ignore[union-attr]
    assert (norm.weight.grad[:2] != 0).all()
    converted = convert_pt2e(after)
    torch.testing.assert_close(
        converted(x)[:, :2], norm.bias[:2].expand(3, 6, 6, 2).permute(0, 3, 1, 2), rtol=0, atol=0.1
    )


def test_weights_before_an_inplace_relu_are_stored_as_integers() -> None:
    x = inputs(2)
    after = prepared(nn.Sequential(*conv_bn(2), nn.ReLU(inplace=True)), x)
    after(x)
    stored = convert_pt2e(after).state_dict()
    assert [value.dtype for value in stored.values() if value.dim() == 4] == [torch.int8]


class Twice(nn.Module):
    """A convolution and batch norm called twice, or two batch norms of a convolution called twice."""

    def __init__(self, norms: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.norms = nn.ModuleList(random_norm(4, 2) for _ in range(norms))

    def forward(self, x: Tensor) -> Any:
        return self.norms[-1](self.conv(self.norms[0](self.conv(x))))


@pytest.mark.parametrize("norms", [1, 2])
def test_shared_weights(norms: int) -> None:
    x = inputs(2)
    after = trained(Twice(norms), x)
    converted = convert_pt2e(after)
    assert calls(converted).count(aten.batch_norm.default) == 0
    torch.testing.assert_close(converted(x), move_exported_model_to_eval(after)(x), rtol=0, atol=0.15)


def test_frozen_statistics() -> None:
    """A batch norm in evaluation stays so, and a graph may be prepared in either mode."""
    model, x = conv_bn(2).eval(), inputs(2)
    after = prepared(model, x)
    norm = call(after, aten.batch_norm.default)
    assert norm.args[5] is False
    assert norm.args[6:8] == (0.3, 0.01)
    torch.testing.assert_close(after(x), model(x), rtol=0, atol=0.3)
    assert torch.equal(model[1].running_mean, exported(model, x).state_dict()["1.running_mean"])  # type: ignore[arg-type]
    assert call(convert_pt2e(after), aten.conv2d.default)


def annotate_output(flow: Flow, model: GraphModule) -> None:
    annotate(flow, model)
    for node in model.graph.nodes:
        if node.target in CONVOLUTIONS:
            node.meta["quantization_annotation"].output_qspec = spec(QCONFIG.activation)


def annotate_inputs(flow: Flow, model: GraphModule) -> None:
    for node in model.graph.nodes:
        if node.target in CONVOLUTIONS:
            flow.annotate(node, {node.args[0]: spec(QCONFIG.activation)})


@pytest.mark.parametrize("annotate", [annotate_output, annotate_inputs, lambda flow, model: None])
def test_convolutions_that_are_left_alone(annotate: Any) -> None:
    """Where the weight is not quantized, or the result before the batch norm is."""
    x = inputs(2)
    after = prepared(conv_bn(2), x, annotate)
    assert without_counters(after) == [aten.conv2d.default, aten.batch_norm.default]
    after(x)
    assert aten.batch_norm.default in calls(convert_pt2e(after))


def test_a_quantizer_that_fails_changes_nothing() -> None:
    def failing(flow: Flow, model: GraphModule) -> None:
        annotate(flow, model)
        raise RuntimeError("no")

    graph = exported(conv_bn(2), inputs(2))
    before = str(graph.graph), list(graph.state_dict())
    with pytest.raises(RuntimeError, match="no"):
        prepare_qat_pt2e(graph, EAGERQ.made(failing))
    assert (str(graph.graph), list(graph.state_dict())) == before
    assert not [node for node in graph.graph.nodes if "quantization_annotation" in node.meta]


def test_converting_changes_nothing_of_what_was_trained() -> None:
    x = inputs(2)
    after = trained(conv_bn(2), x)
    before = str(after.graph), {name: value.clone() for name, value in after.state_dict().items()}
    first = convert_pt2e(after)
    assert str(after.graph) == before[0]
    torch.testing.assert_close(dict(after.state_dict()), before[1])
    assert torch.equal(first(x), convert_pt2e(after)(x))


def test_a_copy_trains_and_converts() -> None:
    x = inputs(2)
    after = trained(conv_bn(2), x)
    assert torch.equal(convert_pt2e(copy.deepcopy(after))(x), convert_pt2e(after)(x))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo of 2.11
def test_compiled_training() -> None:
    """A compiled backward pass may compute again what the batch norm has written over since."""
    model, x = conv_bn(2), inputs(2)
    plain, compiled = (prepared(copy.deepcopy(model), x) for _ in range(2))
    run: Any = torch.compile(compiled, backend="aot_eager_decomp_partition")
    for _ in range(2):
        for y in (plain(x), run(x)):
            y.square().mean().backward()
    for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)
