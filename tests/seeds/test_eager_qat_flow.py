"""Whole models through QAT: prepared, trained, converted, saved and loaded, on every backend's qconfig."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from seeds.common import ENGINES, compiles_and_exports, evaluate, has_no_traces, has_observers, train
from torch import Tensor, nn

import eagerq
from eagerq import FusedMovingAvgObsFakeQuantize, NoopObserver
from eagerq.nn import quantized as nnq

every_engine = pytest.mark.parametrize("engine", ENGINES)


class TwoLinears(nn.Module):
    def __init__(self, engine: str) -> None:
        super().__init__()
        self.qconfig = eagerq.get_default_qat_qconfig(engine)
        self.quant, self.dequant = eagerq.QuantStub(), eagerq.DeQuantStub()
        self.fc1, self.fc2 = nn.Linear(5, 1), nn.Linear(1, 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.dequant(self.fc2(self.fc1(self.quant(x))))
        return y


class ConvLinear(nn.Module):
    def __init__(self, qconfig: eagerq.QConfig) -> None:
        super().__init__()
        self.qconfig = qconfig
        self.quant, self.dequant = eagerq.QuantStub(), eagerq.DeQuantStub()
        self.conv, self.fc1, self.fc2 = nn.Conv2d(3, 1, 3), nn.Linear(64, 10), nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.quant(x)).view(-1, 64).contiguous()
        y: Tensor = self.dequant(self.fc2(self.fc1(x)))
        return y


class Bag(nn.Module):
    """An embedding bag, as one layer or as an embedding and a sum, before a Linear."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.emb = nn.EmbeddingBag(10, 12, mode="sum") if fused else nn.Embedding(10, 12)
        self.emb.qconfig = eagerq.default_embedding_qat_qconfig
        self.quant, self.dequant = eagerq.QuantStub(), eagerq.DeQuantStub()
        self.linear = nn.Linear(12, 1)
        self.qconfig = eagerq.get_default_qat_qconfig("qnnpack")

    def forward(self, indices: Tensor) -> Tensor:
        x = self.emb(indices) if self.fused else self.emb(indices).sum(1)
        y: Tensor = self.dequant(self.linear(self.quant(x)))
        return y


def rows() -> list[tuple[Tensor, Tensor]]:
    return [(torch.rand(20, 5), torch.randint(0, 10, (20,))) for _ in range(2)]


def images() -> list[tuple[Tensor, Tensor]]:
    return [(torch.rand(2, 3, 10, 10), torch.randint(0, 10, (2,))) for _ in range(2)]


def bags() -> list[tuple[Tensor, Tensor]]:
    return [(torch.randint(0, 10, (12, 12)), torch.randn(12, 1)) for _ in range(2)]


def near(int8: nn.Module, prepared: nn.Module, x: Tensor, steps: float = 4.0) -> bool:
    """Whether int8 computes what was trained, give or take a few steps of its output."""
    scale = [module.scale for module in int8.modules() if isinstance(module, nnq.WeightedQuantizedModule)][-1]
    return bool((int8(x) - prepared.eval()(x)).abs().max() <= steps * scale + 1e-6)


@every_engine
def test_manual(engine: str) -> None:
    data = rows()
    prepared = eagerq.prepare_qat(TwoLinears(engine))
    assert has_observers(prepared)
    before = prepared.fc1.weight.clone()
    train(prepared, data)
    assert not torch.equal(prepared.fc1.weight, before)
    in_one_go = eagerq.quantize_qat(TwoLinears(engine), train, [data])
    for model in (eagerq.convert(prepared), in_one_go):
        assert type(model.fc1) is nnq.Linear
        assert type(model.fc2) is nnq.Linear
        assert has_no_traces(model)
        assert all(y.isfinite().all() for y in evaluate(model, [x for x, _ in data]))
        compiles_and_exports(model, data[0][0])
    assert near(eagerq.convert(prepared, as_trained=True), prepared, data[0][0])


