"""Files of torch.ao's dynamic layers, recurrent ones among them, whose packed parameters are script objects."""

from __future__ import annotations

import functools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Oracle
from nn.twins import close, equal
from quantize.models import same_state, state
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import eagerq
from eagerq.checkpoint import from_torch_ao
from eagerq.errors import CheckpointError
from eagerq.nn.quantized import dynamic

SERIES = torch.randn(5, 3, 6, generator=torch.Generator().manual_seed(0))
LAYERS: dict[str, Any] = {
    "Linear": lambda: nn.Linear(6, 4),
    "LSTM": lambda: nn.LSTM(6, 6),
    "LSTM of two layers": lambda: nn.LSTM(6, 6, 2),
    "LSTM of two directions": lambda: nn.LSTM(6, 6, bidirectional=True),
    "LSTM of both": lambda: nn.LSTM(6, 4, 2, bidirectional=True),
    "GRU": lambda: nn.GRU(6, 5, 2),
    "LSTMCell": lambda: nn.LSTMCell(6, 4),
    "GRUCell": lambda: nn.GRUCell(6, 4),
    "RNNCell": lambda: nn.RNNCell(6, 4, nonlinearity="relu"),
}
QCONFIGS = {
    "int8": "default_dynamic_qconfig",
    "channels": "per_channel_dynamic_qconfig",
    "half": "float16_dynamic_qconfig",
}


def made(package: Any, name: str, kind: str, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(LAYERS[name]())
    spec = {type(model[0]): getattr(package, QCONFIGS[kind])}
    result: nn.Sequential = package.quantize_dynamic(model, spec)
    return result


def run(model: nn.Module, name: str) -> Any:
    return model(SERIES[0] if "Cell" in name else SERIES)


@pytest.fixture
def engine() -> Any:
    """Half precision needs another engine than the oracle's."""

    def use(kind: str) -> None:
        torch.backends.quantized.engine = "fbgemm" if kind == "half" else "onednn"

    yield use
    torch.backends.quantized.engine = "onednn"


@pytest.mark.parametrize("kind", QCONFIGS)
@pytest.mark.parametrize("name", LAYERS)
def test_layers(ao: Oracle, engine: Any, name: str, kind: str, tmp_path: Path) -> None:
    engine(kind)
    theirs = made(ao.quantization, name, kind)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pt")
    values = torch.load(tmp_path / "theirs.pt", weights_only=False)
    ours = made(eagerq, name, kind, seed=1)
    ours.load_state_dict(values)
    agree = close if kind == "half" else equal  # fbgemm multiplies halves in another order
    agree(run(ours, name), run(theirs, name))
    assert {type(value) for value in ours.state_dict().values()} == {Tensor}
    # translated once, and versions lost
    save_file(from_torch_ao(values), tmp_path / "plain.safetensors")
    other = made(eagerq, name, kind, seed=2)
    other.load_state_dict(load_file(tmp_path / "plain.safetensors"))
    equal(run(other, name), run(ours, name))
    assert same_state(state(other), state(ours))


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "Linear"])
def test_script_objects_are_read_by_choice_only(ao: Oracle, name: str, tmp_path: Path) -> None:
    torch.save(made(ao.quantization, name, "int8").state_dict(), tmp_path / "theirs.pt")
    with pytest.raises(pickle.UnpicklingError, match=r"[Ww]eights only"):
        torch.load(tmp_path / "theirs.pt", weights_only=True)


@pytest.mark.parametrize("name", ["LSTM", "LSTM of both", "GRU"])
def test_inputs_of_the_full_range(ao: Oracle, name: str) -> None:
    """As the first format had it; it is told by the packed parameters themselves."""
    theirs = made(ao.quantization, name, "int8")
    for part in theirs[0]._all_weight_values:
        _, (bias_ih, bias_hh), _, _, (ih, hh) = part.param.__getstate__()[0]
        part.param = torch.ops.quantized.make_quantized_cell_params_dynamic(ih, hh, bias_ih, bias_hh)
    reduced = made(eagerq, name, "int8")
    ours = made(eagerq, name, "int8", seed=1)
    ours.load_state_dict(theirs.state_dict())
    equal(run(ours, name), run(theirs, name))
    assert not torch.equal(run(ours, name)[0], run(reduced, name)[0])
    again = made(eagerq, name, "int8", seed=1)
    again.load_state_dict(ours.state_dict())
    equal(run(again, name), run(ours, name))


def test_scales_may_be_shared_otherwise(ao: Oracle) -> None:
    for mine, kind in (("int8", "channels"), ("channels", "int8")):
        theirs, ours = made(ao.quantization, "LSTM", kind), made(eagerq, "LSTM", mine, seed=1)
        ours.load_state_dict(theirs.state_dict())
        equal(run(ours, "LSTM"), run(theirs, "LSTM"))


def test_what_does_not_fit_is_refused(ao: Oracle) -> None:
    files = {name: made(ao.quantization, name, "int8").state_dict() for name in LAYERS}
    target = made(eagerq, "LSTM of two layers", "int8", seed=1)
    before = state(target)
    for name, match in (
        ("LSTM", r"it lacks 0\.weight_ih_l1"),
        ("LSTM of both", r"it has 0\._all_weight_values\.2\.weight_ih.* besides"),
        ("GRU", r"weight_ih_l0 has shape \(15, 6\), the model's \(24, 6\)"),
        ("LSTMCell", "it lacks "),
        ("Linear", "it lacks "),
    ):
        with pytest.raises(CheckpointError, match=match):
            target.load_state_dict(files[name])
        assert same_state(state(target), before)


@functools.cache
def half_file(ao: Oracle, name: str) -> dict[str, Any]:
    torch.backends.quantized.engine = "fbgemm"
    try:
        return made(ao.quantization, name, "half").state_dict()
    finally:
        torch.backends.quantized.engine = "onednn"


@pytest.mark.parametrize("name", ["Linear", "LSTM", "GRUCell"])
def test_weights_of_another_width_are_refused(ao: Oracle, name: str) -> None:
    for kind, values in (("int8", half_file(ao, name)), ("half", made(ao.quantization, name, "int8").state_dict())):
        target = made(eagerq, name, kind, seed=1)
        before = state(target)
        with pytest.raises(CheckpointError, match=r"weight\w*_scale|is of torch"):
            target.load_state_dict(values)
        assert same_state(state(target), before)


@pytest.mark.filterwarnings("ignore:The current implementation of the DynamicQuantizedConv:UserWarning")
@pytest.mark.parametrize("name", [f"Conv{transposed}{dim}d" for transposed in ("", "Transpose") for dim in (1, 2, 3)])
def test_convolutions(ao: Oracle, name: str) -> None:
    """What they hold; torch.ao cuts their results to the range of the input, ours do not."""
    theirs, ours = (getattr(package, name)(4, 6, 3) for package in (ao.dynamic, dynamic))
    shape = theirs.weight().shape
    weight = torch._make_per_tensor_quantized_tensor(torch.randint(-128, 128, shape, dtype=torch.int8), 0.01, 0)
    theirs.set_weight_bias(weight, torch.randn(6))
    state = theirs.state_dict()
    assert {"scale", "zero_point"} <= state.keys()
    ours.load_state_dict(state)
    assert ours.reduce_range
    assert torch.equal(ours.weight().int_repr(), weight.int_repr())
    assert torch.equal(ours.weight().dequantize(), weight.dequantize())
    assert torch.equal(ours.bias(), theirs.bias())
