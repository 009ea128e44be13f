"""convert, swap_module, quantize and quantize_qat: what becomes int8, what stays, what is said."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from conftest import Oracle
from quantize.models import PTQ, QAT, anatomy, batch, converted, fused, prepared, same_state, small, state
from torch import Tensor, nn

import eagerq
from eagerq.errors import EagerqError, InvalidConfigError, InvalidInputError, UnsupportedError
from eagerq.fake_quantize import FakeQuantizeBase
from eagerq.intrinsic import quantized as intrinsic_quantized
from eagerq.nn import qat, quantized
from eagerq.nn.quantized import FloatFunctional, QFunctional, QuantizedModule
from eagerq.observer import ObserverBase


def plain(model: nn.Module) -> bool:
    """Nothing of the preparation is left."""
    return not any(
        hasattr(module, "qconfig")
        or isinstance(module, (ObserverBase, FakeQuantizeBase))
        or (module._forward_hooks and module is not model)
        for module in model.modules()
    )


# --- what happens -------------------------------------------------------------------------------------


def test_prepared_layers_become_int8() -> None:
    model = eagerq.convert(prepared().eval())
    kinds = [type(model.quant), type(model.module[0]), type(model.module[4]), type(model.dequant)]
    assert kinds == [quantized.Quantize, intrinsic_quantized.ConvReLU2d, quantized.Linear, quantized.DeQuantize]
    assert plain(model)
    assert model(batch()).dtype is torch.float32
    assert not list(model.parameters())


def test_a_copy_is_converted_unless_inplace() -> None:
    model = prepared().eval()
    before, values = anatomy(model), state(model)
    int8 = eagerq.convert(model)
    assert anatomy(model) == before
    assert same_state(state(model), values)
    again = eagerq.convert(model, inplace=True)
    assert again is model
    assert torch.equal(again(batch()), int8(batch()))


def test_calibrated_layers_become_int8_too() -> None:
    model = eagerq.fuse_modules(small(PTQ).eval(), ["module.0", "module.1", "module.2"])
    model = eagerq.prepare(model)
    x = batch(size=8)
    expected = model(x)
    int8 = eagerq.convert(model)
    assert type(int8.module[0]) is intrinsic_quantized.ConvReLU2d
    assert plain(int8)
    assert (int8(x) - expected).abs().max() < 0.05 * expected.abs().max()


def test_a_kept_qconfig_keeps_the_preparation() -> None:
    model = prepared()
    model.register_module("extra", nn.ReLU6())  # a layer without int8 twin
    int8 = eagerq.convert(model.eval(), remove_qconfig=False)
    assert eagerq.qconfig_equals(int8.qconfig, QAT)
    assert not plain(int8)
    assert plain(eagerq.convert(model))


def test_custom_and_float_modules_work_between_int8_ones() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(3.0))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.factor

    layers = [nn.Linear(6, 6), nn.Tanh(), Scale(), nn.BatchNorm1d(6), nn.Linear(6, 2)]
    model = nn.Sequential(eagerq.QuantWrapper(layers[0]), *layers[1:4], eagerq.QuantWrapper(layers[4])).train()
    model.qconfig = QAT
    for index in (1, 2, 3):
        model[index].qconfig = None
    model = eagerq.prepare_qat(model)
    x = torch.randn(16, 6)
    model(x).sum().backward()
    model.eval().apply(eagerq.disable_observer)
    int8 = eagerq.convert(model, as_trained=True)
    assert [isinstance(module, QuantizedModule) for module in (int8[0].module, int8[4].module)] == [True, True]
    assert [type(module) for module in int8[1:4]] == [nn.Tanh, Scale, nn.BatchNorm1d]
    assert (int8(x) - model(x)).abs().max() < 0.1
    assert [name for name, _ in int8.named_parameters()] == ["2.factor", "3.weight", "3.bias"]


def test_a_layer_without_qconfig_stays_float_with_its_parameters() -> None:
    class Headed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = fused(), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x))

    model = Headed().train()
    model.head.qconfig = None
    model = eagerq.prepare_qat(model)
    model(batch())
    int8 = eagerq.convert(model.eval())
    assert type(int8.head) is nn.Linear
    loss = int8(batch()).sum()
    loss.backward()
    assert int8.head.weight.grad is not None


def test_mapping_and_its_options() -> None:
    seen: list[dict[str, Any]] = []

    class Mine(nn.Module):
        def forward(self, x: Any) -> Any:
            return x

        @classmethod
        def from_float(cls, mod: nn.Module, use_precomputed_fake_quant: bool = False) -> Mine:
            seen.append({"from": type(mod), "precomputed": use_precomputed_fake_quant})
            return cls()

    mapping = {**eagerq.get_default_static_quant_module_mappings(), qat.Linear: Mine}
    model = eagerq.convert(prepared().eval(), mapping=mapping, use_precomputed_fake_quant=True, as_trained=True)
    assert type(model.module[4]) is Mine
    assert type(model.module[0]) is intrinsic_quantized.ConvReLU2d
    assert seen == [{"from": qat.Linear, "precomputed": True}]


def test_swap_module_swaps_one_module() -> None:
    layer = nn.Linear(3, 2).train()
    mapping = eagerq.get_default_qat_module_mappings()
    assert eagerq.swap_module(layer, mapping) is layer  # no qconfig
    layer.qconfig = QAT
    calls: list[str] = []
    layer.register_forward_hook(lambda *args: calls.append("hook"))
    swapped = eagerq.swap_module(layer, mapping)
    assert type(swapped) is qat.Linear
    assert swapped.weight is layer.weight
    swapped(torch.randn(1, 3))
    assert calls == ["hook"]
    relu = nn.ReLU()
    relu.qconfig = QAT
    assert eagerq.swap_module(relu, mapping) is relu  # not in the map


def test_hooks_of_converted_layers_name_them() -> None:
    model = prepared()
    names: list[str] = []
    model.module[4].register_forward_hook(lambda module, args, output: names.append(type(module).__name__))
    int8 = eagerq.convert(model.eval())
    int8(batch())
    assert names == ["Linear"]


class Failing(nn.Module):
    @classmethod
    def from_float(cls, mod: nn.Module) -> Failing:
        raise ValueError("cannot be done")


def test_a_failing_class_leaves_the_model_as_it_was() -> None:
    model = prepared().eval()
    model.module[0].register_forward_hook(lambda *args: None)
    before, values, x = anatomy(model), state(model), batch()
    mapping = {**eagerq.get_default_static_quant_module_mappings(), qat.Linear: Failing}
    with pytest.raises(ValueError, match="cannot be done"):
        eagerq.convert(model, mapping=mapping, inplace=True)
    assert anatomy(model) == before
    assert same_state(state(model), values)
    assert eagerq.convert(model, inplace=True)(x).shape == (2, 5)


# --- in one go --------------------------------------------------------------------------------------------


def run(model: nn.Module, x: Tensor) -> None:
    model(x)


def test_quantize() -> None:
    float_model = small(PTQ)
    float_model = eagerq.fuse_modules(float_model.eval(), ["module.0", "module.1", "module.2"])
    before = anatomy(float_model)
    int8 = eagerq.quantize(float_model, run, [batch()])
    assert anatomy(float_model) == before
    assert type(int8.module[4]) is quantized.Linear
    assert not int8.training
    assert eagerq.quantize(float_model, run, [batch()], inplace=True) is float_model
    assert torch.equal(float_model(batch()), int8(batch()))


def test_quantize_qat() -> None:
    modes: list[bool] = []

    def train(model: nn.Module, x: Tensor) -> None:
        modes.append(model.training)
        assert type(model.module[4]) is qat.Linear
        model(x).sum().backward()

    float_model = fused().eval()
    int8 = eagerq.quantize_qat(float_model, train, [batch()])
    assert modes == [True]
    assert type(int8.module[4]) is quantized.Linear
    assert type(float_model.module[4]) is nn.Linear
    assert eagerq.quantize_qat(float_model, train, [batch()], inplace=True) is float_model
    assert type(float_model.module[4]) is quantized.Linear


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: eagerq.convert(converted()), "converted already.*convert the prepared model once"),
        (lambda: eagerq.convert(small()), r"not prepared: it has no observers.*prepare_qat \(or prepare\)"),
        (lambda: eagerq.convert(nn.Sequential(nn.Linear(2, 2))), "not prepared"),
    ],
)
def test_refused_models(call: Any, match: str) -> None:
    with pytest.raises(InvalidConfigError, match=match):
        call()


def test_reference_modules_are_left_out() -> None:
    with pytest.raises(UnsupportedError, match="FX graph mode"):
        eagerq.convert(prepared(), is_reference=True)


def test_float_input_to_an_int8_layer_names_it_and_the_stub() -> None:
    class NoStub(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return self.features(x)

    model = NoStub().train()
    model.qconfig = QAT
    model = eagerq.prepare_qat(model)
    model(batch())
    int8 = eagerq.convert(model.eval())
    with pytest.raises(InvalidInputError, match=r"'features\.0' \(eagerq\.nn\.quantized\.Conv2d\)") as caught:
        int8(batch())
    for part in (r"got torch.float32 of shape (2, 3, 4, 4)", "QuantStub before it", "QuantWrapper"):
        assert part in str(caught.value)


def test_quantized_input_to_a_float_layer_names_it_and_the_stub() -> None:
    model = small()
    model.module[4].qconfig = None
    model = eagerq.prepare_qat(eagerq.fuse_modules_qat(model, ["module.0", "module.1", "module.2"]))
    model(batch())
    int8 = eagerq.convert(model.eval())
    with pytest.raises(InvalidInputError, match=r"'module\.4' \(torch\.nn\.Linear\): 'linear' got.*DeQuantStub"):
        int8(batch())


# --- layers that have seen no data --------------------------------------------------------------------------


def unobserved(qconfig: Any = QAT) -> nn.Module:
    return eagerq.prepare_qat(fused(qconfig), inplace=True)


def caught(call: Any) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as messages:
        warnings.simplefilter("always")
        call()
    return messages


@pytest.mark.parametrize("as_trained", [False, True])
def test_the_first_forward_warns_once_of_all_layers_without_data(as_trained: bool) -> None:
    model = unobserved().eval()
    assert not caught(lambda: eagerq.convert(model, as_trained=as_trained))
    int8 = eagerq.convert(model, as_trained=as_trained)
    (message,) = caught(lambda: int8(batch()))
    assert "3 layers" in str(message.message)
    for name in ("'quant'", "'module.0'", "'module.4'"):
        assert name in str(message.message)
    assert message.filename == __file__  # where the model was called
    assert not caught(lambda: int8(batch()))


def test_only_the_layers_without_data_are_listed() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quant, self.dequant = eagerq.QuantStub(), eagerq.DeQuantStub()
            self.used, self.unused = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.dequant(self.used(self.quant(x)))

    model = Branches().train()
    model.qconfig = QAT
    model = eagerq.prepare_qat(model)
    model(torch.randn(4, 3))
    int8 = eagerq.convert(model.eval())
    (message,) = caught(lambda: int8(torch.randn(4, 3)))
    assert "1 layers" in str(message.message)
    assert "'unused'" in str(message.message)
    assert "'used'" not in str(message.message)


@pytest.mark.parametrize("how", ["whole", "assign", "deepcopied", "pickled", "nested"])
def test_loading_a_state_dict_keeps_silent(how: str) -> None:
    saved = converted(seed=3).state_dict()
    int8: nn.Module = eagerq.convert(unobserved().eval())
    if how == "deepcopied":
        int8 = copy.deepcopy(int8)
    if how == "pickled":
        buffer = io.BytesIO()
        torch.save(int8, buffer)
        buffer.seek(0)
        int8 = torch.load(buffer, weights_only=False)
    if how == "nested":
        nn.ModuleDict({"inner": int8}).load_state_dict({f"inner.{name}": value for name, value in saved.items()})
    else:
        int8.load_state_dict(saved, assign=how == "assign")
    assert not caught(lambda: int8(batch()))


def test_loading_a_part_does_not_silence() -> None:
    saved = converted(seed=3).state_dict()
    int8 = eagerq.convert(unobserved().eval())
    int8.load_state_dict({"quant.scale": saved["quant.scale"]}, strict=False)
    assert len(caught(lambda: int8(batch()))) == 1


def test_a_loaded_preparation_has_seen_data() -> None:
    model = unobserved()
    model.load_state_dict(prepared(seed=3).state_dict())
    int8 = eagerq.convert(model.eval(), strict=True)
    assert not caught(lambda: int8(batch()))


def test_strict_refuses_layers_without_data() -> None:
    model = unobserved().eval()
    before = anatomy(model)
    with pytest.raises(InvalidConfigError, match=r"seen no data: 'quant', 'module\.0', 'module\.4'.*run the prepared"):
        eagerq.convert(model, inplace=True, strict=True)
    assert anatomy(model) == before
    model(batch())
    assert eagerq.convert(model, strict=True)(batch()).shape == (2, 5)


class Shifts(nn.Module):
    """A FloatFunctional used with numbers only has nothing to observe."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.ff, self.dequant = eagerq.QuantStub(), FloatFunctional(), eagerq.DeQuantStub()

    def forward(self, x: Tensor) -> Tensor:
        return self.dequant(self.ff.mul_scalar(self.ff.add_scalar(self.quant(x), 1.0), 2.0))


