"""What cannot be exported is refused by name, and the user's model is never changed."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from pt2e.exporting.nets import IMAGES, prepared
from torch import Tensor, nn
from torch.export import Dim

import eagerq
from eagerq.errors import InvalidArgumentError, InvalidConfigError, InvalidInputError, UnsupportedError
from eagerq.nn.qat import dynamic
from eagerq.pt2e import export
from eagerq.pt2e.exporting import tracing

Use = Callable[[Any], Any]


class Using(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.use: Use = lambda x: x

    def forward(self, x: Tensor) -> Any:
        return self.use(x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = eagerq.QuantStub(), eagerq.DeQuantStub()
        self.inner = nn.Sequential(nn.Linear(4, 4), Using())
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.dequant(self.inner(self.quant(x)))
        return out


X = torch.linspace(-1, 1, 24).reshape(6, 4)


def using(use: Use) -> Net:
    """A prepared net whose module ``inner.1`` does this."""
    torch.manual_seed(0)
    model = Net().train()
    model.qconfig = eagerq.get_default_qat_qconfig("onednn")  # type: ignore[assignment]
    model = eagerq.prepare_qat(model)
    model(X)
    assert isinstance(model, Net)
    model.inner[1].use = use
    return model


# --- names and causes -----------------------------------------------------------------------------------


def _by_data(x: Any) -> Any:
    return torch.relu(x) if x.dequantize().sum() > 0 else x


@pytest.mark.parametrize(
    ("use", "error", "match"),
    [
        (_by_data, UnsupportedError, r"'inner\.1' .*depends on the data.*To fix it: .*torch\.where"),
        (lambda x: x.dequantize().numpy(), UnsupportedError, r"'inner\.1' .*torch\.export cannot trace it: .*numpy"),
        (lambda x: x.nothing, UnsupportedError, r"'inner\.1' .*AttributeError: .*'nothing'"),
        (lambda x: x + x, InvalidInputError, r"'inner\.1' .*'add' got a quantized tensor"),
    ],
)
def test_the_module_and_the_cause_are_named(use: Use, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match) as caught:
        export(using(use), (X,))
    assert "docs/exporting.md" in str(caught.value) or caught.value.__cause__ is None
    assert (caught.value.__cause__ is None) == (error is InvalidInputError)  # torch's error is kept


def test_a_door_without_qdq_form_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(tracing._QDQ.doors, "linear")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match=r"'inner\.0' \(eagerq.*Linear\): it calls 'linear', which has no Q/DQ"):
        export(using(lambda x: x), (X,))


def test_a_quantized_result_or_argument_is_refused() -> None:
    model = using(lambda x: x)
    model.dequant = nn.Identity()
    with pytest.raises(InvalidInputError, match=r"returns a quantized tensor.*DeQuantStub"):
        export(model, (X,))
    with pytest.raises(InvalidArgumentError, match=r"QTensor.*QuantStub"):
        export(model, (eagerq.quantize_per_tensor(X, 0.1, 0, torch.uint8),))


@pytest.mark.parametrize("inputs", [X, [X], {"x": X}])
def test_example_inputs_must_be_a_tuple(inputs: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=f"is a {type(inputs).__name__}, not a tuple"):
        export(using(lambda x: x), inputs)


@pytest.mark.parametrize(("inputs", "said"), [((), "missing a required argument"), ((X, X), "too many positional")])
def test_inputs_that_forward_cannot_take(inputs: tuple[Tensor, ...], said: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"forward cannot take these example_inputs: {said}"):
        export(using(lambda x: x), inputs)


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="got Tensor, but an eager model is needed"):
        export(X, (X,))  # type: ignore[arg-type]


def test_a_float_model_is_told_to_be_prepared() -> None:
    with pytest.raises(InvalidConfigError, match=r"not prepared.*call prepare_qat"):
        export(nn.Sequential(nn.Linear(2, 2)), (torch.zeros(1, 2),))


def test_a_layer_that_convert_leaves_in_training_form_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4)).train()
    model.qconfig = eagerq.default_dynamic_qat_qconfig  # type: ignore[assignment]
    model = eagerq.prepare_qat(model, mapping={nn.Linear: dynamic.Linear})
    model(X)
    with pytest.raises(InvalidConfigError, match=r"'0' .*convert leaves it as it is.*mapping"):
        export(model, (X,))


def test_layers_without_data_are_told_of() -> None:
    model = Net().train()
    model.qconfig = eagerq.get_default_qat_qconfig("onednn")  # type: ignore[assignment]
    model = eagerq.prepare_qat(model)
    with pytest.warns(UserWarning, match=r"before they had seen any data.*'inner\.0'") as told:
        export(model, (X,))
    assert told[0].filename == __file__


# --- sizes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [Dim("batch"), Dim("batch", min=1, max=64), Dim.DYNAMIC])
def test_the_batch_stays_dynamic(dim: Any) -> None:
    model, x = prepared(), torch.randn(9, *IMAGES[1:])
    program = export(model, (torch.randn(IMAGES),), dynamic_shapes=({0: dim},), activation_dtype=torch.int8).module()
    for size in (1, 2, 9):
        whole = export(model, (x[:size],)).module()
        assert torch.equal(program(x[:size]), whole(x[:size]))


@pytest.mark.parametrize(
    ("use", "shapes", "match"),
    [
        (lambda x: x.view(6, 4), ({0: Dim("batch")},), r"constant \(6\)\. To fix it: .*x\.shape.*batch = 6"),
        (lambda x: x.view(6, 4), ({0: Dim.DYNAMIC},), r"constant \(6\)\. To fix it: .*x\.shape"),
        (lambda x: x if x.shape[0] > 5 else x.relu(), ({0: Dim("b")},), r"6 <= .*To fix it: .*b = Dim\('b', min=6\)"),
        (lambda x: x, {"y": {0: Dim("batch")}}, r"cannot take these .*To fix it: .*structure of example_inputs"),
        (lambda x: x, ({3: Dim("batch")},), r"cannot take these .*To fix it: .*structure of example_inputs"),
    ],
)
def test_sizes_that_cannot_vary_are_explained(use: Use, shapes: Any, match: str) -> None:
    with pytest.raises(InvalidArgumentError, match=match):
        export(using(use), (X,), dynamic_shapes=shapes)


@pytest.mark.parametrize("dim", [Dim("batch"), Dim.DYNAMIC])
def test_an_example_of_one_is_too_small(dim: Any) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch")
        with pytest.raises(InvalidArgumentError, match="To fix it: give example_inputs at least 2 in each dynamic"):
            export(using(lambda x: x), (X[:1],), dynamic_shapes=({0: dim},))


# --- the user's model -------------------------------------------------------------------------------------


def _facts(model: nn.Module) -> Iterator[Any]:
    for name, module in model.named_modules():
        yield name, type(module), module.training, sorted(module.__dict__)
        yield [list(table.items()) for table in (module._forward_hooks, module._forward_pre_hooks)]
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        yield name, id(value), value._version, value.detach().clone().tolist(), value.requires_grad
    yield torch.get_rng_state().tolist()
    yield torch.is_grad_enabled()


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize(
    ("use", "options"),
    [
        (lambda x: x, {}),
        (lambda x: x.dequantize() * torch.rand(()), {}),
        (_by_data, {}),
        (lambda x: x.view(6, 4), {"dynamic_shapes": ({0: Dim("batch")},)}),
        (lambda x: x.int_repr() + 1, {"activation_dtype": torch.int8}),
    ],
)
def test_the_model_is_left_as_it_was(use: Use, options: Any, converted: bool) -> None:
    model: nn.Module = using(use)
    called = []
    model.register_forward_hook(lambda *args: called.append(args))
    if converted:
        model = eagerq.convert(model, as_trained=True)
    before, kept = list(_facts(model)), copy.deepcopy(model.state_dict())
    try:
        export(model, (X,), **options)
    except eagerq.errors.EagerqError:
        assert options or use is _by_data
    assert list(_facts(model)) == before
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    if not options and use is not _by_data:
        export(model, (X,))  # and can be exported again
