"""Activations restated in int8 or uint8: the very same real values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pt2e.exporting.nets import IMAGES, named, prepared
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Interpreter, Node

import eagerq
from eagerq.errors import InvalidArgumentError, UnsupportedError
from eagerq.nn.quantized import FloatFunctional
from eagerq.pt2e import export
from eagerq.qtensor import QTensor

QNNPACK, REDUCED = eagerq.get_default_qat_qconfig("qnnpack"), eagerq.get_default_qat_qconfig("x86")


class _Values(Interpreter):
    """All that a program computes, by node."""

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__(program.module())
        self.seen: dict[str, Any] = {}

    def run_node(self, n: Node) -> Any:
        self.seen[n.name] = super().run_node(n)
        return self.seen[n.name]


def values(program: ExportedProgram, *inputs: Tensor) -> dict[str, Tensor]:
    run = _Values(program)
    run.run(*inputs)
    return {name: value for name, value in run.seen.items() if isinstance(value, Tensor)}


@pytest.mark.parametrize("qconfig", [None, QNNPACK, REDUCED])
def test_every_value_is_the_same_in_the_other_type(qconfig: Any) -> None:
    model, x = prepared(qconfig), torch.randn(IMAGES)
    before, after = export(model, (x,)), export(model, (x,), activation_dtype=torch.int8)
    wanted, got = values(before, x), values(after, x)
    assert wanted.keys() == got.keys()
    changed = [name for name in wanted if wanted[name].dtype is not got[name].dtype]
    assert changed == [node.name for node in named(before, "quantize_per_tensor") if node.name.startswith("quant")]
    for name, value in wanted.items():
        if name in changed:
            assert (value.dtype, got[name].dtype) == (torch.uint8, torch.int8)
            assert torch.equal(value.int() - 128, got[name].int()), name
        else:
            assert torch.equal(value, got[name]), name


def test_the_graph_says_the_type_everywhere() -> None:
    program = export(prepared(REDUCED), (torch.randn(IMAGES),), activation_dtype=torch.int8)
    program.validate()
    for node in program.graph.nodes:
        assert "uint8" not in f"{node.args} {node.meta.get('val')} {node.meta.get('tensor_meta')}", node
    quantized = named(program, "quantize_per_tensor.default")
    ranges = {node.args[3:] for node in quantized if not node.name.startswith("de")}
    assert ranges == {(-128, 127, torch.int8)}  # a reduced one is clamped besides
    annotations = [a for n in program.graph.nodes if (a := n.meta.get("quantization_annotation"))]
    assert {a.output_qspec.dtype for a in annotations} == {torch.int8}


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_what_has_the_type_already_is_left_alone(dtype: torch.dtype) -> None:
    x = torch.randn(IMAGES)
    once = export(prepared(), (x,), activation_dtype=torch.uint8)
    assert str(once.graph) == str(export(prepared(), (x,)).graph)


class Signed(nn.Module):
    """An int8 activation beside uint8 ones."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = eagerq.QuantStub(), eagerq.DeQuantStub()
        self.first, self.add = nn.Linear(4, 4), FloatFunctional()
        activation = eagerq.FakeQuantize.with_args(
            observer=eagerq.MovingAverageMinMaxObserver, dtype=torch.int8, quant_min=-128, quant_max=127
        )
        self.first.qconfig = eagerq.QConfig(activation, eagerq.default_weight_fake_quant)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        x = self.quant(x)
        out: Tensor = self.dequant(self.add.add(self.first(x), x))
        return out


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_mixed_types_become_one(dtype: torch.dtype) -> None:
    model = Signed().train()
    model.qconfig = eagerq.get_default_qat_qconfig("onednn")  # type: ignore[assignment]
    model = eagerq.prepare_qat(model)
    x = torch.randn(8, 4)
    model(x)
    before, after = export(model, (x,)), export(model, (x,), activation_dtype=dtype)
    assert {node.meta["val"].dtype for node in named(before, ".quantize")} == {torch.int8, torch.uint8}
    assert {node.meta["val"].dtype for node in named(after, ".quantize_per_tensor")} == {dtype}
    assert torch.equal(before.module()(x), after.module()(x))


