"""Models quantized in one call: which layers, torch.ao's outputs, mistakes."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from conftest import Oracle
from nn.tables import relative
from quantize.models import anatomy
from torch import Tensor, nn

import eagerq
from eagerq import intrinsic
from eagerq.errors import CheckpointError, InvalidArgumentError, InvalidConfigError, UnsupportedError
from eagerq.intrinsic.quantized import dynamic as intrinsic_dynamic
from eagerq.nn import quantized
from eagerq.nn.quantized import dynamic
from eagerq.scheme import uint4


class Recommender(nn.Module):
    """Bags of items and some numbers, to a score."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.EmbeddingBag(50, 8, mode="sum")
        self.user = nn.Embedding(20, 8)
        self.bottom = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, items: Tensor, user: Tensor, numbers: Tensor) -> Tensor:
        y: Tensor = self.top(torch.cat([self.items(items), self.user(user), self.bottom(numbers)], 1))
        return y


def visits() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randint(0, 50, (7, 4)), torch.randint(0, 20, (7,)), torch.randn(7, 6)


def encoder(batch_first: bool = False) -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=batch_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first).eval()


def perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


def kinds(model: nn.Module) -> list[str]:
    return [f"{type(one).__module__}.{type(one).__name__}" for one in model.modules() if not list(one.children())]


# --- numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("qconfig", ["default_dynamic_qconfig", "per_channel_dynamic_qconfig"])
def test_perceptron_is_torchs(ao: Oracle, qconfig: str) -> None:
    model, x = perceptron(), torch.randn(9, 12)
    ours = eagerq.quantize_dynamic(model, {nn.Linear: getattr(eagerq, qconfig)})
    theirs = ao.quantization.quantize_dynamic(model, {nn.Linear: getattr(ao.quantization, qconfig)})
    assert torch.equal(ours(x), theirs(x))
    assert relative(ours(x), model(x)) < 0.05


def test_encoder_is_torchs(ao: Oracle) -> None:
    model, x = encoder(), torch.randn(5, 3, 16)
    ours = eagerq.quantize_dynamic(model)
    theirs = ao.quantization.quantize_dynamic(model)
    assert sum("eagerq" in kind for kind in kinds(ours)) == 4  # attention's projections stay as they are
    assert relative(ours(x), theirs(x)) < 1e-6


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")  # of the float model
@pytest.mark.parametrize("grad", [False, True])
def test_batch_first_encoder(grad: bool) -> None:
    """torch.ao's has no output: torch's fast path stumbles over the weights."""
    model, x = encoder(batch_first=True), torch.randn(3, 5, 16)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = True
    ours = eagerq.quantize_dynamic(model)
    with torch.set_grad_enabled(grad):
        assert relative(ours(x), model(x)) < 0.05
        got, wanted = (one(x, src_key_padding_mask=padding) for one in (ours, model))
        assert relative(got[~padding], wanted[~padding]) < 0.05
        alone = eagerq.quantize_dynamic(model.layers[0])  # type: ignore[index, union-attr]
        assert relative(alone(x), model.layers[0](x)) < 0.05  # type: ignore[index, union-attr, operator]


def test_recommender_is_torchs(ao: Oracle) -> None:
    model = Recommender().eval()
    ours, theirs = model, model
    for dtype in ("quint8", "qint8"):
        old = getattr(torch, dtype)
        ours, theirs = eagerq.quantize_dynamic(ours, dtype=old), ao.quantization.quantize_dynamic(theirs, dtype=old)
    assert isinstance(ours.items, quantized.EmbeddingBag)
    assert isinstance(ours.user, quantized.Embedding)
    assert isinstance(ours.bottom[0], dynamic.Linear)  # type: ignore[index]
    x = visits()
    assert relative(ours.items(x[0]), theirs.items(x[0])) < 1e-6  # type: ignore[operator]
    assert relative(ours.top(torch.ones(2, 24)), theirs.top(torch.ones(2, 24))) == 0  # type: ignore[operator]
    assert relative(ours(*x), model(*x)) < 0.05


