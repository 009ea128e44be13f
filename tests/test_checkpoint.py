"""Converted models' files that torch.ao wrote: what they hold in plain tensors, and that models take them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Oracle
from nn.tables import relative
from quantize.networks import (
    NETWORKS,
    Gated,
    Network,
    Residual,
    Speech,
    completed,
    images,
    prepared,
    prepared_oracle,
    train,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import eagerq
from eagerq import QTensor
from eagerq.checkpoint import from_torch_ao
from eagerq.errors import CheckpointError
from eagerq.intrinsic import quantized as intrinsic_quantized
from eagerq.nn import quantized

ENGINES = tuple(name for name in torch.backends.quantized.supported_engines if name != "none")


def through_a_file(values: Any, path: Path, **options: Any) -> Any:
    torch.save(values, path)
    return torch.load(path, **{"weights_only": True, **options})


# --- whole networks ---------------------------------------------------------------------------------------------


@functools.cache
def their_file(ao: Oracle, kind: type[Network], engine: str) -> dict[str, Any]:
    """What torch.ao saves of a network trained and converted for an engine."""
    torch.backends.quantized.engine = engine
    try:
        source = prepared_oracle(ao, kind, engine)
        train(source, kind)
        return ao.quantization.convert(source.eval(), mapping=completed(ao)[1]).state_dict()
    finally:
        torch.backends.quantized.engine = "onednn"


# QNNPACK cannot save three-dimensional convolutions
CASES = [("onednn", kind) for kind in NETWORKS]
CASES += [(engine, kind) for engine in ENGINES for kind in (Residual, Gated, Speech) if engine != "onednn"]


@pytest.mark.parametrize(("engine", "kind"), CASES, ids=lambda one: getattr(one, "__name__", one))
def test_networks_of_every_engine(ao: Oracle, engine: str, kind: type[Network], tmp_path: Path) -> None:
    values = through_a_file(their_file(ao, kind, engine), tmp_path / "theirs.pt")
    ours = eagerq.convert(prepared(kind, engine=engine, seed=5).eval())
    assert not ours.load_state_dict(values).missing_keys
    reference = ao.quantization.convert(prepared_oracle(ao, kind, engine, seed=6).eval(), mapping=completed(ao)[1])
    reference.load_state_dict(values)
    assert torch.equal(ours(images(kind)), reference(images(kind)))


def test_a_translated_file_is_as_good_as_our_own(ao: Oracle, tmp_path: Path) -> None:
    ours = eagerq.convert(prepared(Residual, seed=5).eval())
    values = their_file(ao, Residual, "onednn")
    ours.load_state_dict(values)
    plain = from_torch_ao(values)
    assert {key: type(value) for key, value in plain.items()} == dict.fromkeys(ours.state_dict(), Tensor)
    save_file(plain, tmp_path / "plain.safetensors")
    for again in (through_a_file(plain, tmp_path / "plain.pt"), load_file(tmp_path / "plain.safetensors")):
        other = eagerq.convert(prepared(Residual, seed=7).eval())
        other.load_state_dict(again)
        assert torch.equal(other(images(Residual)), ours(images(Residual)))


# --- single layers ----------------------------------------------------------------------------------------------

WEIGHTED = ("Linear", "LinearReLU", *(f"Conv{relu}{dim}d" for relu in ("", "ReLU") for dim in (1, 2, 3)))


def arguments(name: str, bias: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if name.startswith("Linear"):
        return (4, 6, bias), {}
    return (4, 6, 3), {"padding": 1, "bias": bias}


def pair(ao: Oracle, name: str, bias: bool) -> tuple[Any, Any]:
    """A layer of ours and one of torch.ao."""
    positional, named = arguments(name, bias)
    homes = (intrinsic_quantized, ao.intrinsic_quantized) if "ReLU" in name else (quantized, ao.quantized)
    ours, theirs = (getattr(home, name)(*positional, **named) for home in homes)
    return ours, theirs


def fill(layer: Any, weight: Tensor, bias: bool) -> None:
    """Give torch.ao's layer a weight and output parameters."""
    layer.set_weight_bias(weight, torch.randn(weight.shape[0]) if bias else None)
    layer.scale, layer.zero_point = 0.0437, 113


