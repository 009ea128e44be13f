"""The porting pass by itself, on graphs written by hand: what it ports, where it stops, what it stands."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch.fx import Graph, GraphModule, Node

from eagerq.pt2e import graph
from eagerq.pt2e.operators import CHOOSE_QPARAMS
from eagerq.pt2e.port_metadata_pass import PortNodeMetaForQDQ as PassOfTheOldPlace
from eagerq.pt2e.quantizer.port_metadata_pass import PortNodeMetaForQDQ

ops = torch.ops.quantized_decomposed
aten = torch.ops.aten
RANGE = (-128, 127, torch.int8)
PORTED = ("stack_trace", "quantization_tag", "nn_module_stack")


class Written:
    """A graph in the making; its nodes' own metadata is their name."""

    def __init__(self) -> None:
        self.graph = Graph()
        self.x = self.graph.placeholder("x")

    def call(self, target: object, *args: object) -> Node:
        return self.graph.call_function(target, args)  # type: ignore[arg-type]

    def constant(self, name: str) -> Node:
        return self.graph.create_node("get_attr", name)

    def quantize(self, node: Node) -> Node:
        return self.call(ops.quantize_per_tensor.default, node, 0.1, 0, *RANGE)

    def dequantize(self, node: Node) -> Node:
        return self.call(ops.dequantize_per_tensor.default, node, 0.1, 0, *RANGE)

    def both(self, node: Node) -> tuple[Node, Node]:
        quantized = self.quantize(node)
        return quantized, self.dequantize(quantized)

    def dynamic(self, node: Node, choose: object = ops.choose_qparams.tensor) -> tuple[Node, ...]:
        chosen = self.call(choose, node, -128, 127, 1e-5, torch.int8)
        scale, zero_point = self.call(operator.getitem, chosen, 0), self.call(operator.getitem, chosen, 1)
        quantized = self.call(ops.quantize_per_tensor.tensor, node, scale, zero_point, *RANGE)
        dequantized = self.call(ops.dequantize_per_tensor.tensor, quantized, scale, zero_point, *RANGE)
        return chosen, scale, zero_point, quantized, dequantized

    def finish(self, *outputs: Node) -> GraphModule:
        self.graph.output(outputs)
        names = [node.target for node in self.graph.nodes if node.op == "get_attr"]
        return GraphModule(dict.fromkeys(names, torch.zeros(1)), self.graph)


def annotate(node: Node, *inputs: Node, output: bool = False, left_float: tuple[Node, ...] = ()) -> None:
    """As with any quantizer's classes: only the attributes count."""
    spec = SimpleNamespace(dtype=torch.int8)
    node.meta["quantization_annotation"] = SimpleNamespace(
        input_qspec_map=dict.fromkeys(inputs, spec) | dict.fromkeys(left_float),
        output_qspec=spec if output else None,
    )
    tag(node)


def tag(node: Node) -> None:
    for key in PORTED:
        node.meta[key] = f"{key} of {node.name}"
    node.meta["other"] = node.name


def port(module: GraphModule) -> bool:
    return PortNodeMetaForQDQ()(module).modified


def owner(node: Node) -> str | None:
    """Whose metadata a node has: all three keys of one node, or none."""
    found = {node.meta[key].rpartition(" ")[2] for key in PORTED if key in node.meta}
    assert "other" not in node.meta or node.meta["other"] == node.name
    assert len(found) <= 1
    assert not found or all(key in node.meta for key in PORTED)
    return next(iter(found), None)


def owners(*nodes: Node) -> list[str | None]:
    return [owner(node) for node in nodes]


@pytest.fixture
def written() -> Written:
    return Written()


def test_one_class_in_two_places() -> None:
    assert PassOfTheOldPlace is PortNodeMetaForQDQ


def test_chain_of_which_all_is_quantized(written: Written) -> None:
    first, to_conv = written.both(written.x)
    conv = written.call(aten.relu.default, to_conv)
    after_conv, to_pool = written.both(conv)
    pool = written.call(aten.relu.default, to_pool)
    after_pool, last = written.both(pool)
    annotate(conv, written.x, output=True)
    annotate(pool, conv, output=True)
    assert port(written.finish(last))
    assert owners(first, to_conv, after_conv) == [None, conv.name, conv.name]
    assert owners(to_pool, after_pool, last) == [pool.name, pool.name, None]


def test_what_is_not_annotated_gets_nothing(written: Written) -> None:
    first, to_conv = written.both(written.x)
    conv = written.call(aten.relu.default, to_conv)
    after_conv, to_pool = written.both(conv)
    pool = written.call(aten.relu.default, to_pool)
    after_pool, last = written.both(pool)
    annotate(conv, output=True, left_float=(written.x,))
    tag(pool)
    module = written.finish(last)
    assert port(module)
    assert owners(first, to_conv, after_conv) == [None, None, conv.name]
    assert owners(to_pool, after_pool, last) == [None, None, None]
    del conv.meta["quantization_annotation"]
    assert not port(module)


