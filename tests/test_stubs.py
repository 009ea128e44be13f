"""The markers of where a model's int8 part begins and ends."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from conftest import Oracle
from torch import Tensor, nn

import eagerq
from eagerq import DeQuantStub, QTensor, QuantStub, QuantWrapper
from eagerq.errors import InvalidInputError
from eagerq.nn import quantized

QCONFIG = eagerq.get_default_qat_qconfig("onednn")


@pytest.mark.parametrize("stub", [QuantStub, DeQuantStub])
def test_stubs_pass_their_input_on(stub: type[nn.Module]) -> None:
    x = torch.randn(3, requires_grad=True)
    assert stub()(x) is x
    assert not hasattr(stub(), "qconfig")
    assert stub(QCONFIG).qconfig is QCONFIG
    assert not stub().state_dict()


def test_a_stub_learns_the_range_and_then_quantizes() -> None:
    model = nn.Sequential(QuantStub(), DeQuantStub()).train()
    model.qconfig = QCONFIG
    model = eagerq.prepare_qat(model)
    assert hasattr(model[0], "activation_post_process")
    assert not hasattr(model[1], "activation_post_process")
    model(torch.tensor([-1.0, 1.55]))
    int8 = eagerq.convert(model.eval())
    assert (type(int8[0]), type(int8[1])) == (quantized.Quantize, quantized.DeQuantize)
    q = int8[0](torch.tensor([-1.0, 0.0, 0.5, 9.0]))
    assert isinstance(q, QTensor)
    assert q.q_scale() == pytest.approx(0.01, rel=1e-6)
    assert q.int_repr().tolist() == [0, 100, 150, 255]
    assert int8(torch.tensor([0.5])).item() == pytest.approx(0.5)


def test_an_own_qconfig_quantizes_that_input_alone() -> None:
    model = nn.ModuleDict({"eight": QuantStub(QCONFIG), "plain": QuantStub(), "out": DeQuantStub()}).train()
    model = eagerq.prepare_qat(model)
    assert hasattr(model["eight"], "activation_post_process")
    assert not hasattr(model["plain"], "activation_post_process")


def test_a_second_quant_stub_on_the_path_is_one_too_many() -> None:
    model = nn.Sequential(QuantStub(), QuantStub()).train()
    model.qconfig = QCONFIG
    model = eagerq.prepare_qat(model)
    model(torch.randn(4))
    int8 = eagerq.convert(model.eval())
    with pytest.raises(InvalidInputError, match=r"'1' \(eagerq\.nn\.quantized\.Quantize\): .*a second QuantStub"):
        int8(torch.randn(4))


def test_dequantizing_a_float_tensor_passes_it_on() -> None:
    model = nn.Sequential(QuantStub(), DeQuantStub(), DeQuantStub()).train()
    model.qconfig = QCONFIG
    model = eagerq.prepare_qat(model)
    x = torch.randn(4)
    model(x)
    assert eagerq.convert(model.eval())(x).dtype is torch.float32


class Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


@pytest.mark.parametrize("training", [True, False])
def test_wrapper(training: bool) -> None:
    inner = Halves().train(training)
    wrapper = QuantWrapper(inner)
    assert wrapper.module is inner
    assert {module.training for module in wrapper.modules()} == {training}
    assert [name for name, _ in wrapper.named_children()] == ["quant", "dequant", "module"]
    x = torch.randn(3, 4)
    assert torch.equal(wrapper(x), inner(x))
    assert not hasattr(wrapper.quant, "qconfig")


def test_wrapper_hands_the_qconfig_to_its_stubs() -> None:
    inner = Halves()
    inner.qconfig = QCONFIG
    wrapper = QuantWrapper(inner)
    assert wrapper.quant.qconfig is wrapper.dequant.qconfig is QCONFIG
    assert "quant.activation_post_process.scale" in eagerq.prepare_qat(wrapper).state_dict()


def test_wrapper_has_the_keys_of_the_oracles(ao: Oracle) -> None:
    ours, theirs = QuantWrapper(Halves()), ao.quantization.QuantWrapper(Halves())
    ours.qconfig = QCONFIG
    theirs.qconfig = ao.quantization.get_default_qat_qconfig("onednn")
    prepared = eagerq.prepare_qat(ours.train()), ao.quantization.prepare_qat(theirs.train())
    assert list(prepared[0].state_dict()) == list(prepared[1].state_dict())


def test_stubs_and_wrappers_are_copied_and_pickled() -> None:
    wrapper = QuantWrapper(nn.Linear(4, 2))
    x = torch.randn(3, 4)
    for twin in (copy.deepcopy(wrapper), pickle.loads(pickle.dumps(wrapper))):
        assert torch.equal(twin(x), wrapper(x))
