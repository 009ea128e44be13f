"""Embeddings: training against torch.ao, 8-bit look-ups against torch.ao and float64."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import eagerq
from eagerq.errors import InvalidArgumentError, InvalidConfigError, InvalidInputError, UnsupportedError
from eagerq.nn import qat as nnqat
from eagerq.nn import quantized as nnq
from eagerq.qconfig import (
    QConfig,
    default_embedding_qat_qconfig,
    default_embedding_qat_qconfig_4bit,
    float_qparams_weight_only_qconfig,
    float_qparams_weight_only_qconfig_4bit,
    get_default_qat_qconfig,
)
from eagerq.qtensor import QTensor

MODES = ("sum", "mean", "max")
NAMES = ("Embedding", "EmbeddingBag")
INDEX_DTYPES = (torch.int64, torch.int32)
kinds = pytest.mark.parametrize("name", NAMES)


def relative(got: Tensor, wanted: Tensor) -> float:
    """Distance as a share of what was wanted."""
    assert got.shape == wanted.shape
    got, wanted = got.detach().double(), wanted.detach().double()
    return float((got - wanted).norm() / wanted.norm().clamp(min=1e-30))


def real_table(rows: int, columns: int, kind: str) -> Tensor:
    """Float weights of several kinds; all kinds have rows of other sizes."""
    w = torch.randn(rows, columns) * 10 ** (torch.rand(rows, 1) * 4 - 2)
    if kind == "shifted":  # zero is not in the rows' range
        w += 3
    elif kind == "grid":  # values, scales and ties are powers of two
        w = (w * 64).round() / 64
    elif kind == "flat":  # rows of one value each, zeros among them
        w = torch.arange(rows)[:, None].repeat(1, columns).float()
    return w


real_tables = st.builds(
    real_table, st.integers(1, 40), st.integers(1, 33), st.sampled_from(("normal", "shifted", "grid", "flat"))
)


def integer_table(rows: int, columns: int, power_of_two: bool = False) -> QTensor:
    integers = torch.randint(0, 256, (rows, columns), dtype=torch.uint8)
    scale = torch.rand(rows) + 0.01
    if power_of_two:
        scale = 2.0 ** scale.log2().round()
    return QTensor(integers, scale, torch.rand(rows) * 300 - 20, 0)


integer_tables = st.builds(integer_table, st.integers(1, 40), st.integers(1, 33), st.booleans())


class Bags(NamedTuple):
    """Arguments of an embedding bag, as drawn."""

    indices: Tensor
    offsets: Tensor | None
    include_last_offset: bool


@st.composite
def bags(draw: st.DrawFn, rows: int) -> Bags:
    """Bags of none to six indices: with starts, with starts and the end, or as the rows of a matrix."""
    dtype = draw(st.sampled_from(INDEX_DTYPES))
    if draw(st.integers(0, 2)) == 0:
        shape = (draw(st.integers(1, 5)), draw(st.integers(1, 6)))
        return Bags(torch.randint(0, rows, shape, dtype=dtype), None, False)
    lengths = torch.tensor(draw(st.lists(st.integers(0, 6), min_size=1, max_size=6)))
    ends = lengths.cumsum(0)
    include_last_offset = draw(st.booleans())
    offsets = torch.cat([ends.new_zeros(1), ends if include_last_offset else ends[:-1]]).to(dtype)
    return Bags(torch.randint(0, rows, (int(ends[-1]),), dtype=dtype), offsets, include_last_offset)


def as_old(table: QTensor) -> Tensor:
    """The same integers and parameters as torch.ao's modules take them."""
    return torch._make_per_channel_quantized_tensor(table.integers, table.scale, table.zero_point, 0)


def make(name: str, rows: int = 12, columns: int = 5, **arguments: Any) -> Any:
    """A QAT module."""
    return getattr(nnqat, name)(rows, columns, qconfig=default_embedding_qat_qconfig, **arguments)


