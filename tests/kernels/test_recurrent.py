"""LSTM and GRU through time in C and torch's own tangents: what the plain steps give, bit for bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nn.recurrences import SEQUENCES, convert, made, some_input, start_of, tensors
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import eagerq
from eagerq import kernels, native
from eagerq.errors import UnsupportedError
from eagerq.nn.quantized.dynamic.rnn import RNNBase

needs_c = pytest.mark.skipif(not native.conv_ready(), reason="the C library was not built, or not for this processor")

QCONFIGS = ("default_dynamic_qconfig", "per_channel_dynamic_qconfig", "float16_dynamic_qconfig")
# whole vectors of torch's, parts of them, and what C leaves to others (25)
WIDTHS = st.sampled_from([4, 8, 25, 32, 36, 64, 100, 128])


def by_steps(layer: Any, x: Any, hx: Any = None) -> Any:
    """What the layer gives without the fast way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "recur", lambda *args: None)
        return layer(x, hx)


def check(layer: Any, x: Any, hx: Any = None) -> None:
    for one, other in zip(tensors(layer(x, hx)), tensors(by_steps(layer, x, hx)), strict=True):
        assert one.stride() == other.stride()
        assert torch.equal(one, other)


@st.composite
def layers(draw: st.DrawFn) -> Any:
    options = {"bias": draw(st.booleans()), "bidirectional": draw(st.booleans()), "num_layers": draw(st.integers(1, 2))}
    torch.manual_seed(draw(st.integers(0, 1000)))
    float_layer = getattr(nn, draw(st.sampled_from(SEQUENCES)))(draw(WIDTHS), draw(WIDTHS), **options)
    layer = convert(float_layer, draw(st.sampled_from(QCONFIGS)))
    layer.reduce_range = draw(st.booleans())
    return layer


@given(layers(), st.integers(1, 9), st.integers(1, 4), st.sampled_from([0.1, 1.0, 30.0]), st.booleans())
def test_steps_of_as_many_rows(layer: Any, steps: int, batch: int, spread: float, given_start: bool) -> None:
    x = torch.randn(steps, batch, layer.input_size) * spread
    check(layer, x, start_of_dynamic(layer, batch) if given_start else None)


@given(layers(), st.lists(st.integers(1, 7), min_size=1, max_size=5), st.booleans())
def test_sequences_that_end_apart(layer: Any, lengths: list[int], given_start: bool) -> None:
    x = pack_sequence([torch.randn(length, layer.input_size) for length in lengths], enforce_sorted=False)
    check(layer, x, start_of_dynamic(layer, len(lengths)) if given_start else None)


def start_of_dynamic(layer: RNNBase, batch: int) -> Any:
    like = getattr(nn, layer.mode)(1, layer.hidden_size, layer.num_layers, bidirectional=layer.bidirectional)
    return start_of(like, batch)


@pytest.mark.parametrize("hidden", [512, 500])
@pytest.mark.parametrize("kind", SEQUENCES)
def test_more_than_one_thread_s_share(kind: str, hidden: int) -> None:
    """torch parts large work among threads, at places of its own."""
    torch.manual_seed(0)
    layer = convert(getattr(nn, kind)(8, hidden))
    for batch in (17, 31, 90):
        check(layer, torch.randn(3, batch, 8) * 5)


@pytest.mark.parametrize("kind", SEQUENCES)
def test_zero_points(kind: str) -> None:
    layer = made(kind)
    weights = layer.get_weight()
    for name, weight in weights.items():
        zero_points = torch.arange(len(weight)) % 7 - 3
        scales = torch.full((len(weight),), 0.02)
        weights[name] = eagerq.quantize_per_channel(weight.dequantize(), scales, zero_points, 0, torch.int8)
    layer.set_weight_bias({**weights, **layer.get_bias()})
    check(layer, some_input(kind))


@needs_c
@pytest.mark.parametrize("qconfig", QCONFIGS[:2])
@pytest.mark.parametrize("kind", SEQUENCES)
def test_it_is_what_runs(kind: str, qconfig: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, done = convert(getattr(nn, kind)(6, 8, bidirectional=True), qconfig), []

    def watched(*args: Any) -> Any:
        done.append(recur(*args))
        return done[-1]

    recur = kernels.recur
    monkeypatch.setattr(kernels, "recur", watched)
    layer(some_input(kind))
    assert len(done) == 2
    assert None not in done


@pytest.mark.parametrize("kind", SEQUENCES)
def test_what_is_given_stays(kind: str) -> None:
    layer = made(kind)
    hx = start_of_dynamic(layer, 3)
    before = copy.deepcopy(hx)
    outputs = layer(some_input(kind), hx)
    kept = [one.clone() for one in tensors(outputs)]
    layer(some_input(kind) * 2, hx)
    for one, other in zip([*tensors(hx), *tensors(outputs)], [*tensors(before), *kept], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("kind", SEQUENCES)
def test_states_that_are_not_finite(kind: str, bad: float) -> None:
    """A hidden state without integers makes nothing but NaN, from the first step on or later."""
    layer = made(kind)
    hidden, cell = torch.zeros(1, 3, 8), torch.zeros(1, 3, 8)
    hidden[0, 1, 2] = bad
    x = some_input(kind)
    y, _ = layer(x, (hidden, cell) if kind == "LSTM" else hidden)
    assert y.isnan().all()
    x[2, 0, 0] = bad
    assert layer(x)[0].isnan().all()  # the input has one range for all steps
    if kind == "LSTM":
        cell[0, 0, 0] = torch.nan
        start = (torch.zeros(1, 3, 8), cell)
        got, wanted = layer(some_input(kind), start)[0], by_steps(layer, some_input(kind), start)[0]
        assert got[1:].isnan().all()
        assert torch.equal(got.isnan(), wanted.isnan())
        assert torch.equal(got[0, 1:], wanted[0, 1:])


def test_gradients_of_a_state() -> None:
    """The cell state has them; a fast way would lose them."""
    layer = made("LSTM")
    cell = torch.randn(1, 3, 8, requires_grad=True)
    layer(some_input("LSTM"), (torch.zeros(1, 3, 8), cell))[1][1].sum().backward()
    assert cell.grad is not None
    assert cell.grad.norm() > 0
    with torch.no_grad():
        check(layer, some_input("LSTM"), (torch.zeros(1, 3, 8), cell))


@pytest.mark.parametrize("kind", SEQUENCES)
def test_other_strides_and_inference_mode(kind: str) -> None:
    layer = made(kind, num_layers=2)
    x = torch.randn(4, 6, 3).transpose(1, 2)
    hx = start_of_dynamic(layer, 5)
    apart = tuple(part[:, ::2] for part in hx) if isinstance(hx, tuple) else hx[:, ::2]
    check(layer, x, apart)
    with torch.inference_mode():
        inferred: list[Tensor] = tensors(layer(x, apart))
    for one, other in zip(inferred, tensors(layer(x, apart)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", SEQUENCES)
def test_a_forward_that_is_recorded(kind: str) -> None:
    """It is seen step by step: planned where nothing depends on values, refused where a range does."""
    x = some_input(kind)
    half = nn.Sequential(convert(getattr(nn, kind)(6, 8), "float16_dynamic_qconfig")).eval()
    frozen = eagerq.freeze(half, (x,))
    x = x * 2
    for one, other in zip(tensors(frozen(x)), tensors(half(x)), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(UnsupportedError, match="depends on the values"):
        eagerq.freeze(nn.Sequential(made(kind)).eval(), (x,))
