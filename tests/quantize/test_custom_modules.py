"""Custom modules: float → observed → quantized classes of one's own, and the default ones."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
import torch
from quantize.models import PTQ, QAT, anatomy, same_state, state
from torch import Tensor, nn

import eagerq
from eagerq.errors import InvalidConfigError
from eagerq.nn import quantizable, quantized
from eagerq.quantization_mappings import no_observer_set


class Scaled(nn.Module):
    """A linear layer and a factor."""

    def __init__(self, linear: nn.Module | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3) if linear is None else linear

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y * 2


class ObservedScaled(Scaled):
    @classmethod
    def from_float(cls, mod: Any) -> ObservedScaled:
        new = cls(mod.linear)
        new.qconfig = mod.qconfig
        return new


class QuantizedScaled(nn.Module):
    """An int8 layer whose scale stands for the factor too."""

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y

    @classmethod
    def from_observed(cls, mod: Any) -> QuantizedScaled:
        source = copy.deepcopy(mod.linear)
        source.weight.data *= 2
        source.bias.data *= 2
        source.activation_post_process = mod.activation_post_process
        return cls(quantized.Linear.from_float(source))


FLOAT_TO_OBSERVED = "float_to_observed_custom_module_class"
OBSERVED_TO_QUANTIZED = "observed_to_quantized_custom_module_class"
PREPARE: dict[str, Any] = {FLOAT_TO_OBSERVED: {Scaled: ObservedScaled}}
CONVERT: dict[str, Any] = {OBSERVED_TO_QUANTIZED: {ObservedScaled: QuantizedScaled}}


def model_with(*layers: nn.Module, qconfig: Any = PTQ) -> nn.Module:
    model = nn.Sequential(eagerq.QuantStub(), *layers, eagerq.DeQuantStub()).eval()
    model.qconfig = qconfig
    return model


def observed_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if hasattr(module, "activation_post_process")}


def test_a_custom_module_is_observed_and_converted_as_a_whole() -> None:
    model = model_with(nn.Linear(3, 3), Scaled())
    x = torch.randn(50, 3)
    wanted = model(x)
    prepared = eagerq.prepare(model, prepare_custom_config_dict=PREPARE)
    assert type(prepared[2]) is ObservedScaled
    assert observed_names(prepared) == {"0", "1", "2"}
    assert torch.equal(prepared(x), wanted)
    assert type(model[2]) is Scaled
    int8 = eagerq.convert(prepared, convert_custom_config_dict=CONVERT)
    assert type(int8[2]) is QuantizedScaled
    assert type(int8[1]) is quantized.Linear
    assert (int8(x) - wanted).norm() < 0.02 * wanted.norm()
    assert type(prepared[2]) is ObservedScaled


def test_torch_ao_does_the_same(ao: Any) -> None:
    class TheirQuantized(QuantizedScaled):
        @classmethod
        def from_observed(cls, mod: Any) -> QuantizedScaled:
            source = copy.deepcopy(mod.linear)
            source.weight.data *= 2
            source.bias.data *= 2
            source.activation_post_process = mod.activation_post_process
            return cls(ao.quantized.Linear.from_float(source))

    float_model = model_with(nn.Linear(3, 3), Scaled())
    theirs = nn.Sequential(ao.quantization.QuantStub(), *float_model[1:3], ao.quantization.DeQuantStub()).eval()
    theirs.qconfig = ao.quantization.get_default_qconfig("onednn")
    theirs = ao.quantization.prepare(theirs, prepare_custom_config_dict=PREPARE)
    ours = eagerq.prepare(float_model, prepare_custom_config_dict=PREPARE)
    x = torch.randn(50, 3)
    assert torch.equal(ours(x), theirs(x))
    assert same_state(ours.state_dict(), theirs.state_dict())
    table = {OBSERVED_TO_QUANTIZED: {ObservedScaled: TheirQuantized}}
    theirs = ao.quantization.convert(theirs, convert_custom_config_dict=table)
    assert torch.equal(eagerq.convert(ours, convert_custom_config_dict=CONVERT)(x), theirs(x))


def test_below_other_modules_and_twice() -> None:
    shared = Scaled()
    model = model_with(nn.Sequential(nn.Linear(3, 3), nn.ModuleDict({"a": shared, "b": shared})["a"]), shared)
    model = eagerq.prepare(model, prepare_custom_config_dict=PREPARE)
    assert model[1][1] is model[2]
    assert type(model[2]) is ObservedScaled
    assert len(model[2]._forward_hooks) == 1
    x = torch.randn(20, 3)
    model(x)
    model = eagerq.convert(model, convert_custom_config_dict=CONVERT)
    assert model[1][1] is model[2]
    assert type(model[2]) is QuantizedScaled
    assert model(x).shape == (20, 3)


def test_within_a_custom_module_nothing_is_touched() -> None:
    class Outer(nn.Module):
        def __init__(self, inner: Scaled) -> None:
            super().__init__()
            self.inner, self.lstm = inner, nn.LSTM(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.inner(x)
            return y

    class ObservedOuter(Outer):
        @classmethod
        def from_float(cls, mod: Any) -> ObservedOuter:
            new = cls(mod.inner)
            new.qconfig = mod.qconfig
            return new

    class QuantizedOuter(nn.Module):
        @classmethod
        def from_observed(cls, mod: Any) -> QuantizedOuter:
            assert type(mod.inner) is Scaled
            return cls()

        def forward(self, x: Tensor) -> Tensor:
            return x

    prepare_table = {FLOAT_TO_OBSERVED: {**PREPARE[FLOAT_TO_OBSERVED], Outer: ObservedOuter}}
    convert_table = {OBSERVED_TO_QUANTIZED: {**CONVERT[OBSERVED_TO_QUANTIZED], ObservedOuter: QuantizedOuter}}
    prepared = eagerq.prepare(model_with(Outer(Scaled())), prepare_custom_config_dict=prepare_table)
    assert observed_names(prepared) == {"0", "1"}
    assert type(prepared[1].inner) is Scaled
    assert type(prepared[1].lstm) is nn.LSTM
    prepared(torch.randn(5, 3))
    assert type(eagerq.convert(prepared, convert_custom_config_dict=convert_table)[1]) is QuantizedOuter


def test_hooks_mode_and_device_carry_over() -> None:
    calls: list[str] = []
    model = model_with(Scaled())
    model[1].register_forward_pre_hook(lambda *args: calls.append("before"))
    model[1].register_forward_hook(lambda *args: calls.append("after"))
    prepared = eagerq.prepare(model, prepare_custom_config_dict=PREPARE)
    assert not prepared[1].training
    x = torch.randn(5, 3)
    prepared(x)
    eagerq.convert(prepared, convert_custom_config_dict=CONVERT)(x)
    assert calls == ["before", "after"] * 2


def test_without_a_qconfig_it_stays_float() -> None:
    model = model_with(Scaled(), nn.LSTM(3, 3), nn.Linear(3, 3))
    model[1].qconfig = model[2].qconfig = None
    table = {FLOAT_TO_OBSERVED: {**PREPARE[FLOAT_TO_OBSERVED], nn.LSTM: quantizable.LSTM}}
    prepared = eagerq.prepare(model, prepare_custom_config_dict=table)
    assert [type(prepared[number]) for number in (1, 2)] == [Scaled, nn.LSTM]


class Failing(nn.Module):
    kept: ClassVar[list[nn.Module]] = []

    @classmethod
    def from_float(cls, mod: nn.Module) -> Failing:
        raise ValueError("no such observed module")

    @classmethod
    def from_observed(cls, mod: nn.Module) -> Failing:
        raise ValueError("no such int8 module")


def test_a_class_that_fails_leaves_the_model_as_it_was() -> None:
    model = model_with(nn.LSTM(3, 3), Scaled(), Failing())
    table = {FLOAT_TO_OBSERVED: {nn.LSTM: quantizable.LSTM, Scaled: ObservedScaled, Failing: Failing}}
    before, values = anatomy(model), state(model)
    with pytest.raises(ValueError, match="no such observed module"):
        eagerq.prepare(model, inplace=True, prepare_custom_config_dict=table)
    assert anatomy(model) == before
    assert same_state(state(model), values)

    model = model_with(nn.Linear(3, 3), Scaled())
    model = eagerq.prepare(model, prepare_custom_config_dict=PREPARE)
    model(torch.randn(5, 3))
    before, values = anatomy(model), state(model)
    with pytest.raises(ValueError, match="no such int8 module"):
        eagerq.convert(
            model, inplace=True, convert_custom_config_dict={OBSERVED_TO_QUANTIZED: {ObservedScaled: Failing}}
        )
    assert anatomy(model) == before
    assert same_state(state(model), values)


def test_converting_an_lstm_beside_a_failing_module_leaves_it_prepared() -> None:
    model = eagerq.prepare(model_with(nn.LSTM(3, 3)))
    model.add_module("last", ObservedScaled())
    model[-1].qconfig = PTQ
    before, values = anatomy(model), state(model)
    table = eagerq.get_default_custom_config_dict()
    table[OBSERVED_TO_QUANTIZED][ObservedScaled] = Failing
    with pytest.raises(ValueError, match="no such int8 module"):
        eagerq.convert(model, inplace=True, convert_custom_config_dict=table)
    assert anatomy(model) == before
    assert same_state(state(model), values)


def test_the_default_tables() -> None:
    table = eagerq.get_default_custom_config_dict()
    assert table == {
        FLOAT_TO_OBSERVED: {
            nn.LSTM: quantizable.LSTM,
            nn.MultiheadAttention: quantizable.MultiheadAttention,
        },
        OBSERVED_TO_QUANTIZED: {
            quantizable.LSTM: quantized.LSTM,
            quantizable.MultiheadAttention: quantized.MultiheadAttention,
        },
    }
    table[FLOAT_TO_OBSERVED].clear()
    assert eagerq.get_default_custom_config_dict()[FLOAT_TO_OBSERVED]
    assert no_observer_set() == set(table[OBSERVED_TO_QUANTIZED])


def test_the_default_tables_are_used_when_none_are_given() -> None:
    for kind in ("prepare", "prepare_qat"):
        training = kind == "prepare_qat"
        model = model_with(nn.LSTM(3, 4), qconfig=QAT if training else PTQ).train(training)
        prepared = getattr(eagerq, kind)(model)
        assert type(prepared[1]) is quantizable.LSTM
        assert "1" not in observed_names(prepared)  # its parts have observers, it has none
        names = ("1.layers.0.layer_fw.cell.igates", "1.layers.0.layer_fw.cell.ogate_cy")
        assert observed_names(prepared).issuperset(names)
    empty = eagerq.prepare(model_with(nn.LSTM(3, 4)), prepare_custom_config_dict={})
    assert type(empty[1]) is nn.LSTM


def test_a_layer_by_itself_is_refused() -> None:
    for layer in (nn.LSTM(3, 4), nn.MultiheadAttention(4, 2)):
        for kind in ("prepare", "prepare_qat"):
            layer.train()
            layer.qconfig = QAT
            with pytest.raises(InvalidConfigError, match=f"this {type(layer).__name__} is itself a layer"):
                getattr(eagerq, kind)(layer)


def test_an_optimizer_made_before_preparing_in_place_trains_the_lstm() -> None:
    model = model_with(nn.LSTM(3, 4), qconfig=QAT).train()
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    model = eagerq.prepare_qat(model, inplace=True)
    weight = model[1].layers[0].layer_fw.cell.hgates.weight
    before = weight.detach().clone()
    y, _ = model(torch.randn(5, 2, 3))
    y.square().sum().backward()
    optimizer.step()
    assert not torch.equal(weight, before)