def some_input(name: str) -> tuple[Tensor, ...]:
    indices = torch.tensor([1, 4, 4, 0, 7, 11])
    return (indices,) if name == "Embedding" else (indices, torch.tensor([0, 2, 2, 5]))


def save_and_load(module: nn.Module) -> dict[str, Tensor]:
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    state: dict[str, Tensor] = torch.load(file, weights_only=True)
    return state


# --- 8-bit look-ups ------------------------------------------------------------------------------


@given(table=integer_tables, data=st.data())
def test_rows_equal_oracle(ao: Any, table: QTensor, data: st.DataObject) -> None:
    rows, columns = table.shape
    shape = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=2))
    indices = torch.randint(0, rows, shape, dtype=data.draw(st.sampled_from(INDEX_DTYPES)))
    theirs = ao.quantized.Embedding(rows, columns, _weight=as_old(table))
    got = nnq.Embedding(rows, columns, _weight=table)(indices)
    assert got.dtype is torch.float32
    assert relative(got, theirs(indices)) < 1e-6


@given(table=integer_tables, shape=st.lists(st.integers(0, 3), max_size=4))
def test_rows_equal_the_dequantized_table(table: QTensor, shape: list[int]) -> None:
    indices = torch.randint(0, table.shape[0], shape)
    got = nnq.Embedding(*table.shape, _weight=table)(indices)
    assert torch.equal(got, table.dequantize()[indices])


@given(table=integer_tables, data=st.data())
def test_bags_equal_oracle(ao: Any, table: QTensor, data: st.DataObject) -> None:
    indices, offsets, include_last_offset = data.draw(bags(table.shape[0]))
    weights = torch.randn(indices.shape) if data.draw(st.booleans()) else None
    options = {"mode": "sum", "include_last_offset": include_last_offset}
    theirs = ao.quantized.EmbeddingBag(*table.shape, _weight=as_old(table), **options)
    ours = nnq.EmbeddingBag(*table.shape, _weight=table, **options)
    assert relative(ours(indices, offsets, weights), theirs(indices, offsets, weights)) < 1e-6


@pytest.mark.parametrize("mode", MODES)
@given(table=integer_tables, data=st.data())
def test_bags_equal_float64(mode: str, table: QTensor, data: st.DataObject) -> None:
    indices, offsets, include_last_offset = data.draw(bags(table.shape[0]))
    padding_idx = data.draw(st.none() | st.integers(-table.shape[0], table.shape[0] - 1))
    weights = torch.randn(indices.shape) if mode == "sum" and data.draw(st.booleans()) else None
    options = {"mode": mode, "include_last_offset": include_last_offset, "padding_idx": padding_idx}
    rows = (table.integers.double() - table.zero_point.double()[:, None]) * table.scale.double()[:, None]
    wanted = F.embedding_bag(
        indices, rows, offsets, per_sample_weights=None if weights is None else weights.double(), **options
    )
    ours = nnq.EmbeddingBag(*table.shape, _weight=table, **options)
    got = ours(indices, offsets, weights)
    assert got.dtype is torch.float32
    assert relative(got, wanted) < 1e-6


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding_idx", [None, 2])
def test_empty_bags_are_zero(mode: str, padding_idx: int | None) -> None:
    module = nnq.EmbeddingBag(3, 4, mode=mode, padding_idx=padding_idx, _weight=integer_table(3, 4))
    nothing = torch.zeros(0, dtype=torch.int64)
    assert torch.equal(module(nothing, torch.zeros(2, dtype=torch.int64)), torch.zeros(2, 4))
    assert torch.equal(module(torch.zeros(2, 0, dtype=torch.int64)), torch.zeros(2, 4))
    assert module(nothing, nothing).shape == (0, 4)
    if padding_idx is not None:
        assert torch.equal(module(torch.full((1, 3), padding_idx)), torch.zeros(1, 4))