def test_arithmetic_with_numbers_needs_no_data() -> None:
    model = Shifts().train()
    model.qconfig = QAT
    model = eagerq.prepare_qat(model)
    model(torch.randn(4, 4))
    int8 = eagerq.convert(model.eval(), strict=True)
    assert isinstance(int8.ff, QFunctional)
    assert not caught(lambda: int8(torch.randn(4, 4)))


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_and_exported_models_do_not_warn() -> None:
    int8 = eagerq.convert(unobserved().eval())
    assert not [
        one
        for one in caught(lambda: torch.export.export(int8, (batch(),), strict=False))
        if "layers" in str(one.message)
    ]


# --- NaN and infinity -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_batches_with_nan_or_infinity_are_left_out_and_reported(value: float) -> None:
    model = prepared()
    clean = eagerq.convert(model)
    model.eval()
    bad = batch()
    bad[0, 0, 0, 0] = value
    model(bad)
    model(bad)
    with pytest.warns(UserWarning, match=r"NaN or infinity reached the observers of 'quant' \(2\)") as caught_warnings:
        int8 = eagerq.convert(model)
    assert caught_warnings[0].filename == __file__
    assert (int8.quant.scale, int8.quant.zero_point) == (clean.quant.scale, clean.quant.zero_point)
    assert int8(batch()).isfinite().all()


