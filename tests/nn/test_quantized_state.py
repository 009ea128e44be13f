"""What int8 layers save, layer by layer: plain tensors, whatever kernel will run them."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from intrinsic.layers import plain_layer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import eagerq
from eagerq import QTensor, intrinsic
from eagerq.errors import CheckpointError
from eagerq.intrinsic import quantized as intrinsic_quantized
from eagerq.kernels import packing
from eagerq.nn import quantized
from eagerq.nn.quantized.base import Output

# torch.distributed.checkpoint, of a single process
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable:UserWarning")

LINEAR = ("Linear", "LinearReLU")
CONVOLUTIONS = tuple(f"Conv{relu}{dim}d" for relu in ("", "ReLU") for dim in (1, 2, 3))
TRANSPOSED = tuple(f"ConvTranspose{dim}d" for dim in (1, 2, 3))
LAYERS = LINEAR + CONVOLUTIONS + TRANSPOSED


def empty(name: str, bias: bool = True) -> Any:
    """A layer as its constructor leaves it."""
    kind = getattr(intrinsic_quantized if "ReLU" in name else quantized, name)
    return kind(4, 6, bias) if name in LINEAR else kind(4, 6, 3, padding=1, bias=bias)


def filled(name: str, seed: int = 0, bias: bool = True, per_channel: bool = True, output: Output | None = None) -> Any:
    generator = torch.Generator().manual_seed(seed)
    layer = empty(name, bias)
    weight = torch.randn(layer.weight().shape, generator=generator)
    if per_channel:
        scales = torch.rand(6, generator=generator) * 0.01 + 0.01
        axis = int(name in TRANSPOSED)
        quantized_weight = eagerq.quantize_per_channel(weight, scales, torch.zeros(6), axis, torch.int8)
    else:
        quantized_weight = eagerq.quantize_per_tensor(weight, 0.02, 0, torch.int8)
    layer.set_weight_bias(quantized_weight, torch.randn(6, generator=generator) if bias else None)
    layer.output = output or Output(0.03125 * (seed + 1), 100 + seed)
    return layer


def given(name: str) -> QTensor:
    shape = (2, 4) if name in LINEAR else (2, 4, *[5] * int(name[-2]))
    real = torch.randn(shape, generator=torch.Generator().manual_seed(9))
    return eagerq.quantize_per_tensor(real, 0.03, 128, torch.uint8)


def assert_same_layer(one: Any, other: Any, name: str) -> None:
    assert one.output == other.output
    first, second = one(given(name)), other(given(name))
    assert torch.equal(first.int_repr(), second.int_repr())
    assert (first.q_scale(), first.q_zero_point()) == (second.q_scale(), second.q_zero_point())


# --- what there is ----------------------------------------------------------------------------------


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str, bias: bool, per_channel: bool) -> None:
    layer = filled(name, bias=bias, per_channel=per_channel)
    state = layer.state_dict()
    count = 6 if per_channel else 1
    wanted = {
        "weight": (torch.int8, tuple(layer.weight().shape)),
        "weight_scale": (torch.float32, (count,)),
        "weight_zero_point": (torch.int32, (count,)),
        "scale": (torch.float32, ()),
        "zero_point": (torch.uint8, ()),
    }
    if bias:
        wanted["bias"] = (torch.float32, (6,))
    assert {key: (value.dtype, tuple(value.shape)) for key, value in state.items()} == wanted
    assert {type(value) for value in state.values()} == {Tensor}
    assert state["scale"] == layer.scale
    assert state["zero_point"] == layer.zero_point


def test_layers_without_a_weight() -> None:
    stub = quantized.Quantize(0.25, 3, torch.int8)
    state = stub.state_dict()
    assert {key: (value.dtype, value.tolist()) for key, value in state.items()} == {
        "scale": (torch.float32, [0.25]),
        "zero_point": (torch.int8, [3]),
    }
    functional = quantized.QFunctional()
    functional.scale, functional.zero_point = 0.5, 7
    state = functional.state_dict()
    assert {key: (value.dtype, value.tolist()) for key, value in state.items()} == {
        "scale": (torch.float32, 0.5),
        "zero_point": (torch.uint8, 7),
    }
    assert not quantized.DeQuantize().state_dict()


@pytest.mark.parametrize(
    "make", [lambda: filled("Conv2d"), lambda: quantized.Quantize(0.25, 3, torch.uint8), quantized.QFunctional]
)
def test_ranges_in_use(make: Any) -> None:
    """Saved where they are not all that the dtype has, and taken back either way."""
    narrow, wide = make(), make()
    narrow.output = narrow.output._replace(low=0, high=127)
    state = narrow.state_dict()
    assert (state["quant_range"].dtype, state["quant_range"].tolist()) == (torch.int32, [0, 127])
    other = make()
    other.load_state_dict(state)
    assert other.output == narrow.output
    other.load_state_dict(wide.state_dict())
    assert other.output == wide.output
    if isinstance(narrow, quantized.Quantize):
        assert int(narrow(torch.tensor([1e3])).int_repr()) == 127


# --- there and back ---------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["torch", "safetensors", "dcp", "copy", "pickle", "deepcopy", "assign"])
@pytest.mark.parametrize("name", LAYERS)
def test_round_trips(name: str, way: str, tmp_path: Path) -> None:
    source, target = filled(name, 1), filled(name, 2)
    target(given(name))  # so that there is something packed to get rid of
    if way == "torch":
        torch.save(source.state_dict(), tmp_path / "layer.pt")
        target.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    elif way == "safetensors":
        save_file(source.state_dict(), tmp_path / "layer.safetensors")
        target.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    elif way == "dcp":
        dcp.save(source.state_dict(), checkpoint_id=tmp_path / "layer")
        state = target.state_dict()
        dcp.load(state, checkpoint_id=tmp_path / "layer")  # writes to the very tensors
        target.load_state_dict(state)
    elif way == "pickle":
        target = pickle.loads(pickle.dumps(source))
    elif way == "deepcopy":
        target = copy.deepcopy(source)
    else:
        target.load_state_dict(source.state_dict(), assign=way == "assign")
    assert_same_layer(target, source, name)
    assert target.state_dict().keys() == source.state_dict().keys()
    shared = target._weight.data_ptr() == source._weight.data_ptr()
    assert shared == (way == "assign")


@pytest.mark.parametrize("name", LAYERS)
def test_built_without_memory(name: str) -> None:
    """On the meta device, then given tensors."""
    source = filled(name, 1, per_channel=False)
    with torch.device("meta"):
        target = empty(name)
    assert target._weight.is_meta
    target.load_state_dict(source.state_dict(), assign=True)
    assert_same_layer(target, source, name)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant, self.joined = (
            eagerq.QuantStub(),
            eagerq.DeQuantStub(),
            quantized.FloatFunctional(),
        )
        self.conv, self.linear = plain_layer("ConvBnReLU2d").parts()[0], nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.quant(x))
        y = self.joined.add_relu(y, y)
        result: Tensor = self.dequant(self.linear(y.mean((2, 3))))
        return result


def test_models_trained_in_a_reduced_range(tmp_path: Path) -> None:
    """A converted model, rebuilt from scratch, through each kind of file."""

    def build(seed: int) -> Any:
        torch.manual_seed(seed)
        net = Net().train()
        net.qconfig = eagerq.get_default_qat_qconfig("x86")
        net = eagerq.prepare_qat(net)
        net(torch.randn(4, 4, 6, 6) * (seed + 1))
        return eagerq.convert(net.eval(), as_trained=True)

    source, x = build(0), torch.randn(8, 4, 6, 6)
    wanted = source(x)
    state = source.state_dict()
    assert {key.rpartition(".")[0] for key in state if key.endswith("quant_range")} == {
        *("quant", "conv", "joined", "linear")
    }
    torch.save(state, tmp_path / "net.pt")
    save_file(state, tmp_path / "net.safetensors")
    dcp.save(state, checkpoint_id=tmp_path / "net")
    files = [torch.load(tmp_path / "net.pt", weights_only=True), load_file(tmp_path / "net.safetensors")]
    files.append(build(3).state_dict())
    dcp.load(files[-1], checkpoint_id=tmp_path / "net")
    for number, values in enumerate(files):
        target = build(number + 1)
        assert not torch.equal(target(x), wanted)
        target.load_state_dict(values)
        assert torch.equal(target(x), wanted), number
    for twin in (copy.deepcopy(source), pickle.loads(pickle.dumps(source))):
        assert torch.equal(twin(x), wanted)


@pytest.mark.parametrize("cast", ["half", "double", "bfloat16"])
@pytest.mark.parametrize("name", LAYERS)
def test_casts_are_for_float_layers(name: str, cast: str) -> None:
    """A model's head may run in half precision; its int8 layers have nothing to cast."""
    source, target = filled(name, 1), filled(name, 1)
    net = nn.Sequential(target, nn.Linear(2, 2))
    getattr(net, cast)()
    assert net[1].weight.dtype is not torch.float32
    assert {key: value.dtype for key, value in target.state_dict().items()} == {
        key: value.dtype for key, value in source.state_dict().items()
    }
    assert_same_layer(target, source, name)
    net.to("meta")
    assert target._weight_scale.is_meta
    assert target._weight_scale.dtype is torch.float32