def test_a_matrix_of_indices_has_no_last_offset() -> None:
    # torch.ao takes the last row for an end and drops it; the float module does not
    indices = torch.tensor([[0, 1], [2, 3], [4, 5]])
    module = nnq.EmbeddingBag(6, 4, include_last_offset=True)
    assert module(indices).shape == nn.EmbeddingBag(6, 4, include_last_offset=True)(indices).shape == (3, 4)


@kinds
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_result_is_float32_whatever_the_model_is(name: str, dtype: torch.dtype) -> None:
    module = getattr(nnq, name)(12, 5, _weight=integer_table(12, 5)).to(dtype)
    assert module(*some_input(name)).dtype is torch.float32


@pytest.mark.parametrize(("name", "mode"), [("Embedding", "sum"), *(("EmbeddingBag", mode) for mode in MODES)])
def test_only_the_rows_asked_for_become_float(name: str, mode: str) -> None:
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for one in out if isinstance(out, tuple) else (out,):
                largest = max(largest, one.numel())
            return out

    options = {} if name == "Embedding" else {"mode": mode, "padding_idx": 0}
    module = getattr(nnq, name)(1000, 8, **options)
    with Watch():
        module(*some_input(name))
    assert largest <= 6 * 8


@kinds
def test_on_device(name: str, device: torch.device) -> None:
    table = integer_table(12, 5)
    options: list[dict[str, Any]] = [{}]
    if name == "EmbeddingBag":
        options = [{"mode": mode, "padding_idx": padding} for mode in MODES for padding in (None, 4)]
    for option in options:
        module = getattr(nnq, name)(12, 5, _weight=table, **option)
        wanted = module(*some_input(name))
        got = module.to(device)(*(one.to(device) for one in some_input(name)))
        assert got.device.type == device.type
        assert relative(got.cpu(), wanted) < 1e-6


# --- compiled and exported -----------------------------------------------------------------------


