"""Layers with a fake-quantized weight, and what all QAT classes share: construction, from_float, to_float."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from intrinsic.layers import (
    KINDS,
    PHASES,
    PLAIN,
    QCONFIGS,
    Kind,
    Phase,
    assert_same_pass,
    assert_same_state,
    assert_twins,
    layers,
    plain_layer,
    run,
)
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm
from torch.nn.utils.parametrize import is_parametrized

import eagerq
from eagerq import intrinsic
from eagerq.errors import InvalidConfigError
from eagerq.nn import qat

every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)


@pytest.mark.parametrize("kind", PLAIN, ids=str)
@settings(max_examples=max(settings.default.max_examples // 2, 1))
@given(data=st.data(), qconfig=st.sampled_from(sorted(QCONFIGS)), later=st.lists(PHASES, min_size=2, max_size=3))
def test_equals_torch_ao(ao: Any, kind: Kind, data: st.DataObject, qconfig: str, later: list[Phase]) -> None:
    assert_twins(ao, data.draw(layers(kind)), qconfig, [Phase(), *later])


@pytest.mark.parametrize("kind", PLAIN[1:], ids=str)
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_by_name(ao: Any, kind: Kind, padding: str) -> None:
    assert_twins(ao, plain_layer(kind, padding=padding), "onednn-1", [Phase(), Phase()])


@pytest.mark.parametrize("kind", PLAIN, ids=str)
def test_one_sample_without_a_batch(ao: Any, kind: Kind) -> None:
    layer = plain_layer(kind)
    x = layer.inputs(1)[0][0]
    assert_same_pass(run(layer.module(), x), run(layer.twin(ao), x))


def test_linear_over_sequences(ao: Any) -> None:
    layer = plain_layer("Linear")
    x = torch.randn(2, 3, 4, 6)
    assert_same_pass(run(layer.module(), x), run(layer.twin(ao), x))


# --- construction -------------------------------------------------------------------------------


def directly(kind: Kind, **more: Any) -> Any:
    """By the constructor, rather than from a float module."""
    return kind.qat(**plain_layer(kind).arguments, **more)


@every_kind
def test_constructor_equals_torch_aos(ao: Any, kind: Kind) -> None:
    arguments = plain_layer(kind).arguments
    ours = kind.qat(**arguments, qconfig=eagerq.get_default_qat_qconfig("x86"))
    theirs = kind.twin(ao)(**arguments, qconfig=ao.quantization.get_default_qat_qconfig("x86"))
    assert ours.training is theirs.training is True
    theirs.load_state_dict(ours.state_dict())
    assert_same_state(ours.state_dict(), theirs.state_dict())
    x = plain_layer(kind).inputs(1)[0]
    mine, expected = run(ours, x), run(theirs, x)
    assert_same_pass(mine, expected)
    assert_same_state(mine.state, expected.state)


@every_kind
def test_qconfig_is_needed(kind: Kind) -> None:
    with pytest.raises(AssertionError, match="qconfig must be provided for QAT module"):
        directly(kind)


@every_kind
def test_device_and_dtype(kind: Kind, device: torch.device) -> None:
    made = directly(kind, qconfig=eagerq.get_default_qat_qconfig("x86"), device=device, dtype=torch.float64)
    assert {value.dtype for value in made.parameters()} == {torch.float64}
    assert {value.device.type for value in (*made.parameters(), *made.buffers())} == {device.type}
    x = plain_layer(kind).inputs(1)[0].to(device, torch.float64)
    assert made(x).dtype is torch.float64


# --- from_float ---------------------------------------------------------------------------------


def float_module(kind: Kind) -> Any:
    return plain_layer(kind).float_module(intrinsic, eagerq.get_default_qat_qconfig("x86"))


def layer_of(module: Any) -> Any:
    return module[0] if isinstance(module, nn.Sequential) else module


@every_kind
def test_parameters_are_shared(kind: Kind) -> None:
    given = float_module(kind)
    optimizer = torch.optim.SGD(given.parameters(), lr=0.1)
    made = kind.qat.from_float(given)
    assert made.weight is layer_of(given).weight
    assert made.bias is layer_of(given).bias
    if kind.bn:
        assert made.bn is given[1]
    assert {*made.parameters()} == {*given.parameters()}
    run(made, plain_layer(kind).inputs(1)[0])
    before = made.weight.clone()
    optimizer.step()  # an optimizer made before still moves them
    assert not torch.equal(made.weight, before)


@every_kind
@pytest.mark.parametrize("training", [True, False])
def test_the_mode_carries_over(kind: Kind, training: bool) -> None:
    made = kind.qat.from_float(float_module(kind).train(training))
    assert {module.training for module in made.modules()} == {training}


@every_kind
def test_no_random_numbers_are_used(kind: Kind) -> None:
    given = float_module(kind)
    before = torch.get_rng_state()
    kind.qat.from_float(given)
    assert torch.equal(torch.get_rng_state(), before)


@every_kind
def test_another_class_is_refused(kind: Kind) -> None:
    wanted = kind.qat._FLOAT_MODULE.__name__
    for other in (nn.ReLU(), nn.Bilinear(1, 2, 3)):
        other.qconfig = eagerq.default_qat_qconfig
        with pytest.raises(AssertionError, match=rf"qat\.{kind}\.from_float only works for {wanted}, got"):
            kind.qat.from_float(other)


class Wider(nn.Linear):
    """Whose forward nobody knows."""


def test_a_subclass_is_refused() -> None:
    given = Wider(2, 3)
    given.qconfig = eagerq.default_qat_qconfig
    with pytest.raises(InvalidConfigError, match="from_float only works for Linear, got Wider"):
        qat.Linear.from_float(given)


@every_kind
def test_a_qconfig_must_be_there(kind: Kind) -> None:
    given = float_module(kind)
    given.qconfig = None
    with pytest.raises(AssertionError, match="Input float module must have a valid qconfig"):
        kind.qat.from_float(given)
    del given.qconfig
    with pytest.raises(AssertionError, match="Input float module must have qconfig defined"):
        kind.qat.from_float(given)


@pytest.mark.parametrize("parametrization", [weight_norm, spectral_norm, orthogonal])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.dim in (0, 2)], ids=str)
def test_parametrizations_are_kept(kind: Kind, parametrization: Any) -> None:
    layer = plain_layer(kind)
    given = layer.float_module(intrinsic, eagerq.get_default_qat_qconfig("x86"))
    parametrization(layer_of(given), "weight").eval()  # spectral_norm moves on while it trains
    weight = layer_of(given).weight.detach().clone()
    originals = set(layer_of(given).parametrizations.parameters())
    made = kind.qat.from_float(given)
    assert isinstance(made, kind.qat)
    assert is_parametrized(made, "weight")
    assert originals <= set(made.parameters())
    torch.testing.assert_close(made.weight, weight)

    step = run(made, layer.inputs(1)[0])
    assert all(step.gradients[name] is not None for name, value in made.named_parameters() if value in originals)
    plain = made.to_float()
    torch.testing.assert_close(layer_of(plain).weight, made.folded(as_trained=False)[0])
    assert not is_parametrized(layer_of(plain))
    if not kind.bn:
        torch.testing.assert_close(layer_of(plain).weight, weight)


def test_parametrizations_equal_torch_aos(ao: Any) -> None:
    results = []
    for library, linear in ((eagerq, qat.Linear), (ao.quantization, ao.qat.Linear)):
        given = weight_norm(plain_layer("Linear").parts()[0])
        given.qconfig = library.get_default_qat_qconfig("x86")
        results.append(run(linear.from_float(given), plain_layer("Linear").inputs(1)[0]))
    assert_same_pass(*results)
    assert_same_state(results[0].state, results[1].state)


# --- back to float, copies, other surroundings --------------------------------------------------


@every_kind
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_to_float_equals_torch_aos(ao: Any, kind: Kind, bias: bool, training: bool) -> None:
    layer = plain_layer(kind, bias=bias)
    ours, theirs = layer.module(), layer.twin(ao)
    for module in (ours, theirs):
        run(module, layer.inputs(1)[0])
        module.train(training)
    mine, expected = ours.to_float(), theirs.to_float()
    assert type(mine).__name__ == type(expected).__name__
    assert [type(part) for part in mine.children()] == [type(part) for part in expected.children()]
    assert {module.training for module in mine.modules()} == {training}  # which torch.ao often forgets
    assert_same_state(mine.state_dict(), expected.state_dict())
    assert all(value.requires_grad for value in mine.parameters())
    x = layer.inputs(1)[0]
    torch.testing.assert_close(mine(x), expected(x), rtol=1e-6, atol=1e-6)


@every_kind
def test_copies_stand_alone(kind: Kind) -> None:
    layer = plain_layer(kind)
    module = layer.module()
    x, y = layer.inputs(2)
    run(module, x)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        before = {name: value.clone() for name, value in module.state_dict().items()}
        run(copied, y)
        assert_same_state(module.state_dict(), before)
    copied = copy.deepcopy(module)
    mine, same = run(copied, y), run(module, y)
    assert_same_pass(mine, same, output=0, gradient=0)
    assert_same_state(mine.state, same.state)


@every_kind
@pytest.mark.parametrize("qconfig", ["x86-0", "x86-1", "qnnpack-1"])
def test_forward_never_reads_the_device(kind: Kind, qconfig: str) -> None:
    layer = plain_layer(kind)
    with FakeTensorMode():  # whose tensors have no values to read
        module = kind.qat(**layer.arguments, qconfig=QCONFIGS[qconfig](eagerq))
        for _ in range(2):
            x = torch.empty(layer.input_shape, requires_grad=True)
            module(x).sum().backward()
            assert x.grad is not None
        module.eval()(x)


@every_kind
@pytest.mark.parametrize("qconfig", ["x86-0", "x86-1"])
def test_evaluated_under_inference_mode_first(kind: Kind, qconfig: str) -> None:
    layer = plain_layer(kind)
    module, steady = layer.module(qconfig), layer.module(qconfig)
    x = layer.inputs(1)[0]
    with torch.inference_mode():
        module.eval()(x)
    steady.eval()(x)
    mine, expected = run(module.train(), x), run(steady.train(), x)
    assert_same_pass(mine, expected, output=0, gradient=0)
    assert_same_state(mine.state, expected.state)


@every_kind
def test_autocast(ao: Any, kind: Kind) -> None:
    layer = plain_layer(kind)
    x = layer.inputs(1)[0]
    outputs: list[Tensor] = []
    for module in (layer.module(), layer.twin(ao)):
        with torch.autocast("cpu", torch.bfloat16):
            outputs.append(module(x))
        outputs[-1].float().sum().backward()
    torch.testing.assert_close(outputs[0].float(), outputs[1].float(), rtol=2**-6, atol=2**-6)


@every_kind
def test_repr(kind: Kind) -> None:
    shown = repr(plain_layer(kind).module())
    assert shown.startswith(f"{kind}(")
    assert "(weight_fake_quant): FusedMovingAvgObsFakeQuantize(" in shown