@pytest.mark.parametrize("reduce_range", [False, True])
def test_inputs_quantized_as_they_come(reduce_range: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    int8 = eagerq.quantize_dynamic(model)
    for layer in (int8[0], int8[2]):
        layer.reduce_range = reduce_range
    x = torch.randn(8, 4)
    before, after = export(int8, (x,)), export(int8, (x,), activation_dtype=torch.int8)
    assert len(named(after, "choose_qparams")) == 2
    assert {node.meta["val"].dtype for node in named(after, ".quantize_per_tensor")} == {torch.int8}
    for scaled in (1.0, 100.0, 1e-3):
        assert torch.equal(before.module()(x * scaled), after.module()(x * scaled))


def test_tables_stay() -> None:
    model = nn.Sequential(nn.Embedding(10, 4))
    model = eagerq.quantize_dynamic(model, {nn.Embedding}, dtype=torch.uint8)
    x = torch.tensor([1, 9])
    before, after = export(model, (x,)), export(model, (x,), activation_dtype=torch.int8)
    assert str(before.graph) == str(after.graph)


class Bare(nn.Module):
    """Hands its integers to arithmetic of the user's own."""

    def __init__(self, use: Any) -> None:
        super().__init__()
        self.quant, self.use = eagerq.QuantStub(), use

    def forward(self, x: Tensor) -> Any:
        return self.use(self.quant(x))


def _bare(use: Any) -> nn.Module:
    model = nn.Sequential(Bare(lambda x: x)).eval()
    model.qconfig = eagerq.default_qconfig  # type: ignore[assignment]
    model = eagerq.prepare(model)
    model(torch.randn(8, 4))
    model = eagerq.convert(model)
    model[0].use = use
    return model


def test_integers_used_otherwise_are_refused_by_name() -> None:
    x = torch.randn(2, 4)
    export(_bare(lambda q: q.int_repr() + 1), (x,))
    with pytest.raises(UnsupportedError, match=r"torch\.int8: node 'add.*in module '0'.* takes the integers of 'quant"):
        export(_bare(lambda q: q.int_repr() + 1), (x,), activation_dtype=torch.int8)
    with pytest.raises(UnsupportedError, match="output"):
        export(_bare(lambda q: q.int_repr()), (x,), activation_dtype=torch.int8)


def test_per_channel_activations_are_refused_by_name() -> None:
    def per_channel(q: Any) -> Tensor:
        scale, zero_point = torch.full((4,), 0.1), torch.zeros(4, dtype=torch.int64)
        return eagerq.quantize_per_channel(q.dequantize(), scale, zero_point, 1, torch.uint8).dequantize()

    with pytest.raises(UnsupportedError, match="something else than 8 bits with one scale"):
        export(_bare(per_channel), (torch.randn(2, 4),), activation_dtype=torch.int8)


def test_copies_of_integers_are_integers() -> None:
    model = _bare(lambda q: QTensor(q.int_repr().clone().contiguous().detach(), q.scale, q.zero_point).dequantize())
    x = torch.randn(2, 4)
    before, after = export(model, (x,)), export(model, (x,), activation_dtype=torch.int8)
    assert named(after, "clone")[0].meta["val"].dtype is torch.int8
    assert torch.equal(before.module()(x), after.module()(x))


@pytest.mark.parametrize("dtype", [torch.int16, torch.float32, "int8"])
def test_only_8_bit_types_can_be_asked_for(dtype: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=r"activation_dtype is .*To fix it: pass torch\.int8"):
        export(prepared(), (torch.randn(IMAGES),), activation_dtype=dtype)
