"""LSTM made of quantizable parts: against nn.LSTM in float, and against torch.ao's when prepared."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nn.twins import close, cross, equal, prepared_pair
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import eagerq
from eagerq.errors import InvalidArgumentError, InvalidConfigError, InvalidInputError, UnsupportedError
from eagerq.nn import quantizable
from eagerq.nn.qat import Linear as TrainedLinear

PTQ = eagerq.get_default_qconfig("onednn")

options = st.fixed_dictionaries(
    {
        "input_size": st.integers(1, 9),
        "hidden_size": st.integers(1, 9),
        "num_layers": st.integers(1, 3),
        "bias": st.booleans(),
        "batch_first": st.booleans(),
        "bidirectional": st.booleans(),
    }
)


def state_of(lstm: Any, batch: int) -> Any:
    shape = (lstm.num_layers * (1 + lstm.bidirectional), batch, lstm.hidden_size)
    return torch.randn(shape), torch.randn(shape)


def made_from(lstm: nn.Module, **arguments: Any) -> quantizable.LSTM:
    """The quantizable twin, with nothing that changes numbers: as in float."""
    lstm.qconfig = PTQ
    return quantizable.LSTM.from_float(lstm, **arguments)


@settings(max_examples=15)
@given(options, st.integers(1, 6), st.integers(1, 4), st.booleans(), st.booleans())
def test_float_results_and_gradients_are_those_of_nn_lstm(
    arguments: dict[str, Any], length: int, batch: int, with_state: bool, split_gates: bool
) -> None:
    lstm = nn.LSTM(**arguments).eval()
    twin = made_from(copy.deepcopy(lstm), split_gates=split_gates)
    shape = (batch, length) if lstm.batch_first else (length, batch)
    x = torch.randn(*shape, lstm.input_size)
    given_state = (state_of(lstm, batch),) if with_state else ()
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    results = [one(own, *given_state) for one, own in zip((twin, lstm), inputs, strict=True)]
    close(*results)
    for y, (h, c) in results:
        (y.square().sum() + h.sum() + c.sum()).backward()
    close(inputs[0].grad, inputs[1].grad, 1e-5)


def test_one_sequence_without_a_batch() -> None:
    for batch_first in (False, True):
        lstm = nn.LSTM(3, 4, 2, batch_first=batch_first, bidirectional=True).eval()
        x, state = torch.randn(5, 3), (torch.randn(4, 4), torch.randn(4, 4))
        close(made_from(lstm)(x, state), lstm(x, state))
        close(made_from(lstm)(x), lstm(x))


def test_states_as_one_pair_for_each_layer() -> None:
    lstm = nn.LSTM(3, 4, 2).eval()
    x, (h, c) = torch.randn(5, 2, 3), (torch.randn(2, 2, 4), torch.randn(2, 2, 4))
    equal(made_from(lstm)(x, [(h[0], c[0]), (h[1], c[1])]), made_from(lstm)(x, (h, c)))


def test_made_without_a_float_module() -> None:
    lstm = quantizable.LSTM(3, 4, 2, bidirectional=True, batch_first=True, dtype=torch.float64)
    y, (h, c) = lstm(torch.randn(2, 5, 3, dtype=torch.float64))
    assert (y.shape, h.shape, c.shape) == ((2, 5, 8), (4, 2, 4), (4, 2, 4))
    assert y.dtype is torch.float64
    assert type(lstm.layers[1].layer_bw.cell) is quantizable.LSTMCell


def test_parameters_are_shared_so_an_optimizer_made_before_goes_on() -> None:
    lstm = nn.LSTM(3, 4, 2, bidirectional=True)
    ours = {id(value) for value in made_from(lstm).parameters()}
    assert ours == {id(value) for value in lstm.parameters()}


@pytest.mark.parametrize("split_gates", [False, True])
def test_a_cell_is_that_of_nn_lstm_cell(split_gates: bool) -> None:
    for bias in (False, True):
        cell = nn.LSTMCell(3, 5, bias)
        cell.qconfig = PTQ
        twin = quantizable.LSTMCell.from_float(cell, split_gates=split_gates)
        x, state = torch.randn(4, 3), (torch.randn(4, 5), torch.randn(4, 5))
        close(twin(x, state), cell(x, state))
        close(twin(x), cell(x))
        layers = [part for part in twin.modules() if isinstance(part, nn.Linear)]
        assert len(layers) == (8 if split_gates else 2)
        assert all(layer.qconfig is PTQ for layer in layers)


def test_a_cell_says_what_it_starts_from() -> None:
    cell = quantizable.LSTMCell(3, 5)
    assert [value.tolist() for value in cell.initialize_hidden(2)] == [[[0.0] * 5] * 2] * 2
    cell.initial_cell_state_qparams = (0.5, 3)
    h, c = cell.initialize_hidden(2, is_quantized=True)
    assert isinstance(h, eagerq.QTensor)
    assert isinstance(c, eagerq.QTensor)
    assert (h.q_scale(), h.q_zero_point(), c.q_scale(), c.q_zero_point()) == (1.0, 0, 0.5, 3)
    assert c.int_repr().tolist() == [[3] * 5] * 2


def test_dropout_runs_between_layers_in_training() -> None:
    config = eagerq.QConfig(activation=eagerq.NoopObserver, weight=eagerq.NoopObserver)
    lstm = nn.LSTM(4, 64, 2, dropout=0.5).eval()
    lstm.qconfig = config
    twin = quantizable.LSTM.from_float(lstm)
    x = torch.randn(6, 3, 4)
    close(twin(x), lstm(x))
    zeros = []
    twin.layers[1].register_forward_pre_hook(lambda module, args: zeros.append((args[0] == 0).float().mean()))
    twin.train()
    twin(x)
    assert 0.4 < zeros[0] < 0.6


@settings(max_examples=6)
@given(options)
def test_prepared_for_calibration_as_torch_ao_does(ao: Any, arguments: dict[str, Any]) -> None:
    theirs, ours = prepared_pair(ao, nn.LSTM(**arguments))
    for _ in range(2):
        x = torch.randn(4, 3, arguments["input_size"])
        equal(ours(x), theirs(x))
    equal(tuple(ours.state_dict().values()), tuple(theirs.state_dict().values()))
    cross(theirs, ours)


@settings(max_examples=3)
@given(options)
def test_prepared_for_training_as_torch_ao_does(ao: Any, arguments: dict[str, Any]) -> None:
    theirs, ours = prepared_pair(ao, nn.LSTM(**arguments), training=True)
    optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in (theirs, ours)]
    for _ in range(3):
        x = torch.randn(4, 3, arguments["input_size"])
        results = [model(x) for model in (theirs, ours)]
        close(results[1], results[0], 1e-5)
        for (y, _), optimizer in zip(results, optimizers, strict=True):
            optimizer.zero_grad()
            y.square().sum().backward()
            optimizer.step()
    cell = ours.inner.layers[0].layer_fw.cell
    assert type(cell.igates) is type(cell.hgates) is TrainedLinear
    for gate in (cell.input_gate, cell.forget_gate, cell.output_gate):
        assert isinstance(gate.activation_post_process, eagerq.FixedQParamsFakeQuantize)
        assert gate.activation_post_process.scale == 1 / 256
    assert cell.cell_gate.activation_post_process.scale == 2 / 256
    for name, value in theirs.state_dict().items():
        assert torch.allclose(ours.state_dict()[name], value, rtol=1e-3, atol=1e-4), name
    cross(theirs, ours)


def test_placed_in_a_model_by_hand() -> None:
    for training in (False, True):
        model = eagerq.QuantWrapper(nn.Sequential(quantizable.LSTM(3, 4))).train(training)
        model.qconfig = eagerq.get_default_qat_qconfig("onednn") if training else PTQ
        model = (eagerq.prepare_qat if training else eagerq.prepare)(model)
        cell = model.module[0].layers[0].layer_fw.cell
        assert hasattr(cell.hgates, "activation_post_process")
        assert hasattr(cell.input_gate, "activation_post_process") is training
        assert hasattr(cell.hgates, "weight_fake_quant") is training


def test_the_walk_keeps_hooks_and_mode() -> None:
    calls = []
    model = nn.Sequential(eagerq.QuantStub(), nn.LSTM(3, 4)).eval()
    model[1].register_forward_hook(lambda *args: calls.append(args))
    model.qconfig = PTQ
    prepared = eagerq.prepare(model)
    prepared(torch.randn(5, 2, 3))
    assert len(calls) == 1
    assert not prepared[1].training
    assert not prepared[1].layers[0].layer_fw.cell.igates.training


def test_refusals() -> None:
    with pytest.raises(InvalidConfigError, match="must have 'qconfig'"):
        quantizable.LSTM.from_float(nn.LSTM(3, 4))
    with pytest.raises(AssertionError, match="Expected module type LSTM, got GRU"):
        quantizable.LSTM.from_float(nn.GRU(3, 4), PTQ)
    with pytest.raises(AssertionError, match="Expected module type LSTMCell, got LSTM"):
        quantizable.LSTMCell.from_float(nn.LSTM(3, 4))
    with pytest.raises(UnsupportedError, match="proj_size=2"):
        quantizable.LSTM.from_float(nn.LSTM(3, 4, proj_size=2), PTQ)
    for dropout in (1.5, -0.1, True, "half"):
        with pytest.raises(InvalidArgumentError, match=r"dropout should be a number in range \[0, 1\]"):
            quantizable.LSTM(3, 4, dropout=dropout)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="only one of the two biases"):
        quantizable.LSTMCell.from_params(torch.randn(8, 3), torch.randn(8, 2), torch.randn(8))
    lstm = quantizable.LSTM.from_float(nn.LSTM(3, 4), PTQ)
    with pytest.raises(InvalidInputError, match="pad the sequences"):
        lstm(pack_padded_sequence(torch.randn(5, 2, 3), torch.tensor([5, 3])))
    with pytest.raises(InvalidInputError, match="the sequence has no elements"):
        lstm(torch.randn(0, 2, 3))
    with pytest.raises(InvalidInputError, match=r"expected shape \[length, batch, 3\].*got \(5, 2, 4\)"):
        lstm(torch.randn(5, 2, 4))
    with pytest.raises(InvalidInputError, match=r"the state has shape \(2, 2, 4\), expected \(1, 2, 4\)"):
        lstm(torch.randn(5, 2, 3), (torch.randn(2, 2, 4), torch.randn(1, 2, 4)))