def test_4_bits_are_for_bags() -> None:
    made = eagerq.quantize_dynamic(Recommender(), dtype=uint4)
    assert isinstance(made.items, quantized.EmbeddingBag)
    assert made.items.dtype is uint4
    assert isinstance(made.user, nn.Embedding)
    old = getattr(torch, "quint4x2", uint4)
    assert type(eagerq.quantize_dynamic(Recommender(), {nn.EmbeddingBag}, old).items) is quantized.EmbeddingBag


def test_float16_is_torchs(ao: Oracle) -> None:
    engine, model, x = torch.backends.quantized.engine, perceptron(), torch.randn(9, 12)
    torch.backends.quantized.engine = "fbgemm"  # the other has no float16
    try:
        theirs = ao.quantization.quantize_dynamic(model, dtype=torch.float16)
        ours = eagerq.quantize_dynamic(model, dtype=torch.float16)
        assert relative(ours(x), theirs(x)) < 1e-6
    finally:
        torch.backends.quantized.engine = engine
    assert ours[0].dtype is torch.float16  # type: ignore[index, union-attr]


# --- which layers -------------------------------------------------------------------------------------


def chosen(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, dynamic.DynamicModule)]


EIGHT_BITS = eagerq.default_dynamic_qconfig


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        (None, ["bottom.0", "top.0", "top.2"]),
        ({nn.Linear}, ["bottom.0", "top.0", "top.2"]),
        ({nn.Linear, nn.LSTM}, ["bottom.0", "top.0", "top.2"]),
        ({"top"}, ["top.0", "top.2"]),
        (["top.0"], ["top.0"]),
        ({"top.2", "bottom"}, ["bottom.0", "top.2"]),
        ({nn.Sequential}, ["bottom.0", "top.0", "top.2"]),
        ({nn.Linear: EIGHT_BITS, "top.0": None}, ["bottom.0", "top.2"]),
        ({"top": EIGHT_BITS, nn.GRU: EIGHT_BITS}, ["top.0", "top.2"]),
        (eagerq.QConfigMapping().set_object_type(nn.Linear, EIGHT_BITS), ["bottom.0", "top.0", "top.2"]),
    ],
)
def test_which_layers(spec: Any, wanted: list[str]) -> None:
    assert chosen(eagerq.quantize_dynamic(Recommender(), spec)) == wanted


@pytest.mark.parametrize("dtype", [torch.int8, torch.float16])
def test_dtype_of_named_layers(dtype: torch.dtype) -> None:
    model = eagerq.quantize_dynamic(perceptron(), {"0", "4"}, dtype)
    assert [type(one).__name__ for one in model] == ["Linear", "ReLU", "Linear", "ReLU", "Linear"]  # type: ignore[attr-defined]
    assert [getattr(model[number], "dtype", None) for number in (0, 2, 4)] == [dtype, None, dtype]  # type: ignore[index]


def test_a_layers_own_qconfig_counts() -> None:
    model: Any = perceptron()
    model[2].qconfig, model[4].qconfig = eagerq.float16_dynamic_qconfig, None
    made: Any = eagerq.quantize_dynamic(model)
    assert (made[0].dtype, made[2].dtype, type(made[4])) == (torch.int8, torch.float16, nn.Linear)
    assert not any(hasattr(module, "qconfig") for module in made.modules())
    assert model[2].qconfig is eagerq.float16_dynamic_qconfig


def test_fused_and_mapped_layers() -> None:
    model = nn.Sequential(intrinsic.LinearReLU(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2))
    made: Any = eagerq.quantize_dynamic(model, {intrinsic.LinearReLU, nn.Linear})
    assert [type(one) for one in made] == [intrinsic_dynamic.LinearReLU, dynamic.Linear]

    class Own(dynamic.Linear):
        pass

    made = eagerq.quantize_dynamic(model, {nn.Linear}, mapping={nn.Linear: Own})
    assert [type(one) for one in made] == [intrinsic.LinearReLU, Own]


def test_tied_layers_stay_tied_and_hooks_stay() -> None:
    layer, calls = nn.Linear(4, 4), []
    layer.register_forward_hook(lambda *_: calls.append(1))
    made: Any = eagerq.quantize_dynamic(nn.Sequential(layer, nn.ReLU(), layer))
    assert made[0] is made[2]
    made(torch.randn(2, 4))
    assert len(calls) == 2


