"""An eager model's Q/DQ program: the same integers, and nothing but torch's operators."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from pt2e.exporting.nets import IMAGES, prepared, saved_and_loaded
from torch import Tensor, nn
from torch.export import ExportedProgram

import eagerq
from eagerq.pt2e import export


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("backend", ["onednn", "qnnpack"])
def test_a_model_becomes_a_graph_of_the_same_integers(converted: bool, backend: str) -> None:
    model = prepared(eagerq.get_default_qat_qconfig(backend))
    int8 = eagerq.convert(model, as_trained=True)
    x = torch.randn(IMAGES)
    program = export(int8 if converted else model, (x,))
    assert not [node for node in program.graph.nodes if "eagerq" in str(node.target)]
    assert ((program.module()(x) - int8(x)) / int8.classify.scale).abs().max().round() <= 1


def test_weights_are_buffers_with_the_names_and_integers_of_the_state_dict() -> None:
    model = prepared()
    int8 = eagerq.convert(model, as_trained=True)
    program = export(model, (torch.randn(IMAGES),))
    state = int8.state_dict()
    assert list(program.state_dict) == [
        f"{layer}.{what}"
        for layer in ("conv", "depthwise", "classify")
        for what in ("weight", "weight_scale", "weight_zero_point", "bias")
    ]
    for name, value in program.state_dict.items():
        assert torch.equal(value, state[name].to(value.dtype)), name
        assert value.dtype is (torch.int64 if name.endswith("zero_point") else state[name].dtype), name
    assert not program.constants
    assert [spec.arg.name for spec in program.graph_signature.input_specs] == [
        *(f"b_{name.replace('.', '_')}" for name in program.state_dict),
        "x",
    ]


def test_one_scale_for_a_whole_weight_is_one_for_each_channel() -> None:
    model = prepared(eagerq.get_default_qat_qconfig("qnnpack"))
    program = export(model, (torch.randn(IMAGES),))
    weight = eagerq.convert(model, as_trained=True).conv.weight()
    assert program.state_dict["conv.weight_scale"].tolist() == [weight.q_scale()] * 8
    assert program.state_dict["conv.weight_zero_point"].tolist() == [0] * 8


def _saved(program: ExportedProgram, x: Tensor) -> nn.Module:
    return saved_and_loaded(program).module()


def _exported_again(program: ExportedProgram, x: Tensor) -> nn.Module:
    return torch.export.export(program.module(), (x,)).module()


def _exported_strictly(program: ExportedProgram, x: Tensor) -> nn.Module:
    return torch.export.export(program.module(), (x,), strict=True).module()


def _decomposed(program: ExportedProgram, x: Tensor) -> nn.Module:
    return program.run_decompositions().module()


def _copied(program: ExportedProgram, x: Tensor) -> nn.Module:
    return copy.deepcopy(program).module()


@pytest.mark.parametrize("way", [_saved, _exported_again, _exported_strictly, _decomposed, _copied])
@pytest.mark.parametrize("backend", ["onednn", "qnnpack"])
def test_the_program_goes_wherever_programs_go(
    way: Callable[[ExportedProgram, Tensor], nn.Module], backend: str
) -> None:
    x = torch.randn(IMAGES)
    program = export(prepared(eagerq.get_default_qat_qconfig(backend)), (x,))
    program.validate()
    assert torch.equal(way(program, x)(x), program.module()(x))


def test_what_nothing_uses_is_left_out() -> None:
    model = prepared()
    model.unused, model.table = nn.Linear(3, 3), nn.Parameter(torch.zeros(5))
    model.register_buffer("count", torch.zeros(()), persistent=False)
    program = export(model, (torch.randn(IMAGES),))
    assert {name.split(".")[0] for name in program.state_dict} == {"conv", "depthwise", "classify"}
    assert len(program.graph_signature.input_specs) == len(program.state_dict) + 1
    assert not program.constants


class _Mixed(nn.Module):
    """Float parts around the int8 one, with a parameter, a buffer and a constant of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle = nn.Linear(4, 4), eagerq.QuantWrapper(nn.Linear(4, 4))
        self.gain, self.offsets = nn.Parameter(torch.full((4,), 2.0)), [torch.arange(4.0)]
        self.register_buffer("_shift", torch.ones(4), persistent=False)
        self.middle.qconfig = eagerq.get_default_qat_qconfig("onednn")  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.middle(self.stem(x)) * self.gain + self._shift + self.offsets[0]
        return out


def test_float_parts_stay_as_they_are() -> None:
    model, x = _Mixed().train(), torch.randn(5, 4)
    model = eagerq.prepare_qat(model)
    model(x)
    program = export(model, (x,))
    assert set(program.state_dict) == {
        *("gain", "stem.weight", "stem.bias"),
        *(f"middle.module.{name}" for name in ("weight", "weight_scale", "weight_zero_point", "bias")),
    }
    assert set(program.constants) == {"_shift", "lifted_tensor_0"}
    int8 = eagerq.convert(model.eval(), as_trained=True)
    torch.testing.assert_close(program.module()(x), int8(x), atol=2 * int8.middle.module.scale, rtol=0)
    assert torch.equal(saved_and_loaded(program).module()(x), program.module()(x))
