"""Attention made of quantizable parts: float against nn.MultiheadAttention, prepared and int8 against torch.ao's."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nn.twins import Between, close, cross, equal, flat, prepared_pair
from torch import Tensor, nn

import eagerq
from eagerq.errors import InvalidConfigError, InvalidInputError, UnsupportedError
from eagerq.nn import quantizable, quantized
from eagerq.nn.qat import Linear as TrainedLinear

PTQ = eagerq.get_default_qconfig("onednn")
QAT = eagerq.get_default_qat_qconfig("onednn")


@st.composite
def drawn_options(draw: st.DrawFn, **fixed: Any) -> dict[str, Any]:
    heads = draw(st.integers(1, 3))
    width = heads * draw(st.integers(1, 4))
    drawn = {
        "embed_dim": width,
        "num_heads": heads,
        "bias": draw(st.booleans()),
        "add_bias_kv": draw(st.booleans()),
        "add_zero_attn": draw(st.booleans()),
        "kdim": draw(st.sampled_from((None, 3, width))),
        "vdim": draw(st.sampled_from((None, 5))),
        "batch_first": draw(st.booleans()),
    }
    return {**drawn, **fixed}


def make(options: dict[str, Any]) -> nn.MultiheadAttention:
    """With biases that are not zero, as they are when new."""
    mha = nn.MultiheadAttention(**options).eval()
    for name, value in mha.named_parameters():
        if "bias" in name:
            nn.init.normal_(value)
    return mha


def inputs(mha: Any, length: int, source: int, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    def one(size: int, width: int) -> Tensor:
        x = torch.randn(size, batch, width)
        return x.transpose(0, 1).contiguous() if mha.batch_first else x

    return one(length, mha.embed_dim), one(source, mha.kdim), one(source, mha.vdim)


def masks(kind: str, heads: int, length: int, source: int, batch: int) -> dict[str, Any]:
    """Masks that leave each query at least the first key."""
    hidden = torch.rand(length, source) < 0.4
    hidden[:, 0] = False
    each = torch.rand(batch * heads, length, source) < 0.4
    each[:, :, 0] = False
    padding = torch.rand(batch, source) < 0.4
    padding[:, 0] = False
    return {
        "none": {},
        "boolean": {"attn_mask": hidden, "key_padding_mask": padding},
        "float": {"attn_mask": torch.randn(length, source), "is_causal": True},
        "each head": {"attn_mask": each},
        "float each head": {"attn_mask": torch.randn(batch * heads, length, source)},
        "padding": {"key_padding_mask": padding},
        "float padding": {"key_padding_mask": torch.randn(batch, source)},
    }[kind]


MASKS = ("none", "boolean", "float", "each head", "float each head", "padding", "float padding")
sizes = st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3))


def twin_of(mha: nn.MultiheadAttention) -> quantizable.MultiheadAttention:
    mha = copy.deepcopy(mha)
    mha.qconfig = PTQ
    return quantizable.MultiheadAttention.from_float(mha)


@settings(max_examples=20)
@given(drawn_options(), sizes, st.sampled_from(MASKS), st.booleans())
def test_float_results_and_gradients_are_those_of_nn_attention(
    options: dict[str, Any], size: tuple[int, int, int], kind: str, average: bool
) -> None:
    mha = make(options)
    twin = twin_of(mha)
    given_masks = masks(kind, mha.num_heads, *size)
    args = [[x.clone().requires_grad_() for x in inputs(mha, *size)]]
    args.append([x.detach().clone().requires_grad_() for x in args[0]])
    results = [
        one(*own, average_attn_weights=average, **given_masks) for one, own in zip((twin, mha), args, strict=True)
    ]
    close(*results)
    for y, weights in results:
        (y.square().sum() + weights.square().sum()).backward()
    for mine, reference in zip(*args, strict=True):
        close(mine.grad, reference.grad, 1e-5)
    y, nothing = twin(*args[0], need_weights=False, **given_masks)
    assert nothing is None
    close(y, results[1][0])


def test_one_sequence_without_a_batch() -> None:
    for batch_first in (False, True):
        mha = make({"embed_dim": 6, "num_heads": 2, "batch_first": batch_first})
        x, hidden = torch.randn(5, 6), torch.tensor([False, True, False, False, True])
        for average in (False, True):
            asked: dict[str, Any] = {"key_padding_mask": hidden, "average_attn_weights": average}
            close(twin_of(mha)(x, x, x, **asked), mha(x, x, x, **asked))


@settings(max_examples=10)
@given(drawn_options(batch_first=False), sizes)
def test_prepared_as_torch_ao_does(ao: Any, options: dict[str, Any], size: tuple[int, int, int]) -> None:
    mha = make(options)
    theirs, ours = prepared_pair(ao, mha)
    for _ in range(2):
        given_inputs = inputs(mha, *size)
        equal(ours(*given_inputs), theirs(*given_inputs))
    state = theirs.state_dict()
    observed = [name for name in state if "activation_post_process" in name]
    assert observed
    for name in observed:
        assert torch.equal(ours.state_dict()[name], state[name]), name
    cross(theirs, ours)


def as_theirs(theirs: Any, mha: Any) -> None:
    """Their biases of keys and values, as they are when quantized once and each by its own range."""
    for layer, name in ((theirs.inner.linear_K, "bias_k"), (theirs.inner.linear_V, "bias_v")):
        if getattr(mha, name) is not None:
            value = torch.quantize_per_tensor(getattr(mha, name).detach(), layer.scale, layer.zero_point, torch.quint8)
            setattr(theirs.inner, name, value)


@settings(max_examples=8)
@given(drawn_options(batch_first=False), sizes, st.sampled_from(MASKS[:-1]), st.booleans())
def test_integers_are_those_of_torch_ao(
    ao: Any, options: dict[str, Any], size: tuple[int, int, int], kind: str, average: bool
) -> None:
    mha = make(options)
    given_masks = masks(kind, mha.num_heads, *size)
    if kind == "float":
        del given_masks["is_causal"]  # which theirs refuses
    theirs, ours = prepared_pair(ao, mha, minmax=True)
    for model in (theirs, ours):
        torch.manual_seed(1)
        for _ in range(2):
            model(*inputs(mha, *size), average_attn_weights=average, **given_masks)
    theirs, ours = ao.quantization.convert(theirs), eagerq.convert(ours)
    as_theirs(theirs, mha)
    assert type(ours.inner) is quantized.MultiheadAttention
    for _ in range(2):
        given_inputs = inputs(mha, *size)
        equal(
            ours(*given_inputs, average_attn_weights=average, **given_masks),
            theirs(*given_inputs, average_attn_weights=average, **given_masks),
        )


def converted(options: dict[str, Any], training: bool = False, **arguments: Any) -> tuple[Any, Any]:
    mha = make(options)
    model = Between(copy.deepcopy(mha), eagerq).train(training)
    model.qconfig = QAT if training else PTQ
    model = (eagerq.prepare_qat if training else eagerq.prepare)(model)
    for _ in range(4):
        model(*inputs(mha, 6, 5, 4))
    return mha, eagerq.convert(model.eval(), **arguments)


FULL: dict[str, Any] = {
    "embed_dim": 8,
    "num_heads": 2,
    "kdim": 6,
    "add_bias_kv": True,
    "add_zero_attn": True,
    "batch_first": True,
}


def test_int8_stays_near_float() -> None:
    for options in (FULL, {"embed_dim": 8, "num_heads": 2}):
        mha, model = converted(options)
        given_inputs = inputs(mha, 6, 5, 4)
        for got, wanted in zip(flat(model(*given_inputs)), flat(mha(*given_inputs)), strict=True):
            assert (got - wanted).norm() < 0.05 * wanted.norm()


def test_trained_weights_are_fake_quantized_and_converted_as_trained() -> None:
    mha = make({"embed_dim": 8, "num_heads": 2, "dropout": 0.1}).train()
    model = Between(mha, eagerq).train()
    model.qconfig = QAT
    model = eagerq.prepare_qat(model)
    layers = (model.inner.linear_Q, model.inner.linear_K, model.inner.linear_V, model.inner.out_proj)
    assert all(type(layer) is TrainedLinear for layer in layers)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    first = layers[0].weight.detach().clone()
    for _ in range(3):
        x = torch.randn(5, 3, 8)
        optimizer.zero_grad()
        model(x, x, x)[0].square().sum().backward()
        assert all(layer.weight.grad is not None for layer in layers)
        optimizer.step()
    assert not torch.equal(layers[0].weight, first)
    model.apply(eagerq.disable_observer).eval()
    int8 = eagerq.convert(model, as_trained=True)
    step = int8.inner.out_proj.scale
    x = torch.randn(5, 3, 8)
    # a projection that rounds another way moves what comes after it
    assert (int8(x, x, x)[0] - model(x, x, x)[0]).abs().max() <= 2.01 * step


def test_checkpoints_of_int8_hold_plain_tensors_and_load_anew() -> None:
    mha, model = converted(FULL)
    names = {name for name, _ in model.named_parameters()}
    assert names == {"inner.bias_k", "inner.bias_v"}
    assert not any(value.requires_grad for value in model.parameters())
    state = model.state_dict()
    assert all(type(value) is Tensor or isinstance(value, nn.Parameter) for value in state.values())
    _, other = converted(FULL)
    given_inputs = inputs(mha, 4, 3, 2)
    assert not torch.equal(other(*given_inputs)[0], model(*given_inputs)[0])
    other.load_state_dict(state)
    equal(other(*given_inputs), model(*given_inputs))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        equal(twin(*given_inputs), model(*given_inputs))


def test_projections_that_old_files_keep_are_passed_over() -> None:
    _, model = converted(FULL)
    state = {**model.state_dict(), "inner.q_proj_weight": torch.randn(8, 8)}
    model.load_state_dict(state)
    with pytest.raises(eagerq.CheckpointError, match="bias_k"):
        model.load_state_dict({name: value for name, value in state.items() if name != "inner.bias_k"})


def test_files_of_torch_ao(ao: Any) -> None:
    mha = make({"embed_dim": 8, "num_heads": 2, "kdim": 6})
    theirs, _ = prepared_pair(ao, mha, minmax=True)
    given_inputs = inputs(mha, 4, 3, 2)
    theirs(*given_inputs)
    theirs = ao.quantization.convert(theirs)
    assert "inner.q_proj_weight" in theirs.state_dict()  # of no use: passed over
    _, ours = converted({"embed_dim": 8, "num_heads": 2, "kdim": 6})
    ours.load_state_dict(theirs.state_dict())
    equal(ours(*given_inputs), theirs(*given_inputs))


def test_a_transformer_layer_observes_its_attention() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    layer.qconfig = PTQ
    prepared = eagerq.prepare(layer)
    assert type(prepared.self_attn) is quantizable.MultiheadAttention
    x, hidden = torch.randn(3, 5, 8), torch.tensor([[False] * 4 + [True]]).repeat(3, 1)
    with torch.no_grad():
        close(prepared(x, src_key_padding_mask=hidden)[:, :4], layer(x, src_key_padding_mask=hidden)[:, :4])
    assert prepared.self_attn.linear_K.activation_post_process.calculate_qparams()[0] != 1


@pytest.mark.parametrize("options", [FULL, {"embed_dim": 8, "num_heads": 2, "bias": False}])
def test_dequantized_it_is_a_float_module_again(options: dict[str, Any]) -> None:
    mha, model = converted(options)
    plain = model.inner.dequantize()
    assert type(plain) is nn.MultiheadAttention
    assert plain.state_dict().keys() == mha.state_dict().keys()
    for name, value in mha.state_dict().items():
        assert (plain.state_dict()[name] - value).abs().max() <= 0.02 * value.abs().max(), name
    given_inputs = inputs(mha, 4, 3, 2)
    close(plain(*given_inputs), mha(*given_inputs), 0.05)
    prepared = twin_of(mha)
    close(prepared.dequantize()(*given_inputs), mha(*given_inputs))


def test_made_without_a_float_module() -> None:
    mha = quantizable.MultiheadAttention(6, 2, kdim=3, dtype=torch.float64)
    y, weights = mha(*(torch.randn(4, 2, width, dtype=torch.float64) for width in (6, 3, 6)))
    assert (y.shape, weights.shape, y.dtype) == ((4, 2, 6), (2, 4, 4), torch.float64)


def test_by_hand() -> None:
    mha = make({"embed_dim": 6, "num_heads": 2})
    observed = twin_of(mha)
    x = torch.randn(4, 3, 6)
    observed(x, x, x)
    int8 = quantized.MultiheadAttention.from_observed(observed)
    assert hasattr(observed.linear_Q, "activation_post_process")
    q = eagerq.quantize_per_tensor(x, 0.03, 128, torch.uint8)
    assert isinstance(int8(q, q, q)[0], eagerq.QTensor)
    with pytest.raises(InvalidInputError, match=r"eagerq\.nn\.quantized\.MultiheadAttention: expected a quantized"):
        int8(x, x, x)


def test_refusals() -> None:
    mha = make({"embed_dim": 6, "num_heads": 2})
    with pytest.raises(InvalidConfigError, match="must have 'qconfig'"):
        quantizable.MultiheadAttention.from_float(mha)
    with pytest.raises(AssertionError, match="Expected type MultiheadAttention, got Linear"):
        quantizable.MultiheadAttention.from_float(nn.Linear(2, 2))
    with pytest.raises(AssertionError, match="Expected module type MultiheadAttention, got MultiheadAttention"):
        quantized.MultiheadAttention.from_observed(mha)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="of an observed one"):
        quantized.MultiheadAttention.from_float(mha)
    bare = quantizable.MultiheadAttention(6, 2)
    bare.linear_Q.qconfig = PTQ
    with pytest.raises(InvalidConfigError, match="no observer"):
        quantized.MultiheadAttention.from_observed(bare)
    twin = twin_of(mha)
    x = torch.randn(5, 3, 6)
    for args, options, message in (
        ((x, x[:, :2], x), {}, "one batch size"),
        ((x, x, x[:4]), {}, "one length"),
        ((x[..., :4], x, x), {}, r"the query has shape \(5, 3, 4\), expected 6"),
        ((x, x, x), {"is_causal": True}, "pass the causal mask"),
        (
            (x, x, x),
            {"attn_mask": torch.zeros(5, 4)},
            r"attn_mask has shape \(5, 4\).*make it \(5, 5\), or \(6, 5, 5\)",
        ),
        ((x, x, x), {"key_padding_mask": torch.zeros(5, 3)[:4]}, r"key_padding_mask has shape \(4, 3\).*\(3, 5\)"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            twin(*args, **options)


def test_compiles_and_exports() -> None:
    mha, model = converted({"embed_dim": 8, "num_heads": 2, "add_bias_kv": True})
    given_inputs = inputs(mha, 4, 3, 2)
    wanted = model(*given_inputs)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    equal(compiled(*given_inputs), wanted)
    exported = torch.export.export(model, given_inputs)
    equal(exported.module()(*given_inputs), wanted)