def old_weight(shape: tuple[int, ...], scheme: str) -> Tensor:
    """A quantized tensor of torch's own."""
    integers = torch.randint(-128, 128, shape, dtype=torch.int8)
    points = torch.randint(-9, 9, shape[:1]) if scheme.endswith("affine") else torch.zeros(shape[0], dtype=torch.long)
    if scheme.startswith("channel"):
        scales = (torch.rand(shape[0]) * 0.01 + 0.001).double()
        return torch._make_per_channel_quantized_tensor(integers, scales, points, 0)
    return torch._make_per_tensor_quantized_tensor(integers, 0.0073, int(points[0]))


def given(name: str) -> QTensor:
    shape = (5, 4) if name.startswith("Linear") else (2, 4, *[7] * int(name[-2]))
    return eagerq.quantize_per_tensor(torch.randn(shape), 0.03, 121, torch.uint8)


def as_old(x: QTensor) -> Tensor:
    return torch._make_per_tensor_quantized_tensor(x.integers, x.scale, x.zero_point)


def assert_same(ours: Any, theirs: Any, x: QTensor, ties: bool = False) -> None:
    got, wanted = ours(x), theirs(as_old(x))
    steps = (got.int_repr().int() - wanted.int_repr().int()).abs()
    assert int(steps.max()) <= ties > 0 or not steps.any()
    assert float((steps > 0).float().mean()) < 0.001
    assert (got.q_scale(), got.q_zero_point()) == (pytest.approx(wanted.q_scale(), rel=1e-7), wanted.q_zero_point())


