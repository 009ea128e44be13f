"""int8 activation modules: torch.ao's integers for every input, and what is right where those are wrong."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Oracle
from hypothesis import given
from hypothesis import strategies as st
from kernels.calls import SCALE_KINDS, scales
from torch import Tensor, nn

import eagerq
from eagerq import QTensor, QuantWrapper, quantize_per_tensor
from eagerq.errors import InvalidArgumentError, InvalidConfigError, InvalidInputError
from eagerq.nn import quantized
from eagerq.qconfig import QConfig

# float module -> constructor of its twin, of either library, given the parameters of the result
FLOAT: dict[str, Callable[[], nn.Module]] = {
    "ELU": lambda: nn.ELU(0.7),
    "Hardswish": nn.Hardswish,
    "LeakyReLU": lambda: nn.LeakyReLU(0.3),
    "PReLU": lambda: nn.PReLU(8, 0.3),
    "ReLU6": nn.ReLU6,
}
BUILT: dict[str, Callable[[Any, float, int], nn.Module]] = {
    "ELU": lambda nnq, scale, zero_point: nnq.ELU(scale, zero_point, 0.7),
    "Hardswish": lambda nnq, scale, zero_point: nnq.Hardswish(scale, zero_point),
    "LeakyReLU": lambda nnq, scale, zero_point: nnq.LeakyReLU(scale, zero_point, 0.3),
    "ReLU6": lambda nnq, scale, zero_point: nnq.ReLU6(),
    "Sigmoid": lambda nnq, scale, zero_point: nnq.Sigmoid(scale, zero_point),
    "Softmax": lambda nnq, scale, zero_point: nnq.Softmax(0, scale, zero_point),
}
ALL = [*BUILT, "PReLU"]
SIGNED = ("PReLU", True)
UNSIGNED = {True: torch.uint8, False: torch.quint8}


def build(name: str, scale: float = 0.05, zero_point: int = 20) -> Any:
    """One of ours, ready to run."""
    if name != "PReLU":
        return BUILT[name](quantized, scale, zero_point)
    layer = quantized.PReLU(scale, zero_point, 8)
    layer.set_weight(quantize_per_tensor(torch.linspace(-0.5, 0.9, 8), 0.01, 100, torch.uint8))
    return layer


def images() -> Tensor:
    return torch.randn(2, 8, 4, 4) * 3


def some_input() -> QTensor:
    return quantize_per_tensor(images(), 0.05, 100, torch.uint8)


def forgive(off: Tensor, steps: Tensor) -> None:
    """Take single steps out of ``off`` where the exact result lies next to a tie."""
    off[((steps - steps.floor() - 0.5).abs() < 1e-4) & (off.abs() == 1)] = 0


bytes_ = st.integers(0, 255)


@pytest.mark.parametrize("name", BUILT)
@given(data=st.data())
def test_integers_are_those_of_torch_ao(name: str, ao: Oracle, data: st.DataObject) -> None:
    kind = data.draw(SCALE_KINDS)
    x = QTensor(torch.arange(256, dtype=torch.uint8), data.draw(scales(kind)), data.draw(bytes_))
    scale, zero_point = data.draw(scales(kind)), data.draw(bytes_)
    wanted = BUILT[name](ao.quantized, scale, zero_point)(
        torch._make_per_tensor_quantized_tensor(x.integers, x.scale, x.zero_point)
    )
    got = build(name, scale, zero_point)(x)
    off = got.int_repr().int() - wanted.int_repr()
    if name == "Sigmoid":  # its exp has another last bit there
        forgive(off, torch.sigmoid(x.dequantize().double()) / scale)
    assert not off.any()
    if name != "ReLU6":
        assert (got.q_scale(), got.q_zero_point()) == (scale, zero_point)


@pytest.mark.parametrize("name", ["ELU", "Hardswish", "LeakyReLU"])
@given(seed=st.integers(0, 2**31))
def test_integers_are_those_of_torch_ao_next_to_ties(name: str, ao: Oracle, seed: int) -> None:
    generator = random.Random(seed)
    x = QTensor(torch.arange(256, dtype=torch.uint8), generator.uniform(0.001, 0.3), generator.randrange(256))
    real = getattr(nn, name)(*{"ELU": [0.7], "LeakyReLU": [0.3]}.get(name, []))(x.dequantize())
    tie = generator.randrange(120) + 0.5
    scale = real[generator.randrange(256)].abs().item() / tie * (1 + generator.uniform(-1e-7, 1e-7)) or 0.1
    wanted = BUILT[name](ao.quantized, scale, 120)(
        torch._make_per_tensor_quantized_tensor(x.integers, x.scale, x.zero_point)
    )
    layer: Any = build(name, scale, 120)
    if name != "ELU":
        layer.scale = torch.tensor(scale).item()  # torch.ao keeps it in a float32 buffer
    assert torch.equal(layer(x).int_repr(), wanted.int_repr())


@given(data=st.data(), parameters=st.sampled_from([1, 3]))
def test_prelu_has_the_integers_of_torch_ao_where_that_can_express_the_slope_one(
    ao: Oracle, data: st.DataObject, parameters: int
) -> None:
    kind = data.draw(SCALE_KINDS)
    one = 2 ** data.draw(st.integers(0, 6)) if kind == "power" else data.draw(st.integers(1, 100))
    x = QTensor(torch.arange(256).to(torch.uint8).expand(2, 3, 256), data.draw(scales(kind)), data.draw(bytes_))
    slopes = torch.tensor([data.draw(bytes_) for _ in range(parameters)], dtype=torch.uint8)
    weight = QTensor(slopes, 1 / one, data.draw(st.integers(0, 255 - one)))
    ours, theirs = (
        library.PReLU(scale, zero_point, parameters)
        for scale, zero_point in [(data.draw(scales(kind)), data.draw(bytes_))]
        for library in (quantized, ao.quantized)
    )
    ours.set_weight(weight)
    theirs.set_weight(torch._make_per_tensor_quantized_tensor(weight.integers, weight.scale, weight.zero_point))
    wanted = theirs(torch._make_per_tensor_quantized_tensor(x.integers.contiguous(), x.scale, x.zero_point))
    off = ours(x).int_repr().int() - wanted.int_repr()
    if kind != "power":  # it multiplies in another order, so that what is nearly a tie may part
        forgive(off, F.prelu(x.dequantize().double(), weight.dequantize().double()) / ours.scale)
    assert not off.any()


@given(
    slopes=st.lists(st.floats(-1.5, 1.5), min_size=8, max_size=8),
    per_channel=st.booleans(),
    dtype=st.sampled_from([torch.uint8, torch.int8]),
)
def test_prelu_learned_slopes(slopes: list[float], per_channel: bool, dtype: torch.dtype) -> None:
    # here torch.ao shrinks positive values, loses negative slopes, or fails
    observer = eagerq.PerChannelMinMaxObserver if per_channel else eagerq.MinMaxObserver
    weight = {"dtype": dtype} | ({"ch_axis": 0} if per_channel else {})
    scheme = torch.per_channel_affine if per_channel else torch.per_tensor_affine
    if dtype is torch.int8:
        scheme = torch.per_channel_symmetric if per_channel else torch.per_tensor_symmetric
    float_layer = nn.PReLU(8)
    float_layer.weight = nn.Parameter(torch.tensor(slopes))
    model = QuantWrapper(float_layer).eval()
    model.qconfig = QConfig(eagerq.MinMaxObserver, observer.with_args(qscheme=scheme, **weight))
    model = eagerq.prepare(model)
    x = images()
    model(x)
    converted: Any = eagerq.convert(model)
    layer = converted.module
    q = converted.quant(x)
    learned = layer.weight.dequantize()
    assert (learned - torch.tensor(slopes)).abs().max() <= max(map(abs, slopes)) / 120
    exact = F.prelu(q.dequantize().double(), learned.double()).clamp((0 - layer.zero_point) * layer.scale)
    exact = exact.clamp(max=(255 - layer.zero_point) * layer.scale)
    assert (layer(q).dequantize() - exact).abs().max() <= layer.scale * 0.501
    # whatever the observer's type, the state is one, so that another layer of its shape can load it
    assert layer.state_dict()["weight"].dtype is torch.uint8
    if layer.state_dict()["weight_scale"].numel() == 1:
        other = quantized.PReLU(1.0, 0, 8)
        other.load_state_dict(layer.state_dict())
        assert torch.equal(other(q).int_repr(), layer(q).int_repr())


@pytest.mark.parametrize(
    ("name", "training"),
    # torch.ao says of the slopes in default qconfigs that they should be unsigned
    [(name, training) for name in [*FLOAT, "Dropout"] for training in (False, True) if (name, training) != SIGNED],
)
def test_convert_gives_torch_aos_module_and_parameters(name: str, training: bool, ao: Oracle) -> None:
    make = FLOAT.get(name, nn.Dropout)
    models = []
    for library in (eagerq, ao.quantization):
        torch.manual_seed(0)
        model = library.QuantWrapper(make()).train(training)
        if training:
            model.qconfig = library.default_qat_qconfig
        else:  # PReLU's slopes: whole steps of which make 1, or torch.ao is wrong
            fixed = library.FixedQParamsObserver.with_args(scale=0.01, zero_point=50, dtype=UNSIGNED[library is eagerq])
            model.qconfig = library.QConfig(library.MinMaxObserver, fixed)
        prepared = (library.prepare_qat if training else library.prepare)(model)
        prepared(images().abs() if name == "Dropout" else images())
        models.append(library.convert(prepared.eval()))
    ours, theirs = models
    assert type(ours.module) is getattr(quantized, name)
    assert type(ours.module).__name__ == type(theirs.module).__name__
    x = images()
    assert torch.equal(ours(x), theirs(x))
    scale = theirs.module(theirs.quant(x)).q_scale()
    assert ours.module(ours.quant(x)).q_scale() == pytest.approx(scale, rel=1e-7)


@pytest.mark.filterwarnings("ignore:this state_dict lacks parameters that torch.ao never saves:UserWarning")
@pytest.mark.parametrize("name", [name for name in FLOAT if name != "PReLU"])  # whose slopes torch.ao does not save
def test_files_of_torch_ao_load(name: str, ao: Oracle) -> None:
    models, x = [], images()
    for library in (ao.quantization, eagerq):
        model = library.QuantWrapper(FLOAT[name]()).eval()
        model.qconfig = library.get_default_qconfig("onednn")
        prepared = library.prepare(model)
        prepared(x)
        models.append(library.convert(prepared))
    theirs, ours = models
    if name in ("Hardswish", "LeakyReLU"):  # the others' parameters are not in the file
        ours.module.scale, ours.module.zero_point = 9.0, 9
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("name", [name for name in FLOAT if name != "ReLU6"])  # it has no parameters of its own
def test_as_trained_agrees_with_training(name: str) -> None:
    model = QuantWrapper(FLOAT[name]()).train()
    model.qconfig = eagerq.get_default_qat_qconfig("fbgemm")  # 0 to 127
    model = eagerq.prepare_qat(model)
    for _ in range(3):
        model(images())
    model.eval().apply(eagerq.disable_observer)
    converted: Any = eagerq.convert(model, as_trained=True)
    x = images() * 2
    step = model.module.activation_post_process.scale.item()
    slope = step * 128 / 127 if name == "PReLU" else 0.0  # its slopes are integers
    assert (converted(x) - model(x)).abs().max() <= step * 1.001 + slope
    assert converted.module(converted.quant(x * 9)).int_repr().max() == 127
    assert converted.state_dict()["module.quant_range"].tolist() == [0, 127]


@pytest.mark.parametrize("name", ALL)
def test_a_float_tensor_is_refused(name: str) -> None:
    model = nn.Sequential()
    model.add_module("act", build(name))
    eagerq.errors.stamp_names(model)
    message = rf"'act' \(eagerq\.nn\.quantized\.{name}\): expected a quantized tensor .* got torch\.float32"
    with pytest.raises(InvalidInputError, match=message):
        model(images())


@pytest.mark.parametrize("name", ALL)
def test_state_is_plain_tensors_and_comes_back(name: str) -> None:
    layer, other = build(name, 0.07, 33), build(name)
    state = layer.state_dict()
    assert all(type(value) is Tensor for value in state.values())
    assert set(state) == EXPECTED_STATE.get(name, {"scale", "zero_point"})
    if name == "PReLU":
        other.set_weight(quantize_per_tensor(torch.zeros(8), 1.0, 0, torch.uint8))
    other.load_state_dict(state)
    x = some_input()
    assert torch.equal(other(x).dequantize(), layer(x).dequantize())


EXPECTED_STATE: dict[str, set[str]] = {
    "ReLU6": set(),
    "PReLU": {"weight", "weight_scale", "weight_zero_point", "scale", "zero_point"},
}


@pytest.mark.parametrize("name", ["ELU", "Sigmoid", "Softmax"])
def test_files_without_their_parameters_leave_them(name: str) -> None:
    layer = build(name, 0.07, 33)
    layer.load_state_dict({})
    assert (layer.scale, layer.zero_point) == (0.07, 33)


@pytest.mark.parametrize("name", ["Hardswish", "LeakyReLU", "PReLU"])
def test_other_files_without_parameters_are_refused(name: str) -> None:
    with pytest.raises(RuntimeError, match="Missing key"):
        build(name).load_state_dict({})


@pytest.mark.parametrize("name", ALL)
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_and_exported(name: str, device: torch.device) -> None:
    model = nn.Sequential(quantized.Quantize(0.05, 100, torch.uint8), build(name), quantized.DeQuantize()).to(device)
    x = images().to(device)
    wanted = model(x)
    assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), wanted)
    for strict in (True, False):
        assert torch.equal(torch.export.export(model, (x,), strict=strict).module()(x), wanted)


@pytest.mark.parametrize("name", ALL)
def test_built_by_hand_with_a_negative_zero_point_gives_signed_integers(name: str) -> None:
    if name == "ReLU6":
        return
    layer = build(name, 0.05, -20)
    y = layer(quantize_per_tensor(images(), 0.05, -10, torch.int8))
    assert (y.dtype, y.q_zero_point()) == (torch.int8, -20)


@pytest.mark.parametrize("name", ["Sigmoid", "Softmax"])
def test_further_maps_may_ask_for_it(name: str) -> None:
    kind = getattr(nn, name)
    model = QuantWrapper(kind(1) if name == "Softmax" else kind()).train()
    model.qconfig = eagerq.get_default_qat_qconfig("onednn")
    model = eagerq.prepare_qat(model)
    x = images()
    wanted = model(x)
    mapping = eagerq.get_default_static_quant_module_mappings() | {kind: getattr(quantized, name)}
    converted: Any = eagerq.convert(model, mapping)
    assert type(converted.module) is getattr(quantized, name)
    assert (converted.module.scale, converted.module.zero_point) == (1 / 256, 0)
    assert torch.equal(converted(x), wanted)
    if name == "Sigmoid":
        assert (converted.module.output_scale, converted.module.output_zero_point) == (1 / 256, 0)


def test_softmax_with_its_axis_left_open() -> None:
    x = quantize_per_tensor(torch.randn(3, 4), 0.1, 30, torch.uint8)
    with pytest.warns(UserWarning, match="Implicit dimension choice for softmax"):
        y = quantized.Softmax(None, 1 / 256, 0)(x)
    assert torch.equal(y.int_repr(), quantized.Softmax(1, 1 / 256, 0)(x).int_repr())


def test_relu6_in_place() -> None:
    x = some_input()
    assert quantized.ReLU6(inplace=True)(x) is x
    assert x.dequantize().max() == pytest.approx(6.0, abs=1e-5)


def test_leaky_relu_leaves_its_input() -> None:
    x = some_input()
    before = x.int_repr().clone()
    quantized.LeakyReLU(0.1, 20, inplace=True)(x)
    assert torch.equal(x.int_repr(), before)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_gives_what_it_gets(training: bool) -> None:
    layer, x = quantized.Dropout(0.9).train(training), some_input()
    assert layer(x) is x
    assert layer(images()).count_nonzero() == images().numel()
    assert not layer.state_dict()


@pytest.mark.parametrize("name", ["ELU", "Hardswish", "LeakyReLU", "PReLU", "Sigmoid", "Softmax"])
def test_an_unprepared_module_is_refused(name: str) -> None:
    with pytest.raises(InvalidConfigError, match="no observer is attached"):
        getattr(quantized, name).from_float(getattr(nn, name)())


def test_prelu_of_another_shape_is_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"expected 8 channels, got shape \(2, 3\)"):
        build("PReLU")(quantize_per_tensor(torch.randn(2, 3), 0.1, 0, torch.uint8))
    with pytest.raises(InvalidArgumentError, match=r"shape \(3,\), wanted \(8,\)"):
        build("PReLU").set_weight(quantize_per_tensor(torch.randn(3), 0.1, 0, torch.uint8))


def test_they_say_what_they_are() -> None:
    assert repr(quantized.ELU(0.5, 3, 2.0)) == "QuantizedELU(alpha=2.0, scale=0.5, zero_point=3)"
    assert repr(quantized.PReLU(0.5, 3, 2)) == "QuantizedPReLU(num_parameters=2, scale=0.5, zero_point=3)"
    assert isinstance(quantized.Hardswish(0.5, 3), nn.Hardswish)