class Many(nn.Module):
    """Several kinds of look-ups on one input."""

    def __init__(self) -> None:
        super().__init__()
        table = integer_table(20, 8)
        self.rows = nnq.Embedding(20, 8, _weight=table)
        self.sums = nnq.EmbeddingBag(20, 8, _weight=table)
        self.means = nnq.EmbeddingBag(20, 8, mode="mean", padding_idx=3, _weight=table)
        self.most = nnq.EmbeddingBag(20, 8, mode="max", padding_idx=3, _weight=table)

    def forward(self, indices: Tensor, offsets: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        matrix = indices.reshape(-1, 4)
        return (
            self.rows(matrix),
            self.sums(indices, offsets, weights),
            self.means(matrix),
            self.most(indices, offsets),
        )


def many_inputs(count: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randint(0, 20, (count,)), torch.tensor([0, 3, 3, 9]), torch.rand(count)


def assert_all_close(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted, strict=True):
        assert relative(one, other) < 1e-6


def test_compiles() -> None:
    model, inputs = Many(), many_inputs()
    torch._dynamo.reset()
    assert_all_close(torch.compile(model, fullgraph=True)(*inputs), model(*inputs))


@pytest.mark.parametrize("strict", [True, False])
def test_exports(strict: bool) -> None:
    model, inputs = Many(), many_inputs()
    count = torch.export.Dim("count", min=1, max=64)
    exported = torch.export.export(model, inputs, dynamic_shapes=({0: 4 * count}, None, {0: 4 * count}), strict=strict)
    other = many_inputs(24)
    assert_all_close(exported.module()(*other), model(*other))


# Dynamo makes an instance of an autograd.Function that it traces, which torch warns against
@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")
def test_training_compiles() -> None:
    eager = nn.ModuleList([make("Embedding"), make("EmbeddingBag", mode="mean", padding_idx=4)])
    compiled = copy.deepcopy(eager)

    def run(modules: nn.ModuleList) -> Tensor:
        total = torch.zeros(())
        for name, module in zip(NAMES, modules, strict=True):
            total = total + module(*some_input(name)).square().sum()
        return total

    torch._dynamo.reset()
    wanted, got = run(eager), torch.compile(run, fullgraph=True)(compiled)
    wanted.backward()
    got.backward()
    assert relative(got, wanted) < 1e-5
    for one, other in zip(compiled.parameters(), eager.parameters(), strict=True):
        assert relative(one.grad, other.grad) < 1e-5
    for key, value in eager.state_dict().items():
        assert torch.equal(compiled.state_dict()[key], value), key


# --- from float and QAT modules ------------------------------------------------------------------


def assert_same_table(ours: nn.Module, theirs: nn.Module) -> None:
    # theirs has to stay alive: what it tells is a view of memory that it owns
    got, wanted = ours.weight(), theirs.weight()
    assert torch.equal(got.int_repr(), wanted.int_repr())
    assert torch.equal(got.q_per_channel_scales(), wanted.q_per_channel_scales().float())
    assert torch.equal(got.q_per_channel_zero_points(), wanted.q_per_channel_zero_points().float())
    assert got.q_per_channel_axis() == wanted.q_per_channel_axis() == 0


@kinds
@given(weight=real_tables)
def test_integers_of_qat_modules_equal_oracle(ao: Any, name: str, weight: Tensor) -> None:
    theirs = getattr(ao.qat, name)(*weight.shape, _weight=weight, qconfig=ao.quantization.default_embedding_qat_qconfig)
    ours = make(name, *weight.shape, _weight=weight.clone())
    assert_same_table(getattr(nnq, name).from_float(ours), getattr(ao.quantized, name).from_float(theirs))


@kinds
@given(weight=real_tables)
def test_integers_of_float_modules_equal_oracle(ao: Any, name: str, weight: Tensor) -> None:
    theirs = getattr(nn, name)(*weight.shape, _weight=weight)
    theirs.qconfig = ao.quantization.float_qparams_weight_only_qconfig
    ours = getattr(nn, name)(*weight.shape, _weight=weight.clone())
    ours.qconfig = float_qparams_weight_only_qconfig
    assert_same_table(getattr(nnq, name).from_float(ours), getattr(ao.quantized, name).from_float(theirs))


@kinds
def test_no_weight_in_the_qconfig_means_the_default(name: str) -> None:
    module = getattr(nn, name)(12, 5)
    wanted = copy.copy(module)
    wanted.qconfig = float_qparams_weight_only_qconfig
    for qconfig in (None, QConfig(activation=nn.Identity, weight=None)):
        module.qconfig = qconfig
        got, table = (getattr(nnq, name).from_float(one).weight() for one in (module, wanted))
        assert torch.equal(got.int_repr(), table.int_repr())
        assert torch.equal(got.q_per_channel_scales(), table.q_per_channel_scales())


@kinds
@given(weight=real_tables)
def test_as_trained_rows_are_those_trained_with(name: str, weight: Tensor) -> None:
    module = make(name, *weight.shape, _weight=weight)
    trained_with = module.weight_fake_quant(module.weight).detach()
    converted = getattr(nnq, name).from_float(module, as_trained=True)
    assert torch.equal(converted.weight().dequantize(), trained_with)
    by_default = getattr(nnq, name).from_float(module).weight()
    step = by_default.q_per_channel_scales()[:, None] + 1e-6 * trained_with.abs()
    assert ((by_default.dequantize() - trained_with).abs() <= 1.001 * step).all()


@kinds
def test_as_trained_keeps_the_scales_of_training(name: str) -> None:
    module = make(name)
    module(*some_input(name))
    before = module.weight_fake_quant.scale.clone()
    with torch.no_grad():
        module.weight.mul_(2)
    kept = getattr(nnq, name).from_float(module, as_trained=True)
    assert torch.equal(kept.weight().q_per_channel_scales(), before)
    fresh = getattr(nnq, name).from_float(module)
    assert torch.equal(fresh.weight().q_per_channel_scales(), 2 * before)
    assert torch.equal(module.weight_fake_quant.scale, before)  # it is left as it was


@kinds
@pytest.mark.parametrize("norm_type", [2.0, 1.0, torch.inf])
@pytest.mark.parametrize("as_trained", [False, True])
def test_rows_within_max_norm_as_trained_with(ao: Any, name: str, norm_type: float, as_trained: bool) -> None:
    # torch.ao forgets max_norm here: its rows may be of any length
    options = {"max_norm": 1.0, "norm_type": norm_type}
    if name == "EmbeddingBag":
        options["mode"] = "sum"
    module = make(name, **options)
    inputs = some_input(name)
    wanted = module(*inputs)
    got = getattr(nnq, name).from_float(module, as_trained=as_trained)
    assert relative(got(*inputs), wanted) < 1e-6
    everything = torch.arange(12)
    norms = torch.linalg.vector_norm(nnq.Embedding(12, 5, _weight=got.weight())(everything), norm_type, dim=1)
    assert norms.max() <= 1.0 + 1e-6
    theirs = getattr(ao.qat, name)(
        12, 5, _weight=module.weight.detach(), qconfig=ao.quantization.default_embedding_qat_qconfig, **options
    )
    old = getattr(ao.quantized, name).from_float(theirs)
    assert torch.equal(got.weight().int_repr(), old.weight().int_repr())


@kinds
def test_settings_are_taken_over(name: str) -> None:
    options: dict[str, Any] = {"padding_idx": -2, "max_norm": 3.0, "norm_type": 1.0, "scale_grad_by_freq": True}
    options["sparse"] = True
    if name == "EmbeddingBag":
        options |= {"mode": "mean", "include_last_offset": True}
    float_module = getattr(nn, name)(12, 5, **options)
    float_module.qconfig = default_embedding_qat_qconfig
    module = getattr(nnqat, name).from_float(float_module)
    back, converted = module.to_float(), getattr(nnq, name).from_float(module)
    assert type(back) is type(float_module)
    for other in (module, back, converted):
        for key in options:
            assert getattr(other, key) == getattr(float_module, key), key
    assert torch.equal(back.weight, float_module.weight)


# --- state ---------------------------------------------------------------------------------------


@kinds
def test_state_is_plain_tensors(name: str) -> None:
    module = getattr(nnq, name)(12, 5, _weight=integer_table(12, 5))
    state = save_and_load(module)
    assert {key: (value.dtype, tuple(value.shape)) for key, value in state.items()} == {
        "weight": (torch.uint8, (12, 5)),
        "weight_scale": (torch.float32, (12,)),
        "weight_zero_point": (torch.float32, (12,)),
    }
    fresh = getattr(nnq, name)(12, 5)
    fresh.load_state_dict(state)
    assert torch.equal(fresh(*some_input(name)), module(*some_input(name)))
    assert not hasattr(module, "scale")


@kinds
def test_state_of_another_table_is_refused(name: str) -> None:
    module = getattr(nnq, name)(12, 5, _weight=integer_table(12, 5))
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        module.load_state_dict(getattr(nnq, name)(13, 5).state_dict())
    with pytest.raises(RuntimeError, match="weight_scale"):
        module.load_state_dict({"weight": before["weight"]})
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


@kinds
def test_copies_are_independent(name: str) -> None:
    module = getattr(nnq, name)(12, 5, _weight=integer_table(12, 5))
    wanted = module(*some_input(name))
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(*some_input(name)), wanted)
        twin.set_weight(integer_table(12, 5))
        assert not torch.equal(twin(*some_input(name)), wanted)
    assert torch.equal(module(*some_input(name)), wanted)


@kinds
def test_prepared_states_cross(ao: Any, name: str) -> None:
    theirs = getattr(ao.qat, name)(12, 5, qconfig=ao.quantization.default_embedding_qat_qconfig)
    inputs = some_input(name)
    for trained in (False, True):
        ours = make(name)
        if trained:
            theirs(*inputs)
        ours.load_state_dict(theirs.state_dict())
        assert relative(ours(*inputs), theirs(*inputs)) < 1e-6
        other = getattr(ao.qat, name)(12, 5, qconfig=ao.quantization.default_embedding_qat_qconfig)
        other.load_state_dict(ours.state_dict())
        for key, value in other.state_dict().items():
            assert value.dtype == ours.state_dict()[key].dtype
            assert torch.equal(value, ours.state_dict()[key]), key


# --- training ------------------------------------------------------------------------------------


def train_both(ours: nn.Module, theirs: nn.Module, inputs: tuple[Tensor | None, ...], steps: int = 3) -> None:
    """Some SGD steps side by side; outputs, gradients and parameters are compared at each."""
    for _ in range(steps):
        outputs = [module(*inputs) for module in (ours, theirs)]
        upstream = torch.randn_like(outputs[0])
        assert relative(*outputs) < 1e-6
        gradients = []
        for module, output in zip((ours, theirs), outputs, strict=True):
            weights = [one for one in inputs[2:] if one is not None]
            found = torch.autograd.grad(output, [module.weight, *weights], upstream)
            gradients.append([one.to_dense() for one in found])
            with torch.no_grad():
                module.weight.sub_(found[0].to_dense(), alpha=0.1)
        for one, other in zip(*gradients, strict=True):
            assert relative(one, other) < 1e-5
        for key, value in theirs.state_dict().items():
            mine = ours.state_dict()[key]
            if key == "weight":
                assert relative(mine, value) < 1e-6
                with torch.no_grad():  # rounding may part them by a bit, and flip a tie later
                    theirs.weight.copy_(ours.weight)
            else:
                assert mine.shape == value.shape
                assert torch.allclose(mine.double(), value.double(), rtol=1e-6), key


options = st.fixed_dictionaries(
    {
        "max_norm": st.none() | st.floats(0.5, 5.0),
        "norm_type": st.sampled_from((2.0, 1.0)),
        "scale_grad_by_freq": st.booleans(),
    }
)


@given(weight=real_tables, chosen=options, data=st.data())
def test_embedding_trains_as_oracle(ao: Any, weight: Tensor, chosen: dict[str, Any], data: st.DataObject) -> None:
    rows = weight.shape[0]
    chosen["padding_idx"] = data.draw(st.none() | st.integers(-rows, rows - 1))
    chosen["sparse"] = data.draw(st.booleans()) and not chosen["scale_grad_by_freq"]
    theirs = ao.qat.Embedding(
        *weight.shape, _weight=weight.clone(), qconfig=ao.quantization.default_embedding_qat_qconfig, **chosen
    )
    ours = make("Embedding", *weight.shape, _weight=weight, **chosen)
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    train_both(ours, theirs, (torch.randint(0, rows, shape),))


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=15)
@given(weight=real_tables, chosen=options, data=st.data())
def test_bag_trains_as_oracle(ao: Any, mode: str, weight: Tensor, chosen: dict[str, Any], data: st.DataObject) -> None:
    rows = weight.shape[0]
    indices, offsets, include_last_offset = data.draw(bags(rows))
    chosen |= {"mode": mode, "include_last_offset": include_last_offset}
    chosen["padding_idx"] = data.draw(st.none() | st.integers(-rows, rows - 1))
    if mode == "max":
        chosen["scale_grad_by_freq"] = False
    chosen["sparse"] = data.draw(st.booleans()) and mode != "max" and not chosen["scale_grad_by_freq"]
    weights = None
    if mode == "sum" and not chosen["sparse"] and data.draw(st.booleans()):
        weights = torch.randn(indices.shape, requires_grad=True)
    theirs = ao.qat.EmbeddingBag(
        *weight.shape, _weight=weight.clone(), qconfig=ao.quantization.default_embedding_qat_qconfig, **chosen
    )
    ours = make("EmbeddingBag", *weight.shape, _weight=weight, **chosen)
    train_both(ours, theirs, (indices, offsets, weights))


