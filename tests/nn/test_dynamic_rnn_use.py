"""Dynamic LSTM, GRU and cells in use: state, copies, mistakes, compiling, exporting."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from nn.recurrences import CELLS, KINDS, SEQUENCES, convert, made, some_input, tensors
from nn.tables import save_and_load
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import eagerq
from eagerq.errors import (
    CheckpointError,
    EagerqError,
    InvalidArgumentError,
    InvalidConfigError,
    InvalidInputError,
    UnsupportedError,
    stamp_names,
)
from eagerq.nn.quantized import dynamic
from eagerq.quantization_mappings import (
    get_default_dynamic_quant_module_mappings,
    get_default_qconfig_propagation_list,
)
from eagerq.quantize.state import install_state_check

kinds = pytest.mark.parametrize("kind", KINDS)


def assert_same(one: Any, other: Any, kind: str) -> None:
    x = some_input(kind)
    for first, second in zip(tensors(one(x)), tensors(other(x)), strict=True):
        assert torch.equal(first, second)


def differs(one: Any, other: Any, kind: str) -> bool:
    x = some_input(kind)
    return not torch.equal(tensors(one(x))[0], tensors(other(x))[0])


# --- state --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
@kinds
def test_state(kind: str, per_channel: bool, bias: bool) -> None:
    """The float module's names; scales and zero points beside the weights."""
    layer = getattr(nn, kind)(6, 8, bias=bias)
    state = convert(layer, "per_channel_dynamic_qconfig" if per_channel else "default_dynamic_qconfig").state_dict()
    wanted = {}
    for name, value in layer.state_dict().items():
        wanted[name] = (torch.float32 if "bias" in name else torch.int8, tuple(value.shape))
        if "weight" in name:
            count = len(value) if per_channel else 1
            wanted |= {f"{name}_scale": (torch.float32, (count,)), f"{name}_zero_point": (torch.int32, (count,))}
    assert {name: (value.dtype, tuple(value.shape)) for name, value in state.items()} == wanted
    assert {type(value) for value in state.values()} == {Tensor}


@pytest.mark.parametrize("kind", SEQUENCES)
def test_state_of_layers_and_directions(kind: str) -> None:
    layer = getattr(nn, kind)(6, 8, 2, bidirectional=True)
    names = set(convert(layer, "float16_dynamic_qconfig").state_dict())
    assert names == set(layer.state_dict())


@pytest.mark.parametrize("dtype", [torch.int8, torch.float16])
@kinds
def test_save_and_load(kind: str, dtype: torch.dtype) -> None:
    qconfig = "per_channel_dynamic_qconfig" if dtype is torch.int8 else "float16_dynamic_qconfig"
    layer, other = (convert(getattr(nn, kind)(6, 8), qconfig) for _ in range(2))
    assert differs(layer, other, kind)
    other.load_state_dict(save_and_load(layer))
    assert_same(layer, other, kind)
    built = getattr(dynamic, kind)(6, 8, dtype=dtype)
    built.load_state_dict(layer.state_dict(), assign=True)
    assert_same(layer, built, kind)


@kinds
def test_loading_what_does_not_fit(kind: str) -> None:
    layer = made(kind)
    before = copy.deepcopy(layer)
    model = nn.Sequential(layer)
    install_state_check(model)  # as convert does
    float16 = convert(getattr(nn, kind)(6, 8), "float16_dynamic_qconfig")
    for other in (convert(getattr(nn, kind)(6, 9)), getattr(nn, kind)(6, 8), float16, nn.Identity()):
        with pytest.raises(CheckpointError, match="does not fit"):
            model.load_state_dict(nn.Sequential(other).state_dict())
        assert_same(layer, before, kind)


@kinds
def test_copies(kind: str) -> None:
    layer = made(kind)
    x = some_input(kind)
    layer(x)
    copied = copy.deepcopy(layer)
    pickled = pickle.loads(pickle.dumps(layer))
    assert_same(layer, copied, kind)
    assert_same(layer, pickled, kind)
    copied.load_state_dict(made(kind, seed=1).state_dict())
    assert differs(layer, copied, kind)
    assert_same(layer, pickled, kind)


