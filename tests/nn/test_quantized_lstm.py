"""int8 LSTM: torch.ao's integers, files, and what else an int8 module can do."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nn.twins import Between, cross, equal, flat, prepared_pair
from torch import Tensor, nn

import eagerq
from eagerq.errors import CheckpointError, InvalidConfigError, InvalidInputError, UnsupportedError
from eagerq.nn import quantizable, quantized
from eagerq.nn.quantized import QFunctional

# torch.ao's own cat, of the states of two directions or layers
pytestmark = pytest.mark.filterwarnings("ignore:All inputs of this cat operator must share the same quantization")

PTQ = eagerq.QConfig(activation=eagerq.MinMaxObserver, weight=eagerq.default_per_channel_weight_observer)
QAT = eagerq.get_default_qat_qconfig("onednn")

# torch.ao's kernels round the last few elements another way: states of a whole number of 64 have no such
WHOLE = 8

options = st.fixed_dictionaries(
    {
        "input_size": st.integers(1, 20),
        "hidden_size": st.sampled_from((WHOLE, 3 * WHOLE)),
        "num_layers": st.integers(1, 2),
        "bias": st.booleans(),
        "batch_first": st.booleans(),
        "bidirectional": st.booleans(),
    }
)


def data(arguments: dict[str, Any], length: int, batch: int = WHOLE) -> Tensor:
    shape = (batch, length) if arguments.get("batch_first") else (length, batch)
    return torch.randn(*shape, arguments["input_size"])


def to_powers_of_two(model: nn.Module) -> None:
    """Widen what observers have seen so that scales are powers of two, which make ties."""
    for observer in model.modules():
        low, high = getattr(observer, "min_val", None), getattr(observer, "max_val", None)
        if isinstance(low, Tensor) and isinstance(high, Tensor) and low.numel() == 1:
            reach = 2.0 ** torch.maximum(high, -low).clamp(min=1e-6).log2().ceil()
            low.copy_(-reach)
            high.copy_(reach * 127 / 128)


@settings(max_examples=8)
@given(options, st.integers(1, 6), st.booleans(), st.booleans(), st.booleans())
def test_integers_are_those_of_torch_ao(
    ao: Any, arguments: dict[str, Any], length: int, training: bool, powers: bool, with_state: bool
) -> None:
    theirs, ours = prepared_pair(ao, nn.LSTM(**arguments), training, minmax=True)
    for _ in range(2):
        x = data(arguments, length + 2)
        equal(ours(x), theirs(x))
    for model in (theirs.eval(), ours.eval()):
        if powers:
            to_powers_of_two(model)
    theirs, ours = ao.quantization.convert(theirs), eagerq.convert(ours)
    assert type(ours.inner) is quantized.LSTM
    x = data(arguments, length)
    directions = arguments["num_layers"] * (1 + arguments["bidirectional"])
    state = torch.randn(directions, WHOLE, arguments["hidden_size"])
    given_inputs = (x, (state, state)) if with_state else (x,)
    equal(ours(*given_inputs), theirs(*given_inputs))


def converted(training: bool = False, length: int = 5, **changes: Any) -> tuple[nn.LSTM, Any]:
    as_trained = changes.pop("as_trained", False)
    arguments: dict[str, Any] = {"input_size": 6, "hidden_size": WHOLE, **changes}
    lstm = nn.LSTM(**arguments)
    model = Between(copy.deepcopy(lstm), eagerq).train(training)
    model.qconfig = QAT if training else PTQ
    model = (eagerq.prepare_qat if training else eagerq.prepare)(model)
    for _ in range(4):
        model(data(arguments, length))
    return lstm, eagerq.convert(model.eval(), as_trained=as_trained)


FULL: dict[str, Any] = {"num_layers": 2, "bidirectional": True, "batch_first": True}


def test_int8_stays_near_float_over_a_long_sequence() -> None:
    for changes in ({}, FULL):
        lstm, model = converted(**changes, length=25)
        x = torch.randn(WHOLE, 25, 6) if changes else torch.randn(25, WHOLE, 6)
        for got, wanted in zip(flat(model(x)), flat(lstm(x)), strict=True):
            assert (got - wanted).norm() < 0.1 * wanted.norm()


def test_no_part_is_left_in_float() -> None:
    _, model = converted(**FULL)
    assert not list(model.parameters())
    assert not any(hasattr(part, "qconfig") or hasattr(part, "min_val") for part in model.modules())
    cell = model.inner.layers[1].layer_bw.cell
    assert type(cell.igates) is type(cell.hgates) is quantized.Linear
    assert all(type(part) is QFunctional for part in (cell.gates, cell.fgate_cx, cell.igate_cgate, cell.ogate_cy))


def test_split_gates_give_what_the_float_ones_do() -> None:
    lstm = nn.LSTM(6, WHOLE).eval()
    lstm.qconfig = PTQ
    observed = quantizable.LSTM.from_float(lstm, split_gates=True)
    x = torch.randn(5, WHOLE, 6)
    wanted = observed(x)
    int8 = quantized.LSTM.from_observed(observed)
    q = eagerq.quantize_per_tensor(x, 0.03, 128, torch.uint8)
    for got, real in zip(flat(int8(q)), flat(wanted), strict=True):
        assert (got.dequantize() - real).norm() < 0.1 * real.norm()


def test_as_trained_keeps_the_scales_of_training() -> None:
    torch.manual_seed(3)
    _, plain = converted(training=True)
    torch.manual_seed(3)
    _, model = converted(training=True, as_trained=True)
    ours, theirs = (one.inner.layers[0].layer_fw.cell.hgates.weight() for one in (model, plain))
    assert not torch.equal(ours.q_per_channel_scales(), theirs.q_per_channel_scales())
    x = torch.randn(5, WHOLE, 6)
    for a, b in zip(flat(model(x)), flat(plain(x)), strict=True):
        assert (a - b).norm() < 0.05 * b.norm()


def test_by_hand() -> None:
    lstm = nn.LSTM(6, WHOLE).eval()
    lstm.qconfig = PTQ
    observed = quantizable.LSTM.from_float(lstm)
    x = torch.randn(5, 3, 6)
    observed(x)
    int8 = quantized.LSTM.from_observed(observed)
    assert type(observed) is quantizable.LSTM
    assert isinstance(observed.layers[0].layer_fw.cell.igates.activation_post_process, eagerq.MinMaxObserver)
    y, (h, c) = int8(eagerq.quantize_per_tensor(x, 0.03, 128, torch.uint8))
    assert all(isinstance(value, eagerq.QTensor) for value in (y, h, c))
    assert torch.equal(y[-1].int_repr(), h[0].int_repr())


def test_a_cell_alone_starts_from_zeros() -> None:
    _, model = converted()
    cell = model.inner.layers[0].layer_fw.cell
    x = eagerq.quantize_per_tensor(torch.randn(3, 6), 0.03, 128, torch.uint8)
    zeros = eagerq.quantize_per_tensor(torch.zeros(3, WHOLE), 0.5, 7, torch.uint8)
    wanted = cell(x, (zeros, zeros))
    for parameters in ((1.0, 0), (0.25, 100)):
        cell.initial_hidden_state_qparams = cell.initial_cell_state_qparams = parameters
        assert all(torch.equal(a.int_repr(), b.int_repr()) for a, b in zip(cell(x), wanted, strict=True))


def test_files() -> None:
    _, model = converted(**FULL)
    _, other = converted(**FULL)
    x = torch.randn(2, 5, 6)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert all(type(value) is Tensor for value in state.values())
    other.load_state_dict(state)
    equal(other(x), model(x))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        equal(twin(x), model(x))
    _, smaller = converted()
    before = smaller(x.transpose(0, 1))
    with pytest.raises(CheckpointError, match=r"layers\.0\.layer_bw"):
        smaller.load_state_dict(state)
    equal(smaller(x.transpose(0, 1)), before)


def test_files_of_torch_ao(ao: Any) -> None:
    for changes in ({"num_layers": 2, "bidirectional": True}, {"bias": False}):
        lstm = nn.LSTM(6, WHOLE, **changes)
        theirs, _ = prepared_pair(ao, lstm, minmax=True)
        theirs(torch.randn(5, WHOLE, 6))
        theirs = ao.quantization.convert(theirs)
        _, ours = converted(**changes)
        x = torch.randn(5, WHOLE, 6)
        ours.load_state_dict(theirs.state_dict())
        equal(ours(x), theirs(x))


def test_prepared_checkpoints_cross_and_convert_to_the_same(ao: Any) -> None:
    lstm = nn.LSTM(6, WHOLE, 2)
    theirs, ours = prepared_pair(ao, lstm, training=True)
    for seed, model in enumerate((theirs, ours)):  # each has seen data of its own
        torch.manual_seed(seed)
        model(torch.randn(5, WHOLE, 6))
    kept = {name: value.clone() for name, value in theirs.state_dict().items()}
    cross(theirs, ours)
    theirs.load_state_dict(kept)
    x = torch.randn(5, WHOLE, 6)
    equal(eagerq.convert(ours.eval())(x), ao.quantization.convert(theirs.eval())(x))


@pytest.mark.parametrize("training", [False, True])
def test_prepared_and_converted_on_a_device(device: torch.device, training: bool) -> None:
    modules = nn.LSTM(6, WHOLE), nn.MultiheadAttention(6, 2, add_bias_kv=True, add_zero_attn=True)
    for inner in modules:
        model = Between(inner, eagerq).to(device).train(training)
        model.qconfig = QAT if training else PTQ
        model = (eagerq.prepare_qat if training else eagerq.prepare)(model)
        inputs = [torch.randn(5, WHOLE, 6)] * (3 if inner is modules[1] else 1)
        moved = [x.to(device) for x in inputs]
        model(*moved)
        int8 = eagerq.convert(model.eval())
        assert all(value.device == torch.device(device) for value in flat(int8(*moved)))
        for a, b in zip(flat(int8(*moved)), flat(copy.deepcopy(int8).cpu()(*inputs)), strict=True):
            assert (a.cpu() - b).norm() <= 0.01 * b.norm()


def test_refusals() -> None:
    _, model = converted()
    with pytest.raises(InvalidInputError, match=r"'inner' \(eagerq\.nn\.quantized\.LSTM\): expected a quantized"):
        model.inner(torch.randn(5, 2, 6))
    q = eagerq.quantize_per_tensor(torch.randn(5, 2, 6), 0.03, 128, torch.uint8)
    with pytest.raises(InvalidInputError, match=r"hgates' .*expected a quantized"):
        model.inner(q, (torch.zeros(1, 2, WHOLE), torch.zeros(1, 2, WHOLE)))
    with pytest.raises(UnsupportedError, match="of an observed LSTM"):
        quantized.LSTM.from_float(nn.LSTM(3, 4))
    with pytest.raises(AssertionError, match="Expected module type LSTM, got LSTM"):
        quantized.LSTM.from_observed(nn.LSTM(3, 4))  # type: ignore[arg-type]
    bare = quantizable.LSTM(3, 4)
    for part in bare.modules():
        part.qconfig = PTQ
    with pytest.raises(InvalidConfigError, match="no observer"):
        quantized.LSTM.from_observed(bare)


def test_layers_without_data_are_told() -> None:
    model = Between(nn.LSTM(6, WHOLE), eagerq).eval()
    model.qconfig = PTQ
    model = eagerq.prepare(model)
    with pytest.raises(InvalidConfigError, match=r"'inner\.layers\.0\.layer_fw\.cell\.igates'"):
        eagerq.convert(model, strict=True)
    int8 = eagerq.convert(model)
    with pytest.warns(UserWarning, match=r"'inner\.layers\.0\.layer_fw\.cell\.hgates'"):
        int8(torch.randn(5, 2, 6))


def test_compiles_and_exports() -> None:
    _, model = converted(bidirectional=True, length=3)
    x = torch.randn(3, 2, 6)
    wanted = model(x)
    equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), wanted)
    equal(torch.export.export(model, (x,)).module()(x), wanted)