# --- training mode ----------------------------------------------------------------------------------------------


def test_a_converted_model_in_training_mode_says_so_once_and_runs() -> None:
    int8 = converted()
    x = batch()
    expected = int8(x)
    int8.train()
    with pytest.warns(UserWarning, match=r"cannot be trained.*run as in eval mode.*convert it again") as messages:
        y = int8(x)
    assert len(messages) == 1
    assert messages[0].filename == __file__
    assert torch.equal(y, expected)
    assert not caught(lambda: int8(x))
    int8.eval()
    int8(x)
    int8.train()
    assert not caught(lambda: int8(x))


def test_a_model_converted_in_training_mode_runs_silently() -> None:
    model = prepared().train()
    int8 = eagerq.convert(model)
    assert int8.training
    assert not caught(lambda: int8(batch()))
    assert torch.equal(int8(batch()), int8.eval()(batch()))


def test_dropout_after_conversion_does_nothing() -> None:
    model = eagerq.QuantWrapper(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.9), nn.Linear(4, 4))).train()
    model.qconfig = QAT
    model = eagerq.prepare_qat(model)
    x = torch.randn(5, 4)
    model(x)
    int8 = eagerq.convert(model)  # never put into eval mode
    assert torch.equal(int8(x), int8(x))
    assert torch.equal(int8(x), copy.deepcopy(int8).eval()(x))