@kinds
def test_sparse_gradients_stay_sparse(name: str) -> None:
    options = {"sparse": True} if name == "Embedding" else {"sparse": True, "mode": "sum"}
    module = make(name, **options)
    module(*some_input(name)).sum().backward()
    assert module.weight.grad.is_sparse
    torch.optim.SparseAdam(module.parameters()).step()


@kinds
def test_padding_row_has_no_gradient(name: str) -> None:
    module = make(name, padding_idx=4)
    module(*some_input(name)).sum().backward()
    assert module.weight.grad[4].eq(0).all()
    assert module.weight.grad[1].ne(0).any()


@kinds
def test_from_float_shares_the_weight(name: str) -> None:
    float_module = getattr(nn, name)(12, 5).eval()
    float_module.weight.requires_grad_(False)  # a frozen table stays frozen
    float_module.qconfig = default_embedding_qat_qconfig
    module = getattr(nnqat, name).from_float(float_module)
    assert module.weight is float_module.weight
    assert not module.training
    assert [key for key, _ in module.named_parameters()] == ["weight"]
    module.weight_fake_quant.disable_fake_quant()
    assert torch.equal(module(*some_input(name)), float_module(*some_input(name)))


# --- what bad input gets -------------------------------------------------------------------------


@kinds
def test_qat_errors(name: str) -> None:
    cls, other = getattr(nnqat, name), nn.Linear(2, 2)
    wrong = get_default_qat_qconfig("onednn")
    title = {"Embedding": "Embedding", "EmbeddingBag": "Embedding Bag"}[name]
    scheme = f"{title} weights requires a qscheme of torch.per_channel_affine_float_qparams"
    with pytest.raises(AssertionError, match="qconfig must be provided for QAT module"):
        cls(10, 5, qconfig=None)
    with pytest.raises(AssertionError, match=scheme):
        cls(10, 5, qconfig=wrong)
    with pytest.raises(AssertionError, match=f"qat.{name}.from_float only works for {name}"):
        cls.from_float(other)
    module = getattr(nn, name)(10, 5)
    with pytest.raises(AssertionError, match="Input float module must have qconfig defined"):
        cls.from_float(module)
    module.qconfig = None
    with pytest.raises(AssertionError, match="Input float module must have a valid qconfig"):
        cls.from_float(module)
    module.qconfig = wrong
    with pytest.raises(InvalidConfigError, match=scheme):
        cls.from_float(module)


