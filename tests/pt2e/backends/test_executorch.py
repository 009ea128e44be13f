"""Exported programs on phones: XNNPACK takes every layer, and ExecuTorch's runtime gives the eager model's numbers."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from pt2e.backends.nets import Classifier, Mobile, Residual, agree, int8
from torch import Tensor
from torch.export import ExportedProgram

from eagerq.pt2e import export


def lowered(program: ExportedProgram) -> tuple[Any, Counter[str], Counter[str]]:
    """The lowered program; the operators that XNNPACK has taken, and those left to ExecuTorch's own kernels."""
    pytest.importorskip("executorch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchao, loaded on the way, about its own files
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    graph = edge.exported_program().graph_module
    taken: Counter[str] = Counter()
    left: Counter[str] = Counter()
    for node in graph.graph.nodes:
        if "call_delegate" in str(node.target):
            inside = getattr(graph, node.args[0].target).original_module.graph.nodes
            taken.update(str(one.target.__name__) for one in inside if one.op == "call_function")
        elif node.op == "call_function" and node.target.__name__ != "getitem":
            left[node.target.__name__] += 1
    return edge, taken, left


def run(edge: Any, path: Path, x: Tensor) -> Tensor:
    """What ExecuTorch's runtime makes of the saved program."""
    if torch.torch_version.TorchVersion(torch.__version__) < (2, 13):
        pytest.skip("ExecuTorch's runtime is built for torch 2.13 and later; the lowering was tested")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the runtime is experimental
        from executorch.runtime import Runtime

        path.write_bytes(edge.to_executorch().buffer)
        (result,) = Runtime.get().load_program(path).load_method("forward").execute([x])
    assert isinstance(result, Tensor)
    return result


@pytest.mark.parametrize(("net", "engine"), [(Mobile, "x86"), (Residual, "onednn")])
def test_xnnpack_takes_every_operator(net: type[Classifier], engine: str, tmp_path: Path) -> None:
    model, images = int8(net, engine)
    images = images if engine == "onednn" else 3 * images  # beyond the 7 bits that training has seen
    edge, taken, left = lowered(export(model, (images,), activation_dtype=torch.int8))
    assert not left
    assert taken["aten.convolution.default"] + taken["aten.linear.default"] == net.weighted
    assert taken["aten.add.Tensor"] == net.added
    assert taken["aten.max_pool2d.default"] == (net is Residual)
    assert taken["aten.mean.dim"] == 1
    assert agree(run(edge, tmp_path / "model.pte", images), model, images)
