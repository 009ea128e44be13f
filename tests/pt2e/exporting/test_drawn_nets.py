"""Nets put together by chance: given the same integers, each module of the graph and of the int8 model agree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Interpreter, Node

import eagerq
from eagerq.nn.quantized import FloatFunctional, QFunctional, Quantize
from eagerq.pt2e import export
from eagerq.pt2e.exporting.weights import centre_weights
from eagerq.pt2e.graph import is_quantize, qualified_name
from eagerq.qtensor import QTensor

CHANNELS = 4


class Join(nn.Module):
    """The input beside what a branch makes of it: added, or appended and brought back to its width."""

    def __init__(self, branch: nn.Module, how: str) -> None:
        super().__init__()
        self.branch, self.how, self.ff = branch, how, FloatFunctional()
        if how == "cat":
            self.back = nn.Conv2d(2 * CHANNELS, CHANNELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        if self.how == "cat":
            joined: Tensor = self.back(self.ff.cat([x, y], 1))
        else:
            joined = getattr(self.ff, self.how)(x, y)
        return joined


class Net(nn.Module):
    def __init__(self, stages: list[nn.Module]) -> None:
        super().__init__()
        self.quant, self.dequant = eagerq.QuantStub(), eagerq.DeQuantStub()
        self.stages, self.pool = nn.Sequential(*stages), nn.AdaptiveAvgPool2d(1)
        self.flatten, self.classify = nn.Flatten(), nn.Linear(CHANNELS, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.stages(self.quant(x)))
        out: Tensor = self.dequant(self.classify(self.flatten(x)))
        return out


def convolutions(draw: Callable[..., Any]) -> nn.Module:
    kernel, groups, bias = draw(st.sampled_from([1, 3])), draw(st.sampled_from([1, 2, 4])), draw(st.booleans())
    conv = nn.Conv2d(CHANNELS, CHANNELS, kernel, padding=kernel // 2, groups=groups, bias=bias)
    after = draw(st.sampled_from([[], ["bn"], ["relu"], ["bn", "relu"]]))
    made = {"bn": nn.BatchNorm2d(CHANNELS), "relu": nn.ReLU()}
    return nn.Sequential(conv, *(made[name] for name in after))


POOLS: list[Callable[[], nn.Module]] = [
    lambda: nn.MaxPool2d(3, stride=1, padding=1),
    lambda: nn.AvgPool2d(3, stride=1, padding=1),
    lambda: nn.AvgPool2d(2, stride=1, ceil_mode=True),
    nn.ReLU,
    nn.Hardswish,
    lambda: nn.LeakyReLU(0.1),
    nn.Sigmoid,
]


@st.composite
def nets(draw: Callable[..., Any]) -> Net:
    torch.manual_seed(draw(st.integers(0, 10**6)))
    stages: list[nn.Module] = []
    for kind in draw(
        st.lists(st.sampled_from(["conv", "add", "add_relu", "mul", "cat", "pool"]), min_size=1, max_size=4)
    ):
        if kind == "pool":
            stages.append(draw(st.sampled_from(POOLS))())
        else:
            conv = convolutions(draw)
            stages.append(conv if kind == "conv" else Join(conv, kind))
    return Net(stages)


def fuse(model: nn.Module) -> nn.Module:
    groups = [
        [f"{name}.{number}" for number in range(len(one))]
        for name, one in model.named_modules()
        if isinstance(one, nn.Sequential) and len(one) > 1 and isinstance(one[0], nn.Conv2d)
    ]
    return eagerq.fuse_modules_qat(model, groups) if groups else model


def int8_of(model: nn.Module, backend: str) -> nn.Module:
    model.train()
    model.qconfig = eagerq.get_default_qat_qconfig(backend)  # type: ignore[assignment]
    model = eagerq.prepare_qat(fuse(model))
    model(torch.randn(8, CHANNELS, 6, 6))
    int8 = eagerq.convert(model.eval(), as_trained=True)
    centre_weights(int8)  # which the graph's are, and that is all it rounds
    return int8


class _Recorder(nn.Module):
    def __init__(self, keep: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.keep = keep

    def forward(self, y: QTensor) -> QTensor:
        self.keep(y.int_repr())
        return y


def recorded(int8: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The integers that each module of an int8 model returns."""
    found: dict[str, Tensor] = {}
    hooks = []
    for name, module in list(int8.named_modules()):
        if isinstance(module, QFunctional):
            module.activation_post_process = _Recorder(lambda y, name=name: found.__setitem__(name, y))  # type: ignore[misc]
        elif not list(module.children()) and not isinstance(module, nn.Identity):

            def keep(module: nn.Module, args: Any, y: Any, name: str = name) -> None:
                if isinstance(y, QTensor):
                    found[name] = y.int_repr()

            hooks.append(module.register_forward_hook(keep))
    int8(x)
    for hook in hooks:
        hook.remove()
    for module in int8.modules():
        if isinstance(module, QFunctional):
            module.activation_post_process = nn.Identity()
    return found


class Following(Interpreter):
    """Runs a graph, each module with the integers of the model that it was made of; counts the steps between."""

    def __init__(self, graph: nn.Module, integers: dict[str, Tensor], shift: int) -> None:
        super().__init__(graph)  # type: ignore[arg-type]
        self.integers, self.shift = integers, shift
        self.steps: dict[str, int] = {}
        # a module that clamps to less than the dtype quantizes before that, too
        self.last = {self.place(node): node for node in self.graph.nodes if is_quantize(node)}

    @staticmethod
    def place(n: Node) -> str:
        name: str = n.meta.get("quantization_tag") or qualified_name(n)
        return name

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        name = self.place(n) if is_quantize(n) else ""
        if self.last.get(name) is not n:
            return value
        wanted = self.integers[name].int() + self.shift
        self.steps[name] = int((value.int() - wanted).abs().max())
        return wanted.to(value.dtype)


EXACT = (Quantize, nn.MaxPool2d, nn.ReLU, nn.Flatten)


@settings(max_examples=15)
@given(net=nets(), backend=st.sampled_from(["onednn", "qnnpack", "x86"]), signed=st.booleans())
def test_each_module_agrees_within_a_step(net: Net, backend: str, signed: bool) -> None:
    int8, x = int8_of(net, backend), torch.randn(3, CHANNELS, 6, 6)
    integers = recorded(int8, x)
    program = export(int8, (x,), activation_dtype=torch.int8 if signed else torch.uint8)
    following = Following(program.module(), integers, -128 if signed else 0)
    y = following.run(x)
    assert set(following.steps) == set(integers)
    assert max(following.steps.values()) <= 1
    exact = {name for name, module in int8.named_modules() if isinstance(module, EXACT)}
    assert not [name for name in exact & set(integers) if following.steps[name]]
    torch.testing.assert_close(y, int8(x))  # from the last integers on


@pytest.mark.parametrize("backend", ["onednn", "qnnpack", "x86"])
def test_the_comparison_sees_a_wrong_scale(backend: str) -> None:
    torch.manual_seed(0)
    int8 = int8_of(Net([nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 3), nn.ReLU())]), backend)
    x = torch.randn(3, CHANNELS, 6, 6)
    integers = recorded(int8, x)
    int8.stages[0][0].scale *= 1.05  # type: ignore[union-attr, index, operator]
    following = Following(export(int8, (x,)).module(), integers, 0)
    following.run(x)
    assert following.steps["stages.0.0"] > 1
