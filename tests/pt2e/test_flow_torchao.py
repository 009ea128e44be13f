"""torchao's graph flow as the oracle: the same annotations give the same graphs, parameters and numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from pt2e.flows import EAGERQ, Flow, aten, exported, listing, quiet, torchao_flow
from torch import Tensor, nn
from torch.fx import GraphModule, Node

__all__ = ["torchao_flow"]  # a fixture

INT8 = (torch.int8, -128, 127)
SHAPE = (2, 3, 6, 6)


def act(flow: Flow, dtype: torch.dtype = torch.int8, low: int = -128, high: int = 127, **more: Any) -> Any:
    observer = more.pop("observer", "HistogramObserver")
    return flow.spec(dtype, observer, low, high, torch.per_tensor_affine, **{"eps": 2**-12, **more})


def weight(flow: Flow, axis: int | None = 0) -> Any:
    if axis is None:
        return flow.spec(torch.int8, "MinMaxObserver", -127, 127, torch.per_tensor_symmetric, ch_axis=0)
    return flow.spec(torch.int8, "PerChannelMinMaxObserver", -127, 127, torch.per_channel_symmetric, ch_axis=axis)


def of(model: GraphModule, *targets: Any) -> list[Node]:
    return [node for node in model.graph.nodes if node.target in targets]


WEIGHTED = (aten.conv2d.default, aten.linear.default, aten.conv_transpose2d.input)


def weighted(flow: Flow, model: GraphModule, axis: int | None = 0, output: Any = None, **more: Any) -> None:
    for node in of(model, *WEIGHTED):
        spec = act(flow, **more)
        flow.annotate(node, {node.args[0]: spec, node.args[1]: weight(flow, axis)}, spec)


def sharing(flow: Flow, model: GraphModule, *targets: Any) -> None:
    """All inputs of these nodes, and their outputs, as their first input."""
    for node in of(model, *targets):
        first, *others = node.all_input_nodes
        shared = flow.shared((first, node))
        flow.annotate(node, {first: act(flow), **dict.fromkeys(others, shared)}, shared)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.last = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(self.second(x).relu() + x)


def residual(flow: Flow, model: GraphModule) -> None:
    weighted(flow, model)
    sharing(flow, model, aten.add.Tensor)


def per_tensor(flow: Flow, model: GraphModule) -> None:
    weighted(flow, model, axis=None, observer="MinMaxObserver")


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(3, 4, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x)


def second_axis(flow: Flow, model: GraphModule) -> None:
    weighted(flow, model, axis=1)


class Cats(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        a, b, c = x + 1, y * 2, x.sigmoid()
        both = torch.cat([a, b], 1)
        return torch.cat([both, c], 1), both.relu()


def chained_cats(flow: Flow, model: GraphModule) -> None:
    """The first shares with its first input, the second with its last; both cats end in one group."""
    for node in of(model, aten.add.Tensor, aten.mul.Tensor, aten.sigmoid.default, aten.relu.default):
        flow.annotate(node, {node.args[0]: act(flow)}, act(flow))
    first, second = of(model, aten.cat.default)
    a, b = first.args[0]
    flow.annotate(first, {a: act(flow), b: flow.shared((a, first))}, flow.shared((a, first)))
    both, c = second.args[0]
    shared = flow.shared((c, second))
    flow.annotate(second, {c: act(flow), both: shared}, shared)


class Users(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = x.relu()
        return y.sigmoid(), y.tanh(), y.abs(), y.neg(), y + x


def each_its_own(flow: Flow, model: GraphModule) -> None:
    """One tensor: unsigned for one user, signed for two, for another alone, and float for the last."""
    unsigned, signed = act(flow, torch.uint8, 0, 255), act(flow)
    (relu,) = of(model, aten.relu.default)
    flow.annotate(relu, {relu.args[0]: signed}, unsigned)
    specs = {aten.sigmoid.default: unsigned, aten.tanh.default: signed, aten.abs.default: signed}
    for node in of(model, *specs):
        flow.annotate(node, {node.args[0]: specs[node.target]}, signed)
    (neg,) = of(model, aten.neg.default)
    flow.annotate(neg, {neg.args[0]: signed}, allow_implicit_sharing=False)
    (add,) = of(model, aten.add.Tensor)
    flow.annotate(add, {add.args[0]: None, add.args[1]: flow.shared((add.args[0], add))}, signed)


def apart(flow: Flow, model: GraphModule) -> None:
    """No user allows implicit sharing."""
    for node in of(model, aten.relu.default, aten.sigmoid.default, aten.tanh.default):
        flow.annotate(node, {node.args[0]: act(flow)}, act(flow), allow_implicit_sharing=False)


class Pool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.max_pool2d(x.sigmoid(), 2).flatten(1)


def fixed(flow: Flow, model: GraphModule) -> None:
    spec = flow.quantizer.FixedQParamsQuantizationSpec(torch.uint8, 1 / 256, 0, 0, 255, torch.per_tensor_affine)
    (sigmoid,) = of(model, aten.sigmoid.default)
    flow.annotate(sigmoid, {sigmoid.args[0]: act(flow)}, spec)
    for node in of(model, aten.max_pool2d.default, aten.flatten.using_ints):
        edge = (node.args[0], node)
        shared = flow.shared(node.args[0]) if node.args[0] is sigmoid else flow.shared(edge[0])
        flow.annotate(node, {node.args[0]: shared}, flow.shared(edge))


def product(observers: list[Any]) -> tuple[Tensor, Tensor]:
    (x, _), (w, _) = (observer.calculate_qparams() for observer in observers)
    return x * w, torch.zeros_like(w, dtype=torch.int32)


def derived_bias(axis: int | None) -> Callable[[Flow, GraphModule], None]:
    scheme = torch.per_tensor_symmetric if axis is None else torch.per_channel_symmetric

    def annotate(flow: Flow, model: GraphModule) -> None:
        for node in of(model, *WEIGHTED):
            x, w, bias = node.args[:3]
            made = flow.quantizer.DerivedQuantizationSpec(
                [(x, node), (w, node)], product, torch.int32, -(2**31), 2**31 - 1, scheme, axis
            )
            flow.annotate(node, {x: act(flow), w: weight(flow, axis), bias: made}, act(flow))

    return annotate


def dynamic(scheme: torch.qscheme) -> Callable[[Flow, GraphModule], None]:
    def annotate(flow: Flow, model: GraphModule) -> None:
        spec = flow.spec(*INT8[:1], "PlaceholderObserver", *INT8[1:], scheme, is_dynamic=True, eps=2**-12)
        for node in of(model, *WEIGHTED):
            flow.annotate(node, {node.args[0]: spec, node.args[1]: weight(flow)})

    return annotate


def wide(dtype: torch.dtype) -> Callable[[Flow, GraphModule], None]:
    limits = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)

    def annotate(flow: Flow, model: GraphModule) -> None:
        more = {"observer": "MinMaxObserver"}
        weighted(flow, model, None, dtype=dtype, low=int(limits.min), high=int(limits.max), **more)

    return annotate


def affine(flow: Flow, model: GraphModule) -> None:
    """torchao's observers of blocks, which convert themselves."""
    from torchao.quantization import pt2e
    from torchao.quantization.pt2e._affine_quantization import AffineQuantizedMinMaxObserver

    made = AffineQuantizedMinMaxObserver.with_args(
        mapping_type=pt2e.MappingType.SYMMETRIC, target_dtype=torch.int8, granularity=pt2e.PerAxis(0)
    )
    spec = flow.quantizer.QuantizationSpec(torch.int8, made)
    for node in of(model, *WEIGHTED):
        flow.annotate(node, {node.args[0]: act(flow), node.args[1]: spec})