def test_copy_or_in_place() -> None:
    model = perceptron().train()
    before = anatomy(model)
    made = eagerq.quantize_dynamic(model)
    assert not made.training
    assert anatomy(model) == before
    assert eagerq.quantize_dynamic(model, inplace=True) is model
    assert chosen(model) == ["0", "2", "4"]


# --- state --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int8, torch.float16, torch.uint8, uint4])
def test_save_and_load(dtype: torch.dtype) -> None:
    model, x = eagerq.quantize_dynamic(Recommender(), dtype=dtype), visits()
    state = model.state_dict()
    assert all(type(value) in (Tensor, nn.Parameter) and not value.is_quantized for value in state.values())
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    other = eagerq.quantize_dynamic(Recommender(), dtype=dtype)
    assert not torch.equal(other(*x), model(*x))
    other.load_state_dict(torch.load(file, weights_only=True))
    for twin in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(*x), model(*x))
    truncated = {name: value for name, value in state.items() if name != "top.2.bias"}
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(CheckpointError, match=r"top\.2\.bias"):
        other.load_state_dict(truncated)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_compiled_and_exported() -> None:
    model, x = eagerq.quantize_dynamic(encoder()), torch.randn(5, 3, 16)
    with torch.no_grad():
        wanted = model(x)
        assert relative(torch.compile(model, fullgraph=True, backend="aot_eager")(x), wanted) < 1e-6
        assert relative(torch.export.export(model, (x,)).module()(x), wanted) < 1e-6


# --- mistakes -----------------------------------------------------------------------------------------


MISTAKES: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (InvalidArgumentError, r"no module is named 'topp'; nearest names: 'top'", {"qconfig_spec": {"topp"}}),
    (
        InvalidArgumentError,
        r"no module is named 'top.9'",
        {"qconfig_spec": {"top.9": EIGHT_BITS, nn.Linear: EIGHT_BITS}},
    ),
    (InvalidArgumentError, r"Don't know how to quantize with default settings for torch.int32", {"dtype": torch.int32}),
    (
        UnsupportedError,
        r"Unknown dtype specified for quantize_dynamic: torch.bfloat16",
        {"qconfig_spec": {nn.Linear}, "dtype": torch.bfloat16},
    ),
    (
        InvalidConfigError,
        r"looked for LSTM, the model has Embedding, EmbeddingBag, Linear",
        {"qconfig_spec": {nn.LSTM}},
    ),
    (InvalidConfigError, r"looked for 'bottom.1', the model has", {"qconfig_spec": {"bottom.1"}}),
    (InvalidConfigError, r"found nothing to quantize", {"mapping": {nn.Conv2d: dynamic.Linear}}),
    (InvalidArgumentError, r"its qconfig is a str, not a QConfig", {"qconfig_spec": {nn.Linear: "int8"}}),
    (InvalidConfigError, r"'items' \(torch.nn.EmbeddingBag\).*float_qparams", {"qconfig_spec": {"": EIGHT_BITS}}),
    (
        InvalidConfigError,
        r"'bottom.0' \(torch.nn.Linear\).*got: torch.uint8",
        {"qconfig_spec": {nn.Linear: eagerq.default_quint8_weight_qconfig}},
    ),
]


@pytest.mark.parametrize(("error", "message", "arguments"), MISTAKES)
@pytest.mark.parametrize("inplace", [False, True])
def test_mistakes(error: type[Exception], message: str, arguments: dict[str, Any], inplace: bool) -> None:
    model = Recommender().train()
    before = anatomy(model)
    with pytest.raises(error, match=message):
        eagerq.quantize_dynamic(model, **arguments, inplace=inplace)
    assert anatomy(model) == before


def test_a_lone_layer() -> None:
    with pytest.raises(InvalidConfigError, match="this Linear is itself a layer"):
        eagerq.quantize_dynamic(nn.Linear(3, 4))


def test_layers_asked_for_in_vain() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4, 2))
    with pytest.warns(UserWarning, match=r"leaves '0' \(Conv2d\) in float"):
        made = eagerq.quantize_dynamic(model, {nn.Conv2d, nn.Linear})
    assert chosen(made) == ["2"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        eagerq.quantize_dynamic(model, {nn.Sequential, nn.Linear})
