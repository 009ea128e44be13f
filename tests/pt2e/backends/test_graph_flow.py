"""Graphs of the graph flow on the same roads: ONNX, and ExecuTorch's XNNPACK."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pt2e.backends.test_executorch import lowered, run
from pt2e.backends.test_onnx import FLOAT, INTEGER, outputs, session
from torch import Tensor, nn
from torch.fx import GraphModule

from eagerq.pt2e import convert_pt2e, move_exported_model_to_eval, prepare_pt2e, prepare_qat_pt2e
from eagerq.pt2e.quantizer import XNNPACKQuantizer, get_symmetric_quantization_config


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.classify = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        out: Tensor = self.classify((x + self.second(x)).mean([2, 3]))
        return out


def after_training(net: nn.Module, x: Tensor) -> GraphModule:
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    prepared = prepare_pt2e(torch.export.export(net.eval(), (x,)).module(), quantizer)
    prepared(x)
    return convert_pt2e(prepared)


def while_training(net: nn.Module, x: Tensor) -> GraphModule:
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True, is_qat=True))
    prepared = prepare_qat_pt2e(torch.export.export(net.train(), (x,)).module(), quantizer)
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        prepared(x).square().mean().backward()
        optimizer.step()
    move_exported_model_to_eval(prepared)
    return convert_pt2e(prepared)


def close(got: Tensor, wanted: Tensor, graph: GraphModule) -> bool:
    """Whether they differ by a few steps of the last quantize at most, and mostly not at all."""
    (scale,) = [node.args[1] for node in graph.graph.nodes if "dequantize_per_tensor" in str(node.target)][-1:]
    steps = ((got - wanted) / scale).round().abs()
    return bool((steps <= 3).all()) and (steps == 0).float().mean().item() > 0.8


FLOWS = [after_training, while_training]


@pytest.mark.parametrize("flow", FLOWS)
def test_onnxruntime_computes_a_converted_graph_in_integers(
    flow: Callable[[nn.Module, Tensor], GraphModule], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    x = torch.randn(12, 3, 8, 8)
    graph = flow(Net(), x)
    run_it, kinds = session(torch.export.export(graph, (x,)), tmp_path / "model.onnx")
    assert sum(kinds[kind] for kind in INTEGER) == 3
    assert not {*kinds} & {*FLOAT}
    assert close(outputs(run_it, x), graph(x), graph)


@pytest.mark.parametrize("flow", FLOWS)
def test_xnnpack_takes_a_converted_graph(flow: Callable[[nn.Module, Tensor], GraphModule], tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(12, 3, 8, 8)
    graph = flow(Net(), x)
    edge, taken, left = lowered(torch.export.export(graph, (x,)))
    assert taken["aten.convolution.default"] + taken["aten.linear.default"] == 3
    assert not {name for name in left if not name.startswith(("quantized_decomposed", "aten.mean"))}
    assert close(run(edge, tmp_path / "model.pte", x), graph(x), graph)
