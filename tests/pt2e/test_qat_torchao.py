"""torchao's training in the graph as the oracle: the same numbers at every step, the same graph after conversion."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from pt2e.flows import EAGERQ, Flow, aten, quiet, torchao_flow
from pt2e.graphs import exported
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from eagerq.pt2e.rewriting import attribute_of

__all__ = ["torchao_flow"]  # a fixture

CONVOLUTIONS = {
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
}
AFTER = {aten.batch_norm.default, aten.relu.default, aten.relu_.default}


@dataclass(frozen=True)
class Case:
    conv: Any
    bias: bool
    relu: bool | None = None  # in place or not
    by_channel: bool = True
    quantized_bias: bool = False
    stride: int = 1


KINDS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d)
CASES = [
    case
    for kind in KINDS
    for case in (
        Case(kind, bias=True),
        Case(kind, bias=False, relu=False, stride=2),
        Case(kind, bias=True, relu=True, by_channel=False),
    )
]
# (torchao cannot convert the quantized bias of a transposed convolution)
CASES += [Case(kind, bias=True, relu=False, quantized_bias=True) for kind in (nn.Conv1d, nn.Conv2d)]


@dataclass(frozen=True)
class Call:
    what: Any
    args: Any


class Branches(nn.Module):
    """Each case's layers, on an input of their own: torchao takes as long for all as for one."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(layers(case) for case in CASES)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Args: x: [batch, 4, 7, 7], of which layers of one dimension see a row."""
        return [branch(x if branch[0].weight.dim() == 4 else x[:, :, 0]) for branch in self.branches]  # type: ignore[index, union-attr]


def layers(case: Case) -> nn.Sequential:
    """A convolution of 4 channels to 6 and its batch norm.

    With the default eps and momentum, since torchao trains with these whatever the model has.
    """
    conv = case.conv(4, 6, 3, padding=1, stride=case.stride, bias=case.bias)
    norm = {3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[conv.weight.dim()](6)
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    nn.init.uniform_(norm.weight, -2, 2)
    nn.init.normal_(norm.bias)
    return nn.Sequential(conv, norm, *([] if case.relu is None else [nn.ReLU(inplace=case.relu)]))


def fake_quant(flow: Flow, observer: str, low: int, scheme: Any, **more: Any) -> Any:
    chosen = getattr(flow.observers, observer)
    chosen = chosen.with_args(**more) if more else chosen  # torchao loses the axis of the specification,
    fused = not more.get("ch_axis")  # and its fused kind has axis 0 only
    kind = "FusedMovingAvgObsFakeQuantize" if fused else "FakeQuantize"
    return flow.spec(torch.int8, kind, low, 127, scheme, observer=chosen, **more)


def activation(flow: Flow) -> Any:
    return fake_quant(flow, "MovingAverageMinMaxObserver", -128, torch.per_tensor_affine)


def weight(flow: Flow, axis: int | None) -> Any:
    if axis is None:
        return fake_quant(flow, "MovingAverageMinMaxObserver", -127, torch.per_tensor_symmetric)
    return fake_quant(flow, "MovingAveragePerChannelMinMaxObserver", -127, torch.per_channel_symmetric, ch_axis=axis)


def bias(flow: Flow, x: Node, weight: Node, conv: Node) -> Any:
    return flow.quantizer.DerivedQuantizationSpec(
        derived_from=[(x, conv), (weight, conv)],
        derive_qparams_fn=product,
        dtype=torch.int32,
        quant_min=-(2**31),
        quant_max=2**31 - 1,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
    )


def product(observers: list[Any]) -> tuple[Tensor, Tensor]:
    (x, _), (weight, zero_point) = (observer.calculate_qparams() for observer in observers)
    return x * weight, zero_point


def annotate(flow: Flow, model: GraphModule) -> None:
    convolutions = [node for node in model.graph.nodes if node.target in CONVOLUTIONS]
    for node, case in zip(convolutions, CASES, strict=True):
        axis = int("Transpose" in case.conv.__name__) if case.by_channel else None
        inputs = {node.args[0]: activation(flow), node.args[1]: weight(flow, axis)}
        if case.quantized_bias:
            inputs[node.args[2]] = bias(flow, *node.args[:2], node)
        flow.annotate(node, inputs)
        last = node
        while (after := next(iter(last.users))).target in AFTER:
            last = after
        flow.annotate(last, {}, activation(flow))


def trained(flow: Flow, model: nn.Module, data: list[Tensor]) -> tuple[list[Any], Any]:
    """What the steps of training show, and what converting gives."""
    graph = exported(copy.deepcopy(model).train(), data[0], dynamic=True)
    prepared = flow.steps.prepare_qat_pt2e(graph, flow.made(annotate))
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.1, momentum=0.9)
    seen: list[Any] = []
    for x in data:
        optimizer.zero_grad()
        outputs = prepared(x)
        sum((y - x.mean()).square().mean() for y in outputs).backward()
        gradients = {name: parameter.grad.clone() for name, parameter in prepared.named_parameters()}
        optimizer.step()
        state = {name: value.clone() for name, value in prepared.state_dict().items() if "post_process" not in name}
        seen.append({"outputs": outputs, "gradients": gradients, "state": state})
    return seen, flow.steps.convert_pt2e(prepared)


def formula(model: GraphModule) -> Any:
    """The outputs as nested calls, with the tensors that they read: the graph, whatever the order of its nodes."""
    known: dict[Node, Any] = {}
    for node in model.graph.nodes:
        args = torch.fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
        value = attribute_of(model, node).tolist() if node.op == "get_attr" else node.target
        known[node] = Call(value, args)
    return known[node]


def test_steps_and_conversion(torchao_flow: Flow) -> None:
    model = Branches()
    data = [torch.randn(3, 4, 7, 7) for _ in range(5)]
    seen, converted = trained(EAGERQ, model, data)
    with quiet():
        wanted_seen, wanted = trained(torchao_flow, model, data)
    torch.testing.assert_close(seen, wanted_seen, rtol=1e-5, atol=1e-5)
    assert formula(converted) == formula(wanted)
    torch.testing.assert_close(converted(data[0]), wanted(data[0]), rtol=0, atol=0)