@kinds
def test_from_float_errors(name: str) -> None:
    cls = getattr(nnq, name)
    with pytest.raises(InvalidConfigError, match=f"nnq.{name}.from_float only works for {name}, got Linear"):
        cls.from_float(nn.Linear(2, 2))
    module = getattr(nn, name)(10, 5)
    with pytest.raises(InvalidConfigError, match="must have qconfig defined"):
        cls.from_float(module)
    module.qconfig = get_default_qat_qconfig("onednn")
    with pytest.raises(InvalidConfigError, match=r"torch\.per_channel_affine_float_qparams only"):
        cls.from_float(module)
    module.qconfig = float_qparams_weight_only_qconfig_4bit
    with pytest.raises(UnsupportedError, match=r"4 bits \(uint4\) are planned"):
        cls.from_float(module)
    trained = getattr(nnqat, name)(10, 5, qconfig=default_embedding_qat_qconfig_4bit)
    with pytest.raises(UnsupportedError, match=r"4 bits \(uint4\) are planned"):
        cls.from_float(trained)


@kinds
def test_constructor_errors(name: str) -> None:
    cls = getattr(nnq, name)
    old_name = getattr(torch, "quint8", None)
    if old_name is not None:
        assert cls(3, 2, dtype=old_name).dtype is torch.uint8
    with pytest.raises(UnsupportedError, match="4 bits"):
        cls(3, 2, dtype=torch.uint4)
    with pytest.raises(UnsupportedError, match=r"not in torch\.int8"):
        cls(3, 2, dtype=torch.int8)
    with pytest.raises(InvalidArgumentError, match="padding_idx 3 is none of the 3 rows"):
        cls(3, 2, padding_idx=3)
    if name == "EmbeddingBag":
        with pytest.raises(InvalidArgumentError, match="unknown mode 'last'"):
            cls(3, 2, mode="last")