@every_engine
def test_eval_only_fake_quant(engine: str) -> None:
    """Fake quantization in evaluation mode estimates what int8 will lose."""
    x = torch.rand(20, 5)
    model = TwoLinears(engine)
    prepared = eagerq.prepare_qat(model)
    assert has_observers(prepared)
    (rounded,) = evaluate(prepared, [x])
    exact = model.eval()(x)
    assert not torch.equal(rounded, exact)
    assert (rounded - exact).abs().max() < 0.05 * exact.abs().max()
    for module in (prepared.quant, prepared.fc1, prepared.fc2):
        module.activation_post_process.disable_fake_quant()
    assert not torch.equal(prepared(x), exact)  # the weights' share
    prepared.apply(eagerq.disable_fake_quant)
    assert torch.equal(prepared(x), exact)


def check_conv_linear(qconfig: eagerq.QConfig) -> Any:
    data = images()
    prepared = eagerq.prepare_qat(ConvLinear(qconfig))
    assert has_observers(prepared)
    train(prepared, data)
    in_one_go = eagerq.quantize_qat(ConvLinear(qconfig), train, [data])
    model: Any = None
    for model in (in_one_go, eagerq.convert(prepared, as_trained=True)):
        assert [type(layer) for layer in (model.conv, model.fc1, model.fc2)] == [nnq.Conv2d, nnq.Linear, nnq.Linear]
        assert has_no_traces(model)
        assert all(y.isfinite().all() for y in evaluate(model, [x for x, _ in data]))
        compiles_and_exports(model, data[0][0])
    assert near(model, prepared, data[0][0])
    return model


@every_engine
def test_conv_linear(engine: str) -> None:
    model = check_conv_linear(eagerq.get_default_qat_qconfig(engine))
    assert model.conv(model.quant(images()[0][0])).dtype is torch.uint8


def test_conv_linear_symm() -> None:
    """Signed activations, and weights whose zero point is 0."""
    model = check_conv_linear(eagerq.default_symmetric_qnnpack_qat_qconfig)
    assert model.conv(model.quant(images()[0][0])).dtype is torch.int8
    for layer in (model.conv, model.fc1, model.fc2):
        assert not layer.state_dict()["weight_zero_point"].any()
        assert layer.weight().int_repr().abs().max() <= 127


def check_bag(fused: bool) -> Any:
    data = bags()
    model = Bag(fused).train()
    prepared = eagerq.prepare_qat(model, mapping=eagerq.get_embedding_qat_module_mappings())
    assert has_observers(prepared)
    train(prepared, data)
    assert prepared.emb.weight_fake_quant.zero_point.dtype is torch.float32
    assert prepared.linear.weight_fake_quant.zero_point.dtype is torch.int32
    converted = eagerq.convert(copy.deepcopy(prepared), mapping=eagerq.get_embedding_static_quant_module_mappings())
    assert type(converted.emb) is (nnq.EmbeddingBag if fused else nnq.Embedding)
    assert type(converted.linear) is nnq.Linear
    assert has_no_traces(converted)
    inputs = data[0][0]
    assert evaluate(converted, [inputs])[0].shape == (12, 1)
    compiles_and_exports(converted, inputs)
    assert near(converted, prepared, inputs)
    return prepared


def test_defused_embedding_bag_linear() -> None:
    prepared = check_bag(fused=False)
    assert type(prepared.linear.activation_post_process) is FusedMovingAvgObsFakeQuantize
    assert type(prepared.emb.activation_post_process) is NoopObserver


def test_embedding_bag_linear() -> None:
    prepared = check_bag(fused=True)
    assert not hasattr(prepared, "activation_post_process")
    assert type(prepared.emb.activation_post_process) is NoopObserver


def test_embedding_qat_qconfig_equal() -> None:
    """A qconfig stays recognisable through prepare, however its factories were written."""
    prepared = eagerq.prepare_qat(Bag(fused=True).train())
    assert eagerq.qconfig_equals(prepared.emb.qconfig, eagerq.default_embedding_qat_qconfig)
    again = eagerq.QConfig(NoopObserver.with_args(dtype=torch.float32), prepared.emb.qconfig.weight.with_args())
    assert eagerq.qconfig_equals(prepared.emb.qconfig, again)
    assert not eagerq.qconfig_equals(prepared.emb.qconfig, prepared.linear.qconfig)