# --- torch.ao as the yardstick ------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["onednn", "x86", "fbgemm", "qnnpack"])
def test_layers_become_what_the_oracle_makes_of_them(ao: Oracle, engine: str) -> None:
    def build(api: Any) -> nn.Module:
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5), nn.ReLU6()]
        model = api.QuantWrapper(nn.Sequential(*layers)).train()
        model.qconfig = api.get_default_qat_qconfig(engine)
        model = api.prepare_qat(api.fuse_modules_qat(model, ["module.0", "module.1", "module.2"]))
        model(batch())
        return api.convert(model.eval())

    ours, theirs = build(eagerq), build(ao.quantization)
    names = {name: type(module).__name__ for name, module in theirs.named_modules() if not name.endswith("_params")}
    assert {name: type(module).__name__ for name, module in ours.named_modules()} == names
    for name in ("quant", "module.0", "module.4"):
        mine, reference = ours.get_submodule(name), theirs.get_submodule(name)
        assert mine.scale == pytest.approx(float(reference.scale), rel=1e-6)
        assert mine.zero_point == int(reference.zero_point)
    for name in ("module.0", "module.4"):
        mine, reference = ours.get_submodule(name).weight(), theirs.get_submodule(name).weight()
        assert torch.equal(mine.int_repr(), reference.int_repr())


def test_errors_of_the_walk_are_of_one_family() -> None:
    for call in (lambda: eagerq.convert(small()), lambda: eagerq.prepare_qat(small(None))):
        with pytest.raises(EagerqError):
            call()
        with pytest.raises(AssertionError):  # what torch.ao raises
            call()