@kinds
@pytest.mark.parametrize(
    ("table", "message"),
    [
        (torch.zeros(3, 2), "got Tensor"),
        (eagerq.quantize_per_tensor(torch.zeros(3, 2), 1.0, 0, torch.uint8), "axis None"),
        (QTensor(torch.zeros(3, 2, dtype=torch.uint8), torch.ones(2), torch.zeros(2), 1), "axis 1"),
        (QTensor(torch.zeros(3, 2, dtype=torch.int8), torch.ones(3), torch.zeros(3), 0), "dtype torch.int8"),
        (QTensor(torch.zeros(2, 3, dtype=torch.uint8), torch.ones(2), torch.zeros(2), 0), r"shape \(2, 3\)"),
        (QTensor(torch.zeros(3, 2, dtype=torch.uint8), torch.ones(1), torch.zeros(1), 0), r"\(1,\) scales"),
    ],
)
def test_tables_that_do_not_fit(name: str, table: Tensor, message: str) -> None:
    module = getattr(nnq, name)(3, 2)
    with pytest.raises(InvalidConfigError, match=message):
        module.set_weight(table)
    with pytest.raises(InvalidConfigError, match=message):
        getattr(nnq, name)(3, 2, _weight=table)


@pytest.mark.parametrize("index", [-1, 12, 2**31 - 1])
@pytest.mark.parametrize("dtype", INDEX_DTYPES)
def test_index_out_of_range(index: int, dtype: torch.dtype) -> None:
    indices = torch.tensor([[0, index]], dtype=dtype)
    with pytest.raises(IndexError):
        nnq.Embedding(12, 5)(indices)
    for mode in MODES:
        with pytest.raises(IndexError):
            nnq.EmbeddingBag(12, 5, mode=mode, padding_idx=0)(indices)