@kinds
def test_half_is_for_float_layers(kind: str) -> None:
    layer = made(kind)
    before = copy.deepcopy(layer)
    assert_same(layer.half().to(torch.bfloat16), before, kind)


@kinds
def test_weights_given_by_hand(kind: str) -> None:
    layer, other = made(kind), made(kind, seed=1)
    weights, biases = other.get_weight(), other.get_bias()

    def give(weights: dict[str, Any], biases: dict[str, Any]) -> None:
        layer.set_weight_bias({"weight": weights, "bias": biases} if kind in CELLS else {**weights, **biases})

    give(weights, biases)
    assert_same(layer, other, kind)
    name = next(iter(weights))
    misfits: list[Any] = [
        torch.zeros(weights[name].shape),
        eagerq.quantize_per_tensor(torch.randn(3, 4), 0.1, 0, torch.int8),
        eagerq.quantize_per_tensor(torch.randn(weights[name].shape), 0.1, 0, torch.uint8),
    ]
    for misfit in misfits:
        with pytest.raises(InvalidConfigError, match=name):
            give({**weights, name: misfit}, biases)
        assert_same(layer, other, kind)
    last = next(reversed(biases))
    for values in ({**biases, last: torch.zeros(1)}, {key: value for key, value in biases.items() if key != last}):
        with pytest.raises(InvalidConfigError, match=last):
            give(made(kind, seed=2).get_weight(), values)
        assert_same(layer, other, kind)


# --- mistakes -----------------------------------------------------------------------------------


def named(kind: str) -> Any:
    """A layer that a walk has named."""
    model = nn.ModuleDict({"encoder": made(kind)})
    stamp_names(model)
    return model["encoder"]


@kinds
def test_inputs_that_do_not_fit(kind: str) -> None:
    layer, x = named(kind), some_input(kind)
    where = f"'encoder' (eagerq.nn.quantized.dynamic.{kind})"
    hidden = torch.zeros(3, 8) if kind in CELLS else torch.zeros(1, 3, 8)
    start: Any = (hidden, hidden) if "LSTM" in kind else hidden
    wrong = hidden[..., :7]
    quantized = eagerq.quantize_per_tensor(x, 0.1, 0, torch.int8)
    calls: list[tuple[Any, Any, str]] = [
        (x[..., :5], None, "6]"),
        (x[None, None], None, "6]"),
        (x.double(), None, "float64"),
        (None, None, "NoneType"),
        (quantized, None, "DeQuantStub"),
        (x, (wrong, wrong) if "LSTM" in kind else wrong, "hidden state h"),
        (x, (hidden, wrong) if "LSTM" in kind else hidden[..., :2, :], "hidden state"),
        (x, hidden if "LSTM" in kind else (hidden, hidden), "tensors"),
        (x, (hidden, hidden.double()) if "LSTM" in kind else hidden.double(), "float64"),
    ]
    for given, hx, words in calls:
        with pytest.raises(InvalidInputError) as caught:
            layer(given, hx)
        assert where in str(caught.value)
        assert words in str(caught.value)
    layer(x, start)


@pytest.mark.parametrize("kind", SEQUENCES)
def test_sequences_that_do_not_fit(kind: str) -> None:
    layer = named(kind)
    with pytest.raises(InvalidInputError, match=r"'encoder'.*larger than 0"):
        layer(torch.zeros(0, 3, 6))
    with pytest.raises(InvalidInputError, match="'encoder'"):
        layer(pack_sequence([torch.zeros(2, 5)]))
    packed = pack_sequence([torch.zeros(2, 6)])
    hidden = torch.zeros(1, 2, 8)
    with pytest.raises(InvalidInputError, match=r"'encoder'.*hidden state h"):
        layer(packed, (hidden, hidden) if kind == "LSTM" else hidden)