@pytest.mark.parametrize("scheme", ["tensor", "channel", "tensor affine", "channel affine"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", WEIGHTED)
def test_layers(ao: Oracle, name: str, bias: bool, scheme: str, tmp_path: Path) -> None:
    ours, theirs = pair(ao, name, bias)
    engine = "fbgemm" if scheme.endswith("affine") else "onednn"  # onednn takes zero points of 0 only
    torch.backends.quantized.engine = engine
    try:
        theirs = pair(ao, name, bias)[1]
        weight = old_weight(tuple(ours.weight().shape), scheme)
        fill(theirs, weight, bias)
        ours.load_state_dict(through_a_file(theirs.state_dict(), tmp_path / "layer.pt"))
        assert torch.equal(ours.weight().int_repr(), weight.int_repr())
        assert torch.equal(ours.weight().dequantize(), weight.dequantize())
        assert (ours.scale, ours.zero_point) == (pytest.approx(0.0437, rel=1e-7), 113)
        # fbgemm rounds before it adds the zero point
        assert_same(ours, theirs, given(name), ties=engine == "fbgemm")
    finally:
        torch.backends.quantized.engine = "onednn"


@pytest.mark.parametrize("version", [1, 2, 3, None])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ["Linear", "LinearReLU"])
def test_old_formats_of_linear(ao: Oracle, name: str, bias: bool, version: int | None) -> None:
    ours, source = pair(ao, name, bias)
    fill(source, old_weight((6, 4), "channel"), bias)
    weight, offset = source.weight(), source.bias()
    state: Any = torch.nn.Module().state_dict()
    state.update(scale=torch.tensor(source.scale), zero_point=torch.tensor(source.zero_point))
    if version is None or version == 1:
        state.update(weight=weight, bias=offset)
    elif version == 2:
        state.update({"_packed_params.weight": weight, "_packed_params.bias": offset})
        state["_packed_params.dtype"] = torch.qint8
    else:
        state = source.state_dict()
    state._metadata = {path: {"version": version} for path in ("", "_packed_params")} if version else {}

    ours.load_state_dict(state)
    theirs = pair(ao, name, bias)[1]
    theirs.load_state_dict(state)
    assert_same(ours, theirs, given(name))


@pytest.mark.parametrize("name", ["Embedding", "EmbeddingBag"])
def test_tables(ao: Oracle, name: str, tmp_path: Path) -> None:
    ours, theirs = getattr(quantized, name)(12, 8), getattr(ao.quantized, name)(12, 8)
    rows = torch.randint(0, 256, (12, 8), dtype=torch.uint8)
    table = torch._make_per_channel_quantized_tensor(rows, torch.rand(12) + 0.01, torch.rand(12) * 300 - 20, 0)
    theirs.set_weight(table)
    ours.load_state_dict(through_a_file(theirs.state_dict(), tmp_path / "table.pt"))
    indices = (
        (torch.tensor([3, 0, 11, 3]),) if name == "Embedding" else (torch.tensor([3, 0, 11]), torch.tensor([0, 2]))
    )
    assert relative(ours(*indices), theirs(*indices)) < 1e-6
    assert torch.equal(ours.weight().int_repr(), theirs.weight().int_repr())
    assert torch.equal(ours.weight().q_per_channel_zero_points(), theirs.weight().q_per_channel_zero_points().float())


def test_layers_without_a_weight(ao: Oracle, tmp_path: Path) -> None:
    ours, theirs = nn.Module(), nn.Module()
    for target, home, dtype in ((ours, quantized, torch.uint8), (theirs, ao.quantized, torch.quint8)):
        target.quant, target.joined = home.Quantize(1.0, 0, dtype), home.QFunctional()
    theirs.quant.scale.fill_(0.037)
    theirs.quant.zero_point.fill_(119)
    theirs.joined.scale, theirs.joined.zero_point = 0.061, 77
    ours.load_state_dict(through_a_file(theirs.state_dict(), tmp_path / "layers.pt"))
    real = torch.randn(4, 5)
    x, y = ours.quant(real), theirs.quant(real)
    assert torch.equal(x.int_repr(), y.int_repr())
    assert torch.equal(ours.joined.add(x, x).int_repr(), theirs.joined.add(y, y).int_repr())


@pytest.mark.parametrize("inside", [False, True])
def test_layers_without_the_check_of_a_root(ao: Oracle, inside: bool) -> None:
    """A layer alone, or in a model that neither prepare nor convert has made."""
    ours, theirs = pair(ao, "Linear", True)
    fill(theirs, old_weight((6, 4), "channel"), True)
    if inside:
        nn.Sequential(nn.Identity(), ours).load_state_dict(nn.Sequential(nn.Identity(), theirs).state_dict())
    else:
        ours.load_state_dict(theirs.state_dict())
    assert_same(ours, theirs, given("Linear"))


@pytest.mark.parametrize("mine", ["tensor", "channel"])
@pytest.mark.parametrize("theirs_are", ["tensor", "channel"])
@pytest.mark.parametrize("assign", [False, True])
def test_a_file_may_share_scales_otherwise(ao: Oracle, mine: str, theirs_are: str, assign: bool) -> None:
    """As in torch.ao, where the weight comes with its scheme."""
    ours, theirs = pair(ao, "Conv2d", True)
    source = old_weight((6, 4, 3, 3), mine)
    ours.load_state_dict(from_torch_ao({"weight": source}), strict=False)
    fill(theirs, old_weight((6, 4, 3, 3), theirs_are), True)
    ours.load_state_dict(theirs.state_dict(), assign=assign)
    assert_same(ours, theirs, given("Conv2d"))
    assert ours.weight().qscheme() == theirs.weight().qscheme()


# --- translated by hand -------------------------------------------------------------------------------------------


def test_the_translation_leaves_its_argument_alone(ao: Oracle) -> None:
    theirs = nn.Sequential(pair(ao, "Linear", True)[1], pair(ao, "Conv2d", False)[1])
    state = theirs.state_dict()
    before = dict(state)
    plain: Any = from_torch_ao(state)
    assert dict(state) == before or state.keys() == before.keys()
    assert all(state[key] is value for key, value in before.items())
    assert plain._metadata == state._metadata
    assert {key: (value.dtype, tuple(value.shape)) for key, value in plain.items()} == {
        "0.weight": (torch.int8, (6, 4)),
        "0.weight_scale": (torch.float32, (1,)),
        "0.weight_zero_point": (torch.int32, (1,)),
        "0.bias": (torch.float32, (6,)),
        "0.scale": (torch.float32, ()),
        "0.zero_point": (torch.int64, ()),
        "1.weight": (torch.int8, (6, 4, 3, 3)),
        "1.weight_scale": (torch.float32, (1,)),
        "1.weight_zero_point": (torch.int32, (1,)),
        "1.scale": (torch.float32, ()),
        "1.zero_point": (torch.int64, ()),
    }


def test_plain_states_come_back_the_same() -> None:
    for make in (prepared, lambda kind: eagerq.convert(prepared(kind).eval())):
        state = make(NETWORKS[0]).state_dict()
        plain = from_torch_ao(state)
        assert list(plain) == list(state)
        assert all(plain[key] is state[key] for key in state)


def test_scales_of_another_axis_are_refused(ao: Oracle) -> None:
    weight = torch._make_per_channel_quantized_tensor(
        torch.zeros(6, 4, dtype=torch.int8), torch.ones(4), torch.zeros(4, dtype=torch.long), 1
    )
    with pytest.raises(CheckpointError, match=r"fc\.weight has a scale for each index of axis 1"):
        from_torch_ao({"fc._packed_params._packed_params": (weight, None)})
