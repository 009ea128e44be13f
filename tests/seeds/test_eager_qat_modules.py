"""QAT modules on their own: Linear with batch norm, precomputed ranges, what embeddings refuse."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from seeds.common import ENGINES
from torch import nn

import eagerq
from eagerq.intrinsic import qat as intrinsic_qat
from eagerq.nn import qat
from eagerq.nn import quantized as nnq

every_engine = pytest.mark.parametrize("engine", ENGINES)


def linear_bn(qconfig: eagerq.QConfig) -> tuple[nn.Module, Any]:
    """A Linear and a batch norm apart, and the two fused for QAT with the same numbers."""
    apart = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with torch.no_grad():
        for value in (apart[1].weight, apart[1].bias):
            value.uniform_(0.5, 2.0)
    fused: Any = eagerq.fuse_modules_qat(copy.deepcopy(apart), ["0", "1"])
    fused[0].qconfig = qconfig
    return apart, intrinsic_qat.LinearBn1d.from_float(fused[0])


def check_linear_bn(qconfig: eagerq.QConfig) -> None:
    """With rounding off, the fused module is the two apart: forward, backward, statistics, train and eval."""
    apart, fused = linear_bn(qconfig)
    fused.apply(eagerq.disable_fake_quant)
    for training in (True, True, False):
        apart.train(training), fused.train(training)
        x = torch.randn(6, 4)
        inputs = x.clone().requires_grad_(), x.clone().requires_grad_()
        outputs = apart(inputs[0]), fused(inputs[1])
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-6)
        upstream = torch.randn(6, 4)
        for one, y in zip((apart, fused), outputs, strict=True):
            one.zero_grad()
            y.backward(upstream)
        torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-4, atol=1e-5)
        pairs = [(fused.weight, apart[0].weight), (fused.bn.weight, apart[1].weight), (fused.bn.bias, apart[1].bias)]
        for mine, wanted in pairs:
            torch.testing.assert_close(mine.grad, wanted.grad, rtol=1e-4, atol=1e-5)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            torch.testing.assert_close(getattr(fused.bn, name), getattr(apart[1], name), rtol=1e-5, atol=1e-6)


@every_engine
def test_linear_bn_numerics(engine: str) -> None:
    check_linear_bn(eagerq.get_default_qat_qconfig(engine))


def test_linear_bn_symm_numerics() -> None:
    check_linear_bn(eagerq.default_symmetric_qnnpack_qat_qconfig)


@every_engine
def test_linear_bn_workflow(engine: str) -> None:
    model: Any = nn.Sequential(eagerq.QuantStub(), nn.Linear(4, 4), nn.BatchNorm1d(4))
    model.qconfig = eagerq.get_default_qat_qconfig(engine)
    model = eagerq.fuse_modules_qat(model, ["1", "2"])
    prepared = eagerq.prepare_qat(model)
    x = torch.randn(4, 4)
    prepared(x)
    converted: Any = eagerq.convert(prepared)
    assert type(converted[1]) is nnq.Linear
    assert type(converted[2]) is nn.Identity
    step = converted[1].scale
    assert (converted(x).dequantize() - prepared.eval()(x)).abs().max() <= 3 * step


def test_linear_precomputed_fake_quant() -> None:
    """A range that is already known is kept, instead of the weight's own."""
    layer: Any = nn.Linear(4, 4)
    layer.qconfig = eagerq.default_qconfig
    layer.activation_post_process = layer.qconfig.activation()
    layer.activation_post_process(torch.randn(4, 4))
    own = nnq.Linear.from_float(copy.deepcopy(layer))
    known = layer.qconfig.weight()
    known.min_val, known.max_val = torch.tensor(-1.0), torch.tensor(1.0)
    layer.weight_post_process = known
    precomputed = nnq.Linear.from_float(layer, use_precomputed_fake_quant=True)
    assert precomputed.weight().q_scale() == pytest.approx(2 / 255)
    assert own.weight().q_scale() == pytest.approx(2 * layer.weight.abs().max().item() / 255, rel=1e-5)
    assert precomputed.weight().q_scale() != own.weight().q_scale()
    ignored = nnq.Linear.from_float(layer)
    assert ignored.weight().q_scale() == own.weight().q_scale()


WRONG_SCHEME = "Embedding Bag weights requires a qscheme of torch.per_channel_affine_float_qparams"


@every_engine
def test_qat_embedding_bag_errors(engine: str) -> None:
    qconfig = eagerq.get_default_qat_qconfig(engine)
    with pytest.raises(AssertionError, match="qconfig must be provided for QAT module"):
        qat.EmbeddingBag(10, 5, qconfig=None)
    with pytest.raises(AssertionError, match=WRONG_SCHEME):
        qat.EmbeddingBag(10, 5, qconfig=qconfig)
    with pytest.raises(AssertionError, match=r"qat\.EmbeddingBag\.from_float only works for EmbeddingBag"):
        qat.EmbeddingBag.from_float(nn.Embedding(10, 5))
    bag: Any = nn.EmbeddingBag(10, 5)
    with pytest.raises(AssertionError, match="Input float module must have qconfig defined"):
        qat.EmbeddingBag.from_float(bag)
    bag.qconfig = None
    with pytest.raises(AssertionError, match="Input float module must have a valid qconfig"):
        qat.EmbeddingBag.from_float(bag)
    bag.qconfig = qconfig
    with pytest.raises(AssertionError, match=WRONG_SCHEME):
        qat.EmbeddingBag.from_float(bag)
