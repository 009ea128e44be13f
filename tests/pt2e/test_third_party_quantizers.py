"""torchao's and ExecuTorch's own quantizers on our flow: the graphs, parameters and outputs of torchao's flow."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from pt2e.graphs import peer
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from eagerq import pt2e

XNNPACK = "executorch.backends.xnnpack.quantizer.xnnpack_quantizer"
X86 = "torchao.quantization.pt2e.quantizer.x86_inductor_quantizer"


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def torchao() -> ModuleType:
    return peer("torchao.quantization.pt2e.quantize_pt2e")


class Net(nn.Module):
    """Conv-bn-relu, a residual addition, pooling and linears."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.conv, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.pool, self.flat = nn.AdaptiveAvgPool2d(2), nn.Flatten()
        self.hidden, self.head = nn.Linear(32, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        x = torch.relu(self.bn2(self.conv(x)) + x)
        return self.head(torch.relu(self.hidden(self.flat(self.pool(x)))))


def xnnpack(**config: bool) -> Any:
    module = peer(XNNPACK)
    return module.XNNPACKQuantizer().set_global(module.get_symmetric_quantization_config(**config))


def x86(**config: bool) -> Any:
    module = peer(X86)
    return module.X86InductorQuantizer().set_global(module.get_default_x86_inductor_quantization_config(**config))


QUANTIZERS: dict[str, tuple[Callable[..., Any], dict[str, bool]]] = {
    "xnnpack": (xnnpack, {}),
    "xnnpack-channels": (xnnpack, {"is_per_channel": True}),
    "xnnpack-dynamic": (xnnpack, {"is_dynamic": True}),
    "xnnpack-channels-dynamic": (xnnpack, {"is_per_channel": True, "is_dynamic": True}),
    "x86": (x86, {}),
    "x86-dynamic": (x86, {"is_dynamic": True}),
}

TRAINED = {name: QUANTIZERS[name] for name in ("xnnpack-channels", "x86")}  # torchao needs long


def exported(training: bool) -> GraphModule:
    torch.manual_seed(0)
    net = Net()
    net(torch.randn(16, 3, 8, 8))  # statistics that are not trivial
    batch = ({0: torch.export.Dim("batch")},)
    return torch.export.export(net.train(training), (torch.randn(2, 3, 8, 8),), dynamic_shapes=batch).module()


def ported(prepare: Callable[..., GraphModule], convert: Callable[..., GraphModule], quantizer: Any) -> GraphModule:
    prepared = prepare(exported(training=False), quantizer)
    for seed in range(3):
        prepared(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed)))
    return convert(prepared)


def told(module: GraphModule) -> list[Any]:
    """Each operator with its arguments: nodes by their place (of twins, the first's), constants by their values."""
    places: dict[Node, int] = {}
    descriptions: list[Any] = []

    def argument(value: Any) -> Any:
        if not isinstance(value, Node):
            return value
        if value.op == "get_attr":
            return getattr_of(module, value).tolist()
        return places.get(value, value.op)

    for node in module.graph.nodes:
        if node.op == "call_function":
            description = str(node.target), torch.fx.node.map_aggregate((node.args, node.kwargs), argument)
            places[node] = descriptions.index(description) if description in descriptions else len(descriptions)
            descriptions.append(description)
    return descriptions


def getattr_of(module: GraphModule, node: Node) -> Tensor:
    owner, _, name = str(node.target).rpartition(".")
    return getattr(module.get_submodule(owner), name)


def same(ours: GraphModule, theirs: GraphModule) -> None:
    assert [name for name, _ in told(ours)] == [name for name, _ in told(theirs)]
    for one, other in zip(told(ours), told(theirs), strict=True):
        assert one == other
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(ours(x), theirs(x))


def trained(flow: Any, to_eval: Callable[..., GraphModule], quantizer: Any) -> GraphModule:
    prepared = flow.prepare_qat_pt2e(exported(training=True), quantizer)
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.05)
    for seed in range(3):
        x = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        prepared(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return flow.convert_pt2e(to_eval(prepared))


@pytest.mark.parametrize("case", TRAINED)
def test_while_training(torchao: ModuleType, case: str) -> None:
    make, config = TRAINED[case]
    to_eval = importlib.import_module("torchao.quantization.pt2e").move_exported_model_to_eval
    theirs = trained(torchao, to_eval, make(**config, is_qat=True))
    ours = trained(pt2e, pt2e.move_exported_model_to_eval, make(**config, is_qat=True))
    assert sum("quantize_per" in name for name, _ in told(ours)) > 8
    same(ours, theirs)


@pytest.mark.parametrize("case", QUANTIZERS)
def test_after_training(torchao: ModuleType, case: str) -> None:
    make, config = QUANTIZERS[case]
    theirs = ported(torchao.prepare_pt2e, torchao.convert_pt2e, make(**config))
    ours = ported(pt2e.prepare_pt2e, pt2e.convert_pt2e, make(**config))
    assert sum("quantize_per" in name for name, _ in told(ours)) > 8
    same(ours, theirs)