@pytest.mark.parametrize("name", LAYERS)
def test_default_dtypes_do_not_matter(name: str) -> None:
    source = filled(name, 1, per_channel=False)
    torch.set_default_dtype(torch.float64)
    try:
        target = empty(name)
        target.load_state_dict(source.state_dict())
        assert target._weight_scale.dtype is target._bias.dtype is torch.float32
        assert torch.equal(target(given(name)).int_repr(), source(given(name)).int_repr())
    finally:
        torch.set_default_dtype(torch.float32)


# --- what does not fit ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Linear", "Conv2d"])
def test_other_widths_of_the_same_numbers(name: str) -> None:
    """Files of other programs keep zero points in int64 and scales in float64, with one entry or none."""
    source, target = filled(name, 1), filled(name, 2)
    state = source.state_dict()
    for key in ("weight_scale", "scale"):
        state[key] = state[key].double()
    for key in ("weight_zero_point", "zero_point"):
        state[key] = state[key].long()
    for key in ("scale", "zero_point"):
        state[key] = state[key].reshape(1)
    for assign in (False, True):
        target.load_state_dict(state, assign=assign)
        assert_same_layer(target, source, name)
        assert {key: value.dtype for key, value in target.state_dict().items()} == {
            key: value.dtype for key, value in source.state_dict().items()
        }