@kinds
def test_indices_have_to_be_integers(name: str) -> None:
    module = getattr(nnq, name)(12, 5)
    quantized = eagerq.quantize_per_tensor(torch.zeros(2, 2), 1.0, 0, torch.uint8)
    for wrong in (torch.zeros(2, 2), quantized):
        with pytest.raises(InvalidInputError, match="expected row numbers in int64 or int32"):
            module(wrong)


def test_bags_that_do_not_fit() -> None:
    module = nnq.EmbeddingBag(12, 5)
    indices, offsets = some_input("EmbeddingBag")
    shapes: list[tuple[Tensor, Tensor | None]] = [
        (indices, None),
        (indices.reshape(2, 3), offsets),
        (indices, offsets.reshape(2, 2)),
        (indices.reshape(1, 2, 3), None),
    ]
    for wrong in shapes:
        with pytest.raises(ValueError, match="1-d indices with 1-d offsets, or 2-d indices alone"):
            module(*wrong)
    with pytest.raises(RuntimeError, match=r"offsets\[0\] has to be 0"):
        module(indices, offsets + 1)
    with pytest.raises(RuntimeError, match=r"offsets\[-1\] can not be greater"):
        module(indices, torch.tensor([0, 99]))
    with pytest.raises(ValueError, match="one weight for each index"):
        module(indices, offsets, torch.ones(2))
    with pytest.raises(NotImplementedError, match="per_sample_weights with mode 'mean'"):
        nnq.EmbeddingBag(12, 5, mode="mean")(indices, offsets, torch.ones(6))
