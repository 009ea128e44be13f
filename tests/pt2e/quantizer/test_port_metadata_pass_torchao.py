"""The porting pass on graphs that torchao has converted with ExecuTorch's quantizer, against torchao's own pass."""

from __future__ import annotations

import copy
import operator
import warnings
from typing import Any

import pytest
import torch
from pt2e.graphs import peer
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from eagerq.pt2e.graph import is_choose_qparams, is_dequantize, is_quantize
from eagerq.pt2e.quantizer.port_metadata_pass import PortNodeMetaForQDQ

PORTED = ("stack_trace", "quantization_tag", "nn_module_stack")


class Net(nn.Module):
    """Shared activations, a residual sum, an output used twice, one input for three linears."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.stem(x))
        x = self.conv(x) + x
        flat = self.pool(x).flatten(1)
        return self.q(flat) * self.k(flat) + self.v(flat), x


@pytest.fixture(scope="module")
def backend() -> tuple[Any, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        flow = peer("torchao.quantization.pt2e.quantize_pt2e")
        xnnpack = peer("executorch.backends.xnnpack.quantizer.xnnpack_quantizer")
    return flow, xnnpack


def converted(backend: tuple[Any, Any], fold: bool, **config: bool) -> GraphModule:
    flow, xnnpack = backend
    quantizer = xnnpack.XNNPACKQuantizer().set_global(xnnpack.get_symmetric_quantization_config(**config))
    example = (torch.randn(2, 3, 8, 8),)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = flow.prepare_pt2e(torch.export.export(Net().eval(), example).module(), quantizer)
        for node in prepared.graph.nodes:
            if "quantization_annotation" in node.meta:
                node.meta["quantization_tag"] = node.name
                for weight in node.all_input_nodes:
                    while weight.op == "call_module":
                        weight = weight.all_input_nodes[0]
                    if weight.op == "get_attr":
                        weight.meta["quantization_tag"] = node.name
        prepared(*example)
        return flow.convert_pt2e(prepared, fold_quantize=fold)


def inserted(node: Node) -> bool:
    of_choose = node.target is operator.getitem and is_choose_qparams(node.args[0])
    return is_quantize(node) or is_dequantize(node) or is_choose_qparams(node) or of_choose


def told(module: GraphModule, key: str) -> dict[str, Any]:
    return {node.name: node.meta.get(key) for node in module.graph.nodes if inserted(node)}


def stripped(module: GraphModule) -> GraphModule:
    bare = copy.deepcopy(module)
    for node in filter(inserted, bare.graph.nodes):
        for key in PORTED:
            node.meta.pop(key, None)
    return bare


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize(
    "config", [{}, {"is_per_channel": True}, {"is_per_channel": True, "is_dynamic": True}], ids=lambda c: "-".join(c)
)
def test_tags_and_stack_traces_are_torchao_s(backend: tuple[Any, Any], fold: bool, config: dict[str, bool]) -> None:
    theirs = converted(backend, fold, **config)
    ours = stripped(theirs)
    PortNodeMetaForQDQ()(ours)
    for key in ("quantization_tag", "stack_trace"):
        wanted, got = told(theirs, key), told(ours, key)
        tagged = [name for name, value in wanted.items() if value is not None]
        assert len(tagged) > 5
        assert {name: got[name] for name in tagged} == {name: wanted[name] for name in tagged}
        nodes = {node.name: node for node in ours.graph.nodes}
        more = [nodes[name] for name in wanted if got[name] != wanted[name]]
        assert all(node.target is operator.getitem for node in more), more


def test_module_stacks_too(backend: tuple[Any, Any]) -> None:
    ours = stripped(converted(backend, True, is_per_channel=True))
    PortNodeMetaForQDQ()(ours)
    conv = next(node for node in ours.graph.nodes if node.name == "conv2d_1")
    around = [node for node in conv.all_input_nodes if inserted(node)]
    assert len(around) == 2
    for node in around:
        assert node.meta["nn_module_stack"] == conv.meta["nn_module_stack"]
        assert "conv" in str(node.meta["nn_module_stack"])
