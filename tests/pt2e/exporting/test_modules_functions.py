"""torch's functions on QTensors in Q/DQ form: what they give eagerly, to one step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pt2e.exporting.graphs import exported, steps_between, used
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import eagerq
from eagerq import QTensor
from eagerq.errors import InvalidInputError, UnsupportedError
from eagerq.nn import quantized
from eagerq.pt2e import export
from eagerq.pt2e.operators import QUANTIZE_PER_TENSOR
from eagerq.qtensor import HANDLERS, KEEPING

STEP = 0.05
INDICES = torch.zeros(2, 1, 8, 8, dtype=torch.long)


def _each(names: str, *arguments: tuple[Any, ...]) -> dict[str, list[tuple[Any, ...]]]:
    return {name: list(arguments) for name in names.split()}


# what a function takes after its first argument, by its name; several where it has as many uses
ARGUMENTS: dict[str, list[tuple[Any, ...]]] = {
    **_each("__get__ adjoint fliplr flipud mT matrix_H numpy_T ravel t", ()),
    **_each("clone contiguous detach", ()),
    **_each("amax amin argmax argmin argsort sort unbind unsqueeze", (1,)),
    **_each("flatten squeeze", (1,)),
    **_each("movedim moveaxis swapaxes swapdims transpose", (1, 2)),
    **_each("broadcast_to expand", ((3, 2, 6, 8, 8),)),
    **_each("repeat tile", ((1, 2, 1, 1),)),
    "gather": [(1, INDICES)],
    "take_along_dim": [(INDICES, 1)],
    "flip": [((1,),)],
    **_each("hstack vstack dstack", ()),
    **_each("cat concat concatenate stack", (1,)),
    **_each("relu relu6 relu_ sigmoid tanh hardsigmoid leaky_relu leaky_relu_", ()),
    **_each("hardtanh hardtanh_ clamp clamp_ clip clip_", (-1.0, 1.3)),
    **_each("clamp_min clamp_max", (0.3,)),
    **_each("threshold _threshold threshold_", (0.5, 0.1), (0.52, -7.0)),
    **_each("maximum minimum", ("itself",)),
    **_each("max min", (1,), (), ("itself",)),
    **_each("channel_shuffle pixel_unshuffle chunk", (2,)),
    **_each("split split_with_sizes", ([2, 4], 1)),
    **_each("interpolate upsample", (None, 2.0), ((5, 9), None, "bilinear")),
    **_each("dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout", ()),
    **{f"{kind}_pool{dim}d": [(2,)] for kind in ("avg", "adaptive_avg") for dim in (1, 2, 3)},
    **{f"adaptive_max_pool{dim}d{end}": [(2,)] for dim in (1, 2, 3) for end in ("", "_with_indices")},
    **{f"max_pool{dim}d{end}": [(2,), (3, 2, 1, 1, True)] for dim in (1, 2, 3) for end in ("", "_with_indices")},
    **_each("view reshape", ((2, -1),)),
    **_each("view_as reshape_as expand_as", ("itself",)),
    **_each("eq ne lt le gt ge __eq__ __ne__", ("itself",), (0.5,)),
    **_each("__lt__ __le__ __gt__ __ge__ isclose", ("itself",)),
    **_each("isnan isinf isfinite dequantize gelu std", ()),
    "softmax": [(1,)],
    "__getitem__": [((slice(None), slice(1, 3), ..., None),), ((slice(None), torch.tensor([0, 2])),)],
    "diagonal": [(0, 2, 3)],
    "index_select": [(1, torch.tensor([0, 3]))],
    "kthvalue": [(2, 1)],
    "mean": [([2, 3],), ()],
    "narrow": [(1, 1, 3)],
    "pad": [((1, 2, 0, 1),), ((1, 2), "constant", 0.7), ((1, 2, 1, 1), "reflect"), ((1, 2, 1, 1), "replicate")],
    "permute": [((0, 2, 3, 1),)],
    "pixel_shuffle": [(2,)],
    "roll": [(1, 1)],
    "rot90": [(1, (2, 3))],
    "select": [(1, 2)],
    "tensor_split": [(3, 1)],
    "topk": [(2, 1)],
    "unflatten": [(1, (2, 3))],
    "unfold": [(2, 3, 1)],
}
SHAPES: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("t", "__get__", "numpy_T", "matrix_H", "fliplr"), (6, 8)),
    "dropout1d": (2, 6, 8),
    "feature_alpha_dropout": (2, 6, 8),
    "pixel_shuffle": (2, 4, 5, 6),
    "squeeze": (6, 1, 8),
}
# what only tells about a tensor, moves it between devices, or makes a Python value of it
ASKING = frozenset(
    (
        *("__len__", "data_ptr", "dim", "element_size", "get_device", "is_complex", "is_contiguous", "is_inference"),
        *("is_floating_point", "is_pinned", "nelement", "numel", "size", "storage_offset", "stride", "int_repr"),
        *("cpu", "cuda", "pin_memory", "to", "__format__"),
        *("__bool__", "__contains__", "__float__", "__int__", "allclose", "equal", "is_nonzero", "item", "tolist"),
    )
)
CASES = [
    pytest.param(func, arguments, id=f"{func.__name__}-{number}")
    for func in HANDLERS
    for number, arguments in enumerate(ARGUMENTS.get(func.__name__, ()))
]


class Apply(nn.Module):
    """A function of a quantized tensor, and what the tensor is afterwards."""

    def __init__(self, function: Callable[[QTensor], Any]) -> None:
        super().__init__()
        self.quant, self.function = quantized.Quantize(STEP, 110, torch.uint8), function

    def forward(self, x: Tensor) -> Any:
        q = self.quant(x)
        result = self.function(q)
        return tree_map(lambda value: value.dequantize() if isinstance(value, QTensor) else value, (result, q))


def _input(name: str) -> Tensor:
    shape = SHAPES.get(name, {"1": (2, 6, 8), "3": (2, 6, 4, 5, 6)}.get(name.partition("pool")[2][:1], (2, 6, 8, 8)))
    torch.manual_seed(sum(map(ord, name)))
    # no two values of a line are equal, of which any may be the first in order
    return ((torch.rand(shape).argsort(1) - 2.5) * 0.41 + torch.rand(()) * 0.1).contiguous()


def test_every_function_is_looked_at() -> None:
    names = {func.__name__ for func in HANDLERS}
    assert not names - ARGUMENTS.keys() - ASKING
    assert not (ARGUMENTS.keys() | ASKING) - names
    assert not ASKING & {func.__name__ for func in KEEPING}


@torch.no_grad()
@pytest.mark.parametrize(("func", "arguments"), CASES)
@pytest.mark.filterwarnings("ignore:.*(deprecated|dropout):UserWarning")
def test_a_function_gives_what_it_gives_eagerly(func: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    name = func.__name__

    def function(q: QTensor) -> Any:
        first: Any = [q, q] if name.endswith(("cat", "concatenate", "stack")) else q
        if name in ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"):
            return func(q, 0.5, False)
        return func(first, *(q.flip(1) if one == "itself" else one for one in arguments))

    model, x = Apply(function), _input(name)
    _, graph = exported(model, (x,))
    assert steps_between(graph(x), model(x), STEP).max() <= 1


IN_PLACE: dict[str, Callable[[QTensor], Any]] = {
    "relu_": lambda q: q.relu_(),
    "relu": lambda q: F.relu(q, inplace=True),
    "relu by position": lambda q: F.relu(q, True),
    "relu6": lambda q: F.relu6(q, inplace=True),
    "ReLU6": nn.ReLU6(inplace=True),
    "Hardtanh": nn.Hardtanh(-0.5, 0.7, inplace=True),
    "clamp_": lambda q: q.clamp_(min=-0.2),
    "LeakyReLU": nn.LeakyReLU(0.2, inplace=True),
    "Hardsigmoid": nn.Hardsigmoid(inplace=True),
    "Threshold": nn.Threshold(0.2, 0.1, inplace=True),
}


@torch.no_grad()
@pytest.mark.parametrize("function", IN_PLACE.values(), ids=IN_PLACE)
def test_what_is_changed_in_place_is_changed_for_all_readers(function: Callable[[QTensor], Any]) -> None:
    model = Apply(function)
    x = _input("relu")
    program, graph = exported(model, (x,))
    result, argument = graph(x)
    assert torch.equal(result, argument)
    assert not torch.equal(argument, x)
    assert steps_between((result, argument), model(x), STEP / 10).max() <= 10
    assert not [target for target in used(program) if str(target).rpartition(".")[0].endswith("_")]


def _through_a_view(q: QTensor) -> Any:
    q.flatten(1)[:, :5].relu_()
    return q


def _before_a_view_is_read(q: QTensor) -> Any:
    view = q.detach().transpose(1, 2)
    q.clamp_(0, 1)
    return view


@pytest.mark.parametrize("function", [_through_a_view, _before_a_view_is_read])
def test_what_shares_memory_is_not_read_when_changed(function: Callable[[QTensor], Any]) -> None:
    with pytest.raises(UnsupportedError, match=r"shares its memory was changed in place.*\.clone\(\)"):
        export(Apply(function), (_input("relu"),))


def _not_read_again(q: QTensor) -> Any:
    first, second = q.flatten(1).relu_().chunk(2, 1)
    return torch.cat([first.clone().clamp_(0, 0.5), second], 1)


@torch.no_grad()
def test_what_shares_memory_may_be_changed_when_nothing_reads_it() -> None:
    class Model(Apply):
        def forward(self, x: Tensor) -> Any:
            return self.function(self.quant(x)).dequantize()

    _, graph = exported(Model(_not_read_again), (_input("relu"),))
    assert torch.equal(graph(_input("relu")), Model(_not_read_again)(_input("relu")))


def test_layouts_and_copies_leave_no_trace() -> None:
    def shuffle(q: QTensor) -> Any:
        return q.view(2, 2, 3, 8, 8).transpose(1, 2).contiguous().clone().detach().data.view(2, 6, 8, 8)

    program, graph = exported(Apply(shuffle), (_input(""),))
    counts = used(program)
    assert counts[QUANTIZE_PER_TENSOR] == 4
    assert torch.equal(graph(_input(""))[0], Apply(shuffle)(_input(""))[0])


@pytest.mark.parametrize(
    "function",
    [
        lambda q: torch.cat([q, eagerq.quantize_per_tensor(q.dequantize(), 0.1, 0, torch.uint8)]),
        lambda q: torch.cat([q, q.dequantize()]),
        lambda q: torch.maximum(q, eagerq.quantize_per_tensor(q.dequantize(), 0.1, 0, torch.uint8)),
        lambda q: q + q,
    ],
)
def test_what_is_refused_eagerly_is_refused(function: Callable[[QTensor], Any]) -> None:
    with pytest.raises(InvalidInputError) as eagerly:
        Apply(function)(_input(""))
    with pytest.raises(InvalidInputError) as exporting:
        export(Apply(function), (_input(""),))
    assert str(exporting.value).partition(": ")[2] == str(eagerly.value).partition(": ")[2]