@pytest.mark.parametrize(
    ("build", "error"),
    [
        (lambda: dynamic.LSTM(3, 4, dtype=torch.float32), UnsupportedError),
        (lambda: dynamic.GRUCell(3, 4, dtype=torch.uint8), UnsupportedError),
        (lambda: dynamic.LSTM(3, 4, dropout=1.5), InvalidArgumentError),
        (lambda: dynamic.LSTM(3, 4, dropout=True), InvalidArgumentError),
        (lambda: dynamic.GRU(3, 4, 0), InvalidArgumentError),
        (lambda: dynamic.GRU(3, 0), InvalidArgumentError),
        (lambda: dynamic.RNNBase("RNN_TANH", 3, 4), InvalidArgumentError),
        (lambda: dynamic.RNNCell(3, 4, nonlinearity="gelu"), InvalidArgumentError),
    ],
)
def test_arguments_that_do_not_fit(build: Any, error: type[EagerqError]) -> None:
    with pytest.raises(error):
        build()


def test_dropout_of_one_layer() -> None:
    with pytest.warns(UserWarning, match="num_layers greater than 1"):
        dynamic.LSTM(3, 4, dropout=0.5)


def test_float_modules_that_do_not_fit() -> None:
    layer: Any = nn.LSTM(3, 4)
    with pytest.raises(InvalidConfigError, match="must have qconfig"):
        dynamic.LSTM.from_float(layer)
    layer.qconfig = eagerq.default_dynamic_qconfig
    with pytest.raises(InvalidConfigError, match=r"GRU\.from_float only works for nn\.GRU, got LSTM"):
        dynamic.GRU.from_float(layer)
    layer.qconfig = eagerq.default_qconfig._replace(weight=eagerq.default_observer)
    with pytest.raises(UnsupportedError, match="Unsupported dtype"):
        dynamic.LSTM.from_float(layer)
    projected: Any = nn.LSTM(3, 4, proj_size=2)
    projected.qconfig = eagerq.default_dynamic_qconfig
    with pytest.raises(UnsupportedError, match="proj_size=2"):
        dynamic.LSTM.from_float(projected)


def test_qconfigs_without_weights() -> None:
    """They mean the default; so does none at all."""
    layer: Any = nn.GRUCell(6, 8)
    wanted = convert(layer)
    for qconfig in (None, eagerq.default_dynamic_qconfig._replace(weight=None)):
        layer.qconfig = qconfig
        assert_same(dynamic.GRUCell.from_float(layer), wanted, "GRUCell")


# --- tables, compiling, exporting ---------------------------------------------------------------


@kinds
def test_tables(kind: str) -> None:
    float_kind = getattr(nn, kind)
    assert get_default_dynamic_quant_module_mappings()[float_kind] is getattr(dynamic, kind)
    assert float_kind in get_default_qconfig_propagation_list()


@pytest.mark.parametrize("qconfig", ["default_dynamic_qconfig", "float16_dynamic_qconfig"])
@kinds
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled(kind: str, qconfig: str) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {} if kind in CELLS else {"bidirectional": True}
    layer = convert(getattr(nn, kind)(6, 8, **options), qconfig)
    assert_same(torch.compile(layer, fullgraph=True, backend="aot_eager"), layer, kind)


@kinds
def test_exported(kind: str) -> None:
    layer = made(kind)
    assert_same(torch.export.export(layer, (some_input(kind),)).module(), layer, kind)


@pytest.mark.parametrize("kind", SEQUENCES)
def test_exported_for_any_batch(kind: str) -> None:
    layer = made(kind, batch_first=True)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(layer, (torch.randn(3, 4, 6),), dynamic_shapes=({0: batch},))
    x = torch.randn(7, 4, 6)
    for got, wanted in zip(tensors(program.module()(x)), tensors(layer(x)), strict=True):
        assert torch.equal(got, wanted)
