"""What a quantized tensor cannot do: the message names the operation, the module and the remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import eagerq
from eagerq import QTensor, quantize_per_tensor
from eagerq.errors import InvalidInputError
from eagerq.nn.quantized import FloatFunctional


def example() -> QTensor:
    return quantize_per_tensor(torch.randn(2, 8, 6, 6), 0.05, 100, torch.uint8)


# operation: (the call, the name that the message has)
REFUSED: dict[str, tuple[Callable[[QTensor], Any], str]] = {
    "sub": (lambda q: q - q, "sub"),
    "rsub": (lambda q: 1 - q, "rsub"),
    "div": (lambda q: q / 2, "div"),
    "neg": (lambda q: -q, "neg"),
    "abs": (lambda q: q.abs(), "abs"),
    "exp": (torch.exp, "exp"),
    "sum": (lambda q: q.sum(), "sum"),
    "var": (lambda q: q.var(), "var"),
    "median": (lambda q: q.median(), "median"),
    "erf": (torch.erf, "erf"),
    "log": (lambda q: q.log(), "log"),
    "log_softmax": (lambda q: F.log_softmax(q, 1), "log_softmax"),
    "silu": (F.silu, "silu"),
    "elu": (F.elu, "elu"),
    "conv2d": (lambda q: F.conv2d(q, torch.randn(1, 8, 3, 3)), "conv2d"),
    "linear": (lambda q: F.linear(q, torch.randn(3, 6)), "linear"),
    "batch_norm": (lambda q: F.batch_norm(q, torch.zeros(8), torch.ones(8)), "batch_norm"),
    "layer_norm": (lambda q: F.layer_norm(q, (6,)), "layer_norm"),
    "normalize": (F.normalize, "normalize"),
    "einsum": (lambda q: torch.einsum("nchw->nc", q), "einsum"),
    "where": (lambda q: torch.where(q > 0, q, q), "where"),
    "masked_fill": (lambda q: q.masked_fill(q > 0, 0.0), "masked_fill"),
    "item assignment": (lambda q: q.__setitem__(0, 1.0), "__setitem__"),
    "copy_": (lambda q: q.copy_(q), "copy_"),
    "zeros_like": (torch.zeros_like, "zeros_like"),
    "float": (lambda q: q.float(), "float"),
    "numpy": (lambda q: q.numpy(), "numpy"),
    "backward": (lambda q: q.backward(), "backward"),
    "requires_grad_": (lambda q: q.requires_grad_(), "requires_grad_"),
    "aten": (torch.ops.aten.sigmoid.default, "sigmoid"),
    "as_strided": (lambda q: q.as_strided((2,), (1,)), "as_strided"),
}


@pytest.mark.parametrize("operation", REFUSED)
def test_other_operations_are_refused(operation: str) -> None:
    call, name = REFUSED[operation]
    q = example()
    before = q.int_repr().clone()
    with pytest.raises(
        InvalidInputError, match=rf"'[_.\w]*{name}[_.\w]*' got a quantized tensor \(QTensor\)"
    ) as caught:
        call(q)
    assert "DeQuantStub" in str(caught.value)
    assert "dequantize()" in str(caught.value)
    assert torch.equal(q.int_repr(), before)


ARITHMETIC: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "x + y": (lambda x, y: x + y, "add"),
    "torch.add": (torch.add, "add"),
    "x += y": (lambda x, y: x.__iadd__(y), "add"),
    "1 + x": (lambda x, y: 1 + x, "add"),
    "x * y": (lambda x, y: x * y, "mul"),
    "2 * x": (lambda x, y: 2 * x, "mul"),
    "x @ y": (lambda x, y: x @ y, "matmul"),
    "torch.matmul": (torch.matmul, "matmul"),
}


@pytest.mark.parametrize("expression", ARITHMETIC)
@pytest.mark.parametrize("other", [example, lambda: torch.randn(2, 8, 6, 6)], ids=["quantized", "float"])
def test_arithmetic_points_to_float_functional(expression: str, other: Callable[[], Tensor]) -> None:
    compute, method = ARITHMETIC[expression]
    with pytest.raises(InvalidInputError, match=rf"FloatFunctional.*self\.ff\.{method}\(x, y\)"):
        compute(example(), other())
    if "1" not in expression and "2" not in expression and expression != "x += y":
        with pytest.raises(InvalidInputError, match=rf"self\.ff\.{method}\(x, y\)"):
            compute(other(), example())


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()
        self.float_conv = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x) + x


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.ReLU(), Block())])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers[0](x)
        return y


def test_the_module_whose_forward_it_was_is_named() -> None:
    with pytest.raises(InvalidInputError, match=r"'layers\.0\.1' \(.*Block\): 'add' got.*self\.ff\.add"):
        Net()(example())


def test_the_first_parameter_of_forward_may_have_any_name() -> None:
    class Odd(nn.Module):
        def forward(this, x: Tensor) -> Tensor:
            return torch.exp(x)

    with pytest.raises(InvalidInputError, match=r"^'0' \(.*Odd\): 'exp'"):
        nn.Sequential(Odd())(example())


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(8, 4, 3),
        nn.Linear(6, 2),
        nn.ConvTranspose2d(8, 4, 3),
        nn.LayerNorm(6),
        nn.Hardswish(),
        nn.SiLU(),
        nn.LogSoftmax(1),
        nn.PReLU(),
        nn.ELU(),
        nn.InstanceNorm2d(8),
        nn.GroupNorm(2, 8),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_a_float_layer_wants_a_dequant_stub_before_it(layer: nn.Module) -> None:
    named = rf"^'tail\.1' \(torch\.nn\.{type(layer).__name__}\)"
    with pytest.raises(InvalidInputError, match=rf"{named}: .* got a quantized.*DeQuantStub before.*qconfig"):
        Tail(layer)(example())


def test_a_batch_norm_is_better_fused() -> None:
    with pytest.raises(InvalidInputError, match=r"^'tail\.1' \(torch\.nn\.BatchNorm2d\): .*fuse_modules_qat"):
        Tail(nn.BatchNorm2d(8))(example())


class Tail(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.tail = nn.Sequential(nn.ReLU(), layer)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.tail(x)
        return y


def test_an_unconverted_float_functional_wants_a_qconfig() -> None:
    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plus = FloatFunctional()

        def forward(self, x: Tensor) -> Tensor:
            return self.plus.add(x, x)

    with pytest.raises(InvalidInputError, match=r"'plus' \(eagerq\.nn\.quantized\.FloatFunctional\).*qconfig"):
        Adds()(example())


def test_names_given_by_convert_are_kept() -> None:
    model = eagerq.QuantWrapper(nn.Sequential(nn.Linear(4, 4), nn.SiLU()))
    model.qconfig = eagerq.get_default_qat_qconfig("onednn")
    model.module[1].qconfig = None
    prepared = eagerq.prepare_qat(model.train())
    prepared(torch.randn(3, 4))
    converted = eagerq.convert(prepared.eval())
    for run in (lambda: converted(torch.randn(3, 4)), lambda: converted.module(converted.quant(torch.randn(3, 4)))):
        with pytest.raises(InvalidInputError, match=r"'module\.1' \(torch\.nn\.SiLU\)"):
            run()


def test_outside_any_module_only_the_operation_is_named() -> None:
    with pytest.raises(InvalidInputError, match=r"^'exp' got"):
        torch.exp(example())


def test_moving_and_joining_name_the_module_too() -> None:
    class Casts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.to(torch.float16)

    with pytest.raises(InvalidInputError, match=r"^'0' \(.*Casts\): a QTensor of torch\.uint8 cannot become"):
        nn.Sequential(Casts())(example())


def test_functions_of_several_tensors_name_the_module_too() -> None:
    class Joins(nn.Module):
        def forward(self, x: QTensor) -> Tensor:
            return torch.cat([x, QTensor(x.int_repr(), 1.0, 0)], 1)

    with pytest.raises(InvalidInputError, match=r"^'0' \(.*Joins\): 'cat' got quantized tensors with different"):
        nn.Sequential(Joins())(example())
