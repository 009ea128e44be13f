"""int8 normalization layers as modules: what they are made of, refuse, show and save."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Oracle
from nn.norms import (
    BATCH_NORMS,
    FUSED,
    INSTANCE_NORMS,
    NAMES,
    Network,
    converted,
    float_layer,
    images,
    int8_class,
    prepared,
    real_input,
    some_input,
    trained_network,
    twin_tensor,
)
from torch import Tensor, nn

import eagerq
from eagerq import QTensor
from eagerq.errors import CheckpointError, InvalidArgumentError, InvalidConfigError, InvalidInputError
from eagerq.nn import quantized

names = pytest.mark.parametrize("name", NAMES)


@names
def test_from_float_is_like_torchs(ao: Oracle, name: str) -> None:
    """Tensors, parameters and constructor arguments."""
    model = prepared(float_layer(name), name)
    mine = eagerq.convert(model)[0]
    layer = float_layer(name, fused=ao.intrinsic)
    layer.activation_post_process = ao.quantization.get_default_qconfig("onednn").activation()
    layer.activation_post_process(layer(some_input(name).dequantize()))
    theirs = int8_class(name, ao.quantized, ao.intrinsic_quantized).from_float(layer)
    state, wanted = mine.state_dict(), theirs.state_dict()
    assert list(state) == list(wanted)
    for key, value in wanted.items():
        assert torch.equal(state[key], value.reshape(state[key].shape).to(state[key].dtype)), key
        assert type(state[key]) is Tensor
    assert mine._get_name() == theirs._get_name()
    for one in (
        "normalized_shape",
        "eps",
        "num_groups",
        "num_channels",
        "num_features",
        "elementwise_affine",
    ):
        assert getattr(mine, one, None) == getattr(theirs, one, None)
    if name not in INSTANCE_NORMS:  # where torch.ao takes affine for the momentum
        assert getattr(mine, "affine", None) == getattr(theirs, "affine", None)
    assert torch.equal(mine.weight, theirs.weight)
    assert torch.equal(mine.bias, theirs.bias)
    if name in BATCH_NORMS:
        assert torch.equal(mine.running_mean, theirs.running_mean)
        assert torch.equal(mine.running_var, theirs.running_var)
        assert mine.num_batches_tracked == 0
    assert not list(mine.parameters())
    y = mine(some_input(name))
    assert torch.equal(y.int_repr(), theirs(twin_tensor(some_input(name))).int_repr())
    other = converted(name)
    other.load_state_dict(wanted)
    assert torch.equal(other(some_input(name)).int_repr(), y.int_repr())


def test_new_layers() -> None:
    for kind in (quantized.BatchNorm2d, quantized.BatchNorm3d, int8_class("BNReLU2d"), int8_class("BNReLU3d")):
        layer = kind(4, 1e-3, 0.2, "cpu", torch.float32)
        assert (layer.eps, layer.momentum, layer.scale, layer.zero_point) == (1e-3, 0.2, 1.0, 0)
        assert set(layer.state_dict()) == {*nn.BatchNorm2d(4).state_dict(), "scale", "zero_point"}
    layer = quantized.LayerNorm((2, 3), torch.ones(2, 3), None, 0.5, 7, 1e-3, True, "cpu", torch.float32)
    assert (layer.normalized_shape, layer.eps, layer.scale, layer.zero_point) == ((2, 3), 1e-3, 0.5, 7)
    assert layer.bias is None
    assert list(layer.state_dict()) == ["weight", "scale", "zero_point"]
    assert quantized.LayerNorm(4, None, None, 1.0, 0).normalized_shape == (4,)
    assert quantized.LayerNorm(4, torch.ones(4).bfloat16(), None, 1.0, 0).weight.dtype is torch.float32
    signed = quantized.GroupNorm(1, 6, None, None, 0.5, -3)(some_input("GroupNorm"))
    assert (signed.dtype, signed.q_zero_point()) == (torch.int8, -3)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: quantized.LayerNorm(4, torch.ones(3), None, 1.0, 0), r"weight has shape \(3,\), not \(4,\)"),
        (lambda: quantized.LayerNorm(4, torch.tensor(1.0), None, 1.0, 0), r"weight has shape \(\)"),
        (lambda: quantized.GroupNorm(2, 4, None, torch.ones(2), 1.0, 0), r"bias has shape \(2,\)"),
        (lambda: quantized.InstanceNorm2d(4, torch.ones(3), None, 1.0, 0), "InstanceNorm2d"),
        (lambda: quantized.GroupNorm(3, 4, None, None, 1.0, 0), "4 channels do not make 3 equal groups"),
        (lambda: quantized.GroupNorm(0, 4, None, None, 1.0, 0), "do not make 0"),
    ],
)
def test_unfitting_arguments_are_refused(make: Any, words: str) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        make()


@names
def test_wrong_inputs_are_refused(name: str) -> None:
    model = nn.Sequential()
    model.norm = eagerq.convert(prepared(float_layer(name), name))[0]
    eagerq.errors.stamp_names(model)
    x = some_input(name)
    wrong: list[tuple[Any, str]] = [
        (x.dequantize(), r"torch\.float32.*QuantStub"),
        (QTensor(x.integers, torch.ones(6), torch.zeros(6), 1), "one scale"),
        (x[:, :, :5] if name == "LayerNorm" else x[:, :5], "got"),
        (x[0, 0, 0], "got"),
    ]
    if name not in ("LayerNorm", "GroupNorm"):
        wrong.append((x.unsqueeze(0).unsqueeze(0), "got"))
    for value, words in wrong:
        with pytest.raises(InvalidInputError, match=rf"'norm' \(eagerq.*{name}\).*{words}"):
            model(value)


def test_instance_norm_without_tensors_takes_any_width() -> None:
    """As the float layer, which uses ``num_features`` for nothing then."""
    int8 = converted("InstanceNorm2d", affine=False)
    assert int8(some_input("InstanceNorm2d")[:, :4]).shape[1] == 4


def test_batch_norm_without_statistics_is_refused() -> None:
    model = nn.Sequential(nn.Sequential(nn.BatchNorm2d(6, track_running_stats=False)))
    model.qconfig = eagerq.get_default_qconfig("onednn")
    model = eagerq.prepare(model.eval())
    model(real_input("BatchNorm2d"))
    with pytest.raises(InvalidConfigError, match=r"'0\.0'.*track_running_stats"):
        eagerq.convert(model)


@names
def test_from_float_refuses_others(name: str) -> None:
    other = prepared(nn.ReLU(), name)[0] if name == "LayerNorm" else prepared(nn.LayerNorm(5), "LayerNorm")[0]
    other.activation_post_process = prepared(float_layer(name), name)[0].activation_post_process
    with pytest.raises(InvalidConfigError, match=rf"{name}.from_float only works for"):
        int8_class(name).from_float(other)
    with pytest.raises(InvalidConfigError, match="no observer"):
        int8_class(name).from_float(float_layer(name))


@names
def test_repr_tells_the_parameters(name: str) -> None:
    int8 = converted(name)
    int8.scale, int8.zero_point = 0.25, 3
    words = repr(int8)
    assert words.startswith(f"Quantized{name}(")
    inner = float_layer(name)
    plain = (inner[0] if name.startswith("BNReLU") else inner).extra_repr().replace(", bias=True", "")
    assert f"({plain}, scale=0.25, zero_point=3)" in words


@names
def test_half_is_for_float_layers(name: str) -> None:
    int8, x = converted(name), some_input(name)
    wanted = int8(x).int_repr()
    int8.half()
    assert int8.weight.dtype is torch.float32
    assert torch.equal(int8(x).int_repr(), wanted)


@names
def test_training_mode_changes_nothing(name: str) -> None:
    int8, x = converted(name), some_input(name)
    before = copy.deepcopy(int8.state_dict())
    assert torch.equal(int8.train()(x).int_repr(), int8.eval()(x).int_repr())
    assert all(torch.equal(value, before[key]) for key, value in int8.state_dict().items())


def test_float_functions_say_what_to_do() -> None:
    x = some_input("GroupNorm")
    for function in (lambda: F.layer_norm(x, [4]), lambda: F.group_norm(x, 2), lambda: F.instance_norm(x)):
        with pytest.raises(InvalidInputError, match=r"norm.*DeQuantStub"):
            function()


# --- state -------------------------------------------------------------------------------------------


def test_state_goes_round() -> None:
    int8 = eagerq.convert(trained_network("x86"), as_trained=True)
    wanted = int8(images())
    file = io.BytesIO()
    torch.save(int8.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert all(type(value) is Tensor for value in state.values())
    fresh = eagerq.fuse_modules_qat(Network(), FUSED)
    fresh.qconfig = eagerq.get_default_qconfig("x86")
    fresh = eagerq.convert(eagerq.prepare(fresh))
    fresh.load_state_dict(state)
    assert torch.equal(fresh(images()), wanted)
    assert torch.equal(copy.deepcopy(fresh)(images()), wanted)
    for key in state:
        with pytest.raises(CheckpointError, match="does not fit"):
            fresh.load_state_dict({**state, key: torch.zeros(3, 3)})
    assert torch.equal(fresh(images()), wanted)


@names
def test_layers_are_pickled(name: str) -> None:
    int8, x = converted(name), some_input(name)
    file = io.BytesIO()
    torch.save(int8, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x).int_repr(), int8(x).int_repr())


def test_old_files_of_batch_norm() -> None:
    """Before version 2 of torch's batch norm there was no count of batches."""
    int8 = converted("BatchNorm2d")
    state = int8.state_dict()
    del state["num_batches_tracked"]
    quantized.BatchNorm2d(6).load_state_dict(state)
