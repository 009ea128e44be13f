"""prepare and prepare_qat: what they swap and observe, what they leave, and what they refuse."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import Oracle
from quantize.models import PTQ, QAT, anatomy, batch, converted, fused, prepared, same_state, small, state
from torch import Tensor, nn

import eagerq
from eagerq import intrinsic
from eagerq.errors import EagerqError, InvalidConfigError
from eagerq.fake_quantize import FakeQuantizeBase, FusedMovingAvgObsFakeQuantize
from eagerq.intrinsic import qat as intrinsic_qat
from eagerq.nn import qat
from eagerq.nn.quantized import FloatFunctional
from eagerq.observer import MinMaxObserver, ObserverBase


def observed(model: nn.Module) -> set[str]:
    """Names of the modules with an observer on their output."""
    return {
        name
        for name, module in model.named_modules()
        if isinstance(getattr(module, "activation_post_process", None), (ObserverBase, FakeQuantizeBase))
        and not isinstance(module, FakeQuantizeBase)
    }


# --- what happens -------------------------------------------------------------------------------------


def test_layers_become_their_qat_twins_and_share_parameters() -> None:
    float_model = fused()
    model = eagerq.prepare_qat(float_model, inplace=True)
    assert model is float_model
    conv, linear = model.module[0], model.module[4]
    assert (type(conv), type(linear)) == (intrinsic_qat.ConvBnReLU2d, qat.Linear)
    assert type(model.quant) is eagerq.QuantStub
    assert observed(model) == {"quant", "module.0", "module.4"}
    assert all(module.training for module in model.modules())
    assert {id(p) for p in model.parameters()} == {id(p) for p in float_model.parameters()}


def test_a_copy_is_prepared_unless_inplace() -> None:
    float_model = small()
    before, values = anatomy(float_model), state(float_model)
    model = eagerq.prepare_qat(float_model)
    model(batch()).sum().backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert anatomy(float_model) == before
    assert same_state(state(float_model), values)


def test_parameters_of_an_optimizer_made_before_are_trained() -> None:
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    eagerq.prepare_qat(model, inplace=True)
    weight = model.module[0].weight.clone()
    model(batch()).sum().backward()
    optimizer.step()
    assert not torch.equal(model.module[0].weight, weight)


def test_modules_without_a_qconfig_stay_float() -> None:
    model = small()
    model.module[4].qconfig = None
    model = eagerq.prepare_qat(model)
    assert type(model.module[4]) is nn.Linear
    assert not hasattr(model.module[4], "activation_post_process")
    assert type(model.module[0]) is qat.Conv2d


def test_a_qconfig_on_one_layer_quantizes_it_alone() -> None:
    model = small(None)
    model.module[4].qconfig = QAT
    model = eagerq.prepare_qat(model)
    assert observed(model) == {"module.4"}
    assert type(model.module[0]) is nn.Conv2d


def test_nested_containers() -> None:
    class Nest(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quant = eagerq.QuantStub()
            self.items = nn.ModuleList([nn.Linear(3, 3), nn.Sequential(nn.Sequential(nn.Linear(3, 3)), nn.ReLU())])
            self.named = nn.ModuleDict({"a": nn.Linear(3, 3), "none": nn.Identity()})
            self.none = None
            self.dequant = eagerq.DeQuantStub()

        def forward(self, x: Tensor) -> Tensor:
            x = self.quant(x)
            for item in self.items:
                x = item(x)
            return self.dequant(self.named["a"](x))

    model = Nest().train()
    model.register_module("missing", None)
    model.qconfig = QAT
    model = eagerq.prepare_qat(model)
    assert observed(model) == {"quant", "items.0", "items.1.0.0", "named.a"}
    model(torch.randn(2, 3))
    assert eagerq.convert(model.eval())(torch.randn(2, 3)).shape == (2, 3)


def test_a_module_in_two_places_stays_one_and_is_observed_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quant, self.dequant = eagerq.QuantStub(), eagerq.DeQuantStub()
            self.first = nn.Linear(3, 3)
            self.block = nn.Sequential(nn.ReLU(), self.first)

        def forward(self, x: Tensor) -> Tensor:
            return self.dequant(self.block(self.first(self.quant(x))))

    model = Tied().train()
    model.qconfig = QAT
    model = eagerq.prepare_qat(model)
    assert model.first is model.block[1]
    assert type(model.first) is qat.Linear
    assert len(model.first._forward_hooks) == 1
    model(torch.randn(4, 3))
    model = eagerq.convert(model.eval())
    assert model.first is model.block[1]
    assert model(torch.randn(4, 3)).shape == (4, 3)


def test_prepare_observes_without_swapping() -> None:
    model = eagerq.prepare(small(PTQ).eval())
    assert type(model.module[0]) is nn.Conv2d
    assert {"quant", "module.0", "module.4"} <= observed(model)
    assert "dequant" not in observed(model)
    x = batch()
    assert torch.equal(model(x), small_output(model, x))


def small_output(model: nn.Module, x: Tensor) -> Tensor:
    """The same layers without observers."""
    plain = copy.deepcopy(model)
    for module in plain.modules():
        module._forward_hooks.clear()
    return plain(x)


def test_allow_list_and_non_leaves() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x)) * 2

    def model() -> nn.Module:
        net = nn.Sequential(eagerq.QuantStub(), Pair(), nn.Linear(3, 3))
        net.qconfig = PTQ
        return net.eval()

    assert observed(eagerq.prepare(model(), allow_list={eagerq.QuantStub})) == {"0"}
    whole = eagerq.prepare(model(), observer_non_leaf_module_list=[Pair])
    assert observed(whole) == {"0", "1", "2"}


def test_custom_modules() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)

    class ObservedOdd(nn.Module):
        def __init__(self, linear: nn.Module) -> None:
            super().__init__()
            self.linear = linear

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)

        @classmethod
        def from_float(cls, mod: Any) -> ObservedOdd:
            new = cls(mod.linear)
            new.qconfig = mod.qconfig
            return new

    class QuantizedOdd(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.scale = scale

        def forward(self, x: Tensor) -> Tensor:
            return x

        @classmethod
        def from_observed(cls, mod: Any) -> QuantizedOdd:
            return cls(float(mod.activation_post_process.calculate_qparams()[0]))

    model = nn.Sequential(eagerq.QuantStub(), Odd(), eagerq.DeQuantStub()).eval()
    model.qconfig = PTQ
    table = {"float_to_observed_custom_module_class": {Odd: ObservedOdd}}
    model = eagerq.prepare(model, prepare_custom_config_dict=table)
    assert type(model[1]) is ObservedOdd
    assert observed(model) == {"0", "1"}  # as a whole, not its parts
    model(torch.randn(4, 3))
    table = {"observed_to_quantized_custom_module_class": {ObservedOdd: QuantizedOdd}}
    model = eagerq.convert(model, convert_custom_config_dict=table)
    assert type(model[1]) is QuantizedOdd
    assert model[1].scale > 0


def test_mapping() -> None:
    class Mine(qat.Linear):
        pass

    model = small()
    chosen = {nn.Linear: Mine}
    prepared_model = eagerq.prepare_qat(model, mapping=chosen)
    assert type(prepared_model.module[4]) is Mine
    assert type(prepared_model.module[0]) is nn.Conv2d  # not in this map: observed, not swapped
    assert chosen == {nn.Linear: Mine}
    assert type(eagerq.prepare_qat(model).module[4]) is qat.Linear  # the default map is as it was


@pytest.mark.parametrize("mode", ["prepare", "prepare_qat"])
def test_float_functional_is_observed_in_itself(mode: str) -> None:
    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quant, self.dequant, self.ff = eagerq.QuantStub(), eagerq.DeQuantStub(), FloatFunctional()

        def forward(self, x: Tensor) -> Tensor:
            x = self.quant(x)
            return self.dequant(self.ff.add(x, x))

    model = Adds().train()
    model.qconfig = QAT if mode == "prepare_qat" else PTQ
    model = getattr(eagerq, mode)(model)
    assert observed(model) == {"quant", "ff"}
    assert not model.ff._forward_hooks
    model(torch.randn(3, 3))
    assert model.ff.activation_post_process.calculate_qparams()[0] != 1


def test_parametrized_layers_keep_their_parametrization() -> None:
    model = fused()
    nn.utils.parametrizations.weight_norm(model.module[4])
    model = eagerq.prepare_qat(model)
    assert nn.utils.parametrize.is_parametrized(model.module[4], "weight")
    model(batch()).sum().backward()
    assert eagerq.convert(model.eval())(batch()).shape == (2, 5)


def test_devices_are_kept(device: torch.device) -> None:
    model = eagerq.prepare_qat(fused().to(device))
    assert {value.device.type for value in (*model.parameters(), *model.buffers())} == {device.type}
    model(batch().to(device))
    assert eagerq.convert(model.eval())(batch().to(device)).device.type == device.type


@pytest.mark.parametrize("make", ["fused", "small"])
def test_the_same_modules_are_observed_as_by_the_oracle(ao: Oracle, make: str) -> None:
    def build(api: Any) -> nn.Module:
        layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.ReLU6(), nn.Dropout(), nn.Flatten()]
        model = api.QuantWrapper(nn.Sequential(*layers, nn.Linear(16, 5), nn.LayerNorm(5), nn.Hardswish())).train()
        model.qconfig = api.get_default_qat_qconfig("onednn")
        groups = ["module.0", "module.1", "module.2"]
        return api.fuse_modules_qat(model, groups) if make == "fused" else model

    ours = eagerq.prepare_qat(build(eagerq))
    theirs = ao.quantization.prepare_qat(build(ao.quantization))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert (
        eagerq.prepare(build(eagerq)).state_dict().keys()
        == ao.quantization.prepare(build(ao.quantization)).state_dict().keys()
    )


# --- hooks ----------------------------------------------------------------------------------------------


def test_hooks_are_preserved_through_prepare_and_convert() -> None:
    model = nn.Sequential(eagerq.QuantStub(), nn.Linear(5, 5), eagerq.DeQuantStub()).train()
    model.qconfig = QAT
    calls: list[str] = []
    layer = model[1]
    layer.register_forward_pre_hook(lambda module, args: calls.append("pre"))
    layer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(f"pre with {len(args)}, {kwargs}"), with_kwargs=True
    )
    layer.register_forward_hook(lambda module, args, output: calls.append(type(output).__name__))
    layer.register_forward_hook(lambda module, args, kwargs, output: calls.append(f"with {kwargs}"), with_kwargs=True)
    layer.register_forward_hook(lambda module, args, output: calls.append("always"), always_call=True)
    expected = ["pre", "pre with 1, {}", "Tensor", "with {}", "always"]
    x = torch.rand(2, 5)
    model(x)
    assert calls == expected

    model = eagerq.prepare_qat(model)
    assert len(model[0]._forward_hooks) == 1  # the observer
    assert len(model[1]._forward_pre_hooks) == 2
    assert len(model[1]._forward_hooks) == 1 + 3
    calls.clear()
    model(x)
    assert calls == expected

    model = eagerq.convert(model.eval())
    assert not model[0]._forward_hooks
    assert len(model[1]._forward_pre_hooks) == 2
    assert len(model[1]._forward_hooks) == 3
    calls.clear()
    model(x)
    assert calls == ["pre", "pre with 1, {}", "QTensor", "with {}", "always"]
    calls.clear()
    with pytest.raises(EagerqError):
        model[1](x)  # a float tensor
    assert calls == ["pre", "pre with 1, {}", "always"]


def test_users_hooks_see_the_fake_quantized_output() -> None:
    model = nn.Sequential(eagerq.QuantStub(), nn.Linear(5, 5)).train()
    model.qconfig = QAT
    seen: list[Tensor] = []
    model[1].register_forward_hook(lambda module, args, output: seen.append(output))
    model = eagerq.prepare_qat(model)
    y = model(torch.rand(2, 5))
    assert torch.equal(seen[0], y)


def test_a_hook_may_still_change_the_output() -> None:
    model = nn.Sequential(eagerq.QuantStub(), nn.Linear(5, 5), eagerq.DeQuantStub()).train()
    model.qconfig = QAT
    model[1].register_forward_hook(lambda module, args, output: output[:1])
    model = eagerq.prepare_qat(model)
    assert model(torch.rand(4, 5)).shape == (1, 5)
    assert eagerq.convert(model.eval())(torch.rand(4, 5)).shape == (1, 5)


# --- what is refused ------------------------------------------------------------------------------------


def layer_with_qconfig(layer: nn.Module) -> nn.Module:
    layer.qconfig = QAT
    return layer.train()


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: eagerq.prepare_qat(small().eval()), r"only works on models in training mode.*model\.train\(\)"),
        (lambda: eagerq.prepare_qat(small(None)), r"prepare_qat found no qconfig .* 8 submodules.*model\.qconfig ="),
        (lambda: eagerq.prepare(small(None)), "prepare found no qconfig"),
        (lambda: eagerq.prepare_qat(prepared()), r"prepared already: 'quant' .*QuantStub.* has an observer"),
        (lambda: eagerq.prepare(prepared()), "prepare got a model that is prepared already"),
        (lambda: eagerq.prepare_qat(converted().train()), r"converted already: 'quant' .*Quantize.* is an int8 module"),
        (lambda: eagerq.prepare(converted()), "prepare got a model that is converted already"),
        (lambda: eagerq.prepare_qat(small(5)), "its qconfig is a int, not a QConfig"),
    ],
)
def test_refused_models(call: Any, match: str) -> None:
    with pytest.raises(EagerqError, match=match):
        call()


@pytest.mark.parametrize("walk", [eagerq.prepare, eagerq.prepare_qat])
@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(2, 2),
        nn.Conv2d(2, 2, 1),
        intrinsic.ConvReLU2d(nn.Conv2d(2, 2, 1), nn.ReLU()),
        FloatFunctional(),
        eagerq.QuantStub(),
        nn.Embedding(4, 2),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_a_model_that_is_itself_a_layer_is_refused(walk: Any, layer: nn.Module) -> None:
    model = layer_with_qconfig(layer)
    before = anatomy(model)
    with pytest.raises(InvalidConfigError, match=rf"{type(layer).__name__} is itself a layer.*QuantWrapper\(model\)"):
        walk(model, inplace=True)
    assert anatomy(model) == before


def test_wrapped_as_told_it_works() -> None:
    model = eagerq.prepare_qat(eagerq.QuantWrapper(layer_with_qconfig(nn.Linear(2, 2))))
    model(torch.randn(4, 2))
    assert eagerq.convert(model.eval())(torch.randn(4, 2)).shape == (4, 2)


class Failing(nn.Module):
    @classmethod
    def from_float(cls, mod: nn.Module) -> Failing:
        raise ValueError("no such layer")


def failing_prepare_qat(model: nn.Module) -> None:
    eagerq.prepare_qat(model, {**eagerq.get_default_qat_module_mappings(), nn.Linear: Failing}, inplace=True)


def failing_prepare(model: nn.Module) -> None:
    table = {"float_to_observed_custom_module_class": {nn.Linear: Failing}}
    eagerq.prepare(model, inplace=True, prepare_custom_config_dict=table)


@pytest.mark.parametrize("walk", [failing_prepare_qat, failing_prepare])
def test_a_failing_class_leaves_the_model_as_it_was(walk: Any) -> None:
    model = fused(QAT if walk is failing_prepare_qat else PTQ)
    model.module[0].register_forward_hook(lambda *args: None)
    model.module[4].register_forward_pre_hook(lambda *args: None)
    before, values = anatomy(model), state(model)
    with pytest.raises(ValueError, match="no such layer"):
        walk(model)
    assert anatomy(model) == before
    assert same_state(state(model), values)


def test_a_failing_observer_leaves_the_model_as_it_was() -> None:
    def broken() -> nn.Module:
        raise RuntimeError("no observer today")

    model = fused()
    model.module[4].qconfig = eagerq.QConfig(activation=broken, weight=QAT.weight)
    before = anatomy(model)
    with pytest.raises(RuntimeError, match="no observer today"):
        eagerq.prepare_qat(model, inplace=True)
    assert anatomy(model) == before


def test_activations_and_weights_get_what_the_qconfig_says() -> None:
    activation = FusedMovingAvgObsFakeQuantize.with_args(quant_min=0, quant_max=15, dtype=torch.uint8)
    weight = eagerq.default_weight_fake_quant
    model = eagerq.prepare_qat(small(eagerq.QConfig(activation=activation, weight=weight)))
    layer = model.module[0]
    assert layer.activation_post_process.quant_max == 15
    assert not layer.weight_fake_quant.is_per_channel
    assert layer.activation_post_process is not model.module[4].activation_post_process


def test_observers_may_be_plain_in_training() -> None:
    # default_qconfig has observers where QAT has fake quantizers: the layers observe, nothing is rounded
    model = nn.Sequential(eagerq.QuantStub(), nn.ReLU(), eagerq.DeQuantStub()).train()
    model.qconfig = eagerq.default_qconfig
    model = eagerq.prepare_qat(model)
    assert isinstance(model[0].activation_post_process, MinMaxObserver)
    assert observed(model) == {"0"}  # a ReLU alone is neither swapped nor observed
    x = torch.randn(3, 3)
    assert torch.equal(model(x), x.relu())
    model = eagerq.convert(model)
    assert type(model[1]) is nn.ReLU
    assert model(x).min() == 0
