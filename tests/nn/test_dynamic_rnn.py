"""Dynamic LSTM, GRU and cells: their numbers, beside torch.ao's and in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nn.recurrences import (
    CELLS,
    KINDS,
    QCONFIGS,
    SEQUENCES,
    cells,
    convert,
    convert_as_ao,
    made,
    sequences,
    some_input,
    start_of,
    tensors,
)
from nn.tables import save_and_load
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

import eagerq
from eagerq.nn.quantized import dynamic

qconfigs = pytest.mark.parametrize("qconfig", QCONFIGS)


def assert_equal(got: Any, wanted: Any) -> None:
    assert [one.shape for one in tensors(got)] == [one.shape for one in tensors(wanted)]
    for one, other in zip(tensors(got), tensors(wanted), strict=True):
        assert torch.equal(one, other)


def assert_close(got: Any, wanted: Any, tolerance: float = 1e-6) -> None:
    """Relative to what was wanted, or to 1 where sums cancel out: gates see numbers of that size."""
    assert [one.shape for one in tensors(got)] == [one.shape for one in tensors(wanted)]
    for one, other in zip(tensors(got), tensors(wanted), strict=True):
        assert (one.double() - other.double()).norm() <= tolerance * max(other.double().norm(), other.numel() ** 0.5)


# --- torch.ao's numbers, bit for bit ------------------------------------------------------------


@given(drawn=cells(), qconfig=st.sampled_from(QCONFIGS))
def test_cells(ao: Any, drawn: tuple[nn.Module, Tensor, Any], qconfig: str) -> None:
    layer, x, hx = drawn
    assert_equal(convert(layer, qconfig)(x, hx), convert_as_ao(ao, layer, qconfig)(x, hx))


@given(drawn=sequences(), qconfig=st.sampled_from(QCONFIGS))
def test_sequences(ao: Any, drawn: tuple[nn.Module, Any, Any], qconfig: str) -> None:
    layer, x, hx = drawn
    got, wanted = convert(layer, qconfig)(x, hx), convert_as_ao(ao, layer, qconfig)(x, hx)
    assert_equal(got, wanted)
    assert type(got[1]) is type(wanted[1])
    if isinstance(x, PackedSequence):
        for one, other in zip(got[0], wanted[0], strict=True):
            assert one is other is None or torch.equal(one, other)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("kind", SEQUENCES)
def test_packed_sequences(ao: Any, kind: str, ordered: bool) -> None:
    """Some end together, some go on alone; each has its own state to start from, in both directions."""
    layer = getattr(nn, kind)(6, 8, 2, bidirectional=True)
    lengths = (6, 4, 4, 3, 1) if ordered else (4, 1, 6, 3, 4)
    packed = pack_sequence([torch.randn(length, 6) for length in lengths], enforce_sorted=ordered)
    hx = start_of(layer, len(lengths))
    mine = convert(layer)
    assert_equal(mine(packed, hx), convert_as_ao(ao, layer)(packed, hx))
    assert not torch.equal(tensors(mine(packed, hx))[0], tensors(mine(packed))[0])


@qconfigs
@pytest.mark.parametrize("kind", KINDS)
def test_weights(ao: Any, kind: str, qconfig: str) -> None:
    layer = getattr(nn, kind)(6, 8)
    mine, other = convert(layer, qconfig), convert_as_ao(ao, layer, qconfig)
    wanted = other.get_weight()
    assert list(mine.get_weight()) == list(wanted)
    for name, weight in mine.get_weight().items():
        assert torch.equal(weight.int_repr(), wanted[name].int_repr())
        assert torch.equal(weight.dequantize(), wanted[name].dequantize())
        assert weight.qscheme() == wanted[name].qscheme()
    for name, bias in mine.get_bias().items():
        assert torch.equal(bias, other.get_bias()[name])


@pytest.mark.parametrize("kind", KINDS)
def test_representation(ao: Any, kind: str) -> None:
    options: dict[str, Any] = {"num_layers": 2, "batch_first": True, "dropout": 0.5, "bidirectional": True}
    for chosen in ({}, options if kind in SEQUENCES else {}):
        layer = getattr(nn, kind)(6, 8, **chosen)
        assert repr(convert(layer)) == repr(convert_as_ao(ao, layer))


@pytest.mark.parametrize("kind", SEQUENCES)
def test_dropout_between_layers(ao: Any, kind: str) -> None:
    layer = getattr(nn, kind)(6, 8, 3, dropout=0.5)
    mine, other = convert(layer), convert_as_ao(ao, layer)
    assert not mine.training
    x = some_input(kind)
    still = mine(x)
    mine.train()
    other.train()
    torch.manual_seed(1)
    got = mine(x)
    torch.manual_seed(1)
    assert_equal(got, other(x))
    assert not torch.equal(got[0], still[0])


@given(drawn=st.one_of(cells(), sequences()))
def test_float16(ao: Any, drawn: tuple[nn.Module, Any, Any]) -> None:
    """torch.ao has it with its engine fbgemm only."""
    layer, x, hx = drawn
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm"
    try:
        other = convert_as_ao(ao, layer, "float16_dynamic_qconfig")
        wanted, weights = other(x, hx), other.get_weight()
    finally:
        torch.backends.quantized.engine = before
    mine = convert(layer, "float16_dynamic_qconfig")
    assert_close(mine(x, hx), wanted)
    for name, weight in mine.get_weight().items():
        assert torch.equal(weight, weights[name])


def test_float16_saturates() -> None:
    layer = nn.GRUCell(1, 1)
    with torch.no_grad():
        layer.weight_ih.copy_(torch.tensor([[1e6], [-1e6], [0.1]]))
    weight = convert(layer, "float16_dynamic_qconfig").get_weight()["weight_ih"]
    assert weight.tolist() == [[65504.0], [-65504.0], [torch.tensor(0.1).half().item()]]


def test_zero_points_of_weights() -> None:
    """torch.ao's engine refuses them; float64 tells what is right."""
    torch.manual_seed(0)
    cell = dynamic.GRUCell(6, 8)
    weights = {
        name: eagerq.quantize_per_tensor(torch.randn(24, width), 0.02, 17, torch.int8)
        for name, width in (("weight_ih", 6), ("weight_hh", 8))
    }
    cell.set_weight_bias({"weight": weights, "bias": {"bias_ih": torch.randn(24), "bias_hh": torch.randn(24)}})
    x, hx = torch.randn(3, 6), torch.randn(3, 8)
    assert_close(cell(x, hx), in_float64(cell, x, hx))


