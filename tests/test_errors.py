"""The family of errors: what they say, which built-in types they are, how modules are named."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor, nn

import eagerq
from eagerq import errors
from eagerq.errors import EagerqError, calling_module, describe, nearest, stamp_names

FAMILY = {
    errors.InvalidArgumentError: ValueError,
    errors.InvalidConfigError: AssertionError,
    errors.InvalidInputError: RuntimeError,
    errors.NotQuantizedError: ValueError,
    errors.UnsupportedError: NotImplementedError,
    errors.CheckpointError: RuntimeError,
    errors.MissingExtraError: ImportError,
}


@pytest.mark.parametrize("kind", FAMILY)
def test_each_is_of_the_family_and_of_a_builtin_type(kind: type[EagerqError]) -> None:
    assert issubclass(kind, EagerqError)
    assert issubclass(kind, FAMILY[kind])
    assert getattr(eagerq, kind.__name__) is kind
    with pytest.raises(FAMILY[kind], match=r"^it went wrong$"):
        raise kind("it went wrong")


def test_the_family_is_complete() -> None:
    public = {getattr(errors, name) for name in errors.__all__}
    classes = {value for value in public if isinstance(value, type) and issubclass(value, EagerqError)}
    assert classes == {EagerqError, *FAMILY}


def test_the_message_has_the_module_the_problem_and_the_remedy() -> None:
    model = nn.Sequential(nn.Linear(1, 1))
    stamp_names(model)
    error = EagerqError("got 3 channels, wanted 4", module=model[0], remedy="check in_channels")
    assert str(error) == "'0' (torch.nn.Linear): got 3 channels, wanted 4. To fix it: check in_channels."
    assert str(EagerqError("got 3")) == "got 3"
    assert str(EagerqError("got 3", module=model)) == "torch.nn.Sequential: got 3"


def test_errors_are_pickled() -> None:
    error = errors.InvalidInputError("got 3", module=nn.Linear(1, 1), remedy="pass 4")
    twin = pickle.loads(pickle.dumps(error))
    assert type(twin) is type(error)
    assert str(twin) == str(error)


class Mine(nn.Module):
    pass


@pytest.mark.parametrize(
    ("make", "shown"),
    [
        (lambda: nn.Conv2d(1, 1, 1), "torch.nn.Conv2d"),
        (lambda: eagerq.nn.quantized.Linear(1, 1), "eagerq.nn.quantized.Linear"),
        (
            lambda: eagerq.nn.qat.Linear(1, 1, qconfig=eagerq.default_qat_qconfig),
            "eagerq.nn.qat.Linear",
        ),
        (
            lambda: eagerq.intrinsic.qat.LinearReLU(1, 1, qconfig=eagerq.default_qat_qconfig),
            "eagerq.intrinsic.qat.LinearReLU",
        ),
        (lambda: eagerq.intrinsic.quantized.LinearReLU(1, 1), "eagerq.intrinsic.quantized.LinearReLU"),
        (lambda: eagerq.intrinsic.LinearReLU(nn.Linear(1, 1), nn.ReLU()), "eagerq.intrinsic.LinearReLU"),
        (Mine, f"{__name__}.Mine"),
    ],
)
def test_classes_are_shown_as_users_import_them(make: type[nn.Module], shown: str) -> None:
    assert describe(make()) == shown


def test_names_are_those_of_the_latest_root() -> None:
    inner = nn.Sequential(nn.Linear(1, 1))
    outer = nn.Sequential(nn.ModuleDict({"block": inner}))
    stamp_names(inner)
    assert describe(inner[0]) == "'0' (torch.nn.Linear)"
    stamp_names(outer)
    assert describe(inner[0]) == "'0.block.0' (torch.nn.Linear)"
    assert describe(outer) == "torch.nn.Sequential"
    assert not any("eagerq" in name for name in outer.state_dict())


def test_nearest_names() -> None:
    known = ["", "conv1", "conv2", "layer1.conv", "layer2.conv", "fc"]
    assert nearest("layer1.con", known).startswith("'layer1.conv', 'layer2.conv'")
    assert set(nearest("conv3", known, count=2).split(", ")) == {"'conv1'", "'conv2'"}
    assert nearest("zzz", known) == "'conv1', 'conv2', 'layer1.conv'"  # none is like it: the first few


def test_nearest_of_nothing() -> None:
    assert nearest("x", []) == "none"
    assert nearest("x", [""]) == "none"


def test_the_calling_module_is_the_innermost_running_one() -> None:
    found: list[nn.Module | None] = []

    def probe(x: Tensor) -> Tensor:
        found.append(calling_module())
        return x

    class Leaf(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return self.helper(x)

        def helper(self, x: Tensor) -> Tensor:
            return probe(x)

    leaf = Leaf()
    model = nn.Sequential(nn.Sequential(leaf))
    model(torch.ones(1))
    assert found == [leaf]
    assert describe(leaf) == f"'0.0' ({__name__}.Leaf)"
    assert calling_module() is None
    leaf(torch.ones(1))  # a name that was given stays
    assert describe(leaf) == f"'0.0' ({__name__}.Leaf)"