@pytest.mark.parametrize("name", ["Linear", "Conv2d"])
@pytest.mark.parametrize("key", ["weight", "weight_scale", "bias", "scale"])
def test_a_layer_alone_takes_all_or_nothing(name: str, key: str) -> None:
    """Without the check that prepare and convert install on a model's root."""
    source, target, before = filled(name, 1), filled(name, 2), filled(name, 2)
    with pytest.raises(RuntimeError, match=rf"\t{key} has shape \(99,\)"):
        target.load_state_dict({**source.state_dict(), key: torch.zeros(99)})
    assert_same_layer(target, before, name)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_alone_is_unchanged_by_wrong_keys(name: str) -> None:
    source, target, before = filled(name, 1).state_dict(), filled(name, 2), filled(name, 2)
    lacking = {key: value for key, value in source.items() if key != "bias"}
    for state in (lacking, {**source, "unknown": torch.zeros(1)}):
        with pytest.raises(RuntimeError, match=r"Missing|Unexpected"):
            target.load_state_dict(state)
        assert_same_layer(target, before, name)


@pytest.mark.parametrize("name", LAYERS)
def test_a_new_layer_takes_scales_of_either_kind(name: str) -> None:
    for per_channel in (True, False):
        source, target = filled(name, 1, per_channel=per_channel), empty(name)
        target.load_state_dict(source.state_dict())
        assert_same_layer(target, source, name)
        assert target.weight().qscheme() == source.weight().qscheme()