def wrapped(qconfig: eagerq.QConfig) -> Any:
    model = eagerq.QuantWrapper(nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 5)))
    model.qconfig = qconfig
    return model


@every_engine
def test_train_save_load_eval(engine: str) -> None:
    qat, static = eagerq.get_default_qat_qconfig(engine), eagerq.get_default_qconfig(engine)
    model = eagerq.prepare_qat(wrapped(qat).train())
    prepared_keys = set(model.state_dict())
    train(model, [(torch.rand(20, 5), torch.rand(20, 5))])
    model = eagerq.convert(model).eval()
    saved = copy.deepcopy(model.state_dict())
    x = torch.rand(2, 5)
    wanted = model(x)

    again = eagerq.prepare_qat(wrapped(qat).train(), inplace=True)
    assert set(again.state_dict()) == prepared_keys
    again = eagerq.convert(again, inplace=True).eval()
    again.load_state_dict(saved)
    assert torch.equal(again(x), wanted)

    post_training = eagerq.convert(eagerq.prepare(wrapped(static).eval(), inplace=True), inplace=True)
    assert set(post_training.state_dict()) == set(saved)
    post_training.load_state_dict(saved)
    assert torch.equal(post_training(x), wanted)


@every_engine
def test_forward_hooks_preserved(engine: str) -> None:
    counts = {"before": 0, "after": 0}

    def before(module: nn.Module, args: Any) -> None:
        counts["before"] += 1

    def after(module: nn.Module, args: Any, output: Any) -> None:
        counts["after"] += 1

    model: Any = eagerq.QuantWrapper(nn.Sequential(nn.Linear(5, 5)))
    model.module[0].register_forward_pre_hook(before)
    model.module[0].register_forward_hook(after)
    model.qconfig = eagerq.get_default_qat_qconfig(engine)
    model = eagerq.prepare_qat(model)
    layer = model.module[0]
    assert list(layer._forward_pre_hooks.values()) == [before]
    assert len(model.quant._forward_hooks) == 1  # the observer's
    assert len(layer._forward_hooks) == 2
    assert after in layer._forward_hooks.values()
    model(torch.rand(2, 5))
    assert counts == {"before": 1, "after": 1}
    eagerq.convert(model, inplace=True)
    layer = model.module[0]
    assert type(layer) is nnq.Linear
    assert list(layer._forward_pre_hooks.values()) == [before]
    assert list(layer._forward_hooks.values()) == [after]
    assert len(model.quant._forward_hooks) == 0
    model(torch.rand(2, 5))
    assert counts == {"before": 2, "after": 2}


class WithNumber(nn.Module):
    def __init__(self, operation: str, number: float) -> None:
        super().__init__()
        self.quant, self.ff = eagerq.QuantStub(), nnq.FloatFunctional()
        self.operation, self.number = operation, number

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = getattr(self.ff, self.operation)(self.quant(x), self.number)
        return y


def quantized_with_number(operation: str, number: float) -> tuple[Any, Any, Tensor]:
    model = WithNumber(operation, number)
    model.qconfig = eagerq.default_qconfig
    prepared = eagerq.prepare_qat(model)
    x = torch.randn(4, 4)
    prepared(x)
    converted = eagerq.convert(prepared)
    return converted, converted(x), x


def test_add_scalar_uses_input_qparams() -> None:
    model, result, x = quantized_with_number("add_scalar", 1.0)
    assert abs(model.quant.scale - result.q_scale()) < 1e-5
    assert torch.equal(result.int_repr(), model.quant(x).int_repr())
    assert (result.dequantize() - (x + 1)).abs().max() <= model.quant.scale


def test_mul_scalar_uses_input_qparams() -> None:
    model, result, x = quantized_with_number("mul_scalar", 2.0)
    assert abs(2 * model.quant.scale - result.q_scale()) < 1e-5
    assert torch.equal(result.int_repr(), model.quant(x).int_repr())
    assert (result.dequantize() - 2 * x).abs().max() <= model.quant.scale * 1.01