def half(flow: Flow, model: GraphModule) -> None:
    spec = flow.quantizer.QuantizationSpec(torch.float16, flow.observers.PlaceholderObserver)
    for node in of(model, *WEIGHTED):
        flow.annotate(node, {node.args[0]: spec, node.args[1]: weight(flow)})


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.rows((x * 9).abs().clamp(max=9).long())


def rows(flow: Flow, model: GraphModule) -> None:
    scheme = torch.per_channel_affine_float_qparams
    spec = flow.spec(torch.uint8, "PerChannelMinMaxObserver", 0, 255, scheme, ch_axis=0)
    for node in of(model, aten.embedding.default):
        flow.annotate(node, {node.args[0]: spec})


class Arranged(nn.Module):
    """A weight that is computed from a parameter, and a constant that is none of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))
        self.other = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.t().contiguous() * 2) + self.other.exp()


class Cache(nn.Module):
    """Writes to a buffer: what is written to is not observed, what is written is."""

    state: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("state", torch.zeros(SHAPE))

    def forward(self, x: Tensor) -> Tensor:
        return self.state.copy_(x) + 1


def cached(flow: Flow, model: GraphModule) -> None:
    for node in of(model, aten.copy_.default):
        flow.annotate(node, {source: act(flow) for source in node.all_input_nodes}, act(flow))


@dataclass(frozen=True)
class Case:
    net: type[nn.Module]
    annotate: Callable[[Flow, GraphModule], None]
    dtype: torch.dtype = torch.float32


CASES = {
    "residual": Case(Residual, residual),
    "per tensor": Case(Residual, per_tensor),
    "transposed": Case(Transposed, second_axis),
    "cats": Case(Cats, chained_cats),
    "users": Case(Users, each_its_own),
    "apart": Case(Users, apart),
    "fixed": Case(Pool, fixed),
    "derived per channel": Case(Residual, derived_bias(0)),
    "derived per tensor": Case(Residual, derived_bias(None)),
    "dynamic": Case(Residual, dynamic(torch.per_tensor_affine)),
    "dynamic symmetric": Case(Residual, dynamic(torch.per_tensor_symmetric)),
    "int16": Case(Residual, wide(torch.int16)),
    "float8_e5m2": Case(Residual, wide(torch.float8_e5m2)),
    "float8_e4m3fn": Case(Residual, wide(torch.float8_e4m3fn)),
    "float16": Case(Residual, half),
    "affine": Case(Residual, affine),
    "rows": Case(Table, rows),
    "arranged": Case(Arranged, per_tensor),
    "bfloat16": Case(Residual, per_tensor, torch.bfloat16),
    "cache": Case(Cache, cached),
}


def batches(case: Case) -> list[tuple[Tensor, ...]]:
    count = 2 if case.net is Cats else 1
    return [tuple(torch.randn(SHAPE).mul(size).to(case.dtype) for _ in range(count)) for size in (1.0, 3.0, 0.5)]


def run(flow: Flow, case: Case, net: nn.Module) -> tuple[GraphModule, GraphModule, list[Any]]:
    data = batches(case)
    with quiet():
        prepared = flow.steps.prepare_pt2e(exported(copy.deepcopy(net), *data[0]), flow.made(case.annotate))
        before = listing(prepared), sorted(prepared.state_dict())
        for batch in data:
            prepared(*batch)
        converted = flow.steps.convert_pt2e(prepared)
    torch.manual_seed(1)
    return before, listing(converted), [converted(*batch) for batch in batches(case)]


@pytest.mark.parametrize("name", CASES)
def test_the_same_graphs_parameters_and_numbers(torchao_flow: Flow, name: str) -> None:
    case = CASES[name]
    net = case.net().to(case.dtype)
    torch.manual_seed(1)
    expected = run(torchao_flow, case, net)
    for flow in (EAGERQ, replace(torchao_flow, steps=EAGERQ.steps)):
        torch.manual_seed(1)
        got = run(flow, case, net)
        assert got[0] == expected[0]
        assert got[1] == expected[1]
        torch.testing.assert_close(got[2], expected[2], rtol=0, atol=0, equal_nan=True)
