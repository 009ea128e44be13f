"""The modes of exported graphs, as tests of torch's pt2e quantization have them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pt2e.graphs import call, exported
from torch import Tensor, nn
from torch.fx import GraphModule

from eagerq.pt2e import (
    allow_exported_model_train_eval,
    convert_pt2e,
    move_exported_model_to_eval,
    move_exported_model_to_train,
    prepare_qat_pt2e,
)
from eagerq.pt2e.export_utils import model_is_exported
from eagerq.pt2e.quantizer.xnnpack_quantizer import XNNPACKQuantizer

aten: Any = torch.ops.aten


class ConvBNReLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, x: Tensor) -> Any:
        return self.relu(self.bn(self.conv(x)))


def check_dropout(inplace: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = nn.Dropout(0.5, inplace=inplace)

        def forward(self, x: Tensor) -> Any:
            return self.dropout(x.clone())

    x = torch.ones(4, 5)
    model = exported(Model(), x)
    target = aten.dropout_.default if inplace else aten.dropout.default
    assert call(model, target).args[1:] == (0.5, True)
    assert set(model(x).unique().tolist()) == {0.0, 2.0}
    move_exported_model_to_eval(model)
    assert call(model, target).args[1:] == (0.5, False)
    assert torch.equal(model(x), x)
    move_exported_model_to_train(model)
    assert call(model, target).args[1:] == (0.5, True)
    assert set(model(x).unique().tolist()) == {0.0, 2.0}


def test_move_exported_model_dropout() -> None:
    check_dropout(inplace=False)


def test_move_exported_model_dropout_inplace() -> None:
    check_dropout(inplace=True)


def test_move_exported_model_bn(device: torch.device) -> None:
    x = torch.randn(4, 3, 3, 3, device=device)
    eager = nn.Sequential(nn.BatchNorm2d(3)).to(device)
    model = exported(eager, x)
    assert call(model, aten.batch_norm.default).args[5] is True
    torch.testing.assert_close(model(x), eager(x))  # the statistics are the eager model's too: two batches by now
    move_exported_model_to_eval(model)
    assert call(model, aten.batch_norm.default).args[5] is False
    torch.testing.assert_close(model(x), eager.eval()(x))
    move_exported_model_to_train(model)
    assert call(model, aten.batch_norm.default).args[5] is True
    torch.testing.assert_close(model(x), eager.train()(x))


def test_model_is_exported() -> None:
    model = ConvBNReLU()
    assert model_is_exported(exported(model, torch.rand(3, 3, 5, 5)))
    assert not model_is_exported(torch.fx.symbolic_trace(model))
    assert not model_is_exported(model)


def check_refusing(model: GraphModule) -> None:
    with pytest.raises(NotImplementedError):
        model.eval()
    with pytest.raises(NotImplementedError):
        model.train()


def test_disallow_eval_train() -> None:
    eager = ConvBNReLU()
    eager.eval()
    eager.train()
    x = torch.rand(3, 3, 5, 5)
    model = exported(eager, x)
    check_refusing(model)
    model = prepare_qat_pt2e(model, XNNPACKQuantizer())
    check_refusing(model)
    check_refusing(convert_pt2e(model))


def test_allow_exported_model_train_eval(device: torch.device) -> None:
    eager = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5)).to(device)

    def check_switching(model: GraphModule) -> None:
        check_refusing(model)
        allow_exported_model_train_eval(model)
        for training in (False, True):
            model.train() if training else model.eval()
            assert call(model, aten.batch_norm.default).args[5] is training
            assert call(model, aten.dropout.default).args[2] is training

    model = exported(eager, torch.randn(2, 3, 3, 3, device=device))
    check_switching(model)
    model = prepare_qat_pt2e(model, XNNPACKQuantizer())
    check_switching(model)
    check_switching(convert_pt2e(model, fold_quantize=True))
