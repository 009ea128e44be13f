"""Layers that train with their batch norm and ReLU fused: torch.ao's numbers, and the batch norm's ways."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from intrinsic.layers import (
    FUSED,
    PHASES,
    QCONFIGS,
    WITH_BN,
    Kind,
    Phase,
    assert_twins,
    layers,
    plain_layer,
    run,
)
from torch import Tensor, nn

import eagerq
from eagerq import intrinsic
from eagerq.errors import InvalidConfigError
from eagerq.intrinsic import qat

every_bn = pytest.mark.parametrize("kind", WITH_BN, ids=str)


@pytest.mark.parametrize("kind", FUSED, ids=str)
@settings(max_examples=max(settings.default.max_examples // 3, 1))
@given(data=st.data(), qconfig=st.sampled_from(sorted(QCONFIGS)), later=st.lists(PHASES, min_size=2, max_size=3))
def test_equals_torch_ao(ao: Any, kind: Kind, data: st.DataObject, qconfig: str, later: list[Phase]) -> None:
    assert_twins(ao, data.draw(layers(kind)), qconfig, [Phase(), *later])


@pytest.mark.parametrize("kind", FUSED, ids=str)
@pytest.mark.parametrize("qconfig", ["x86-0", "onednn-1", "qnnpack-1", "symmetric-channels-1"])
def test_equals_torch_ao_from_training_to_evaluation(ao: Any, kind: Kind, qconfig: str) -> None:
    frozen = Phase(frozen=True)
    settled = Phase(observer=False, frozen=True)
    evaluated = Phase(observer=False, frozen=True, training=False)
    phases = [Phase(), Phase(), frozen, settled, evaluated]
    assert_twins(ao, plain_layer(kind, weights="mixed", bias=kind.relu), qconfig, phases)


# --- the batch norm -----------------------------------------------------------------------------


def statistics(module: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.bn.named_buffers()}


def moves(module: Any, x: Tensor) -> bool:
    """Whether a pass changes the running statistics."""
    before = statistics(module)
    module(x)
    return any(not torch.equal(value, before[name]) for name, value in statistics(module).items())


@every_bn
def test_frozen_statistics_stay_through_train_and_eval(kind: Kind) -> None:
    layer = plain_layer(kind)
    module, x = layer.module(), layer.inputs(1)[0]
    assert moves(module, x)
    assert not moves(module.eval(), x)
    assert moves(module.train(), x)
    assert module.freeze_bn_stats() is module
    for mode in (True, False, True):
        assert module.train(mode).training is mode
        assert module.bn.training is False
        assert not moves(module, x)
    assert module.update_bn_stats() is module
    assert moves(module, x)
    assert not moves(module.eval(), x)


@every_bn
def test_frozen_from_the_start(kind: Kind) -> None:
    layer = plain_layer(kind)
    module = kind.qat(**layer.arguments, freeze_bn=True, qconfig=eagerq.get_default_qat_qconfig("x86"))
    x = layer.inputs(1)[0]
    assert not moves(module, x)
    assert not moves(module.train(), x)
    assert moves(module.update_bn_stats(), x)


def test_functions_for_a_whole_model() -> None:
    names = [str(kind) for kind in WITH_BN]
    model = nn.ModuleDict({name: nn.ModuleList([plain_layer(name).module()]) for name in names})
    model["other"] = nn.BatchNorm2d(3)
    assert model.apply(qat.freeze_bn_stats) is model
    assert [model[name][0].bn.training for name in names] == [False] * len(names)
    assert model["other"].training
    model.train()
    assert [model[name][0].freeze_bn for name in names] == [True] * len(names)
    model.apply(qat.update_bn_stats)
    assert [model[name][0].bn.training for name in names] == [True] * len(names)


@every_bn
def test_statistics_can_be_forgotten(kind: Kind) -> None:
    module = plain_layer(kind).module()
    module.reset_running_stats()
    assert module.bn.running_mean.eq(0).all()
    assert module.bn.running_var.eq(1).all()


@every_bn
def test_batch_norm_can_start_anew(kind: Kind) -> None:
    module = plain_layer(kind).module()
    weight = module.weight.clone()
    with torch.no_grad():
        module.bn.weight.fill_(7.0)
        module.bn.bias.fill_(7.0)
        if module.bias is not None:
            module.bias.fill_(7.0)
    module.reset_bn_parameters()
    assert module.bn.running_var.eq(1).all()
    assert module.bn.bias.eq(0).all()
    assert ((module.bn.weight >= 0) & (module.bn.weight < 1)).all()
    assert module.bias is None or module.bias.abs().max() <= weight[0].numel() ** -0.5
    assert torch.equal(module.weight, weight)


@every_bn
def test_constructor_sets_the_batch_norm(kind: Kind) -> None:
    arguments = {**plain_layer(kind).arguments, "qconfig": eagerq.get_default_qat_qconfig("x86")}
    bn = kind.qat(**arguments, eps=1e-2, momentum=0.7).bn
    assert (bn.eps, bn.momentum) == (1e-2, 0.7)
    bn = kind.qat(**arguments).bn
    assert (bn.eps, bn.momentum) == (1e-5, 0.1)


@pytest.mark.parametrize("kind", [kind for kind in WITH_BN if kind.dim], ids=str)
def test_convolutions_have_no_bias_unless_asked_for(kind: Kind) -> None:
    arguments = {**plain_layer(kind).arguments, "qconfig": eagerq.get_default_qat_qconfig("x86")}
    assert kind.qat(**arguments).bias is None
    assert kind.qat(**arguments, bias=True).bias is not None


# torch.ao divides zero by zero here, and its statistics never recover.
@every_bn
@pytest.mark.parametrize("frozen", [False, True])
def test_a_channel_that_the_batch_norm_silences(kind: Kind, frozen: bool) -> None:
    layer = plain_layer(kind)
    module, plain = layer.module(), nn.Sequential(*layer.parts())
    for bn in (module.bn, plain[1]):
        bn.weight.data[1] = 0
    Phase(frozen=frozen).apply(module)
    plain[1].train(not frozen)
    for x in layer.inputs(2):
        step, expected = run(module, x), run(plain, x)
        assert all(value is None or value.isfinite().all() for value in step.gradients.values())
        assert torch.equal(step.output[:, 1], expected.output[:, 1])  # the shift, and nothing else
        # what is rounded to eight bits in the one is not in the other
        torch.testing.assert_close(module.bn.running_mean, plain[1].running_mean, rtol=0.05, atol=0.05)
        torch.testing.assert_close(module.bn.running_var, plain[1].running_var, rtol=0.05, atol=0.05)
        gradient = step.gradients["bn.weight"]
        assert gradient is not None
        torch.testing.assert_close(gradient[1], plain[1].weight.grad[1], rtol=0.05, atol=0.05)


@every_bn
def test_folding_as_trained_keeps_the_trained_integers(kind: Kind) -> None:
    layer = plain_layer(kind)
    module, x = layer.module(), layer.inputs(1)[0]
    seen: list[Tensor] = []
    module.weight_fake_quant.register_forward_hook(lambda _, args, output: seen.append(args[0].detach()))
    run(module, x)
    Phase(observer=False, training=False).apply(module)
    expected = module(x)
    weight, bias = module.folded(as_trained=True)
    assert torch.equal(weight, seen[-1])
    rounded = module.weight_fake_quant(weight)
    torch.testing.assert_close(module._activated(module._affine(x, rounded, bias)), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weight, module.folded(as_trained=False)[0])
    torch.testing.assert_close(bias, module.folded(as_trained=False)[1])


def test_it_is_the_batch_norm_of_the_model() -> None:
    """Its class, its momentum and whatever hangs on it, not a copy of its numbers."""
    layer = plain_layer("ConvBn2d")
    float_module = layer.float_module(intrinsic, eagerq.get_default_qat_qconfig("x86"))
    calls: list[int] = []
    float_module[1].register_forward_hook(lambda *_: calls.append(1))
    qat.ConvBn2d.from_float(float_module)(layer.inputs(1)[0])
    assert calls == [1]


# --- swapping -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FUSED, ids=str)
def test_hooks_carry_over(kind: Kind) -> None:
    layer = plain_layer(kind)
    float_module = layer.float_module(intrinsic, eagerq.get_default_qat_qconfig("x86"))
    calls: list[str] = []
    float_module.register_forward_pre_hook(lambda module, args: calls.append(f"before {type(module).__name__}"))
    float_module.register_forward_hook(lambda module, args, output: calls.append(f"after {type(module).__name__}"))
    made = eagerq.swap_module(float_module, eagerq.get_default_qat_module_mappings())
    assert type(made) is kind.qat
    made(layer.inputs(1)[0])
    assert calls == [f"before {kind}", f"after {kind}"]


@pytest.mark.parametrize("kind", FUSED, ids=str)
def test_the_parts_are_checked(kind: Kind) -> None:
    fused = getattr(intrinsic, str(kind))
    parts = plain_layer(kind).parts()
    for wrong in (parts[:-1], [*parts, nn.ReLU()], [*reversed(parts)], [nn.ReLU(), *parts[1:]]):
        with pytest.raises(InvalidConfigError, match=f"Incorrect types for input modules of {kind}"):
            fused(*copy.deepcopy(wrong))
    assert list(fused(*parts)) == parts


@pytest.mark.parametrize("dim", [2, 3])
def test_batch_norm_and_relu_alone(dim: int) -> None:
    fused = getattr(intrinsic, f"BNReLU{dim}d")
    bn = getattr(nn, f"BatchNorm{dim}d")(3)
    x = torch.randn(2, 3, *[4] * dim)
    assert torch.equal(fused(bn, nn.ReLU()).eval()(x), bn(x).relu())
    with pytest.raises(InvalidConfigError, match=f"Incorrect types for input modules of BNReLU{dim}d: ReLU"):
        fused(nn.ReLU(), bn)


def test_a_fused_class_of_the_users() -> None:
    class Pair(intrinsic._FusedModule):
        """Any parts will do."""

    pair = Pair(nn.Linear(2, 3), nn.Tanh())
    x = torch.randn(4, 2)
    assert torch.equal(pair(x), pair[0](x).tanh())
