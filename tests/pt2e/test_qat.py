"""Training in the graph: as eagerq's own modules train, and what becomes of a graph on the way."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pt2e.flows import EAGERQ, Flow, aten
from pt2e.graphs import calls, exported
from torch import Tensor, nn
from torch.fx import GraphModule

import eagerq
from eagerq.pt2e import convert_pt2e, move_exported_model_to_eval, prepare_qat_pt2e
from eagerq.pt2e.quantizer import QuantizationSpec

CONVOLUTIONS = {
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
}
AFTER = {aten.batch_norm.default, aten.relu.default, aten.relu_.default}
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
QCONFIG = eagerq.get_default_qat_qconfig("onednn")


def spec(constructor: Any) -> QuantizationSpec:
    """What the qconfig's fake quantizer says, as a specification."""
    made = constructor()
    observer = made.activation_post_process
    return QuantizationSpec(observer.dtype, constructor, made.quant_min, made.quant_max, observer.qscheme)


def annotate(flow: Flow, model: GraphModule) -> None:
    for node in [node for node in model.graph.nodes if node.target in CONVOLUTIONS]:
        inputs = {node.args[0]: spec(QCONFIG.activation), node.args[1]: spec(QCONFIG.weight)}
        flow.annotate(node, inputs)
        last = node
        while next(iter(last.users)).target in AFTER:
            last = next(iter(last.users))
        if last is not node:
            flow.annotate(last, {}, spec(QCONFIG.activation))


QUANTIZER = EAGERQ.made(annotate)


def random_norm(features: int, dims: int, **options: Any) -> Any:
    norm = NORMS[dims - 1](features, **options)
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    if norm.affine:
        nn.init.uniform_(norm.weight, -2, 2)
        nn.init.normal_(norm.bias)
    return norm


def conv_bn(dims: int, transposed: bool = False, **options: Any) -> nn.Sequential:
    kinds = (
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
        if transposed
        else (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    )
    conv: Any = kinds[dims - 1]
    return nn.Sequential(conv(4, 6, 3, padding=1, **options), random_norm(6, dims, eps=0.01, momentum=0.3))


def inputs(dims: int, batch: int = 3) -> Tensor:
    return torch.randn(batch, 4, *[6] * dims)


class Stubbed(nn.Module):
    """The layers as eager quantization wants them."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.quant, self.layers = eagerq.QuantStub(), layers

    def forward(self, x: Tensor) -> Any:
        return self.layers(self.quant(x))


@pytest.mark.parametrize("relu", [None, nn.ReLU(), nn.ReLU(inplace=True)])
@pytest.mark.parametrize(("dims", "bias"), [(1, True), (2, True), (2, False), (3, False)])
def test_as_the_eager_modules_train(dims: int, bias: bool, relu: Any) -> None:
    layers = conv_bn(dims, bias=bias, stride=2)
    layers.extend([] if relu is None else [relu])
    graph = exported(copy.deepcopy(layers), inputs(dims), dynamic=True)
    prepared = prepare_qat_pt2e(graph, QUANTIZER)
    eager = Stubbed(copy.deepcopy(layers)).train()
    eager.qconfig = QCONFIG  # type: ignore[assignment]
    names = [str(index) for index in range(len(layers))]
    eager = eagerq.prepare_qat(eagerq.fuse_modules_qat(eager, [[f"layers.{name}" for name in names]]))
    ours = dict(prepared.named_parameters())
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in (prepared, eager)]
    for batch in (3, 2, 5):
        x = inputs(dims, batch)
        outputs = [prepared(x), eager(x)]
        torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
        for optimizer, y in zip(optimizers, outputs, strict=True):
            optimizer.zero_grad()
            (y - x.mean()).square().mean().backward()
        for name, parameter in eager.named_parameters():
            torch.testing.assert_close(ours[own_name(name)].grad, parameter.grad, rtol=1e-5, atol=1e-6)
        for optimizer in optimizers:
            optimizer.step()
    state, wanted = prepared.state_dict(), eager.state_dict()
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(state[f"1.{name}"], wanted[f"layers.0.bn.{name}"])


def own_name(name: str) -> str:
    """``layers.0.bn.weight`` of the fused module is ``1.weight`` in the graph."""
    return name.removeprefix("layers.").replace("0.bn.", "1.")


def trained(model: nn.Module, x: Tensor) -> GraphModule:
    prepared = prepare_qat_pt2e(exported(model, x, dynamic=True), QUANTIZER)
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        prepared(x).square().mean().backward()
        optimizer.step()
    return prepared


CASES = [(dims, transposed, groups) for dims in (1, 2, 3) for transposed in (False, True) for groups in (1, 2)]


@pytest.mark.parametrize(("dims", "transposed", "groups"), CASES)
def test_what_was_trained_is_what_is_converted(dims: int, transposed: bool, groups: int) -> None:
    """Folding leaves one convolution and its Q/DQ, within two steps of what the trained graph says in evaluation."""
    model = conv_bn(dims, transposed, groups=groups, bias=groups == 1)
    x = inputs(dims)
    prepared = trained(model, x)
    converted = convert_pt2e(prepared)
    kept = [target for target in calls(converted) if target in CONVOLUTIONS | AFTER]
    assert len(kept) == 1
    assert not [name for name in converted.state_dict() if "running" in name or "num_batches" in name]
    wanted = move_exported_model_to_eval(prepared)(x)
    step = list(converted.graph.nodes)[-2].args[1]
    assert (converted(x) - wanted).abs().max() <= 2.01 * step  # type: ignore[operator]