@pytest.mark.parametrize("choose", sorted(CHOOSE_QPARAMS, key=str))
def test_dynamic_after_static(written: Written, choose: object) -> None:
    conv = written.call(aten.relu.default, written.x)
    after_conv, between = written.both(conv)
    dynamic = written.dynamic(between, choose)
    linear = written.call(aten.relu.default, dynamic[-1])
    annotate(conv, output=True)
    annotate(linear, conv)
    assert port(written.finish(linear))
    assert owners(after_conv, between) == [conv.name, None]
    assert owners(*dynamic) == [linear.name] * 5


def test_dynamic_quantize_belongs_to_its_consumer_and_not_to_the_producer(written: Written) -> None:
    producer = written.call(aten.relu.default, written.x)
    dynamic = written.dynamic(producer)
    consumer = written.call(aten.relu.default, dynamic[-1])
    annotate(producer, output=True)
    assert not port(written.finish(consumer))
    assert owners(*dynamic) == [None] * 5


def test_choose_qparams_and_dequantize_shared_by_two_consumers(written: Written) -> None:
    dynamic = written.dynamic(written.x)
    other = written.call(aten.sym_size.int, dynamic[3], 0)
    again = written.dequantize(dynamic[3])
    first, second = written.call(aten.relu.default, dynamic[-1]), written.call(aten.relu.default, again)
    third = written.call(aten.relu.default, again)
    annotate(first, written.x)
    annotate(second, written.x)
    tag(third)
    assert port(written.finish(first, second, third, other))
    assert owners(*dynamic[:4]) == [second.name] * 4
    assert owners(dynamic[4], again, other) == [first.name, second.name, None]


def test_output_with_no_user_several_users_and_other_users(written: Written) -> None:
    unused = written.call(aten.relu.default, written.x)
    used = written.call(aten.relu.default, written.x)
    float_user = written.call(aten.relu.default, used)
    size = written.call(aten.sym_size.int, used, 0)
    two = [written.quantize(used), written.quantize(used)]
    annotate(unused, output=True)
    annotate(used, output=True)
    assert port(written.finish(*two, float_user, size))
    assert owners(*two, float_user, size) == [used.name, used.name, None, None]


def test_inputs_in_lists_and_keywords_are_inputs(written: Written) -> None:
    pairs = [written.both(node) for node in (written.x, written.graph.placeholder("y"))]
    listed = written.call(aten.cat.default, [pair[1] for pair in pairs], 1)
    (_, by_keyword) = written.both(listed)
    named = written.graph.call_function(aten.relu.default, (), {"self": by_keyword})
    annotate(listed, *(pair[0].args[0] for pair in pairs))
    annotate(named, listed)
    assert port(written.finish(named))
    assert owners(*(pair[1] for pair in pairs)) == [listed.name] * 2
    assert owner(by_keyword) == named.name


def test_requantized_input(written: Written) -> None:
    """An output and its consumer's input with parameters of their own: the first pair is the producer's."""
    producer = written.call(aten.relu.default, written.x)
    first, back = written.both(producer)
    second, to_consumer = written.both(back)
    consumer = written.call(aten.relu.default, to_consumer)
    annotate(producer, output=True)
    annotate(consumer, producer)
    assert port(written.finish(consumer))
    assert owners(first, back, second, to_consumer) == [producer.name, None, None, consumer.name]


def _weighted(written: Written, *chain: object, weight: Node | None = None) -> tuple[list[Node], Node, Node]:
    weight = weight or written.constant("weight")
    tag(weight)
    nodes = [weight]
    for target in chain:
        nodes.append(written.call(target, nodes[-1], 0, 1))
    source = nodes[-1]
    quantized, dequantized = written.both(source)
    linear = written.call(aten.linear.default, written.x, dequantized)
    annotate(linear, source)
    return [*nodes[1:], quantized], dequantized, linear


def test_weight_s_chain_has_the_weight_s_metadata(written: Written) -> None:
    chain, dequantized, linear = _weighted(
        written, aten.transpose.int, aten.view.default, aten.permute_copy.default, aten.t.default, aten.slice.Tensor
    )
    assert port(written.finish(linear))
    assert owners(*chain, dequantized) == ["weight"] * 6 + [linear.name]


def test_per_channel_weight(written: Written) -> None:
    weight, scale, zero = (written.constant(name) for name in ("weight", "scale", "zero"))
    tag(weight)
    parameters = (scale, zero, 0, *RANGE)
    quantized = written.call(ops.quantize_per_channel.default, weight, *parameters)
    dequantized = written.call(ops.dequantize_per_channel.default, quantized, *parameters)
    linear = written.call(aten.linear.default, written.x, dequantized)
    annotate(linear, weight)
    assert port(written.finish(linear))
    assert owners(quantized, dequantized, scale, zero) == ["weight", linear.name, None, None]


