"""Which activations prepare, prepare_qat and convert observe and swap: those that torch.ao's do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import Oracle
from torch import Tensor, nn

import eagerq
from eagerq import FixedQParamsFakeQuantize
from eagerq.errors import InvalidConfigError

WITH_A_RANGE = ("elu", "hardswish", "leaky_relu", "relu6")
FIXED = ("hardsigmoid", "sigmoid", "tanh")


class Net(nn.Module):
    """Every activation that one library or the other knows; softmax apart, which torch.ao cannot run."""

    def __init__(self, library: Any) -> None:
        super().__init__()
        self.quant, self.dequant = library.QuantStub(), library.DeQuantStub()
        self.elu, self.hardswish, self.leaky_relu = nn.ELU(), nn.Hardswish(inplace=True), nn.LeakyReLU()
        self.relu6, self.relu, self.dropout = nn.ReLU6(inplace=True), nn.ReLU(), nn.Dropout(0.0)
        self.hardsigmoid, self.sigmoid, self.tanh = nn.Hardsigmoid(), nn.Sigmoid(), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.quant(x))
        for name in (*WITH_A_RANGE, "relu", *FIXED):
            x = getattr(self, name)(x)
        return self.dequant(x)  # type: ignore[no-any-return]


def net(library: Any, training: bool) -> Any:
    model: Any = Net(library).train(training)
    model.qconfig = library.get_default_qat_qconfig("onednn") if training else library.get_default_qconfig("onednn")
    return model


def batch() -> Tensor:
    return torch.randn(4, 16, generator=torch.Generator().manual_seed(0)) * 3


def observers(model: nn.Module) -> dict[str, str]:
    found = {name: getattr(module, "activation_post_process", None) for name, module in model.named_children()}
    return {name: type(observer).__name__ for name, observer in found.items() if observer is not None}


@pytest.mark.parametrize(("prepare", "training"), [("prepare_qat", True), ("prepare", False), ("prepare", True)])
def test_observed_and_swapped_as_in_torch_ao(prepare: str, training: bool, ao: Oracle) -> None:
    ours, theirs = (
        getattr(library, prepare)(net(library, training), inplace=True) for library in (eagerq, ao.quantization)
    )
    assert observers(ours) == observers(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for model in (ours, theirs):
        model(batch())
    ours, theirs = eagerq.convert(ours.eval(), strict=True), ao.quantization.convert(theirs.eval())
    kinds = [{name: type(child).__name__ for name, child in model.named_children()} for model in (ours, theirs)]
    assert kinds[0] == kinds[1]
    assert torch.equal(ours(batch()), theirs(batch()))


@pytest.mark.parametrize("mode", [True, False])
def test_fixed_ranges_are_for_training_only(mode: bool) -> None:
    model = eagerq.prepare_qat(net(eagerq, True)) if mode else eagerq.prepare(net(eagerq, False))
    fixed = {name for name, kind in observers(model).items() if kind == FixedQParamsFakeQuantize.__name__}
    assert fixed == (set(FIXED) if mode else set())
    assert not {"relu", "dropout", "dequant"} & set(observers(model))


def test_fixed_ranges_need_a_qconfig() -> None:
    model = net(eagerq, True)
    model.tanh.qconfig = None
    assert "tanh" not in observers(eagerq.prepare_qat(model))


@pytest.mark.parametrize("qconfig", ["onednn", "fbgemm"])
def test_softmax_runs_on_integers_as_it_was_trained(qconfig: str) -> None:
    model = eagerq.QuantWrapper(nn.Softmax(1)).train()
    model.qconfig = eagerq.get_default_qat_qconfig(qconfig)
    model = eagerq.prepare_qat(model)
    model(batch())
    model.apply(eagerq.disable_observer).eval()
    wanted = model(batch())
    converted = eagerq.convert(model, as_trained=True)
    assert type(converted.module) is nn.Softmax
    assert (converted(batch()) - wanted).abs().max() <= 1 / 256
    assert (converted(batch()) == wanted).float().mean() > 0.99


def test_prepared_but_without_anything_to_observe_is_converted() -> None:
    model = nn.Sequential(nn.ReLU())
    model.qconfig = eagerq.default_qconfig  # type: ignore[assignment]
    with pytest.raises(InvalidConfigError, match="not prepared"):
        eagerq.convert(model)
    assert type(eagerq.convert(eagerq.prepare(model))[0]) is nn.ReLU  # type: ignore[index]