# --- the formulas, in float64 ---------------------------------------------------------------------


def product(x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
    """``x`` in 7 bits over its own range (zero included), times the weight, in float64."""
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    scale = (high - low) / 127 or 0.1
    zero_point = round(-low / scale)
    inverse = float(torch.tensor(1 / scale))  # float32 decides what the integers are
    steps = (x * inverse + zero_point).round().clamp(0, 255).double() - zero_point
    y = steps * scale @ weight.dequantize().double().T
    return y if bias is None else y + bias.double()


def in_float64(cell: Any, x: Tensor, hx: Any) -> Any:
    weights, biases = cell.get_weight(), cell.get_bias()
    hidden = hx[0] if isinstance(hx, tuple) else hx
    from_x = product(x, weights["weight_ih"], biases["bias_ih"])
    from_h = product(hidden, weights["weight_hh"], biases["bias_hh"])
    if isinstance(cell, dynamic.RNNCell):
        return torch.tanh(from_x + from_h) if cell.nonlinearity == "tanh" else torch.relu(from_x + from_h)
    if isinstance(cell, dynamic.GRUCell):
        (reset_x, update_x, new_x), (reset_h, update_h, new_h) = from_x.chunk(3, 1), from_h.chunk(3, 1)
        update = torch.sigmoid(update_x + update_h)
        new = torch.tanh(new_x + torch.sigmoid(reset_x + reset_h) * new_h)
        return (1 - update) * new + update * hidden.double()
    i, f, g, o = (from_x + from_h).chunk(4, 1)
    c = torch.sigmoid(f) * hx[1].double() + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


@given(drawn=cells(), bias=st.booleans(), qconfig=st.sampled_from(QCONFIGS))
def test_cells_in_float64(drawn: tuple[Any, Tensor, Any], bias: bool, qconfig: str) -> None:
    layer, x, hx = drawn
    options = {"nonlinearity": layer.nonlinearity} if isinstance(layer, nn.RNNCell) else {}
    cell = convert(type(layer)(layer.input_size, layer.hidden_size, bias, **options), qconfig)
    if hx is None:
        zeros = torch.zeros(len(x), cell.hidden_size)
        hx = (zeros, zeros) if isinstance(layer, nn.LSTMCell) else zeros
    assert_close(cell(x, hx), in_float64(cell, x, hx), 2e-6)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", SEQUENCES)
def test_sequences_in_float64(kind: str, bias: bool) -> None:
    """Step by step, each from the hidden state that the layer itself gave; the input quantized at once."""
    layer = made(kind, bias=bias)
    x = some_input(kind) * torch.tensor([0.1, 3.0, 1.0, 0.5])[:, None, None]
    y, _ = layer(x)
    weights, biases = layer.get_weight(), layer.get_bias()
    from_x = product(x, weights["weight_ih_l0"], biases["bias_ih_l0"])
    hidden = torch.zeros(3, 8)
    cell = torch.zeros(3, 8, dtype=torch.float64)
    for t in range(len(x)):
        from_h = product(hidden, weights["weight_hh_l0"], biases["bias_hh_l0"])
        if kind == "GRU":
            (reset_x, update_x, new_x), (reset_h, update_h, new_h) = from_x[t].chunk(3, 1), from_h.chunk(3, 1)
            update = torch.sigmoid(update_x + update_h)
            new = torch.tanh(new_x + torch.sigmoid(reset_x + reset_h) * new_h)
            wanted = (1 - update) * new + update * hidden.double()
        else:
            i, f, g, o = (from_x[t] + from_h).chunk(4, 1)
            cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
            wanted = torch.sigmoid(o) * torch.tanh(cell)
        assert_close(y[t], wanted, 2e-6)
        hidden = y[t]


# --- what torch.ao lacks ----------------------------------------------------------------------------


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", SEQUENCES)
def test_one_sequence(kind: str, batch_first: bool) -> None:
    layer = made(kind, num_layers=2, bidirectional=True, batch_first=batch_first)
    x = torch.randn(5, 6)
    batch = 0 if batch_first else 1
    y, state = layer(x)
    wanted_y, wanted_state = layer(x.unsqueeze(batch))
    assert_equal((y, state), (wanted_y.squeeze(batch), [part.squeeze(1) for part in tensors(wanted_state)]))
    again = layer(x, state)
    wanted_y, wanted_state = layer(x.unsqueeze(batch), wanted_state)
    assert_equal(again, (wanted_y.squeeze(batch), [part.squeeze(1) for part in tensors(wanted_state)]))


@pytest.mark.parametrize("kind", CELLS)
def test_one_sample(kind: str) -> None:
    cell = made(kind)
    state = cell(torch.randn(6))
    batched = tuple(part[None] for part in tensors(state)) if kind == "LSTMCell" else state[None]
    x = torch.randn(6)
    assert_equal(cell(x, state), [part[0] for part in tensors(cell(x[None], batched))])


@pytest.mark.parametrize("kind", KINDS)
def test_no_samples(kind: str) -> None:
    x = some_input(kind)
    x = x[:0] if kind in CELLS else x[:, :0]
    for one, other in zip(tensors(made(kind)(x)), tensors(getattr(nn, kind)(6, 8)(x)), strict=True):
        assert one.shape == other.shape


# --- a model ------------------------------------------------------------------------------------------


class Speech(nn.Module):
    """Letters from sound: convolutions, a bidirectional LSTM over sequences of unequal lengths, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Sequential(nn.Conv1d(13, 24, 5, stride=2, padding=2), nn.ReLU())
        self.lstm = nn.LSTM(24, 32, 2, batch_first=True, bidirectional=True)
        self.letters = nn.Linear(64, 29)

    def forward(self, sound: Tensor, lengths: Tensor) -> Tensor:
        x = self.front(sound).transpose(1, 2)
        packed = pack_padded_sequence(x, (lengths + 1) // 2, batch_first=True, enforce_sorted=False)
        y, _ = nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        scores: Tensor = self.letters(y).log_softmax(-1)
        return scores


def test_a_speech_model(ao: Any) -> None:
    """Its convolutions stay float; so does the model given."""
    model = Speech().eval()
    sound, lengths = torch.randn(3, 13, 40), torch.tensor([31, 40, 18])
    before = model(sound, lengths)
    layers = {nn.LSTM, nn.Linear}
    mine = eagerq.quantize_dynamic(model, layers)
    other = ao.quantization.quantize_dynamic(copy.deepcopy(model), layers)
    got = mine(sound, lengths)
    assert torch.equal(got, other(sound, lengths))
    assert torch.equal(model(sound, lengths), before)
    assert [type(mine.front[0]), type(mine.lstm), type(mine.letters)] == [nn.Conv1d, dynamic.LSTM, dynamic.Linear]
    assert 0 < (got - before).norm() < 0.02 * before.norm()
    again = eagerq.quantize_dynamic(Speech(), layers)
    again.load_state_dict(save_and_load(mine))
    assert torch.equal(again(sound, lengths), got)
