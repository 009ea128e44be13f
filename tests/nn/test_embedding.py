"""Embeddings in training, and what becomes of them in 8 bits, against torch.ao."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nn.tables import MODES, NAMES, bags, kinds, make, real_tables, relative, some_input
from torch import Tensor, nn

from eagerq.errors import InvalidConfigError
from eagerq.nn import qat as nnqat
from eagerq.nn import quantized as nnq
from eagerq.qconfig import (
    QConfig,
    default_embedding_qat_qconfig,
    float_qparams_weight_only_qconfig,
    get_default_qat_qconfig,
)

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


@pytest.mark.usefixtures("fresh_compiler")
def test_training_compiles() -> None:
    eager = nn.ModuleList([make("Embedding"), make("EmbeddingBag", mode="mean", padding_idx=4)])
    compiled = copy.deepcopy(eager)

    def run(modules: nn.ModuleList) -> Tensor:
        total = torch.zeros(())
        for name, module in zip(NAMES, modules, strict=True):
            total = total + module(*some_input(name)).square().sum()
        return total

    wanted, got = run(eager), torch.compile(run, fullgraph=True)(compiled)
    wanted.backward()
    got.backward()
    assert relative(got, wanted) < 1e-5
    for one, other in zip(compiled.parameters(), eager.parameters(), strict=True):
        assert relative(one.grad, other.grad) < 1e-5
    for key, value in eager.state_dict().items():
        assert torch.equal(compiled.state_dict()[key], value), key


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


# --- what bad input gets ---------------------------------------------------------------------------


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