@pytest.mark.parametrize("unknown", [aten.relu.default, torch.relu, aten.sym_size.int])
def test_unknown_operators_stop_the_walk(written: Written, unknown: object) -> None:
    chain, dequantized, linear = _weighted(written, aten.view.default, unknown, aten.view.default)
    assert port(written.finish(linear))
    assert owners(*chain, dequantized) == [None] * 4 + [linear.name]


@pytest.mark.parametrize(("name", "owned"), [("p_weight", True), ("b_w", True), ("c_lifted", True), ("y", False)])
def test_weights_among_the_inputs_of_an_exported_program(written: Written, name: str, owned: bool) -> None:
    weight = written.graph.placeholder(name)
    chain, dequantized, linear = _weighted(written, aten.t.default, weight=weight)
    assert port(written.finish(linear))
    assert owners(*chain, dequantized) == [name if owned else None] * 2 + [linear.name]


class Unfolded(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(4, 3))
        self.register_buffer("bias", torch.randn(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        there_and_back = [
            ops.dequantize_per_tensor(ops.quantize_per_tensor(tensor, 0.1, 0, *RANGE), 0.1, 0, *RANGE)
            for tensor in (x, self.weight.t(), self.bias)
        ]
        return torch.nn.functional.linear(*there_and_back)


@pytest.mark.parametrize("as_module", [False, True])
def test_what_torch_exports(as_module: bool) -> None:
    """A program's graph has its weights as inputs, a module's as attributes."""
    program = torch.export.export(Unfolded(), (torch.randn(2, 4),))
    module = program.module() if as_module else program.graph_module
    linear = next(node for node in module.graph.nodes if node.target == aten.linear.default)
    dequantizes = linear.all_input_nodes
    quantizes = [node.all_input_nodes[0] for node in dequantizes]
    x, transposed, bias = (node.all_input_nodes[0] for node in quantizes)
    (weight,) = transposed.all_input_nodes
    annotate(linear, x, transposed, bias)
    for node in (x, weight, bias):
        tag(node)
    for node in (*dequantizes, *quantizes, transposed):
        for key in PORTED:
            node.meta.pop(key, None)
    assert port(module)
    assert owners(*dequantizes) == [linear.name] * 3
    assert owners(*quantizes, transposed) == [None, weight.name, bias.name, weight.name]


@pytest.mark.parametrize("op", ["get_attr", "placeholder"])
def test_folded_weight_whose_old_name_is_gone(written: Written, op: str) -> None:
    weight, folded = written.constant("weight"), written.graph.create_node(op, "b_folded")
    to_weight, (_, to_input) = written.dequantize(folded), written.both(written.x)
    linear = written.call(aten.linear.default, to_input, to_weight)
    annotate(linear, weight)
    written.graph.erase_node(weight)
    assert port(written.finish(linear))
    assert owners(to_weight, to_input) == [linear.name, None]


def test_constant_that_was_not_to_be_quantized(written: Written) -> None:
    """All sources of the annotation are still there, so the other constant is none of its business."""
    to_weight, (_, to_input) = written.dequantize(written.constant("other")), written.both(written.x)
    linear = written.call(aten.linear.default, to_input, to_weight)
    annotate(linear, written.x)
    assert port(written.finish(linear))
    assert owners(to_weight, to_input) == [None, linear.name]


def test_a_copied_graph_and_a_second_time(written: Written) -> None:
    chain, dequantized, linear = _weighted(written, aten.t.default)
    graph_module = written.finish(linear)
    copied = copy.deepcopy(graph_module)
    for module in (graph_module, copied, copied):
        assert port(module)
        nodes = {node.name: node for node in module.graph.nodes}
        assert owners(*(nodes[node.name] for node in chain)) == ["weight"] * 2
        assert owner(nodes[dequantized.name]) == linear.name


def test_work_grows_with_the_graph_and_no_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """No dynamic input costs a look at everything downstream of it."""
    looked = 0

    def counting(node: object, what: str, does: Callable[[object, str], bool] = graph._does) -> bool:
        nonlocal looked
        looked += 1
        return does(node, what)

    monkeypatch.setattr(graph, "_does", counting)
    counts = []
    for length in (100, 200):
        written, looked = Written(), 0
        node = written.x
        for _ in range(length):
            *_, dequantized = written.dynamic(node)
            consumer = written.call(aten.relu.default, dequantized)
            annotate(consumer, node, output=True)
            node = consumer
        assert port(written.finish(node))
        counts.append(looked)
    assert counts[1] <= 2.1 * counts[0]
