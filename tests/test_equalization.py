"""Cross-layer equalization: torch.ao's weights, the same function, and channels without a range."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from conftest import Oracle
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import eagerq
from eagerq import intrinsic
from eagerq.equalization import cross_layer_equalization, equalize
from eagerq.errors import InvalidArgumentError


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 2)
    )


def ranges(weight: torch.Tensor) -> torch.Tensor:
    low, high = torch.aminmax(weight.flatten(1), dim=1)
    return high - low


def test_equals_torch_ao(ao: Oracle) -> None:
    module = importlib.import_module("torch.ao.quantization._equalize")
    ours = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 7), nn.Linear(7, 2))
    theirs = copy.deepcopy(ours)
    equalize(ours, [["0", "1", "2"]])
    module.equalize(theirs, [["0", "1", "2"]])
    for mine, wanted in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5)


@given(st.sampled_from([1, 2, 4]), st.sampled_from([nn.Conv1d, nn.Conv2d, nn.Conv3d]), st.booleans())
def test_the_function_stays_and_ranges_meet(groups: int, conv: Any, bias: bool) -> None:
    first, second = conv(3, 8, 1, bias=bias), conv(8, 8, 1, groups=groups)
    with torch.no_grad():
        first.weight.mul_(torch.logspace(-2, 2, 8).reshape(8, *[1] * (first.weight.dim() - 1)))
    x = torch.randn(2, 3, *[4] * (first.weight.dim() - 2))
    before = second(first(x).relu())
    cross_layer_equalization(first, second)
    after = second(first(x).relu())
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    by_input = second.weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    spread = (ranges(by_input) > 0) & (ranges(first.weight) > 0)
    torch.testing.assert_close(ranges(first.weight)[spread], ranges(by_input)[spread], rtol=1e-4, atol=1e-6)


def test_a_model_by_names_and_by_modules() -> None:
    model = net()
    x = torch.randn(2, 3, 8, 8)
    before = model(x)
    original = copy.deepcopy(model.state_dict())
    parameters = list(model.parameters())
    copied = equalize(model, [[model[0], "2"]], inplace=False)
    assert copied is not model
    assert all(torch.equal(value, original[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(copied(x), before, rtol=1e-4, atol=1e-5)
    assert equalize(model, [["0", "2"]]) is model
    assert all(mine is old for mine, old in zip(model.parameters(), parameters, strict=True))  # optimizers hold them
    torch.testing.assert_close(model[0].weight, copied[0].weight)
    assert not torch.equal(model[0].weight, original["0.weight"])


def test_fused_layers() -> None:
    model = eagerq.fuse_modules(net().eval(), [["0", "1"], ["2", "3"]])
    assert isinstance(model[0], intrinsic.ConvReLU2d)
    x = torch.randn(2, 3, 8, 8)
    before = model(x)
    equalize(model, [["0", "2"]])
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


def test_channels_without_a_range_are_left() -> None:
    """torch.ao divides by zero there."""
    first, second = nn.Linear(4, 3), nn.Linear(3, 2)
    with torch.no_grad():
        first.weight[0] = 0.5
        second.weight[:, 1] = 0.0
    before = first.weight.clone(), second.weight.clone()
    cross_layer_equalization(first, second)
    assert torch.equal(first.weight[:2], before[0][:2])
    assert torch.equal(second.weight[:, :2], before[1][:, :2])
    assert not torch.equal(first.weight[2], before[0][2])
    assert first.weight.isfinite().all()


@pytest.mark.parametrize(
    ("groups", "problem"),
    [
        ([["0"]], "at least two modules"),
        ([["0", "9"]], "module '9' is not in the model"),
        ([["0", "2"], ["2", "3"]], "not supported: ReLU"),
        ([["0", nn.Linear(2, 2)]], "is not in the model"),
        ([["2", "5"]], "gives 4 channels, but the next layer takes 64"),
    ],
)
def test_what_cannot_be_paired_is_refused(groups: list[list[Any]], problem: str) -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InvalidArgumentError, match=problem):
        equalize(model, groups)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
