"""An int8 LSTM in C gives what its cell gives step by step, and stands back where somebody would see the steps."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nn.twins import Between, equal, flat
from torch import Tensor, nn

import eagerq
from eagerq import native
from eagerq.nn.quantizable import lstm as stepping
from eagerq.nn.quantized import LSTM

pytestmark = pytest.mark.skipif(not native.conv_ready(), reason="no compiler at installation, or no AVX-512 VNNI")

# hidden sizes: below and above what C takes at a time, and beyond what one thread does
SIZES = st.sampled_from([4, 8, 20, 64, 260])


def converted(training: bool = False, qconfig: str = "onednn", length: int = 5, **changes: Any) -> Any:
    """An int8 model with an LSTM, observed on random sequences."""
    arguments: dict[str, Any] = {"input_size": 6, "hidden_size": 8, **changes}
    model: Any = Between(nn.LSTM(**arguments), eagerq).train(training)
    model.qconfig = (eagerq.get_default_qat_qconfig if training else eagerq.get_default_qconfig)(qconfig)
    model = (eagerq.prepare_qat if training else eagerq.prepare)(model)
    for _ in range(2):
        model(torch.randn(length, 3, arguments["input_size"]) * 2)
    return eagerq.convert(model.eval(), as_trained=training)


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch, serving: bool = True) -> Iterator[list[bool]]:
    """Whether C took each sequence; or keep it from taking any."""
    found: list[bool] = []
    original = stepping.sequence_in_c

    def noting(*args: Any) -> Any:
        result = original(*args) if serving else None
        found.append(result is not None)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(stepping, "sequence_in_c", noting)
        yield found


def step_by_step(model: Any, *inputs: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch, counted(patch, serving=False):
        return model(*inputs)


@settings(max_examples=20)
@given(
    *(SIZES, st.integers(1, 9), st.sampled_from([1, 2, 3, 33]), st.integers(1, 2), st.integers(0, 3)),
    *(st.booleans(), st.booleans(), st.sampled_from(["onednn", "x86"])),
)
def test_integers_are_those_of_single_steps(
    hidden: int, length: int, batch: int, layers: int, seed: int, both_ways: bool, training: bool, qconfig: str
) -> None:
    torch.manual_seed(seed)
    model = converted(training, qconfig, hidden_size=hidden, num_layers=layers, bidirectional=both_ways)
    x = torch.randn(length, batch, 6) * 3
    state = torch.randn(layers * (1 + both_ways), batch, hidden)
    for inputs in ((x,), (x, (state, state.flip(1) * 0.3))):
        with pytest.MonkeyPatch.context() as patch, counted(patch) as served:
            got = model(*inputs)
        assert served == [True] * layers * (1 + both_ways)
        equal(got, step_by_step(model, *inputs))


def test_one_thread_gives_what_two_give() -> None:
    model, x = converted(hidden_size=512), torch.randn(4, 40, 6)
    wanted = model(x)
    torch.set_num_threads(1)
    try:
        equal(model(x), wanted)
    finally:
        torch.set_num_threads(2)


def test_a_state_goes_on() -> None:
    model, x = converted(), torch.randn(7, 2, 6)
    lstm, quant = model.inner, model.quant
    whole, last = lstm(quant(x))
    first, state = lstm(quant(x[:3]))
    second, end = lstm(quant(x[3:]), state)
    assert torch.equal(torch.cat([first.int_repr(), second.int_repr()]), whole.int_repr())
    assert torch.equal(end[0].int_repr(), last[0].int_repr())
    assert torch.equal(end[1].int_repr(), last[1].int_repr())


def test_a_state_has_memory_of_its_own() -> None:
    model = converted()
    y, state = model.inner(model.quant(torch.randn(7, 2, 6)))
    places = {part.integers.untyped_storage().data_ptr() for part in (y, *state)}
    assert len(places) == 3
    assert all(part.integers.untyped_storage().nbytes() == 2 * 8 for part in state)


def test_results_stay_when_it_runs_again() -> None:
    model = converted()
    first = model(torch.randn(4, 2, 6))
    kept = copy.deepcopy(first)
    model(torch.randn(4, 2, 6))
    equal(first, kept)


@pytest.mark.parametrize("changes", [{"hidden_size": 6}, {"hidden_size": 10}])
def test_other_sizes_go_step_by_step(changes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = converted(**changes), torch.randn(4, 2, 6)
    with counted(monkeypatch) as served:
        got = model(x)
    assert served == [False]
    equal(got, step_by_step(model, x))


@pytest.mark.parametrize("part", ["", ".igates", ".hgates", ".gates", ".input_gate", ".cell_gate", ".ogate_cy"])
def test_hooks_see_each_step(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = converted(), torch.randn(4, 2, 6)
    wanted, seen = model(x), []
    module = model.get_submodule(f"inner.layers.0.layer_fw.cell{part}")
    handle = module.register_forward_hook(lambda *call: seen.append(1))
    with counted(monkeypatch) as served:
        equal(model(x), wanted)
    assert served == [False]
    functional = part in (".gates", ".ogate_cy")  # those are not called but asked for a sum
    assert len(seen) == (0 if functional else 4)
    handle.remove()
    with counted(monkeypatch) as served:
        equal(model(x), wanted)
    assert served == [True]


def test_a_subclass_of_a_part_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    class Loud(eagerq.nn.quantized.QFunctional):
        calls = 0

        def mul(self, x: Tensor, y: Tensor) -> Any:
            type(self).calls += 1
            return super().mul(x, y)

    model, x = converted(), torch.randn(4, 2, 6)
    model.inner.layers[0].layer_fw.cell.ogate_cy.__class__ = Loud
    model(x)
    assert Loud.calls == 4


def test_other_weights_are_noticed() -> None:
    model, other, x = converted(), converted(), torch.randn(4, 2, 6)
    model(x)
    model.load_state_dict(other.state_dict())
    equal(model(x), step_by_step(other, x))


@pytest.mark.parametrize("changes", [{}, {"num_layers": 2, "bidirectional": True}])
def test_frozen(changes: Any) -> None:
    model, x = converted(**changes), torch.randn(6, 2, 6)
    frozen = eagerq.freeze(model, (x,))
    for _ in range(3):
        y = torch.randn(6, 2, 6)
        equal(frozen(y), step_by_step(model, y))


def test_several_threads() -> None:
    model = converted(hidden_size=64)
    inputs = [torch.randn(9, 3, 6) for _ in range(4)]
    wanted = [step_by_step(model, x) for x in inputs]
    wrong: list[int] = []

    def run(number: int) -> None:
        for _ in range(20):
            got = flat(model(inputs[number]))
            if not all(map(torch.equal, got, flat(wanted[number]))):
                wrong.append(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_wrong_states_are_refused_as_before() -> None:
    model = converted().inner
    assert type(model) is LSTM
    x = eagerq.quantize_per_tensor(torch.randn(4, 2, 6), 0.05, 128, torch.uint8)
    state = eagerq.quantize_per_tensor(torch.zeros(1, 3, 8), 1.0, 0, torch.uint8)
    with pytest.raises(eagerq.errors.InvalidInputError, match="the state has shape"):
        model(x, (state, state))