@pytest.mark.parametrize("value", [float("nan"), 0.0, -1.0, float("inf")])
@pytest.mark.parametrize("key", ["scale", "weight_scale"])
def test_scales_that_are_none_are_refused(key: str, value: float) -> None:
    target, before = filled("Linear", 2), filled("Linear", 2)
    state = filled("Linear", 1).state_dict()
    with pytest.raises(RuntimeError, match=rf"{key} holds"):
        target.load_state_dict({**state, key: torch.full_like(state[key], value)})
    assert_same_layer(target, before, "Linear")


@pytest.mark.parametrize("name", LAYERS)
def test_layers_made_in_inference_mode_are_packed_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed weights are kept by the count of a tensor's changes, which inference tensors lack."""
    source = filled(name)
    dim = source._weight.dim() - 2
    x = eagerq.quantize_per_tensor(torch.randn(2, 4, *[9] * dim), 0.02, 100, torch.uint8)
    wanted = source(x)
    with torch.inference_mode():
        set_by_hand, loaded = filled(name), empty(name)
        loaded.load_state_dict({key: value.clone() for key, value in source.state_dict().items()})
        assigned = empty(name)
        assigned.load_state_dict({key: value.clone() for key, value in source.state_dict().items()}, assign=True)
        moved = copy.deepcopy(source).to("meta").to_empty(device="cpu")
        moved.load_state_dict(source.state_dict())
        made = []
        plain = packing._make
        monkeypatch.setattr(packing, "_make", lambda *args: made.append(args) or plain(*args))
        for layer in (set_by_hand, loaded, assigned, moved):
            assert not any(value.is_inference() for value in layer.buffers())
            before = len(made)
            for _ in range(3):
                assert torch.equal(layer(x).int_repr(), wanted.int_repr())
            assert len(made) <= before + 1


def test_missing_and_unknown_keys_are_told() -> None:
    state = filled("Linear", 1).state_dict()
    del state["bias"]
    state["unknown"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r"(?s)Missing.*\"bias\".*Unexpected.*\"unknown\""):
        filled("Linear", 2).load_state_dict(state)
    target = filled("Linear", 2)
    outcome = target.load_state_dict({"scale": torch.tensor(7.0), "unknown": torch.zeros(1)}, strict=False)
    assert target.scale == 7.0
    assert torch.equal(target._weight, filled("Linear", 2)._weight)
    assert outcome.unexpected_keys == ["unknown"]
    assert sorted(outcome.missing_keys) == ["bias", "weight", "weight_scale", "weight_zero_point", "zero_point"]


def test_hooks_may_rename_keys() -> None:
    """As for any module: pre-hooks see the file before the layer does."""

    def rename(module: Any, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
        state[f"{prefix}weight"] = state.pop(f"{prefix}kernel")

    source, target = filled("Linear", 1), filled("Linear", 2)
    state = source.state_dict()
    state["kernel"] = state.pop("weight")
    target.register_load_state_dict_pre_hook(rename)
    target.load_state_dict(state)
    assert_same_layer(target, source, "Linear")


def test_nothing_is_taken_by_a_model_that_does_not_fit() -> None:
    net: Any = nn.Sequential(eagerq.QuantStub(), plain_layer("ConvReLU2d").float_module(intrinsic, None)).train()
    del net[1].qconfig
    net.qconfig = eagerq.get_default_qat_qconfig("onednn")
    net = eagerq.prepare_qat(net)
    net(torch.randn(2, 4, 6, 6))
    converted: Any = eagerq.convert(net.eval())
    before = {key: value.clone() for key, value in converted.state_dict().items()}
    other = {key: value + 1 for key, value in before.items()}
    for key in before:
        for wrong in ({**other, key: torch.zeros(99)}, {name: value for name, value in other.items() if name != key}):
            with pytest.raises(CheckpointError, match=key):
                converted.load_state_dict(wrong)
            assert all(torch.equal(value, before[name]) for name, value in converted.state_dict().items())
