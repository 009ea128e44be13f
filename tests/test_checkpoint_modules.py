"""Files of torch.ao's, for each kind of int8 layer and each kind of prepared one, with the layer's results."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Oracle
from nn.twins import cross, equal, prepared_pair
from quantize.models import same_state, state
from torch import Tensor, nn

import eagerq
from eagerq.checkpoint import from_torch_ao

IMAGES, CLIPS, SERIES = (2, 6, 5, 5), (2, 6, 3, 4, 4), (4, 2, 6)


def batch_norm(make: Callable[..., Any]) -> Any:
    layer = make(6)
    for value in (layer.weight.data, layer.bias.data, layer.running_mean):
        value.normal_()
    layer.running_var.uniform_(0.5, 2.0)
    return layer


def affine(layer: Any) -> Any:
    layer.weight.data.normal_()
    layer.bias.data.normal_()
    return layer


# name -> (the float module, shape of its input, whether torch.ao saves all that its int8 layer is made of)
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], bool]] = {
    "BatchNorm2d": (lambda: batch_norm(nn.BatchNorm2d), IMAGES, True),
    "BatchNorm3d": (lambda: batch_norm(nn.BatchNorm3d), CLIPS, True),
    "LayerNorm": (lambda: affine(nn.LayerNorm([5, 5])), IMAGES, True),
    "GroupNorm": (lambda: affine(nn.GroupNorm(3, 6)), IMAGES, True),
    "InstanceNorm1d": (lambda: affine(nn.InstanceNorm1d(6, affine=True)), (2, 6, 5), True),
    "InstanceNorm2d": (lambda: affine(nn.InstanceNorm2d(6, affine=True)), IMAGES, True),
    "InstanceNorm3d": (lambda: affine(nn.InstanceNorm3d(6, affine=True)), CLIPS, True),
    "Hardswish": (nn.Hardswish, IMAGES, True),
    "LeakyReLU": (lambda: nn.LeakyReLU(0.2), IMAGES, True),
    "ReLU6": (nn.ReLU6, IMAGES, True),
    "Dropout": (nn.Dropout, IMAGES, True),
    "ELU": (nn.ELU, IMAGES, False),
    "LSTM": (lambda: nn.LSTM(6, 3, num_layers=2, bidirectional=True), SERIES, True),
    "LSTM without biases": (lambda: nn.LSTM(6, 3, bias=False, batch_first=True), SERIES, True),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(6, 2), SERIES, True),
}


NEVER_SAVED = r"lacks parameters that torch\.ao never saves: of 'inner' \(scale, zero_point\)\. They stay"


@functools.cache
def made(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return LAYERS[name][0]()


def inputs(name: str, seed: int) -> tuple[Tensor, ...]:
    x = torch.randn(LAYERS[name][1], generator=torch.Generator().manual_seed(seed)) * (1 + seed)
    return (x, x.flip(0), x + 1) if name == "MultiheadAttention" else (x,)


def pair(ao: Oracle, name: str, seed: int) -> tuple[nn.Module, nn.Module]:
    """The layer prepared by torch.ao and by eagerq, after some data."""
    theirs, ours = prepared_pair(ao, copy.deepcopy(made(name, seed)).eval())
    for model in (theirs, ours):
        model(*inputs(name, seed))
    return theirs, ours


# torch.ao, of the two directions' results
@pytest.mark.filterwarnings("ignore:All inputs of this cat operator:UserWarning")
@pytest.mark.parametrize("name", LAYERS)
def test_layers(ao: Oracle, name: str, tmp_path: Path) -> None:
    source = ao.quantization.convert(pair(ao, name, 1)[0])
    torch.save(source.state_dict(), tmp_path / "theirs.pt")
    values = torch.load(tmp_path / "theirs.pt", weights_only=True)
    for given in (values, from_torch_ao(values)):
        ours = eagerq.convert(pair(ao, name, 1 if not LAYERS[name][2] else 2)[1])
        with contextlib.nullcontext() if LAYERS[name][2] else pytest.warns(UserWarning, match=NEVER_SAVED):
            ours.load_state_dict(given)
        equal(ours(*inputs(name, 3)), source(*inputs(name, 3)))


@pytest.mark.parametrize("name", LAYERS)
def test_prepared_layers(ao: Oracle, name: str) -> None:
    theirs, ours = pair(ao, name, 1)[0], pair(ao, name, 2)[1]
    ours.load_state_dict(theirs.state_dict())
    assert same_state(state(ours), state(theirs))
    cross(*pair(ao, name, 1))


TRAINED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Conv2d and Hardswish": (lambda: nn.Sequential(nn.Conv2d(6, 4, 3), nn.Hardswish()), IMAGES),
    "Conv2d and BatchNorm2d": (
        lambda: nn.Sequential(nn.Conv2d(6, 6, 3), nn.ReLU(), batch_norm(nn.BatchNorm2d)),
        IMAGES,
    ),
    "Linear and LayerNorm": (lambda: nn.Sequential(nn.Linear(6, 6), affine(nn.LayerNorm([6]))), SERIES),
    "LSTM": (lambda: nn.LSTM(6, 3), SERIES),
}


@pytest.mark.parametrize("name", TRAINED)
def test_trained_layers(ao: Oracle, name: str) -> None:
    make, shape = TRAINED[name]
    theirs, ours = prepared_pair(ao, make(), training=True)
    for model in (theirs, ours):
        model(torch.randn(shape))
    cross(theirs, ours)
    source = ao.quantization.convert(theirs.eval())
    ours = eagerq.convert(prepared_pair(ao, make(), training=True)[1].eval())
    ours.load_state_dict(source.state_dict())
    x = torch.randn(shape)
    equal(ours(x), source(x))
