"""Groups of places that share an observer: torchao's, on graphs and annotations drawn at random."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from pt2e.flows import EAGERQ, Flow, quiet, torchao_flow
from torch.fx import Graph

from eagerq.pt2e.sharing import groups_of, own_specs, specs_of

__all__ = ["torchao_flow"]  # a fixture


def drawn_spec(flow: Flow, draw: Any, places: list[Any]) -> Any:
    """Signed, unsigned, none, or that of an earlier place."""
    if places and draw(st.booleans()):
        return flow.shared(draw(st.sampled_from(places)))
    kinds = ((torch.int8, -128, 127), (torch.uint8, 0, 255), None)
    kind = draw(st.sampled_from(kinds))
    return kind and flow.spec(kind[0], "MinMaxObserver", *kind[1:], torch.per_tensor_affine)


def drawn_graph(flow: Flow, draw: Any) -> Graph:
    """Up to seven sums, most of them annotated."""
    graph = Graph()
    nodes = [graph.placeholder("x"), graph.placeholder("y")]
    places: list[Any] = []
    for _ in range(draw(st.integers(2, 7))):
        node = graph.call_function(torch.add, tuple(draw(st.sampled_from(nodes)) for _ in range(2)))
        nodes.append(node)
        if draw(st.integers(0, 4)) == 0:
            continue
        inputs = {}
        for source in node.all_input_nodes:
            inputs[source] = drawn_spec(flow, draw, places)
            places.append((source, node))
        output = drawn_spec(flow, draw, places)
        flow.annotate(node, inputs, output, allow_implicit_sharing=draw(st.booleans()))
        places += [node] if output is not None else []
    return graph


@given(st.data())
def test_groups_are_those_of_torchao(torchao_flow: Flow, data: Any) -> None:
    with quiet():
        from torchao.quantization.pt2e import prepare as theirs
    specs = specs_of(drawn_graph(torchao_flow, data.draw))
    own = own_specs(specs)
    groups = groups_of(specs, own)
    assert [place for place in specs if place in {group[0] for group in groups}] == [group[0] for group in groups]
    for group in groups:  # a group comes to one specification, whichever of its places is asked
        assert all(own[place] == own[group[0]] for place in group)
    expected: dict[int, set[Any]] = {}
    try:
        found = theirs._get_edge_or_node_to_group_id(dict(specs))
    except RecursionError:  # explicit and implicit sharing that meet in a circle
        return
    for place, group in found.items():
        expected.setdefault(group, set()).add(place)
    assert {*map(frozenset, groups)} == {*map(frozenset, expected.values())}


def test_explicit_and_implicit_sharing_may_meet_in_a_circle() -> None:
    """Two sums of the same two tensors: each says that one is as the other, from opposite ends."""
    graph = Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    first, second = (graph.call_function(torch.add, (x, y)) for _ in range(2))
    int8 = EAGERQ.spec(torch.int8, "MinMaxObserver", -128, 127, torch.per_tensor_affine)
    EAGERQ.annotate(first, {y: int8, x: EAGERQ.shared((y, first))})
    EAGERQ.annotate(second, {x: int8, y: EAGERQ.shared((x, first))})
    specs = specs_of(graph)
    (group,) = groups_of(specs, own_specs(specs))
    assert group == [(y, first), (x, first), (x, second), (y, second)]


def test_a_long_chain_of_sharing_needs_no_recursion() -> None:
    graph = Graph()
    node = graph.placeholder("x")
    spec = EAGERQ.spec(torch.int8, "MinMaxObserver", -128, 127, torch.per_tensor_affine)
    for _ in range(2000):
        following = graph.call_function(torch.relu, (node,))
        EAGERQ.annotate(following, {node: spec}, EAGERQ.shared((node, following)))
        spec, node = EAGERQ.shared(node) if node.op != "placeholder" else spec, following
    specs = specs_of(graph)
    own = own_specs(specs)
    (group,) = groups_of(specs, own)
    assert len(group) == 4000
    assert own[node].dtype is torch.int8
